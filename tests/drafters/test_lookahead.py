"""Lookahead: its pool against the authors' rule in plain Python, and that hd's D_c alone is the same method."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax import decode, draft_tree, drafters
from hd_jax.draft_tree import NO_NODE, is_node
from hd_jax.drafters.base import Context, Feedback

Ngram = tuple[int, ...]


class Pool:
    """For each first token a list of continuations, the newest last; what is seen again moves to the end."""

    def __init__(self, size: int):
        self.size, self.continuations = size, dict[int, list[Ngram]]()

    def add(self, ngram: list[int]) -> None:
        values = self.continuations.setdefault(ngram[0], [])
        if tuple(ngram[1:]) in values:
            values.remove(tuple(ngram[1:]))
        values.append(tuple(ngram[1:]))
        del values[: -self.size]

    def prefixes(self, token: int) -> set[Ngram]:
        return {value[:end] for value in self.continuations.get(token, []) for end in range(1, len(value) + 1)}


def _context(text: list[int]) -> Context:
    garbage = [2] * (128 - len(text))
    return Context(jnp.asarray(text + garbage, jnp.int32), jnp.int32(len(text)), jnp.int32(1))


def _feedback(drafter, tree, argmax, num_appended: int) -> Feedback:
    zeros = jnp.zeros((drafter.num_nodes, 0))
    path = jnp.full(drafter.max_depth + 1, NO_NODE)
    return Feedback(tree, tree.tokens, jnp.asarray(argmax, jnp.int32), zeros, zeros, path, jnp.int32(num_appended))


def _drafted(tree: draft_tree.DraftTree) -> set[Ngram]:
    """The token paths of the nodes that are not the window's."""
    paths: dict[int, Ngram] = {0: ()}
    for place in np.flatnonzero(is_node(tree) & ~tree.is_window)[1:].tolist():
        paths[place] = (*paths[int(tree.parents[place])], int(tree.tokens[place]))
    assert len(set(paths.values())) == len(paths)
    return set(paths.values()) - {()}


@pytest.mark.parametrize("pool_from_prompt", [True, False])
def test_the_pool_is_the_windows_ngrams_and_those_of_the_text(pool_from_prompt):
    rng = np.random.default_rng(0)
    ngram, window, num_drafts = 3, 4, 2
    drafter = drafters.lookahead(ngram=ngram, window=window, num_drafts=num_drafts, pool_from_prompt=pool_from_prompt)
    draft, update = jax.jit(drafter.draft), jax.jit(drafter.update)
    text = rng.integers(0, 4, 15).tolist()
    pool, state = Pool(num_drafts), drafter.init((), _context(text))
    for start in range(len(text) - ngram + 1 if pool_from_prompt else 0):
        pool.add(text[start : start + ngram])
    num_drafted = 0
    for step in range(25):
        tree = draft((), state, _context(text))
        num_window = (ngram - 1) * window
        cells = [0, *range(drafter.num_nodes - num_window + 1, drafter.num_nodes)]
        rows = np.asarray(tree.tokens)[cells].reshape(ngram - 1, window).tolist()
        assert rows[0][0] == text[-1]
        if step:
            assert rows[0][1:] == expected[0][1:] and rows[1:] == expected[1:]  # noqa: F821 - of the step before
        drafts = _drafted(tree)
        assert drafts == pool.prefixes(text[-1])
        num_drafted += len(drafts)
        argmax = rng.integers(0, 4, drafter.num_nodes)
        expected = [*rows[1:], argmax[cells[-window:]].tolist()]
        for column in zip(rows[0], *expected, strict=True):
            pool.add(list(column))
        num_appended = int(rng.integers(1, ngram + 1))
        for token in rng.integers(0, 4, num_appended).tolist():
            text.append(token)
            if pool_from_prompt:
                pool.add(text[-ngram:])
        state = update((), state, _context(text), _feedback(drafter, tree, argmax, num_appended))
    assert num_drafted > 50


def test_a_window_that_was_not_verified_stays_as_it_is():
    drafter = drafters.lookahead(ngram=3, window=3, num_drafts=2, pool_from_prompt=False)
    context = _context([1, 3, 1, 3, 1])
    state = drafter.init((), context)
    tree = drafter.draft((), state, context)
    argmax = np.arange(drafter.num_nodes)
    whole = drafter.update((), state, context, _feedback(drafter, tree, argmax, 1))
    assert (int(whole.num_logged), whole.window[-1].tolist()) == (3, argmax[-3:].tolist())
    cut = tree._replace(parents=tree.parents.at[-1].set(draft_tree.UNUSED))
    after = drafter.update((), state, context, _feedback(drafter, cut, argmax, 1))
    assert int(after.num_logged) == 0
    np.testing.assert_array_equal(after.window, state.window)


def test_nothing_is_drafted_before_the_window_made_anything():
    drafter = drafters.lookahead(ngram=3, window=2, num_drafts=2, pool_from_prompt=False)
    state = drafter.init((), _context([1, 3, 1, 3, 1]))
    assert not _drafted(drafter.draft((), state, _context([1, 3, 1, 3, 1])))


def test_a_finished_row_teaches_nothing():
    for pool_from_prompt in (True, False):
        drafter = drafters.lookahead(ngram=3, window=2, num_drafts=2, pool_from_prompt=pool_from_prompt)
        context = _context([1, 3, 1, 3, 1])
        state = drafter.init((), context)
        tree = drafter.draft((), state, context)
        for num_appended in (0, 1):
            after = drafter.update((), state, context, _feedback(drafter, tree, tree.tokens, num_appended))
            assert np.array_equal(after.log, state.log) == (num_appended == 0)
            assert int(after.num_logged - state.num_logged) == num_appended * (2 + pool_from_prompt)


def test_the_papers_settings():
    drafter = drafters.lookahead()
    assert (drafter.num_nodes, drafter.max_depth) == (1 + 59 + 60, 17)


def test_it_is_hd_with_the_context_database_alone(lm):
    options = {"window": 3, "num_drafts": 3, "history": 64}
    prompt = [3, 4, 5, 6, 7] * 5
    both = (drafters.lookahead(**options), drafters.hd(order="c", **options))
    first, second = (decode.generate(lm, prompt, drafter=each, max_new_tokens=60) for each in both)
    assert first.accept_lengths == second.accept_lengths and max(first.accept_lengths) > 1
    assert first.source_counts["pool"] == second.source_counts["context"]


def test_the_window_alone_makes_drafts_that_are_accepted(lm):
    drafter = drafters.lookahead(ngram=3, window=6, pool_from_prompt=False)
    out = decode.generate(lm, [9], drafter=drafter, max_new_tokens=100)
    assert out.tokens == decode.generate(lm, [9], max_new_tokens=100).tokens
    assert out.tokens_per_step > 1.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ngram": 1}, "ngram must be at least 2, not 1"),
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"num_drafts": 0}, "num_drafts must be at least 1, not 0"),
        ({"history": 32}, "history must be at least 33, not 32"),
        ({"num_nodes": 60}, "needs at least 61 nodes, not 60"),
        ({"pool_from_prompt": "no"}, "pool_from_prompt is true or false"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        drafters.lookahead(**options)
