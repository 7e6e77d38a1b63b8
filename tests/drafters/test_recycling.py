"""Token Recycling against plain Python: the template, the tree that a matrix fills, what is recorded of a step."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax import decode, draft_tree, drafters
from hd_jax.databases.collection import Databases
from hd_jax.draft_tree import NO_NODE, NO_PARENT, NO_SOURCE, NO_TOKEN, UNUSED, DraftTree
from hd_jax.drafters.base import Context, Drafter, Feedback
from hd_jax.drafters.recycling import PROBABILITIES, Template, recycling, template

VOCAB_SIZE = 12

Path = tuple[int, ...]


def _paths(shape: Template) -> list[Path]:
    """The ranks from the root to every node."""
    paths: list[Path] = [()]
    for parent, rank in zip(shape.parents[1:].tolist(), shape.ranks[1:].tolist(), strict=True):
        paths.append((*paths[parent], rank))
    return paths


@pytest.mark.parametrize(
    ("num_nodes", "num_successors", "max_depth"), [(81, 8, 6), (2, 8, 6), (17, 3, 2), (40, 2, 5), (30, 8, 3), (12, 1, 6)]
)
def test_the_template_is_the_likeliest_paths_level_by_level(num_nodes, num_successors, max_depth):
    shape = template(num_nodes, num_successors, max_depth)
    every = [p for depth in range(1, max_depth + 1) for p in itertools.product(range(num_successors), repeat=depth)]
    scaled = lambda path: math.prod(PROBABILITIES[rank] for rank in path) * 1000 ** (max_depth - len(path))  # noqa: E731
    best = sorted(every, key=lambda path: (-scaled(path), len(path), path))[: num_nodes - 1]
    paths = _paths(shape)
    assert paths == [(), *sorted(best, key=lambda path: (len(path), path))]
    depths = [len(path) for path in paths]
    assert shape.level_starts == (*(depths.index(depth) for depth in range(max(depths) + 1)), len(paths))


def test_a_smaller_template_is_part_of_a_larger_one():
    for num_nodes in range(2, 120):
        assert set(_paths(template(num_nodes, 8, 6))) < set(_paths(template(num_nodes + 1, 8, 6)))
    assert PROBABILITIES == tuple(sorted(PROBABILITIES, reverse=True)) and sum(PROBABILITIES) < 1000


def _context(root: int) -> Context:
    return Context(jnp.asarray([0, root, 0, 0], jnp.int32), jnp.int32(2), jnp.int32(1))


def _feedback(tree: DraftTree, top_tokens: np.ndarray, drafter: Drafter, num_appended: int = 1) -> Feedback:
    path = jnp.full(drafter.max_depth + 1, NO_NODE).at[0].set(0)
    zeros = jnp.zeros(top_tokens.shape, jnp.float32)
    return Feedback(tree, tree.tokens, tree.tokens, jnp.asarray(top_tokens, jnp.int32), zeros, path, jnp.int32(num_appended))


def _top_tokens(rng: np.random.Generator, drafter: Drafter) -> np.ndarray:
    size = drafter.num_top_logits
    return np.array([rng.permutation(VOCAB_SIZE)[:size] for _ in range(drafter.num_nodes)], np.int32)


def _expected(shape: Template, known: dict[int, list[int]], root: int) -> dict[Path, list[int]]:
    """The tokens along each path of ranks that the known successors lead along."""
    out: dict[Path, list[int]] = {(): [root]}
    for path in _paths(shape)[1:]:
        above = out.get(path[:-1])
        if above and above[-1] in known:
            out[path] = [*above, known[above[-1]][path[-1]]]
    return out


def test_trees_and_matrices_are_those_of_plain_python():
    """Two rows at once, each with a matrix of its own."""
    rng = np.random.default_rng(0)
    drafter = recycling(vocab_size=VOCAB_SIZE, num_successors=3, num_nodes=20)
    shape = template(20, 3, 6)
    assert drafter.max_depth == max(map(len, _paths(shape)))
    draft = jax.jit(jax.vmap(drafter.draft, in_axes=(None, 0, 0)))
    update = jax.jit(jax.vmap(drafter.update, in_axes=(None, 0, 0, 0)))
    stacked = lambda rows: jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)  # noqa: E731
    state = stacked([drafter.init((), _context(0))] * 2)
    known: list[dict[int, list[int]]] = [{}, {}]
    num_nodes = []
    for _ in range(12):
        roots = rng.integers(0, VOCAB_SIZE, 2).tolist()
        contexts = stacked([_context(root) for root in roots])
        trees = draft((), state, contexts)
        feedback = []
        for row, root in enumerate(roots):
            tree = jax.tree.map(lambda x, row=row: np.asarray(x[row]), trees)
            expected = _expected(shape, known[row], root)
            for place, path in enumerate(_paths(shape)):
                if path in expected:
                    parent = shape.parents[place]
                    assert (tree.tokens[place], tree.parents[place]) == (expected[path][-1], parent)
                else:
                    assert (tree.tokens[place], tree.parents[place]) == (0, UNUSED)
                assert tree.sources[place] == (0 if path in expected and path else NO_SOURCE)
            assert not tree.is_window.any()
            num_nodes.append(len(expected))
            top_tokens = _top_tokens(rng, drafter)
            for place, path in enumerate(_paths(shape)):
                if path in expected:
                    known[row][expected[path][-1]] = top_tokens[place].tolist()
            feedback.append(_feedback(jax.tree.map(jnp.asarray, tree), top_tokens, drafter))
        state = update((), state, contexts, stacked(feedback))
        for matrix, row in zip(np.asarray(state), known, strict=True):
            assert {token: matrix[token].tolist() for token in np.flatnonzero(matrix[:, 0] != NO_TOKEN).tolist()} == row
    assert num_nodes[:2] == [1, 1] and max(num_nodes) == 20


def test_the_last_of_several_nodes_with_one_token_is_recorded():
    drafter = recycling(vocab_size=VOCAB_SIZE, num_successors=2, num_nodes=6)
    tokens = jnp.asarray([5, 7, 5, 7, 0, 5])
    parents = jnp.asarray([NO_PARENT, 0, 1, 2, UNUSED, UNUSED])
    tree = DraftTree(tokens, parents, jnp.zeros(6, jnp.int32), jnp.zeros(6, bool), jnp.ones(6))
    matrix = drafter.init((), _context(5))
    top_tokens = np.arange(12).reshape(6, 2)
    after = np.asarray(drafter.update((), matrix, _context(5), _feedback(tree, top_tokens, drafter)))
    assert (after[5].tolist(), after[7].tolist()) == ([4, 5], [6, 7])  # of nodes 2 and 3; 4 and 5 are no nodes
    assert np.all(np.delete(after, [5, 7], axis=0) == NO_TOKEN)


def test_a_finished_row_teaches_nothing():
    rng = np.random.default_rng(1)
    drafter = recycling(vocab_size=VOCAB_SIZE, num_nodes=9)
    matrix = drafter.init((), _context(3))
    for num_appended in (1, 0):
        tree = drafter.draft((), matrix, _context(3))
        before, feedback = matrix, _feedback(tree, _top_tokens(rng, drafter), drafter, num_appended)
        matrix = drafter.update((), matrix, _context(3), feedback)
        assert np.array_equal(matrix, before) == (num_appended == 0)


def test_tokens_beyond_the_matrix_have_no_successors():
    drafter = recycling(vocab_size=VOCAB_SIZE, num_successors=2, num_nodes=4)
    full = jnp.full((VOCAB_SIZE, 2), VOCAB_SIZE + 3, jnp.int32)
    tree = drafter.draft((), full, _context(1))
    assert tree.parents.tolist()[:2] == [NO_PARENT, 0] and UNUSED in tree.parents.tolist()
    top_tokens = np.zeros((4, 2), np.int32)
    after = drafter.update((), full, _context(1), _feedback(tree, top_tokens, drafter))
    assert np.flatnonzero(np.any(after != full, axis=1)).tolist() == [1]


def test_a_model_with_its_successors_in_the_matrix_is_drafted_rightly(lm):
    """The matrix holds what the model said of each token: a text that repeats one token is drafted as deep as the tree."""
    drafter = decode.make_drafter(lm, "recycling", num_nodes=9)
    assert drafter.num_top_logits == 8 and drafter.num_nodes == 9
    out = decode.generate(lm, [3, 4, 5, 6, 7] * 5, drafter=drafter, max_new_tokens=60)
    assert out.accept_lengths[0] == 1 and max(out.accept_lengths) > 1
    assert out.source_counts["recycled"]["proposed"][0] > out.source_counts["recycled"]["accepted"][0] > 0


@pytest.mark.parametrize("remember", [True, False])
def test_a_session_keeps_the_matrix_if_asked_to(lm, remember):
    session = decode.Session(lm, drafter=decode.make_drafter(lm, "recycling", num_nodes=9, remember=remember))
    cold = session.generate("hello", max_new_tokens=40)
    session.reset()
    warm = session.generate("hello", max_new_tokens=40)
    assert warm.tokens == cold.tokens
    assert (warm.accept_lengths == cold.accept_lengths) == (not remember)
    assert warm.num_steps < cold.num_steps or not remember
    session.reset(keep_databases=False)
    assert session.generate("hello", max_new_tokens=40).accept_lengths == cold.accept_lengths


def test_makers_are_given_the_size_of_the_vocabulary():
    assert drafters.make("recycling", Databases(), {}, vocab_size=40) is recycling(vocab_size=40)
    assert drafters.make("recycling", Databases(), {"vocab_size": 30}, vocab_size=40) is recycling(vocab_size=30)
    assert drafters.make("pld", Databases(), {}, vocab_size=40) is drafters.pld()
    with pytest.raises(ValueError, match=r"recycling.*'vocab_size'"):
        drafters.make("recycling", Databases(), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 1}, "vocab_size must be at least 2, not 1"),
        ({"num_successors": 0}, "num_successors must be from 1 to 8, not 0"),
        ({"num_successors": 9}, "num_successors must be from 1 to 8, not 9"),
        ({"vocab_size": 5}, "num_successors must be from 1 to 5, not 8"),
        ({"max_depth": 0}, "max_depth must be at least 1, not 0"),
        ({"num_nodes": 1}, "num_nodes must be at least 2, not 1"),
        ({"remember": "False"}, "remember is true or false"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        recycling(**{"vocab_size": 48, **options})


def test_there_are_no_more_nodes_than_paths():
    drafter = recycling(vocab_size=48, num_successors=2, max_depth=2, num_nodes=81)
    assert (drafter.num_nodes, drafter.max_depth) == (1 + 2 + 4, 2)
    assert draft_tree.is_node(drafter.draft((), drafter.init((), _context(1)), _context(1))).sum() == 1
