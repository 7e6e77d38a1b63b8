"""Trie merging, joining, ancestors and depths, as tables."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax import draft_tree
from hd_jax.draft_tree import NO_PARENT, NO_SOURCE, NO_TOKEN, UNUSED

P = NO_PARENT
U = UNUSED

# name, drafts, N, (tokens, parents) of the places used
MERGED = [
    ("nothing", [], 4, [9], [P]),
    ("one chain", [[4, 5, 6]], 4, [9, 4, 5, 6], [P, 0, 1, 2]),
    ("a common prefix", [[4, 5, 6], [4, 5, 7], [8]], 8, [9, 4, 5, 6, 7, 8], [P, 0, 1, 2, 2, 0]),
    ("the same twice", [[4, 5], [4, 5]], 8, [9, 4, 5], [P, 0, 1]),
    ("a prefix of an earlier one", [[4, 5, 6], [4, 5]], 8, [9, 4, 5, 6], [P, 0, 1, 2]),
    ("a continuation of an earlier one", [[4], [4, 5]], 8, [9, 4, 5], [P, 0, 1]),
    ("equal tails do not merge", [[4, 6], [5, 6]], 8, [9, 4, 6, 5, 6], [P, 0, 1, 0, 3]),
    ("the root's token may be drafted", [[9, 9]], 8, [9, 9, 9], [P, 0, 1]),
    ("cut at the budget, last draft first", [[4, 5], [6, 7]], 4, [9, 4, 5, 6], [P, 0, 1, 0]),
    ("an empty place between", [[], [4, 5]], 4, [9, 4, 5], [P, 0, 1]),
    (
        "three levels shared with different owners",
        [[1, 2, 3], [1, 5, 3], [1, 5, 4]],
        9,
        [9, 1, 2, 3, 5, 3, 4],
        [P, 0, 1, 2, 1, 4, 4],
    ),
]


def _pack(drafts: list[list[int]], padding: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    width = max([len(d) for d in drafts] + [1]) + padding
    places = [*drafts, *[[]] * (padding + (not drafts))]
    tokens = [d + [NO_TOKEN] * (width - len(d)) for d in places]
    return jnp.asarray(tokens, jnp.int32), jnp.asarray([len(d) for d in places], jnp.int32), jnp.arange(len(places))


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize(("drafts", "num_nodes", "tokens", "parents"), [m[1:] for m in MERGED], ids=[m[0] for m in MERGED])
def test_merge(drafts, num_nodes, tokens, parents, padding):
    tree = draft_tree.merge(jnp.int32(9), *_pack(drafts, padding), num_nodes)
    used = np.asarray(draft_tree.is_node(tree))
    assert used.tolist() == [True] * len(tokens) + [False] * (num_nodes - len(tokens))
    assert np.asarray(tree.tokens)[used].tolist() == tokens
    assert np.asarray(tree.parents)[used].tolist() == parents
    assert not np.any(np.asarray(tree.is_window))


def test_a_shared_node_keeps_the_source_of_its_first_draft():
    tree = draft_tree.merge(jnp.int32(9), *_pack([[4, 5], [4, 6], [7]]), 6)
    assert tree.sources.tolist() == [NO_SOURCE, 0, 0, 1, 2, NO_SOURCE]


def _random_drafts(rng: np.random.Generator) -> list[list[int]]:
    return [rng.integers(0, 3, rng.integers(0, 5)).tolist() for _ in range(rng.integers(1, 8))]


def test_merge_equals_a_dictionary_trie_on_random_drafts():
    rng = np.random.default_rng(0)
    merge = jax.jit(draft_tree.merge, static_argnums=4)
    for _ in range(200):
        drafts = _random_drafts(rng)
        drafts += [[]] * (8 - len(drafts))
        tokens = np.full((8, 5), NO_TOKEN, np.int32)
        for i, d in enumerate(drafts):
            tokens[i, : len(d)] = d
        num_nodes = 12
        tree = merge(jnp.int32(9), jnp.asarray(tokens), jnp.asarray([len(d) for d in drafts]), jnp.arange(8), num_nodes)
        trie: dict[tuple[int, ...], int] = {(): 0}
        for d in drafts:
            for end in range(1, len(d) + 1):
                trie.setdefault(tuple(d[:end]), len(trie))
        expected = [(p[-1], trie[p[:-1]]) for p in list(trie)[1:num_nodes]]
        found = list(zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True))[1 : len(expected) + 1]
        assert found == expected


def _tree(parents: list[int]) -> draft_tree.DraftTree:
    n = len(parents)
    return draft_tree.root_only(jnp.int32(0), n)._replace(parents=jnp.asarray(parents, jnp.int32))


@pytest.mark.parametrize(
    "parents",
    [[P], [P, 0], [P, 0, 1, 2, 3, 4, 5, 6, 7], [P, 0, 0, 1, 1, 2, 5], [P, 0, 1, U, U], [P, U, 0, 2, U, 3], [P] + [0] * 6],
)
def test_ancestors_and_depths(parents):
    mask = np.asarray(draft_tree.ancestor_mask(_tree(parents)))
    expected = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        while parent >= 0:
            expected[node, parent] = True
            parent = parents[parent]
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(np.asarray(draft_tree.depths(jnp.asarray(mask))), expected.sum(1) - 1)


def test_join_puts_the_second_tree_under_the_first_root():
    first = draft_tree.merge(jnp.int32(9), *_pack([[1, 2]]), 4)
    second = draft_tree.merge(jnp.int32(9), *_pack([[1, 3], [4]]), 5)
    joined = draft_tree.join(first, second)
    assert joined.tokens.tolist() == [9, 1, 2, 0, 1, 3, 4, 0]
    assert joined.parents.tolist() == [P, 0, 1, U, 0, 4, 0, U]


def test_sentinels_share_no_value():
    names = ("NO_PARENT", "UNUSED", "NO_SOURCE", "NO_TOKEN", "NO_NODE")
    assert len({getattr(draft_tree, name) for name in names}) == len(names)
