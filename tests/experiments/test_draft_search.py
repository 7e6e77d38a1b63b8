"""The comparison of searches: each library's search against ours, the table, and what is refused."""

from __future__ import annotations

import builtins
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import draft_search
from experiments.traces import Turn
from hd_jax.databases.collection import Databases
from hd_jax.databases.trigrams import TrigramCounts
from hd_jax.draft_tree import UNUSED
from hd_jax.drafters import tree_search
from hd_jax.drafters.base import Context
from hd_jax.drafters.tree_search import Puct, Rows


@pytest.fixture(scope="module")
def databases() -> Databases:
    rng = np.random.default_rng(0)
    text = rng.choice(30, 3000, p=rng.dirichlet(np.full(30, 0.3))).astype(np.int32)
    return Databases(trigrams=TrigramCounts.build([text]))


@pytest.fixture(scope="module")
def table(databases):
    return databases.successors("trigrams", max_order=2, num_successors=12, min_count=1, discount=0.75)


def _context(tokens: list[int]) -> Context:
    padded = np.zeros(32, np.int32)
    padded[: len(tokens)] = tokens
    return Context(padded, np.int32(len(tokens)), np.int32(1))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("settings", [Puct(iterations=80), Puct(iterations=80, is_unvisited_first=False, num_paths=40)])
def test_the_numba_search_is_ours(table, settings, monkeypatch):
    pytest.importorskip("numba")
    from experiments import numba_search

    noise = np.random.default_rng(1).random((settings.iterations, settings.depth)).astype(np.float32)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: type("Fixed", (), {"random": lambda self, shape: noise})())
    drafter = numba_search.drafter(table, settings, 64)
    rows_fn = lambda pairs: Rows(*(found := tree_search_rows(table, pairs)), jnp.zeros(len(found[0]), jnp.int32))  # noqa: E731
    ours = jax.jit(lambda pair: tree_search.mcts(rows_fn, pair, jnp.asarray(noise), settings=settings, num_nodes=64))
    # Known pairs, a pair that the corpus lacks, a single token, and one that the corpus lacks.
    for tokens, least in (([1, 2, 3], 21), ([4, 5, 6, 0], 21), ([1, 17], 21), ([7], 21), ([29, 29], 1)):
        found = drafter.refresh(_context(tokens))
        expected = ours(jnp.asarray([tokens[-2] if len(tokens) > 1 else -4, tokens[-1]]))
        assert found.parents.tolist() == expected.parents.tolist()
        assert found.tokens[1:].tolist() == expected.tokens[1:].tolist()
        assert np.sum(found.parents != UNUSED) >= least


def tree_search_rows(table, pairs):
    from hd_jax.databases.successor_table import lookup

    found = lookup(table, pairs)
    return found.tokens[:, 0], found.probabilities[:, 0]


def test_the_mctx_search_drafts_likely_paths(table):
    """No child twice, only successors that the matrix has, and the root's likeliest three among them."""
    pytest.importorskip("mctx")
    from experiments import mctx_search

    settings = Puct(iterations=60, num_paths=20)
    drafter = mctx_search.drafter(table, settings, 64)
    draft = jax.jit(drafter.draft)
    for tokens in ([1, 2, 3], [4, 5, 6, 0]):
        context = jax.tree.map(jnp.asarray, _context(tokens))
        tree = jax.tree.map(np.asarray, draft(table, (), context))
        paths = [tuple(tokens[-2:])]
        for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
            if parent == UNUSED:
                break
            pair = paths[parent][-2:]
            assert token in tree_search_rows(table, jnp.asarray([pair]))[0][0].tolist()
            paths.append((*paths[parent], token))
        assert len(set(paths)) == len(paths) > 20 and max(map(len, paths)) <= 2 + settings.depth + 1
        likeliest = tree_search_rows(table, jnp.asarray([tokens[-2:]]))[0][0][:3].tolist()
        assert {path[2] for path in paths if len(path) == 3} >= set(likeliest)


def test_a_variant_is_measured(databases):
    rng = np.random.default_rng(2)
    texts = [Turn(1, 0, "qa", 0, rng.integers(0, 30, 8).tolist(), rng.integers(0, 30, 40).tolist()) for _ in range(2)]
    found = draft_search.variants(databases, ["best_first", "jax", "waves"], [8.0], [20], 5, 16)
    assert [variant.name for variant in found] == ["best_first, depth 4", "best_first, depth 6", *["jax"] * 3, *["waves"] * 2]
    rows = [draft_search.measure(variant, texts) for variant in (found[0], found[4], found[-1])]
    head, body = draft_search.tables(rows)
    assert [line[:6] for line in body] == [
        ["best_first, depth 4", "", "", "", "", ""],
        ["jax", "20", "1", "8", "no", "15"],
        ["waves", "20", "5", "32", "no", "24"],
    ]
    for row, line in zip(rows, body, strict=True):
        assert row["tokens"] == 80 and 1 <= row["tokens_per_step"] == 80 / row["steps"] and row["draft_us"] > 0
        assert len(line) == len(head)


@pytest.mark.parametrize("name", ["mctx", "numba"])
def test_a_missing_package_is_named(databases, monkeypatch, name):
    real = builtins.__import__

    def without(wanted, *args, **kwargs):
        if wanted == name:
            raise ImportError(f"No module named {name!r}")
        return real(wanted, *args, **kwargs)

    monkeypatch.delitem(sys.modules, f"experiments.{name}_search", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=rf"variant {name} needs the package {name}.*pip install -e '.\[search\]'"):
        draft_search.variants(databases, [name], [], [10], 5, 16)


def test_an_unknown_variant_is_named(databases):
    with pytest.raises(ValueError, match="--variants names dfs; there are: best_first, jax, waves, mctx, numba"):
        draft_search.variants(databases, ["dfs"], [], [10], 5, 16)
