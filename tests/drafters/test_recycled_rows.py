"""Recycled rows against dictionaries and sums by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax.databases import pair_overlay
from hd_jax.draft_tree import NO_NODE, NO_PARENT, NO_TOKEN, UNUSED, DraftTree
from hd_jax.drafters import recycled_rows
from hd_jax.drafters.base import Context, Feedback
from hd_jax.drafters.recycled_rows import NO_ROW, NUM_SUCCESSORS, OF_PAIR, OF_TOKEN, SHARE_STEP, Recycled

NUM_NODES, VOCAB = 6, 30
_write = jax.jit(recycled_rows.write)
_lookup = jax.jit(recycled_rows.lookup)


def _step(rng: np.random.Generator, text: list[int], num_appended: int) -> tuple[Context, Feedback, dict, np.ndarray]:
    """A random step whose root is text[-1 - num_appended]: what it is told, and the rows that it should leave."""
    root = len(text) - 1 - num_appended
    tokens = rng.integers(0, VOCAB, NUM_NODES)
    tokens[0] = text[root]
    parents = np.array([NO_PARENT, *(rng.integers(0, i) for i in range(1, NUM_NODES))])
    parents[-1] = UNUSED
    top = np.stack([rng.permutation(VOCAB)[:NUM_SUCCESSORS] for _ in range(NUM_NODES)])
    logits = -np.sort(-rng.normal(size=(NUM_NODES, NUM_SUCCESSORS)), axis=1)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    alone, pairs = {}, {}
    for node in range(NUM_NODES - 1):
        above = tokens[parents[node]] if node else (text[root - 1] if root else NO_TOKEN)
        alone[NO_TOKEN, int(tokens[node])] = node
        pairs[int(above), int(tokens[node])] = node
    rows = {key: dict(zip(top[node].tolist(), probabilities[node], strict=True)) for key, node in {**alone, **pairs}.items()}
    numbers = (jnp.asarray(x, jnp.int32) for x in (tokens, parents, np.zeros(NUM_NODES)))
    tree = DraftTree(*numbers, jnp.zeros(NUM_NODES, bool), jnp.ones(NUM_NODES))
    context = Context(jnp.asarray(text + [0] * (40 - len(text)), jnp.int32), jnp.int32(len(text)), jnp.int32(1))
    path = jnp.full(4, NO_NODE).at[0].set(0)
    feedback = Feedback(
        tree,
        tree.tokens,
        tree.tokens,
        jnp.asarray(top, jnp.int32),
        jnp.asarray(logits, jnp.float32),
        path,
        jnp.int32(num_appended),
    )
    return context, feedback, rows, top


def test_rows_are_those_last_seen_after_a_pair_or_a_token():
    rng = np.random.default_rng(0)
    recycled = recycled_rows.empty(2)
    expected: dict = {}
    in_bucket: dict = {}
    for step in range(40):
        text = rng.integers(0, VOCAB, int(rng.integers(2, 30)) if step else 2).tolist()
        context, feedback, rows, _ = _step(rng, text, num_appended=1)
        recycled = _write(recycled, context, feedback)
        for key, row in rows.items():  # in the order of writing; a key takes its bucket from another one
            (bucket,) = pair_overlay.buckets(jnp.asarray([key]), recycled_rows.MAX_ROWS).tolist()
            expected.pop(in_bucket.get(bucket), None)
            in_bucket[bucket], expected[key] = key, row
    pairs = np.array([(a, b) for a in range(-1, VOCAB) for b in range(VOCAB)])
    pairs[pairs[:, 0] < 0, 0] = NO_TOKEN
    found = _lookup(recycled, jnp.asarray(pairs, jnp.int32))
    num_of = {kind: 0 for kind in (NO_ROW, OF_TOKEN, OF_PAIR)}
    for place, (before, last) in enumerate(pairs.tolist()):
        kind = OF_PAIR if (before, last) in expected else OF_TOKEN if (NO_TOKEN, last) in expected else NO_ROW
        row = expected.get((before, last), expected.get((NO_TOKEN, last), {}))
        assert found.kinds[place] == kind
        told = {int(t): float(p) for t, p in zip(found.tokens[place], found.probabilities[place], strict=True) if t != NO_TOKEN}
        assert told == pytest.approx(row, abs=1e-6)
        num_of[kind] += 1
    assert num_of[OF_PAIR] > 50 and num_of[OF_TOKEN] > 50


def test_a_row_that_had_ended_leaves_nothing():
    context, feedback, _, _ = _step(np.random.default_rng(1), [1, 2, 3], num_appended=0)
    found = _lookup(_write(recycled_rows.empty(2), context, feedback), jnp.asarray([[2, 3], [1, 2]]))
    assert found.kinds.tolist() == [NO_ROW, NO_ROW] and np.all(found.tokens == NO_TOKEN)


def test_shares_move_to_what_told_the_outcomes():
    rng = np.random.default_rng(2)
    recycled = recycled_rows.empty(3)
    shares = np.asarray(recycled.shares).copy()
    for _ in range(50):
        kinds, classes = rng.integers(0, 3, 7), rng.integers(0, 3, 7)
        others, own = rng.random(7) * (rng.random(7) < 0.8), rng.random(7) * (rng.random(7) < 0.8)
        is_counted = rng.random(7) < 0.7
        told: dict = {}
        for kind, row_class, other, mine, counts in zip(kinds, classes, others, own, is_counted, strict=True):
            if counts and kind != NO_ROW and other + mine > 0:
                share = shares[kind, row_class]
                told.setdefault((kind, row_class), []).append(share * mine / (share * mine + (1 - share) * other))
        for key, outcomes in told.items():
            kept = (1 - SHARE_STEP) ** len(outcomes)
            shares[key] = np.clip(shares[key] * kept + np.mean(outcomes) * (1 - kept), 0, 0.95)
        found = Recycled(jnp.zeros((7, 1), jnp.int32), jnp.zeros((7, 1)), jnp.asarray(kinds))
        recycled = recycled_rows.learn_shares(
            recycled, found, jnp.asarray(classes), jnp.asarray(others), jnp.asarray(own), jnp.asarray(is_counted)
        )
        np.testing.assert_allclose(recycled.shares, shares, rtol=1e-4)
    assert np.ptp(shares[OF_TOKEN:]) > 0.01


def test_the_mixture_by_hand():
    recycled = recycled_rows.empty(1)._replace(shares=jnp.asarray([[0.0], [0.25], [0.5]]))
    found = Recycled(jnp.zeros((3, 1), jnp.int32), jnp.zeros((3, 1)), jnp.asarray([NO_ROW, OF_TOKEN, OF_PAIR]))
    others = jnp.log(jnp.asarray([[0.6, 0.0]] * 3))
    sums = jnp.asarray([[0.0, 0.0], [0.2, 0.4], [0.2, 0.4]])
    mixed = np.exp(recycled_rows.mixed(recycled, found, jnp.zeros(3, jnp.int32), others, sums))
    np.testing.assert_allclose(mixed, [[0.6, 0.0], [0.5, 0.1], [0.4, 0.2]], rtol=1e-5)
