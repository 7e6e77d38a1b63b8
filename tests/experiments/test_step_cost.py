"""What is timed, counted and refused; how long anything takes is no matter of tests."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import jax
import pytest

from experiments import device_floor, shapes, step_cost
from hd_jax import decode
from hd_jax.models import llama, weights
from hd_jax.models import tokenizer as tokenizers


def test_each_size_context_and_loop_is_measured(lm, monkeypatch):
    monkeypatch.setattr(device_floor, "COPY_BYTES", 2**20)
    monkeypatch.setattr(device_floor, "MATMUL_SIZE", 512)
    values = types.SimpleNamespace(
        num_steps=8, num_rounds=2, drafters=[], transformers=False, profile=None, shape=None, model=None, mesh=None
    )
    record = step_cost.measure(lm, (1, 4), (16, 40), values)
    assert [(row["context"], row["nodes"]) for row in record["steps"]] == [(16, 1), (16, 4), (40, 1), (40, 4)]
    assert [row["host_ms"] is not None for row in record["steps"]] == [True, True, False, False]
    assert all(len(row["all_device_ms"]) == 2 and row["bare_ms"] > 0 for row in record["steps"])
    assert all(row["bare_with_attention_ms"] > 0 for row in record["steps"])
    assert record["steps"][0]["over_one_node"] == 1
    for _, head, body in step_cost._tables(json.loads(json.dumps(record))):
        assert all(len(line) == len(head) for line in body)


def test_bytes_read_are_the_weights_and_the_committed_keys_and_values(lm):
    weights = sum(x.nbytes for x in jax.tree.leaves(lm.params))  # the embedding is the head
    assert device_floor.bytes_read(lm, 0) == weights
    assert device_floor.bytes_read(lm, 10) - weights == 10 * 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, float32


@pytest.mark.parametrize(("shape", "num_parameters"), [("llama-68m", 68_030_208), ("llama-160m", 162_417_408)])
def test_a_shape_has_its_sizes(shape, num_parameters):
    tokenizer = tokenizers.load(decode.EMBEDDED)
    model = shapes.random_model(shape, tokenizer, dtype="bfloat16")
    assert sum(x.size for x in jax.tree.leaves(model.params)) == num_parameters
    assert model.params["layers_0"]["self_attn"]["qkv_proj"]["weight"].dtype == "bfloat16"


def test_joined_products_give_the_same_logits(lm):
    # A copy, whose parts may be deleted.
    config, params = weights.fused(lm.config, jax.tree.map(lambda x: x + 0, lm.params))
    tokens = jax.numpy.arange(6)[None]
    arguments = (tokens, tokens, jax.numpy.tril(jax.numpy.ones((1, 6, 6), bool)))
    expected, _ = lm.model.apply({"params": lm.params}, *arguments)
    found, _ = llama.Llama(config).apply({"params": params}, *arguments)
    assert jax.numpy.max(jax.numpy.abs(found - expected)) < 1e-5 * jax.numpy.max(jax.numpy.abs(expected))
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(x.size for x in jax.tree.leaves(lm.params))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nodes=1,x"], "--nodes=1,x: whole numbers are needed"),
        (["--nodes=0"], "--nodes=0: different numbers from 1 to 128 are needed"),
        (["--shape=llama-160m", "--context=5000"], "--context=5000: different numbers from 1 to 4064 are needed"),
        (["--shape=llama-160m", "--model=folder"], "--model and --shape: give one of them"),
    ],
)
def test_bad_flags_are_one_line(args, message):
    run = subprocess.run([sys.executable, "-m", "experiments.step_cost", *args], capture_output=True, text=True)
    assert run.returncode == 2 and message in run.stderr.splitlines()[-1]
