"""The verification walk as a table, and against a walk token by token on random trees."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax import draft_tree, verify
from hd_jax.draft_tree import NO_NODE, NO_PARENT, NO_SOURCE, NO_TOKEN, UNUSED, DraftTree

P, U = NO_PARENT, UNUSED

# name, tokens, parents, window nodes, targets, path
WALKS = [
    ("plain decoding", [7], [P], [], [3], [0]),
    ("all of a chain", [7, 3, 4], [P, 0, 1], [], [3, 4, 5], [0, 1, 2]),
    ("none of a chain", [7, 3, 4], [P, 0, 1], [], [9, 4, 5], [0]),
    ("a match below a miss does not count", [7, 3, 4], [P, 0, 1], [], [8, 4, 5], [0]),
    ("the second branch", [7, 3, 4, 5, 6], [P, 0, 1, 0, 3], [], [5, 0, 0, 6, 1], [0, 3, 4]),
    ("the same token twice: the deeper wins", [7, 3, 3, 4], [P, 0, 0, 2], [], [3, 4, 4, 1], [0, 2, 3]),
    ("the same token twice, equally deep: the first", [7, 3, 3], [P, 0, 0], [], [3, 1, 1], [0, 1]),
    ("window nodes are never accepted", [7, 3, 4], [P, 0, 0], [1], [3, 0, 0], [0]),
    ("nor is what hangs below them", [7, 3, 4], [P, 0, 1], [1], [3, 4, 0], [0]),
    ("unused places are never accepted", [7, 3, 3], [P, U, 0], [], [3, 0, 5], [0, 2]),
    ("an unused place with the root's target", [7, 3], [P, U], [], [3, 3], [0]),
]


def _case(tokens, parents, window):
    n = len(tokens)
    return DraftTree(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(parents, jnp.int32),
        jnp.full(n, NO_SOURCE),
        jnp.isin(jnp.arange(n), jnp.asarray(window, int)),
        jnp.ones(n),
    )


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(("tokens", "parents", "window", "targets", "path"), [w[1:] for w in WALKS], ids=[w[0] for w in WALKS])
def test_walk(tokens, parents, window, targets, path, padding):
    tree = _case(tokens + [0] * padding, parents + [U] * padding, window)
    targets = jnp.asarray(targets + [0] * padding)
    found = verify.walk(tree, draft_tree.ancestor_mask(tree), targets, max_depth=5)
    assert found.nodes.tolist() == path + [NO_NODE] * (6 - len(path))
    assert int(found.num_accepted) == len(path) - 1


def _slow_walk(tree: DraftTree, targets: np.ndarray) -> int:
    """Depth of the deepest accepted node, branch by branch."""
    tokens, parents, window = (np.asarray(x) for x in (tree.tokens, tree.parents, tree.is_window))

    def below(node: int) -> int:
        children = [c for c in range(len(tokens)) if parents[c] == node and not window[c] and tokens[c] == targets[node]]
        return max([1 + below(c) for c in children], default=0)

    return below(0)


def test_walk_on_random_trees():
    rng = np.random.default_rng(1)
    walk = jax.jit(verify.walk, static_argnums=3)
    deep = 0
    for _ in range(300):
        n = 12
        parents = [P, *[int(rng.integers(-1, i)) for i in range(1, n)]]
        parents = [p if p >= 0 or i == 0 else U for i, p in enumerate(parents)]
        parents = [U if p >= 0 and parents[p] == U else p for p in parents]
        tree = _case(rng.integers(0, 2, n).tolist(), parents, np.flatnonzero(rng.random(n) < 0.1).tolist())
        tree = tree._replace(is_window=tree.is_window.at[0].set(False))
        targets = rng.integers(0, 2, n)
        ancestors = draft_tree.ancestor_mask(tree)
        found = walk(tree, ancestors, jnp.asarray(targets), n)
        assert int(found.num_accepted) == _slow_walk(tree, targets)
        nodes = [x for x in found.nodes.tolist() if x != NO_NODE]
        for parent, child in itertools.pairwise(nodes):
            assert parents[child] == parent and int(tree.tokens[child]) == targets[parent]
        deep += len(nodes) > 2
    assert deep > 30


def test_nodes_below_max_depth_are_not_accepted():
    tree = _case([7, 3, 4, 5], [P, 0, 1, 2], [])
    found = verify.walk(tree, draft_tree.ancestor_mask(tree), jnp.asarray([3, 4, 5, 6]), max_depth=2)
    assert found.nodes.tolist() == [0, 1, 2]
    assert int(found.num_accepted) == 2


def _tree(*nodes: tuple[int, int]) -> DraftTree:
    """A tree of (token, parent) nodes."""
    tokens, parents = (jnp.asarray(column, jnp.int32) for column in zip(*nodes, strict=True))
    return DraftTree(tokens, parents, jnp.zeros_like(tokens), jnp.zeros(len(nodes), bool), jnp.ones(len(nodes)))


@pytest.mark.parametrize(
    ("length", "tree", "expected"),
    [
        # The record is 5 6 7 8 9: the path 7 8 is in it; 4 is not, nor is the 8 after it, nor an unused place.
        (2, _tree((6, NO_PARENT), (7, 0), (4, 0), (8, 1), (8, 2), (0, UNUSED)), [7, 8, NO_TOKEN, 9, NO_TOKEN, NO_TOKEN]),
        (5, _tree((9, NO_PARENT), (5, 0)), [NO_TOKEN, NO_TOKEN]),  # the record has ended
    ],
)
def test_only_nodes_on_the_recorded_path_have_recorded_targets(length, tree, expected):
    recorded = jnp.asarray([5, 6, 7, 8, 9, NO_TOKEN, NO_TOKEN, NO_TOKEN])
    ancestors = draft_tree.ancestor_mask(tree)
    targets = verify.recorded_targets(recorded, tree, ancestors, draft_tree.depths(ancestors), jnp.int32(length))
    assert targets.tolist() == expected
