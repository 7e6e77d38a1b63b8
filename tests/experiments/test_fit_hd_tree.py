"""Fitting: samples are what the drafter would have seen, and a fit learns from them."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import fit_hd_tree
from experiments.traces import Turn
from hd_jax.drafters.text_index import MAX_MATCH

TABLES = {"classes": jnp.zeros(1, jnp.int32)}


def turns(num_turns: int, seed: int = 0) -> list[Turn]:
    """Texts of four tokens in which a match of one token is right half of the time, and a longer one always."""
    rng = np.random.default_rng(seed)
    out = []
    for index in range(num_turns):
        cycle = [int(t) for t in rng.permutation(8)]
        text = [t for i in range(24) for t in (cycle if i % 2 else [*cycle[:4], 9])]
        out.append(Turn(index, index, "qa", 0, text[:40], text[40:]))
    return out


def test_samples_hold_each_token_of_the_answers_once():
    texts = turns(3)
    samples = fit_hd_tree.collect(TABLES, texts, "c", seed=0)
    assert len(samples.labels) == sum(len(text.answer) for text in texts)
    num_places = samples.is_one.shape[1] - 1
    assert samples.is_one[np.arange(len(samples.labels)), samples.labels].all()  # a label is a candidate, or that none is
    assert samples.is_one[:, num_places].all()
    assert (samples.labels < num_places).mean() > 0.9  # the text repeats itself
    assert samples.matches.max() == MAX_MATCH


def test_a_fit_predicts_better_than_an_even_choice():
    samples, others = (fit_hd_tree.collect(TABLES, turns(12, seed), "c", seed=seed) for seed in (0, 1))
    net, loss = fit_hd_tree.fit(samples, others, epochs=60, seed=0)
    even = float(np.mean(np.log(others.is_one.sum(axis=1))))
    assert loss < 0.5 * even
    assert net["features"].shape[0] == samples.features.shape[2]


def test_longer_matches_are_prolonged_with_more_confidence():
    samples = fit_hd_tree.collect(TABLES, turns(12), "c", seed=0)
    found = fit_hd_tree.prolonged(samples)
    assert found.shape == (MAX_MATCH + 1,) and np.all(found < 0)
    seen = samples.matches == MAX_MATCH
    assert found[MAX_MATCH] == pytest.approx(np.log(min((samples.is_hit[seen].sum() + 1) / (seen.sum() + 2), 0.985)), abs=1e-6)


def test_a_corpus_without_prompts_is_named(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"text": "abc"}) + "\n")

    class NoTokenizer:
        token_classes = np.zeros(1, np.int32)

    with pytest.raises(ValueError, match=r'own.jsonl, line 1: a record needs a "prompt"'):
        fit_hd_tree.split_corpora(str(path), None, NoTokenizer())  # pyright: ignore[reportArgumentType]
