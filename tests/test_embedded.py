"""The embedded model, its databases and questions: what ships, and equality on real text."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest

from experiments import questions
from hd_jax import decode, exactness

PROMPTS = [
    "Which river flows through Vienna?",
    "Tina buys 4 boxes of pencils. Each box holds 12 pencils. She gives away 9. How many pencils does she have left?",
    "Write a short letter to a friend about a walk by the sea.",
]


@pytest.fixture(scope="module")
def embedded():
    return decode.load()


def test_assets_are_small_and_complete():
    files = [p for p in decode.EMBEDDED.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 48 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {p.name for p in files}


def test_questions_are_eight_of_each_task():
    found = questions.read(str(questions.EMBEDDED))
    assert {task: sum(q.task == task for q in found) for task in questions.TASKS} == dict.fromkeys(questions.TASKS, 8)
    for question in found:
        assert len(question.turns) == (2 if question.task == "mt_bench" else 1)
        if question.task == "summarization":
            assert len(question.turns[0].split()) >= 150


def test_loading_turns_the_compilation_cache_on(embedded):
    assert getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009
    assert embedded.config.dtype == "float32"
    assert embedded.tokenizer.decode(embedded.tokenizer.encode("Grüße, 你好! 3 + 4", add_bos=False)) == "Grüße, 你好! 3 + 4"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", ["pld", "hd"])
def test_drafters_write_plain_decodings_tokens(embedded, name, temperature):
    drafter = decode.make_drafter(embedded, name)
    options = {"max_new_tokens": 48, "temperature": temperature}
    reference = [decode.generate(embedded, p, seed=i, **options) for i, p in enumerate(PROMPTS)]
    singles = [decode.generate(embedded, p, seed=i, drafter=drafter, loop="host", **options) for i, p in enumerate(PROMPTS)]
    batch = decode.generate(embedded, PROMPTS, seed=[0, 1, 2], drafter=drafter, **options)
    for out in (singles, batch):
        for seed, (a, b) in enumerate(zip(reference, out, strict=True)):
            verdict = exactness.check(embedded, drafter, a, b, temperature=temperature, seed=seed)
            assert verdict.is_explained, verdict.message
    assert sum(r.num_steps for r in batch) < sum(len(r.tokens) for r in batch)


def test_exact_mode_is_bit_equal(embedded):
    options = {"max_new_tokens": 40, "exact": True, "logprobs": 1}
    for prompt in PROMPTS[1:]:
        reference = decode.generate(embedded, prompt, **options)
        out = decode.generate(embedded, prompt, drafter="hd", **options)
        assert (out.tokens, out.logprobs) == (reference.tokens, reference.logprobs)


def test_databases_hold_what_the_model_says(embedded):
    """D_m alone finds drafts in every answer: it was built from this model's own."""
    drafter = decode.make_drafter(embedded, "hd", order="m", window=0)
    out = [decode.generate(embedded, p, drafter=drafter, max_new_tokens=48) for p in PROMPTS]
    assert sum(sum(r.source_counts["model"]["accepted"]) for r in out) > 0
    both = decode.make_drafter(embedded, "hd")
    assert set(both.tables) == {"m", "s"}
    assert both.refresh is None


def test_a_database_of_another_tokenizer_is_refused(embedded, tmp_path):
    from hd_jax.databases.frequent_ngrams import FrequentNgrams

    other = FrequentNgrams.build([np.arange(50, dtype=np.int32)], n=5)
    other.save(tmp_path / "model.safetensors", fingerprint="another")
    with pytest.raises(ValueError, match="tokenizer"):
        decode.make_drafter(embedded, "hd", order="m", databases=tmp_path)


def test_the_model_card_names_its_data():
    card = pathlib.Path(decode.EMBEDDED / "README.md").read_text()
    for word in ("licence", "Validation loss", "repeated 8-gram", "CC BY"):
        assert word in card
    config = json.loads((decode.EMBEDDED / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
