"""Weights of a model folder: Hugging Face safetensors in and out, and Orbax checkpoints.

Two kinds of folder are read, both described by a Hugging Face `config.json`:

    model.safetensors, or its shards and model.safetensors.index.json        `load_hf`, `export_hf`
    params/, an Orbax checkpoint                                             `load_orbax`, `save_orbax`

Parameters carry Hugging Face's names, nested, and are stored [out, in] on both sides, so a tensor is never transposed:

    model.embed_tokens.weight                  embed_tokens
    model.layers.3.self_attn.q_proj.weight     layers_3 / self_attn / q_proj / weight
    model.norm.weight                          norm / weight
    lm_head.weight                             lm_head (no such parameter where it is tied to embed_tokens)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from flax import traverse_util

from hd_jax import sharding
from hd_jax.models import llama
from hd_jax.models.config import ModelConfig, from_hf, to_hf

DTYPES = ("float32", "bfloat16")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

# What `resolve` fetches from the hub, and what goes with the weights when a folder is converted.
DESCRIPTION_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt")

_SAFETENSORS, _INDEX, _ORBAX = "model.safetensors", "model.safetensors.index.json", "params"

_Path = tuple[str, ...]


def resolve(name: str | os.PathLike[str], *, has_weights: bool = True) -> pathlib.Path:
    """The folder of a model: `name` itself, or a snapshot of the model of this name on the Hugging Face hub.

    Args:
      name: a folder, or a hub name such as "org/model".
      has_weights: False fetches no weights from the hub, only what the tokenizer needs.

    Raises:
      ValueError: there is no such folder, and the hub has no such model or cannot be reached.
    """
    folder = pathlib.Path(name).expanduser()
    if str(name) and folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"{folder} is a file; a model is a folder or the name of one on the Hugging Face hub")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(name)):
        raise ValueError(f"there is no folder {str(name)!r}, and no model on the Hugging Face hub can have this name")

    import huggingface_hub  # Slow to import, and of no use for a folder.

    patterns = [*DESCRIPTION_PATTERNS, *(["*.safetensors"] if has_weights else [])]
    try:
        # Some repositories hold the weights a second time, in their authors' own form.
        ignored = ["consolidated*", "original/*"]
        return pathlib.Path(huggingface_hub.snapshot_download(str(name), allow_patterns=patterns, ignore_patterns=ignored))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model {str(name)!r}: there is no such folder, and it could not be fetched from the Hugging Face hub: {reason}"
        ) from error


def load(
    name: str | os.PathLike[str], dtype: str | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[ModelConfig, Any]:
    """The config and the parameters of a model, by a folder or hub name; see `load_hf` and `load_orbax`.

    Raises:
      ValueError: no such model, no weights in a form that is read here, or weights that do not fit config.json.
    """
    folder = resolve(name)
    read_config(folder)
    if (folder / _SAFETENSORS).exists() or (folder / _INDEX).exists():
        return load_hf(folder, dtype, mesh)
    if (folder / _ORBAX).is_dir():
        return load_orbax(folder, dtype, mesh)
    expected = f"neither {_SAFETENSORS}, nor {_INDEX}, nor an Orbax checkpoint {_ORBAX}/"
    if list(folder.glob("*.bin")) + list(folder.glob("*.bin.index.json")):
        raise ValueError(
            f"{folder} holds PyTorch .bin weights only; convert them to safetensors, for example with transformers: "
            f"AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    raise ValueError(f"{folder} holds no weights: {expected}")


def read_config(folder: pathlib.Path) -> Mapping[str, Any]:
    """The parsed `config.json` of a folder.

    Raises:
      ValueError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no config.json, so it is not a model folder")
    return read_json(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        out = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(out, dict):
        raise ValueError(f"{path}: a JSON object was expected, not a {type(out).__name__}")
    return out


def stored_dtype(folder: pathlib.Path) -> str:
    """The type that config.json says the weights have; "float32" where it says nothing."""
    config = read_config(folder)
    return config.get("dtype") or config.get("torch_dtype") or "float32"


def load_hf(folder: pathlib.Path, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None) -> tuple[ModelConfig, Any]:
    """Reads safetensors, one or several files: of each tensor in turn, the parts that this host's devices hold.

    Args:
      folder: with config.json and the weights.
      dtype: "float32" or "bfloat16". By default float32 on CPUs, where bfloat16 is slow; elsewhere float32 for weights
        stored in it, and bfloat16 for the others.
      mesh: that the parameters are split over, as `sharding` says; None for this process's first device.

    Returns:
      The config, its `dtype` set, and the parameters of `llama.Llama`.

    Raises:
      ValueError: the config is not supported, or tensors are missing, unknown or of another shape: all of them named; or
        the mesh does not divide the model.
    """
    config = _model_config(folder, dtype)
    sharding.check(config, mesh)
    files = _safetensors_files(folder)
    shapes = _shapes(config)
    with contextlib.ExitStack() as stack:
        where = {}  # The opened file of each tensor.
        for file in files:
            opened = stack.enter_context(_open(file))
            where |= {name: opened for name in opened.keys() if not _is_derived(name, config)}
        found = {name: tuple(file.get_slice(name).get_shape()) for name, file in where.items()}
        _check(folder, found, {_hf_name(path): shape for path, shape in shapes.items()})
        flat = {}
        for path, shape in shapes.items():
            stored = where[_hf_name(path)].get_slice(_hf_name(path))

            def read(index: Any, stored: Any = stored) -> np.ndarray:
                return stored[index].astype(jnp.dtype(config.dtype))

            flat[path] = jax.make_array_from_callback(shape, sharding.parameter(mesh, config, path), read)
    return config, traverse_util.unflatten_dict(flat)


def export_hf(
    folder: pathlib.Path,
    config: ModelConfig,
    params: Any,
    tokenizer: tokenizers.Tokenizer,
    *,
    chat_template: str,
    bos: str,
    eos: str,
) -> None:
    """Writes a folder that `load_hf` and transformers read: weights in bfloat16, tokenizer, chat template.

    Args:
      folder: made where it does not stand; files of the same names are replaced.
      config: of the model.
      params: of `llama.Llama`.
      tokenizer: whose vocabulary the model was trained on.
      chat_template: Jinja, as in tokenizer_config.json.
      bos: the token that begins a text.
      eos: the token that ends an answer.
    """
    special = {"bos_token_id": tokenizer.token_to_id(bos), "eos_token_id": tokenizer.token_to_id(eos)}
    unknown = [token for token in (bos, eos) if tokenizer.token_to_id(token) is None]
    if unknown:
        raise ValueError(f"the tokenizer has no token {', '.join(map(repr, unknown))}")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_hf_name(path): np.asarray(leaf, jnp.bfloat16) for path, leaf in _flatten(params).items()}
    with _replacing(folder / _SAFETENSORS) as path:
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    with _replacing(folder / "tokenizer.json") as path:
        tokenizer.save(str(path))
    described = {
        "config.json": to_hf(dataclasses.replace(config, dtype="bfloat16")) | special,
        "generation_config.json": special,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "chat_template": chat_template,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_context,
        },
    }
    for name, content in described.items():
        _write_json(folder / name, content)


def load_orbax(
    folder: pathlib.Path, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[ModelConfig, Any]:
    """Reads a folder that `save_orbax` wrote; arguments, result and errors are those of `load_hf`."""
    import orbax.checkpoint as ocp  # Slow to import, and of no use for safetensors.

    config = _model_config(folder, dtype)
    sharding.check(config, mesh)
    shapes = _shapes(config)
    with ocp.StandardCheckpointer() as checkpointer:
        path = (folder / _ORBAX).absolute()
        try:
            stored = _flatten(checkpointer.metadata(path).item_metadata.tree)
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not an Orbax checkpoint of parameters ({error})") from error
        found = {"/".join(key): tuple(leaf.shape) for key, leaf in stored.items()}
        _check(folder, found, {"/".join(key): shape for key, shape in shapes.items()})
        # Without a sharding, a checkpoint could be restored only onto devices like those that it was saved from.
        target = {
            key: jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype), sharding=sharding.parameter(mesh, config, key))
            for key, shape in shapes.items()
        }
        return config, checkpointer.restore(path, traverse_util.unflatten_dict(target))


def save_orbax(folder: pathlib.Path, config: ModelConfig, params: Any) -> None:
    """Writes `params` as they are to params/, an Orbax checkpoint, and config.json beside it.

    Raises:
      ValueError: there is a params/ already.
    """
    import orbax.checkpoint as ocp

    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / _ORBAX).absolute(), params)
    _write_json(folder / "config.json", to_hf(config))


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path beside `path` to write to; it takes `path`'s place when the block ends, and goes away when the block fails."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    with _replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_config(folder: pathlib.Path, dtype: str | None) -> ModelConfig:
    """The config of a folder with the dtype that its parameters are to have."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    if dtype is None:
        is_narrow = stored_dtype(folder) != "float32" and jax.default_backend() != "cpu"
        dtype = "bfloat16" if is_narrow else "float32"
    try:
        return dataclasses.replace(from_hf(read_config(folder)), dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def _shapes(config: ModelConfig) -> dict[_Path, tuple[int, ...]]:
    """The shape of each parameter, by its path."""
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1, 1), jnp.bool_)
    params = jax.eval_shape(llama.Llama(config).init, jax.random.key(0), token, token, mask)["params"]
    return {path: leaf.shape for path, leaf in _flatten(params).items()}


def _flatten(tree: Any) -> dict[_Path, Any]:
    flat: Any = traverse_util.flatten_dict(tree)
    return flat


def _hf_name(path: _Path) -> str:
    """Hugging Face's name of a parameter; see the table above."""
    if path == ("lm_head",):
        return "lm_head.weight"
    if path == ("embed_tokens",):
        return "model.embed_tokens.weight"
    return ".".join(("model", path[0].replace("layers_", "layers."), *path[1:]))


def _is_derived(name: str, config: ModelConfig) -> bool:
    """Whether a stored tensor follows from the others or from config.json, and so is not read."""
    return name.endswith(".rotary_emb.inv_freq") or (config.is_head_tied and name == "lm_head.weight")


def _safetensors_files(folder: pathlib.Path) -> Sequence[pathlib.Path]:
    if (folder / _SAFETENSORS).exists():
        return [folder / _SAFETENSORS]
    index = folder / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map, which names the file of each tensor")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise ValueError(f"{folder} lacks {', '.join(absent)}, which {_INDEX} names")
    return files


def _open(file: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file ({error})") from error


def _check(folder: pathlib.Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises one ValueError that names every missing, unknown and mis-shaped tensor."""
    both = [name for name in expected if name in found]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "wrong shape": [f"{name} {found[name]}, not {expected[name]}" for name in both if found[name] != expected[name]],
    }
    told = [f"{kind}: {', '.join(sorted(names))}" for kind, names in problems.items() if names]
    if told:
        raise ValueError(f"the weights in {folder} are not those that its config.json describes; {'; '.join(told)}")


def fused(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The model with one product in place of the two or three that take the same input: fewer and larger ones are faster.

    The arrays that are joined are deleted, layer by layer, so that the model is never held twice.
    """

    def join(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        tree = {name: join(branch) for name, branch in tree.items()}
        for name, parts in FUSED.items():
            if parts[0] in tree:
                pieces = [tree.pop(part) for part in parts]
                tree[name] = jax.block_until_ready(jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *pieces))
                jax.tree.map(lambda array: array.delete(), pieces)
        return tree

    return dataclasses.replace(config, is_fused=True), join(params)
