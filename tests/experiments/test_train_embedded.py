"""Training the embedded model: its data, its products and attention, and the program with a resume."""

from __future__ import annotations

import gzip
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from experiments import train_embedded, training_mix
from hd_jax import decode
from hd_jax.models import llama, weights
from hd_jax.models import tokenizer as model_tokenizer
from hd_jax.models.config import ModelConfig

TURNS = [
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Danube."},
    {"role": "user", "content": "And a lake?"},
    {"role": "assistant", "content": "Lake Constance, of course."},
]


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(decode.EMBEDDED / "tokenizer.json"))


def test_training_sees_the_form_that_the_chat_template_gives(tokenizer):
    record = training_mix.encode({"task": "chat", "source": "x", "turns": TURNS}, tokenizer)
    chat = model_tokenizer.load(decode.EMBEDDED).chat(TURNS, add_generation_prompt=False)
    assert record.tokens.tolist() == chat
    marked = tokenizer.decode(record.tokens[record.is_target].tolist(), skip_special_tokens=False)
    assert marked == "The Danube.</s>Lake Constance, of course.</s>"


def _records(tokenizer) -> list[training_mix.Record]:
    texts = [f"Line {i}: " + "word " * (i % 17) for i in range(60)]
    return [training_mix.encode({"task": "text", "source": "x", "text": t}, tokenizer) for t in texts]


def test_packing_keeps_every_record_whole_and_once(tokenizer):
    records = _records(tokenizer)
    packed = training_mix.pack(records, 64, np.random.default_rng(0))
    assert all(sum(len(r.tokens) for r in sequence) <= 64 for sequence in packed)
    found = sorted(tuple(r.tokens) for sequence in packed for r in sequence)
    assert found == sorted(tuple(r.tokens) for r in records)


def test_batches_go_on_where_a_run_stopped(tokenizer):
    records = _records(tokenizer)
    whole = list(itertools.islice(training_mix.batches(records, 2, 64, 0, 0), 12))
    rest = list(itertools.islice(training_mix.batches(records, 2, 64, 0, 7), 5))
    for a, b in zip(whole[7:], rest, strict=True):
        assert all(np.array_equal(a[key], b[key]) for key in a)


CONFIG = ModelConfig(64, 32, 48, 2, 4, 2, 8, 256, is_head_tied=True)


def _batch() -> dict:
    rng = np.random.default_rng(0)
    length = 160  # more than a block of queries
    return {
        "tokens": jnp.asarray(rng.integers(0, 64, (2, length)), jnp.int32),
        "segments": jnp.asarray(np.arange(length) // 50)[None].repeat(2, 0),
        "positions": jnp.asarray(np.arange(length) % 50)[None].repeat(2, 0),
        "where": jnp.asarray(rng.integers(0, 2 * length, 90)),
        "targets": jnp.asarray(rng.integers(0, 64, 90), jnp.int32),
        "weight": jnp.ones(90),
    }


def test_training_products_and_attention_have_the_models_gradients():
    """Within the rounding of bfloat16: 5% of each gradient's norm. Without the mask of segments they are far off."""
    plain = llama.Llama(CONFIG)
    fast = llama.Llama(CONFIG, train_embedded.training_multiply, train_embedded.training_attend)
    one = jnp.zeros((1, 1), jnp.int32)
    params = plain.init(jax.random.key(0), one, one, jnp.ones((1, 1, 1), bool))["params"]
    gradient = jax.jit(jax.grad(lambda p, m, b: train_embedded.loss_fn(p, m, b)[0]), static_argnums=1)

    def distance(a, b) -> float:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return max(float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in pairs)

    batch = _batch()
    reference = gradient(params, plain, batch)
    assert distance(gradient(params, fast, batch), reference) < 0.05
    assert distance(gradient(params, fast, {**batch, "segments": batch["segments"] * 0}), reference) > 0.1


def test_the_program_trains_resumes_and_exports(tmp_path: pathlib.Path):
    data, output = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    lines = [{"task": "chat", "source": "x", "turns": TURNS[: 2 + 2 * (i % 2)]} for i in range(40)]
    lines += [{"task": "text", "source": "y", "text": f"Text {i} " + "goes on " * 20} for i in range(20)]
    for name in ("mix", "validation"):
        with gzip.open(data / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    sizes = [
        "--vocab_size=512",
        "--hidden_size=32",
        "--intermediate_size=32",
        "--num_layers=1",
        "--num_heads=2",
        "--num_kv_heads=1",
    ]
    sizes += ["--sequence_length=64", "--batch_size=2", "--num_loop_prompts=2", f"--data={data}", f"--output_dir={output}"]
    command = [sys.executable, "-m", "experiments.train_embedded", *sizes]
    for num_steps in (2, 3):
        done = subprocess.run([*command, f"--num_steps={num_steps}"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert ("going on from step 2" in done.stderr) == (num_steps == 3)
    config, params = weights.load(output / "export")
    assert config.vocab_size == params["embed_tokens"].shape[0] <= 512
    facts = json.loads((output / "training.json").read_text())
    assert set(facts["validation_loss"]) == {"chat", "text", "overall"}
    assert facts["recipe"]["num_steps"] == 3
    assert 0 <= facts["loop_share"]["overall"] <= 1


def test_bad_data_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no .jsonl.gz files"):
        training_mix.training_files(tmp_path)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"task": 1}\n{broken\n')
    with pytest.raises(ValueError, match="line 2"):
        list(training_mix.read_records(tmp_path / "a.jsonl.gz"))
