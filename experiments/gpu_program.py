r"""What a decoding step launches on an NVIDIA GPU: the device loop is compiled for one, which need not be there, and read.

    pip install -e '.[cuda12]'
    python -m experiments.gpu_program --shape=llama-2-7b --methods=none,hd:order=c,hd_tree:num_nodes=65

A kernel takes a microsecond or two to be started, however little it does, so small ones are counted: those of the draft, of a
layer, of the rest of the model, of the commit to the cache and of what the drafter learns. Besides, a program that copies a
cache in every step is found out here. Parameters are shapes alone, so a model of any size is compiled on a laptop; drafters
have the embedded model's databases. Products are as the compiler chooses them where it cannot time any.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies

from experiments import program, report, run_config, shapes
from hd_jax import admission, decode, loop, runner
from hd_jax.drafters.base import Drafter
from hd_jax.models.llama import Llama, empty_cache
from hd_jax.runner import LM, Options, Row

# Facts of a device that XLA's choices depend on, as an xla.gpu.GpuTargetConfigProto.
H100 = """
    gpu_device_info {
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
      core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: 3352320000000 device_memory_size: 84929347584 l2_cache_size: 52428800
      cuda_compute_capability { major: 9 }
    }
    platform_name: "CUDA"
    dnn_version_info { major: 9 minor: 8 }
    runtime_version { major: 12 minor: 9 }
    device_description_str: "NVIDIA H100 80GB HBM3"
"""
# An H200 took 312 us for `hd_tree`'s draft of 64 nodes at commit 7b3c9ef, where the draft alone compiles to 132 kernels.
US_PER_KERNEL = 312 / 132
PARTS = ("draft", "layers", "head", "commit", "learn")  # of a step; a kernel of none of them is of the rest
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier"}
# Instructions that launch what other computations hold, and how their text names these.
CALLED = {
    "while": ("body", "condition"),
    "call": ("to_apply",),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
}
NUM_SLOTS = 2048
SYNC_EVERY = 32

_INSTRUCTION = re.compile(r"^(?:ROOT )?%[\w.\-]+ = (?P<shape>\([^()]*\)|\S+) (?P<opcode>[\w\-]+)\(")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>[\w.\-]+) \(.*\{$")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One that a step launches, by the compiled program's text."""

    part: str  # of PARTS, or "rest"
    opcode: str
    shape: str  # of what it writes


def topology() -> Any:
    """The description of a GPU that is not there.

    Raises:
      ValueError: JAX's CUDA plugin, which holds the compiler, is not installed.
    """
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # which asks the driver for devices
    try:
        return topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"no compiler for GPUs ({error}): pip install -e '.[cuda12]' brings it") from error


def compiled(lm: LM, drafter: Drafter, budget: str | None) -> Any:
    """The device loop of a model whose parameters may be shapes alone, for one row."""
    mesh = topologies.make_mesh(topology(), (1,), ("one",))
    where = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
    options = Options(budget=budget)
    sizes = runner.pass_sizes(drafter, options)
    settings = loop.StepSettings(sizes=sizes if len(sizes) > 1 else ())

    def start(request: loop.Request, drafter: Drafter) -> loop.State:
        tokens = jnp.zeros((1, NUM_SLOTS), jnp.int32)
        drafter_state = admission.init_drafter(drafter, request, tokens, None)
        state = admission.start(drafter, request, empty_cache(lm.config, 1, NUM_SLOTS), tokens, drafter_state, settings)
        costs = jnp.ones(1 + len(sizes)) if settings.sizes else None
        return admission.with_budget(state, settings, costs, drafter.num_nodes)

    request = runner.request_of(lm, [Row([0] * 256, 0)], options)
    state = jax.eval_shape(start, request, drafter)
    host = loop.refresh(drafter, request, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state._replace(cache=())))
    arguments = (lm.params, drafter, request, host, state, jnp.int32(0), jnp.int32(1))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arguments)
    lowered = loop.run_steps.lower(lm.model, settings, *abstract, sync_every=SYNC_EVERY)
    without_timing: dict[str, Any] = {"xla_gpu_autotune_level": 0}  # of kernels, for which there is no device
    return lowered.compile(compiler_options=without_timing)


def abstract_model(shape: str) -> LM:
    """A model of a shape as it is decoded on one GPU, without numbers. Raises ValueError where there is no such shape."""
    source = decode.load()
    config = dataclasses.replace(shapes.config_of(shape, source.tokenizer, "bfloat16"), is_fused=True)
    model = Llama(config)
    return LM(config, model, shapes.parameters(model), source.tokenizer, shape, config.max_context, source.databases)


def kernels(text: str) -> list[Kernel]:
    """Those of one step, by the text of a compiled loop: of an inner loop, one round's; of branches, those of all."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found["name"]
            entry = name if found["entry"] else entry
        elif name and line.startswith("  "):
            computations.setdefault(name, []).append(line.strip())

    def called(line: str, key: str) -> list[str]:
        found = re.search(rf"\b{key}=\{{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)", line)
        return [name.strip(" %") for name in found[1].split(",")] if found else []

    def walk(name: str, depth: int) -> Iterator[Kernel]:
        for line in computations.get(name, ()):
            found = _INSTRUCTION.match(line)
            if found is None or found["opcode"] in FREE:
                continue
            opcode = found["opcode"]
            if opcode in CALLED:
                for callee in (callee for key in CALLED[opcode] for callee in called(line, key)):
                    yield from walk(callee, depth + (opcode == "while"))
            elif depth:
                path = re.search(r'op_name="([^"]*)"', line)
                yield Kernel(_part(path[1] if path else ""), opcode, found["shape"])

    return list(walk(entry, 0))


def _part(path: str) -> str:
    """The part of a step that an operation belongs to, by its path."""
    names = path.split("/")
    if any(name.startswith("layers_") for name in names):
        return "layers"
    if "Llama" in names:
        return "head"
    return next((part for part in PARTS if part in names), "rest")


def count(lm: LM, label: str, drafter: Drafter, budget: str | None) -> dict[str, Any]:
    """What a step of a method launches, and the memory that its program takes besides its arguments."""
    loop_of = compiled(lm, drafter, budget)
    found = kernels(loop_of.as_text())
    parts = collections.Counter(kernel.part for kernel in found)
    config = lm.config
    cache_shape = f"[1,{config.num_kv_heads},{NUM_SLOTS},{config.head_dim}]"
    return {
        "method": label,
        "nodes": drafter.num_nodes,
        "kernels": len(found),
        **{part: parts[part] for part in (*PARTS, "rest")},
        "a_layer": parts["layers"] / config.num_layers,
        "cache_copies": sum(_is_copy(kernel) and cache_shape in kernel.shape for kernel in found),
        "scratch_mb": loop_of.memory_analysis().temp_size_in_bytes / 1e6,
    }


def _is_copy(kernel: Kernel) -> bool:
    """Whether a kernel that writes a cache copies it: the commit alone writes in place."""
    return kernel.part != "commit" or kernel.opcode.startswith("copy")


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and body, a method a row."""
    head = ["method", "nodes", "kernels a step", *PARTS, "rest", "a layer", "draft, us", "copies of caches", "scratch MB"]
    body = []
    for row in rows:
        cells = [row["method"], *(f"{row[name]}" for name in ("nodes", "kernels", *PARTS, "rest")), f"{row['a_layer']:.1f}"]
        cells += [f"{row['draft'] * US_PER_KERNEL:.0f}", f"{row['cache_copies']}", f"{row['scratch_mb']:.1f}"]
        body.append(cells)
    return head, body


def define_flags() -> None:
    """Defines the flags; a function, so that tests can import several programs."""
    flags.DEFINE_enum("shape", "llama-2-7b", list(shapes.SHAPES), "Of the model, in bfloat16.")
    flags.DEFINE_string("methods", "none,hd:order=c,hd_tree:num_nodes=65", "Comma list; options as in hd_tree:num_nodes=65.")
    flags.DEFINE_string("output_dir", None, "Folder for gpu_program.json and .md; by default nothing is written.")


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")  # for all that is not only compiled
    values = flags.FLAGS
    methods = [run_config.parse_method(text) for text in values.methods.split(",")]
    topology()
    lm = abstract_model(values.shape)
    rows = []
    for method in methods:
        options: dict[str, Any] = dict(method.options)
        budget = run_config.budget_of(method.label, options.pop(run_config.BUDGET, None))
        drafter = decode.make_drafter(lm, method.drafter, **options)
        rows.append(count(lm, method.label, drafter, budget))
    head, body = table(rows)
    facts = (
        f"{values.shape}, bfloat16, batch size 1, {NUM_SLOTS} cache slots; compiled for an H100 by jax "
        f"{jax.__version__}; of branches, as an adaptive budget has them, those of all; a draft's time is an estimate, "
        f"{US_PER_KERNEL:.1f} us a kernel"
    )
    print(f"{facts}\n{report.aligned(head, body)}")
    if values.output_dir:
        folder = pathlib.Path(values.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"facts": facts, "results": rows}
        report.write_file(folder / "gpu_program.json", json.dumps(record, indent=1) + "\n")
        report.write_file(folder / "gpu_program.md", f"# What a step launches\n\n{facts}\n\n{report.markdown(head, body)}\n")
        print(f"Written to {folder}")


if __name__ == "__main__":
    define_flags()
    program.run(main)
