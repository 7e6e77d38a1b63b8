"""The searches against plain Python: brute force for the best paths, and a Monte Carlo search with the same random numbers."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax.draft_tree import NO_PARENT, NO_SOURCE, NO_TOKEN, UNUSED, DraftTree
from hd_jax.drafters import tree_search
from hd_jax.drafters.tree_search import Puct, Rows

VOCAB_SIZE = 6

Path = tuple[int, ...]


class Matrix:
    """Random rows of 3 successors, some shorter or empty."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        shape = (VOCAB_SIZE, VOCAB_SIZE)
        self.tokens = np.array([[rng.permutation(VOCAB_SIZE)[:3] for _ in range(shape[1])] for _ in range(shape[0])], np.int32)
        sizes = rng.choice([0, 1, 2, 3], shape, p=[0.15, 0.1, 0.15, 0.6])
        is_used = np.arange(3) < sizes[..., None]
        drawn = np.sort(rng.dirichlet(np.ones(4), shape)[..., :3], axis=-1)[..., ::-1]
        self.tokens = np.where(is_used, self.tokens, NO_TOKEN)
        self.probabilities = np.where(is_used, drawn, 0).astype(np.float32)

    def row(self, pair: tuple[int, int]) -> list[tuple[int, float]]:
        found = zip(self.tokens[pair].tolist(), self.probabilities[pair].tolist(), strict=True)
        return [(token, p) for token, p in found if p > 0]

    def rows_fn(self, pairs: jax.Array) -> Rows:
        places = (jnp.clip(pairs[:, 0], 0, VOCAB_SIZE - 1), jnp.clip(pairs[:, 1], 0, VOCAB_SIZE - 1))
        is_known = jnp.all(pairs >= 0, axis=1, keepdims=True)
        tokens = jnp.where(is_known, jnp.asarray(self.tokens)[places], NO_TOKEN)
        return Rows(tokens, jnp.where(is_known, jnp.asarray(self.probabilities)[places], 0.0), pairs[:, 0] % 2)


def _paths(tree: DraftTree) -> list[Path]:
    """Of every used place but the root, in their order; parents stand before, and unused places last."""
    tokens, parents = np.asarray(tree.tokens).tolist(), np.asarray(tree.parents).tolist()
    assert parents[0] == NO_PARENT
    paths: list[Path] = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        if parent == UNUSED:
            break
        paths.append((*paths[parent], token))
    assert set(parents[len(paths) :]) <= {UNUSED}
    assert len(set(paths)) == len(paths)
    return paths[1:]


def _every_path(matrix: Matrix, pair: tuple[int, int], depth: int) -> dict[Path, float]:
    out: dict[Path, float] = {(): 1.0}
    for level in range(depth):
        for path in [path for path in out if len(path) == level]:
            newest = (*pair, *path)[-2:]
            for token, p in matrix.row((newest[0], newest[1])):
                out[(*path, token)] = float(np.float32(out[path]) * np.float32(p))
    del out[()]
    return out


@pytest.mark.parametrize(("depth", "num_nodes"), [(1, 8), (3, 8), (3, 20), (4, 40), (2, 64)])
def test_best_first_is_brute_force(depth, num_nodes):
    """With a width that leaves nothing out."""
    for seed in range(6):
        matrix, pair = Matrix(seed), (seed % VOCAB_SIZE, 1)
        draft = jax.jit(
            lambda pair, matrix=matrix: tree_search.best_first(
                matrix.rows_fn, pair, depth=depth, width=3**depth, num_nodes=num_nodes
            )
        )
        tree = draft(jnp.asarray(pair))
        every = _every_path(matrix, pair, depth)
        expected = sorted(every.values(), reverse=True)[: num_nodes - 1]
        paths = _paths(tree)
        assert [every[path] for path in paths] == pytest.approx(expected, rel=1e-5)
        for place, path in enumerate(paths, 1):
            assert tree.sources[place] == (*pair, *path)[-3] % 2
        assert tree.sources[0] == NO_SOURCE and tree.tokens[0] == pair[1]


def test_a_narrow_search_keeps_the_best_of_each_level():
    matrix, pair = Matrix(1), (0, 1)
    every = _every_path(matrix, pair, 3)
    level = [()]
    expected: dict[Path, float] = {}
    for depth in range(1, 4):
        children = {path: p for path, p in every.items() if len(path) == depth and path[:-1] in level}
        expected |= children
        level = sorted(children, key=lambda path: -children[path])[:2]
    tree = tree_search.best_first(matrix.rows_fn, jnp.asarray(pair), depth=3, width=2, num_nodes=64)
    assert set(_paths(tree)) == set(expected) and len(expected) > 6


class Node:
    def __init__(self, path: Path, total: float):
        self.path, self.total, self.visits, self.value = path, total, 0, 0.0
        self.children: dict[int, Node] = {}  # by rank


def _plain_search(matrix: Matrix, pair: tuple[int, int], noise: np.ndarray, settings: Puct) -> list[Node]:
    """Nodes in the order of their first visits, without the root."""
    root = Node((), 0.0)
    found: list[Node] = []

    def row_of(path: Path) -> list[tuple[int, float]]:
        newest = (*pair, *path)[-2:]
        return matrix.row((newest[0], newest[1]))

    def choice(node: Node, waiting: Counter[int], num_here: int) -> int:
        scores = []
        parent_visits = node.visits + num_here - 1
        for rank, (_, p) in enumerate(row_of(node.path)):
            child, before = node.children.get(rank), waiting[rank]
            n, mean = (child.visits, child.value / child.visits) if child else (0, 0.0)
            weight = settings.c1 + math.log((parent_visits + settings.c2 + 1) / settings.c2)
            score = mean + weight * p * math.sqrt(parent_visits) / (1 + n + before)
            scores.append(math.inf if settings.is_unvisited_first and not child and not before else score)
        return int(np.argmax(scores))

    for start in range(0, settings.iterations, settings.wave):
        trails = [[root] for _ in range(settings.wave)]
        fresh: dict[Path, tuple[int, int, Node, Node]] = {}  # who makes it, its rank, its parent, it
        for depth in range(settings.depth):
            here: dict[Path, list[int]] = {}
            for walker, trail in enumerate(trails):
                path = trail[-1].path
                if len(path) == depth and path not in fresh and row_of(path):
                    here.setdefault(path, []).append(walker)
            for walkers in here.values():
                node, waiting = trails[walkers[0]][-1], Counter[int]()
                for walker in walkers:
                    rank = choice(node, waiting, len(walkers))
                    waiting[rank] += 1
                    token, p = row_of(node.path)[rank]
                    path = (*node.path, token)
                    if rank not in node.children and path not in fresh:
                        fresh[path] = (walker, rank, node, Node(path, node.total + p))
                    trails[walker].append(node.children[rank] if rank in node.children else fresh[path][-1])
        for _, rank, parent, node in sorted(fresh.values(), key=lambda entry: entry[0]):
            parent.children[rank] = node
            found.append(node)
        for trail, uniform in zip(trails, noise[start : start + settings.wave], strict=True):
            path, total = trail[-1].path, trail[-1].total
            while len(path) < settings.depth and (row := row_of(path)):
                below = np.cumsum([p for _, p in row])
                token, p = row[min(int(np.sum(below <= uniform[len(path)] * below[-1])), len(row) - 1)]
                path, total = (*path, token), total + p
            for each in trail:
                each.visits += 1
                each.value += 1 + total
    return found


@pytest.mark.parametrize(
    "settings",
    [
        Puct(iterations=60, depth=4, num_paths=10),
        Puct(iterations=60, depth=4, is_unvisited_first=False, num_paths=10),
        Puct(iterations=40, depth=3, c1=1.0, c2=20.0, is_unvisited_first=False, num_paths=40),
        Puct(iterations=30, depth=1, num_paths=4),
        Puct(iterations=60, depth=4, num_paths=10, wave=10),
        Puct(iterations=60, depth=3, c1=2.0, is_unvisited_first=False, num_paths=10, wave=6),
    ],
)
def test_the_monte_carlo_search_is_that_of_plain_python(settings):
    run = jax.jit(
        lambda tokens, probabilities, pair, noise: tree_search.run_puct(
            lambda pairs: Rows(tokens[pairs[:, 0], pairs[:, 1]], probabilities[pairs[:, 0], pairs[:, 1]], pairs[:, 0] % 2),
            pair,
            noise,
            settings,
        )
    )
    for seed in range(4):
        matrix, pair = Matrix(seed), (seed % VOCAB_SIZE, 1)
        noise = np.random.default_rng(seed).random((settings.iterations, settings.depth)).astype(np.float32)
        search = run(matrix.tokens, matrix.probabilities, jnp.asarray(pair), noise)
        expected = _plain_search(matrix, pair, noise, settings)
        is_node = np.asarray(search.visits) > 0
        is_node[0] = False
        assert np.asarray(search.visits)[is_node].tolist() == [node.visits for node in expected]
        assert np.asarray(search.values)[is_node].tolist() == pytest.approx([node.value for node in expected], rel=1e-4)
        assert int(search.visits[0]) == settings.iterations
        paths = _paths(tree_search.most_visited(jnp.int32(pair[1]), search, settings.num_paths, 64))
        chosen = sorted(expected, key=lambda node: -node.visits)[: settings.num_paths]
        extended = [(*n.path, matrix.row((*pair, *n.path)[-2:])[0][0]) for n in chosen if matrix.row((*pair, *n.path)[-2:])]
        known = [node.path for node in chosen]
        assert paths == [*known, *(path for path in extended if path not in known)]


def test_visits_follow_the_probabilities_where_exploration_is_strong():
    """Then a node's share of the visits is the product of the probabilities: c1 decides, not the roll-outs."""
    matrix, pair = Matrix(3), (0, 1)
    noise = jax.random.uniform(jax.random.key(0), (1000, 2))
    farthest = {}
    for c1 in (0.0, 1000.0):
        settings = Puct(iterations=1000, depth=2, c1=c1, c2=1e6, is_unvisited_first=False)
        search = tree_search.run_puct(matrix.rows_fn, jnp.asarray(pair), noise, settings)
        shares = {}
        for node in np.flatnonzero(np.asarray(search.parents[1:]) == 0) + 1:
            if search.visits[node] > 0:
                shares[int(search.tokens[node])] = int(search.visits[node]) / 1000
        row = matrix.row(pair)
        total = sum(p for _, p in row)
        farthest[c1] = max(abs(shares.get(token, 0.0) - p / total) for token, p in row)
    assert farthest[1000.0] < 0.02 and farthest[0.0] > 0.2


def test_trees_are_cut_to_their_size_and_blank_without_successors():
    matrix, pair = Matrix(0), jnp.asarray([0, 1])
    noise = jax.random.uniform(jax.random.key(0), (30, 3))
    settings = Puct(iterations=30, depth=3, num_paths=12)
    whole = _paths(tree_search.mcts(matrix.rows_fn, pair, noise, settings=settings, num_nodes=64))
    for num_nodes in (2, 5, 9):
        cut = _paths(tree_search.mcts(matrix.rows_fn, pair, noise, settings=settings, num_nodes=num_nodes))
        assert cut == whole[: num_nodes - 1]
    nothing = lambda pairs: Rows(jnp.full((len(pairs), 3), NO_TOKEN), jnp.zeros((len(pairs), 3)), jnp.zeros(len(pairs), int))  # noqa: E731
    for tree in (
        tree_search.mcts(nothing, pair, noise, settings=settings, num_nodes=9),
        tree_search.best_first(nothing, pair, depth=3, width=4, num_nodes=9),
    ):
        assert _paths(tree) == []
    assert len(set(itertools.chain(whole))) == len(whole)
