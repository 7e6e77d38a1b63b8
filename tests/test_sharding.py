"""Meshes: what is said of wrong ones, and the table. What needs several devices runs in processes of its own."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from experiments import answers, questions
from hd_jax import sharding
from hd_jax.models import weights

ROOT = pathlib.Path(__file__).parent.parent


def abstract_mesh(data: int, model: int) -> AbstractMesh:
    return AbstractMesh((data, model), sharding.AXES, (AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ("data=2,model=4", {"data": 2, "model": 4}),
        (" model=4 , data=2", {"data": 2, "model": 4}),
        ("model=8", {"data": 1, "model": 8}),
        ({"data": 3}, {"data": 3, "model": 1}),
    ],
)
def test_forms_of_a_mesh(mesh, expected):
    assert sharding.mesh_sizes(mesh) == expected


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensor=2", "mesh axis 'tensor' is unknown; there are: data, model"),
        ({"x": 2}, "mesh axis 'x' is unknown"),
        ("", "mesh axis '' is unknown"),
        ("2,4", "mesh axis '2' is unknown"),
        ("model", "mesh axis model must be a whole number of at least 1, not ''"),
        ("model=0", "mesh axis model must be a whole number of at least 1, not '0'"),
        ("model=2.5", "not '2.5'"),
        ("data=-1", "not '-1'"),
        ("model=2,model=4", "names an axis twice"),
        ("data=2,model=4", r"mesh data=2,model=4 needs 8 devices; there are 1 \(cpu\)"),
        (jax.make_mesh((1,), ("x",)), "the mesh has axes x; it needs data and model"),
    ],
)
def test_wrong_meshes_are_named(mesh, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(mesh)


def test_a_jax_mesh_serves_whatever_its_kind_of_axes(lm):
    given = jax.make_mesh((1, 1), ("model", "data"), (AxisType.Explicit,) * 2)
    mesh = sharding.make_mesh(given)
    assert mesh.axis_names == ("model", "data") and set(mesh.axis_types) == {AxisType.Auto}


def test_a_model_that_the_mesh_cannot_split_is_told_in_full(lm):
    for num_parts in (1, 2, 4):  # 4 heads, 2 key/value heads, 48 and 48
        sharding.check(lm.config, abstract_mesh(3, num_parts))
    with pytest.raises(ValueError) as caught:
        sharding.check(lm.config, abstract_mesh(1, 5))
    sizes = "num_attention_heads of 4, num_key_value_heads of 2, intermediate_size of 48, vocab_size of 48"
    assert str(caught.value) == f"mesh axis model=5 does not divide the model's {sizes}; the next one that does is model=4"
    with pytest.raises(ValueError, match=r"model=8 does not divide the model's num_attention_heads of 4; .* model=4"):
        sharding.check(lm.config, abstract_mesh(1, 8))


@pytest.mark.parametrize("num_parts", [2, 4])
def test_the_table(lm, num_parts):
    mesh = abstract_mesh(2, num_parts)
    kv_heads = "model" if num_parts == 2 else None  # 2 heads on 4 devices: all of them on each
    expected = {
        ("embed_tokens",): ("model", None),
        ("lm_head",): ("model", None),
        ("layers_1", "self_attn", "q_proj", "weight"): ("model", None),
        ("layers_1", "self_attn", "q_proj", "bias"): ("model",),
        ("layers_1", "self_attn", "k_proj", "weight"): (kv_heads, None),
        ("layers_1", "self_attn", "v_proj", "bias"): (kv_heads,),
        ("layers_1", "self_attn", "o_proj", "weight"): (None, "model"),
        ("layers_1", "self_attn", "o_proj", "bias"): (None,),
        ("layers_1", "self_attn", "q_norm", "weight"): (),
        ("layers_1", "mlp", "up_proj", "weight"): ("model", None),
        ("layers_1", "mlp", "down_proj", "weight"): (None, "model"),
        ("norm", "weight"): (),
    }
    for path, axes in expected.items():
        assert sharding.parameter(mesh, lm.config, path) == jax.NamedSharding(mesh, PartitionSpec(*axes)), path


def test_every_matrix_of_a_model_is_split(lm):
    for path, shape in weights._shapes(lm.config).items():
        where = sharding.parameter(abstract_mesh(1, 2), lm.config, path)
        assert len(shape) == 1 or "model" in where.spec, path


def _environment(num_devices: int) -> dict[str, str]:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={num_devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def test_on_eight_devices():
    """Runs tests/on_eight_devices.py in a process that sees eight."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "on_eight_devices.py")]
    done = subprocess.run(command, env=_environment(8), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_main_job_in_two_processes(tmp_path):
    """One is told of the other by flags, one by the environment. Each has a row of the batch and two devices; one writes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.specbench", "--mesh=data=2,model=2", "--batch_size=2", "--tasks=qa"]
    command += ["--methods=none,pld", "--limit=1", "--max_new_tokens=6", f"--output_dir={folder}"]
    flags = [f"--coordinator_address={address}", "--num_processes=2", "--process_id=0"]
    environment = _environment(2)
    other = environment | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    running = [
        subprocess.Popen(c, env=e, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c, e in (([*command, *flags], environment), (command, other))
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], outputs
    assert "Every method's token ids equal plain decoding's" in outputs[0][0] and f"Written to {folder}" in outputs[0][0]
    assert "Written" not in outputs[1][0]
    chosen = questions.select(questions.read(questions.EMBEDDED), ("qa",), 1)
    plain, pld = (answers.read(folder / f"{name}.jsonl", chosen) for name in ("none", "pld"))
    assert answers.tokens(plain[0], 0) == answers.tokens(pld[0], 0)


def test_processes_that_cannot_be_joined_are_told_what_is_needed():
    command = [sys.executable, "-m", "experiments.specbench", "--coordinator_address=127.0.0.1:1234"]
    done = subprocess.run(command, env=_environment(1), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: the processes of this run cannot be joined")
    assert "--num_processes and --process_id, or JAX_COORDINATOR_ADDRESS" in done.stderr
