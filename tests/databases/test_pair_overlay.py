"""The overlay of changed rows against a dictionary."""

import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax.databases import pair_overlay
from hd_jax.draft_tree import NO_TOKEN


@pytest.mark.parametrize("num_buckets", [1, 8, 1 << 12])
def test_writes_and_lookups_are_those_of_a_dictionary(num_buckets):
    rng = np.random.default_rng(num_buckets)
    overlay = pair_overlay.empty(num_buckets, 3)
    known: dict[int, tuple[list[int], list[int]]] = {}  # by bucket
    for step in range(20):
        pairs = rng.integers(0, 5, (7, 2)).astype(np.int32)  # some twice
        tokens, weights = rng.integers(0, 9, (7, 3)), np.full((7, 3), step + 1.0)
        is_written = rng.random(7) < 0.7
        overlay = pair_overlay.write(
            overlay, jnp.asarray(pairs), jnp.asarray(tokens), jnp.asarray(weights), jnp.asarray(is_written)
        )
        places = np.asarray(pair_overlay.buckets(jnp.asarray(pairs), num_buckets)).tolist()
        for place, pair, row, is_kept in zip(places, pairs.tolist(), tokens.tolist(), is_written, strict=True):
            if is_kept:
                known[place] = (pair, row)
        asked = np.array([[a, b] for a in range(5) for b in range(5)], np.int32)
        found, _, is_found = pair_overlay.lookup(overlay, jnp.asarray(asked))
        for place, pair, row, is_hit in zip(
            np.asarray(pair_overlay.buckets(jnp.asarray(asked), num_buckets)).tolist(),
            asked.tolist(),
            found,
            is_found,
            strict=True,
        ):
            expected = known.get(place)
            assert bool(is_hit) == (expected is not None and expected[0] == pair)
            assert not is_hit or row.tolist() == expected[1]


def test_an_empty_bucket_is_no_row():
    pairs = jnp.asarray([[NO_TOKEN, NO_TOKEN], [NO_TOKEN, 3], [0, 0]])
    assert not pair_overlay.lookup(pair_overlay.empty(4, 2), pairs)[2].any()


def test_equal_tokens_are_added_up_and_the_heaviest_kept():
    tokens = jnp.asarray([[7, 5, 7, NO_TOKEN, 2], [NO_TOKEN, 4, NO_TOKEN, 4, 1]])
    weights = jnp.asarray([[1.0, 2.0, 1.5, 9.0, 2.5], [3.0, 0.5, 3.0, 0.5, 0.0]])
    found, sums = pair_overlay.merge(tokens, weights, 3)
    assert found.tolist() == [[7, 2, 5], [4, NO_TOKEN, NO_TOKEN]]  # 7 and 2 weigh the same: the first goes first
    assert sums.tolist() == [[2.5, 2.5, 2.0], [1.0, 0.0, 0.0]]
