"""What a step launches on a GPU: read from the text of a program, and from one compiled here where there is a compiler."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
from jax.experimental import topologies

from experiments import gpu_program

PROGRAM = """\
HloModule jit_run_steps

%fused_add (p.0: f32[4]) -> f32[4] {
  %p.0 = f32[4]{0} parameter(0)
  ROOT %add.0 = f32[4]{0} add(%p.0, %p.0)
}

%one (p.1: s32[]) -> (f32[4], f32[4]) {
  %p.1 = s32[] parameter(0)
  %network = f32[4]{0} fusion(%p.1), kind=kLoop, calls=%fused_add, metadata={op_name="f/while/body/learn/add"}
  ROOT %both = (f32[4]{0}, /*index=1*/f32[4]{0}) tuple(%network, %network)
}

%other (p.2: s32[]) -> (f32[4], f32[4]) {
  %p.2 = s32[] parameter(0)
  ROOT %fill = (f32[4]{0}, /*index=1*/f32[4]{0}) fusion(%p.2), calls=%fused_add, metadata={op_name="f/while/body/add"}
}

%inner_body (p.3: f32[4]) -> f32[4] {
  %p.3 = f32[4]{0} parameter(0)
  ROOT %level = f32[4]{0} fusion(%p.3), kind=kLoop, calls=%fused_add, metadata={op_name="f/while/body/draft/while/body/add"}
}

%inner_condition (p.4: f32[4]) -> pred[] {
  %p.4 = f32[4]{0} parameter(0)
  ROOT %is_less = pred[] constant(true)
}

%body (p.5: (f32[4], f32[1,2,2048,8])) -> (f32[4], f32[1,2,2048,8]) {
  %p.5 = (f32[4]{0}, f32[1,2,2048,8]{3,2,1,0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p.5), index=0
  %drafted = f32[4]{0} while(%x), condition=%inner_condition, body=%inner_body
  %qkv = bf16[8]{0} custom-call(%drafted), custom_call_target="gemm", metadata={op_name="f/while/body/Llama/layers_1/dot"}
  %logits = f32[8]{0} fusion(%qkv), kind=kLoop, calls=%fused_add, metadata={op_name="f/while/body/Llama/head/dot"}
  %copied = f32[1,2,2048,8]{3,2,1,0} copy(%p.5)
  %written = (f32[1,2,2048,8]{3,2,1,0}) custom-call(%copied), metadata={op_name="f/while/body/commit/commit"}
  %chosen = (f32[4]{0}, /*index=1*/f32[4]{0}) conditional(%x), branch_computations={%one, %other}
  ROOT %next = (f32[4]{0}, f32[1,2,2048,8]{3,2,1,0}) tuple(%x, %written)
}

%condition (p.6: (f32[4], f32[1,2,2048,8])) -> pred[] {
  %p.6 = (f32[4]{0}, f32[1,2,2048,8]{3,2,1,0}) parameter(0)
  ROOT %less = pred[] fusion(%p.6), kind=kLoop, calls=%fused_add, metadata={op_name="f/while/cond/lt"}
}

ENTRY %main (a.0: f32[4]) -> f32[4] {
  %a.0 = f32[4]{0} parameter(0)
  %before = f32[4]{0} fusion(%a.0), kind=kLoop, calls=%fused_add
  ROOT %run = f32[4]{0} while(%before), condition=%condition, body=%body
}
"""


def test_the_kernels_of_a_step_are_those_of_the_loop():
    found = gpu_program.kernels(PROGRAM)
    assert [kernel.part for kernel in found] == ["draft", "layers", "head", "rest", "commit", "learn", "rest", "rest"]
    assert [kernel.opcode for kernel in found] == [
        *("fusion", "custom-call", "fusion", "copy", "custom-call"),
        *("fusion", "fusion", "fusion"),
    ]
    assert found[3].shape.startswith("f32[1,2,2048,8]")
    copied, committed = found[3:5]
    assert gpu_program._is_copy(copied) and not gpu_program._is_copy(committed)
    assert gpu_program._is_copy(dataclasses.replace(copied, part="commit"))
    assert found[6].shape.startswith("(f32[4]{0}, /*index=1*/f32[4]")


has_compiler = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


@pytest.mark.skipif(not has_compiler, reason="needs JAX's CUDA plugin, which holds the compiler")
def test_a_step_commits_in_one_kernel_and_copies_no_cache(tmp_path):
    """In a process of its own: JAX asks for the plugin once."""
    command = [sys.executable, "-m", "experiments.gpu_program", "--shape=llama-68m", f"--output_dir={tmp_path}"]
    command.append("--methods=none,hd_tree:num_nodes=9:rounds=2:width=2,hd_tree:num_nodes=9:rounds=2:width=2:budget=adaptive")
    subprocess.run(command, cwd=pathlib.Path(__file__).parents[2], check=True, timeout=300)
    plain, drafted, budgeted = json.loads((tmp_path / "gpu_program.json").read_text())["results"]
    for found in (plain, drafted, budgeted):
        assert found["cache_copies"] == 0 and found["commit"] == (2 if found is budgeted else 1)  # one of each loop
        assert found["kernels"] == sum(found[part] for part in (*gpu_program.PARTS, "rest"))
    for found in (plain, drafted):
        assert 10 <= found["a_layer"] <= 15
    assert plain["draft"] <= 1 and plain["learn"] == 0
    assert drafted["draft"] > 10 and drafted["learn"] > 3
    assert budgeted["kernels"] > drafted["kernels"]
    assert "| none | 1 |" in (tmp_path / "gpu_program.md").read_text()


def test_a_machine_without_the_compiler_is_told(monkeypatch):
    def missing(**settings):
        raise NotImplementedError("topology not implemented for platform cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ValueError, match=r"no compiler for GPUs .* pip install"):
        gpu_program.topology()
