"""Where arrays lie on a mesh of devices: one table from logical axes to mesh axes.

A mesh has two axes. `data` splits the rows of a batch, `model` splits the model:

    mesh data=2,model=4           model 0    1    2    3
                          data 0        d0   d1   d2   d3      rows    0 .. B/2-1
                               1        d4   d5   d6   d7      rows  B/2 .. B-1

Each device holds a fourth of the heads, of the MLP's inner width and of the vocabulary, and the cache of its rows and key/value
heads. One sum over `model` follows every attention and every MLP, and the logits are gathered; all else (drafts, sampling,
acceptance) is done by every device for its own rows. Drafters' tables are on all devices.

Within compiled programs the compiler splits the work (jax's automatic axes); the model and the loop pin what must lie as the
table says. A mesh of None, everywhere, is one device and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hd_jax.models.config import ModelConfig

AXES = ("data", "model")

# The table: logical axes to mesh axes. An axis that is not here is not split.
RULES = {
    "rows": "data",
    "heads": "model",
    "kv_heads": "model",  # on every device instead, where `model` is a multiple of their number
    "mlp": "model",
    "vocab": "model",
}

# The logical axes of parameters, [out, in], by the name of their module; a bias has the first. Others are on all devices.
PARAMETERS: dict[str, tuple[str, str]] = {
    "embed_tokens": ("vocab", "embed"),
    "lm_head": ("vocab", "embed"),
    "q_proj": ("heads", "embed"),
    "k_proj": ("kv_heads", "embed"),
    "v_proj": ("kv_heads", "embed"),
    "o_proj": ("embed", "heads"),
    "gate_proj": ("mlp", "embed"),
    "up_proj": ("mlp", "embed"),
    "down_proj": ("embed", "mlp"),
}

AnyMesh = Mesh | AbstractMesh | None  # an abstract mesh, which has no devices, serves to lower programs


def make_mesh(mesh: str | Mapping[str, int] | Mesh) -> Mesh:
    """A mesh of this process's devices, or, where there are several processes, of all of theirs.

    Args:
      mesh: "data=2,model=4", or a dictionary; an axis that is left out has size 1. Or a jax Mesh with both axes.

    Raises:
      ValueError: no such form, an unknown axis, a size below 1, or another number of devices than there are.
    """
    if isinstance(mesh, Mesh):
        if set(mesh.axis_names) != set(AXES):
            raise ValueError(f"the mesh has axes {', '.join(mesh.axis_names)}; it needs {' and '.join(AXES)}")
        # Explicit axes would ask for a sharding at every operation.
        return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(AXES))
    sizes = mesh_sizes(mesh)
    shown = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    num_devices, wanted = jax.device_count(), math.prod(sizes.values())
    if wanted > num_devices:
        raise ValueError(f"mesh {shown} needs {wanted} devices; there are {num_devices} ({jax.default_backend()})")
    if jax.process_count() > 1 and wanted < num_devices:
        raise ValueError(f"mesh {shown} has {wanted} of {num_devices} devices; a mesh over several processes has all of them")
    devices = jax.devices()[:wanted]
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(mesh: str | Mapping[str, int]) -> dict[str, int]:
    """The sizes of both axes; needs no device. Raises ValueError as `make_mesh`."""
    form = "a mesh is written data=2,model=4"
    if isinstance(mesh, str):
        pairs = [(name.strip(), size.strip()) for name, _, size in (piece.partition("=") for piece in mesh.split(","))]
    else:
        pairs = [(name, str(size)) for name, size in mesh.items()]
    for name, size in pairs:
        if name not in AXES:
            raise ValueError(f"mesh axis {name!r} is unknown; there are: {', '.join(AXES)} ({form})")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh axis {name} must be a whole number of at least 1, not {size!r} ({form})")
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"mesh {mesh!r} names an axis twice; {form}")
    return {axis: int(dict(pairs).get(axis, 1)) for axis in AXES}


def check(config: ModelConfig, mesh: AnyMesh) -> None:
    """Raises one ValueError that names every size of the model that the mesh cannot split."""
    num_parts = 1 if mesh is None else mesh.shape["model"]
    undivided = _undivided(config, num_parts)
    if undivided:
        fitting = max(n for n in range(1, num_parts) if not _undivided(config, n))
        raise ValueError(
            f"mesh axis model={num_parts} does not divide the model's {', '.join(undivided)}; the next one that does is "
            f"model={fitting}"
        )


def _undivided(config: ModelConfig, num_parts: int) -> list[str]:
    sizes = {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    if num_parts % config.num_kv_heads == 0:  # Then all devices hold all of them.
        del sizes["num_key_value_heads"]
    return [f"{name} of {size}" for name, size in sizes.items() if size % num_parts]


def check_rows(num_rows: int, num_parts: int) -> None:
    """Raises ValueError where a batch of so many rows cannot be split into equal parts."""
    if num_rows % num_parts:
        raise ValueError(
            f"mesh axis data={num_parts} does not divide a batch of {num_rows}: its size must be a multiple of {num_parts}"
        )


def num_row_parts(mesh: AnyMesh) -> int:
    """Into how many parts a batch is split."""
    return 1 if mesh is None else mesh.shape["data"]


def named(mesh: AnyMesh, config: ModelConfig, *axes: str | None) -> NamedSharding | None:
    """The sharding of an array of a model by its logical axes, of which the last ones may be left out."""
    if mesh is None:
        return None
    is_whole = config.num_kv_heads % mesh.shape["model"] != 0
    rules = RULES | {"kv_heads": None} if is_whole else RULES
    return NamedSharding(mesh, PartitionSpec(*(rules.get(axis) if axis else None for axis in axes)))


def parameter(mesh: AnyMesh, config: ModelConfig, path: tuple[str, ...]) -> jax.sharding.Sharding:
    """The sharding of a parameter of `llama.Llama` by its path; without a mesh, this process's first device."""
    module = path[-2] if path[-1] in ("weight", "bias") else path[-1]
    axes = PARAMETERS.get(module, ())
    found = named(mesh, config, *(axes[:1] if path[-1] == "bias" else axes))
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if found is None else found


def by_rows(mesh: AnyMesh) -> NamedSharding | None:
    """The sharding of every array whose first axis is the batch's."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(RULES["rows"]))


def replicated(mesh: AnyMesh) -> NamedSharding | None:
    """The sharding of an array that all devices hold."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def constrain(tree: Any, where: NamedSharding | None) -> Any:
    """The arrays of a tree, laid out so within a compiled program; None leaves the tree as it is."""
    return tree if where is None else jax.lax.with_sharding_constraint(tree, where)


def over_rows(fn: Callable[..., Any], mesh: AnyMesh) -> Callable[..., Any]:
    """`fn` of one row, mapped over a batch. Every device runs it on its own rows, so nothing moves, whatever `fn` does.

    The first argument is shared by all rows; in the others, and in the result, every array's first axis is the batch's.
    """

    def mapped(shared: Any, *args: Any) -> Any:
        return jax.vmap(fn, in_axes=(None, *[0] * len(args)))(shared, *args)

    def split(shared: Any, *args: Any) -> Any:
        rows = PartitionSpec(RULES["rows"])
        specs = (PartitionSpec(), *[rows] * len(args))
        return jax.shard_map(mapped, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(shared, *args)

    return mapped if mesh is None else split


def within_parts(fn: Callable[..., Any], mesh: AnyMesh) -> Callable[..., Any]:
    """`fn` of one part of a batch, run by each part's devices on the part's own rows; how they split the model is unchanged.

    In the arguments, and in the result, every array's first axis is divided among the parts.
    """
    if mesh is None:
        return fn
    rows = PartitionSpec(RULES["rows"])
    return jax.shard_map(fn, mesh=mesh, in_specs=rows, out_specs=rows, axis_names={RULES["rows"]}, check_vma=False)


def repeated(tree: Any, part_size: int, mesh: AnyMesh) -> Any:
    """Arrays of one row a part, with `part_size` copies of it in each part."""
    repeat = lambda part: jax.tree.map(lambda x: jnp.repeat(x, part_size, axis=0), part)  # noqa: E731
    return within_parts(repeat, mesh)(tree)


def put(tree: Any, where: NamedSharding | None) -> Any:
    """The arrays of a tree, equal in every process, on the mesh; those that lie so already, and None, stay as they are.

    Without a mesh they are bound to this process's first device, as what a program returns is: to arrays that are bound and to
    those that are not, the same program would be compiled twice.
    """
    if where is None:
        return jax.device_put(tree, jax.local_devices()[0])

    def one(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == where:
            return x
        host = np.asarray(x)
        host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(one, tree)


def fetch(x: jax.Array) -> np.ndarray:
    """A whole array on this host, wherever its parts are; all processes must call it together."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)
