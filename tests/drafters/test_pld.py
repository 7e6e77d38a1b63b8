"""PLD against the rule in plain Python."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax import drafters
from hd_jax.draft_tree import is_node
from hd_jax.drafters.base import Context


def _lookup(text: list[int], max_ngram: int, num_tokens: int) -> list[int]:
    for n in range(min(max_ngram, len(text)), 0, -1):
        suffix = text[-n:]
        for start in range(len(text) - n):
            end = start + n + num_tokens
            if text[start : start + n] == suffix and end <= len(text):
                return text[start + n : end]
    return []


@pytest.mark.parametrize(("max_ngram", "num_tokens"), [(3, 10), (1, 2), (5, 1)])
def test_pld_drafts_what_followed_the_longest_suffix(max_ngram, num_tokens):
    rng = np.random.default_rng(0)
    drafter = drafters.pld(max_ngram=max_ngram, num_nodes=num_tokens + 1)
    draft = jax.jit(drafter.draft)
    found = 0
    for _ in range(150):
        text = rng.integers(0, 4, rng.integers(1, 40)).tolist()
        buffer = jnp.asarray(text + rng.integers(0, 4, 48 - len(text)).tolist(), jnp.int32)  # garbage behind the text
        tree = draft((), (), Context(buffer, jnp.int32(len(text)), jnp.int32(1)))
        expected = _lookup(text, max_ngram, num_tokens)
        used = np.asarray(is_node(tree))
        assert np.asarray(tree.tokens)[used].tolist() == [text[-1], *expected]
        assert np.asarray(tree.parents)[used].tolist() == list(range(-1, len(expected)))
        found += bool(expected)
    assert found > 50


@pytest.mark.parametrize("options", [{"max_ngram": 0}, {"num_nodes": 1}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="pld needs"):
        drafters.pld(**options)
