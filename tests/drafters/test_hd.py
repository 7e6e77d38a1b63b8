"""HD: D_c against a least-recently-used set in plain Python, the window's shape, the order of the databases."""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax import decode, draft_tree, drafters, exactness
from hd_jax.databases.collection import Databases
from hd_jax.databases.frequent_ngrams import FrequentNgrams
from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.draft_tree import NO_NODE, is_node
from hd_jax.drafters.base import Context, Feedback


class LeastRecentlyUsed:
    """The paper's D_c: for each first token, the latest distinct continuations; `size` of them stay."""

    def __init__(self, size: int):
        self.size = size
        self.table: dict[int, OrderedDict[tuple[int, ...], None]] = {}

    def insert(self, ngram) -> None:
        first, *rest = (int(t) for t in ngram)
        values = self.table.setdefault(first, OrderedDict())
        values.pop(tuple(rest), None)
        values[tuple(rest)] = None
        if len(values) > self.size:
            values.popitem(last=False)

    def latest_first(self, token: int) -> list[tuple[int, ...]]:
        return list(reversed(self.table.get(token, {})))


def _trie_of(drafts: list[tuple[int, ...]]) -> set[tuple[int, ...]]:
    return {draft[:end] for draft in drafts for end in range(1, len(draft) + 1)}


def _paths(tree: draft_tree.DraftTree, is_wanted) -> set[tuple[int, ...]]:
    """The token paths from the root to every node that is wanted."""
    tokens, parents = np.asarray(tree.tokens), np.asarray(tree.parents)
    out = set()
    for node in range(1, len(tokens)):
        if is_wanted[node]:
            path, at = [], node
            while at:
                path.append(int(tokens[at]))
                at = parents[at]
            out.add(tuple(reversed(path)))
    return out


def _context(buffer: np.ndarray, length: int) -> Context:
    return Context(jnp.asarray(buffer, jnp.int32), jnp.int32(length), jnp.int32(1))


@pytest.mark.parametrize("window", [0, 3])
def test_context_database_is_the_papers_lru(window):
    rng = np.random.default_rng(0)
    ngram, num_drafts = 4, 3
    drafter = drafters.hd(order="c", ngram=ngram, window=window, num_drafts=num_drafts, history=512)
    init, draft, update = jax.jit(drafter.init), jax.jit(drafter.draft), jax.jit(drafter.update)
    for _ in range(4):
        text = rng.integers(0, 4, 20).tolist()
        buffer = np.zeros(256, np.int64)
        buffer[:20] = text
        state = init(drafter.tables, _context(buffer, 20))
        model = LeastRecentlyUsed(num_drafts)
        for start in range(len(text) - ngram + 1):
            model.insert(text[start : start + ngram])
        for _ in range(25):
            tree = draft(drafter.tables, state, _context(buffer, len(text)))
            wanted = np.asarray(is_node(tree)) & ~np.asarray(tree.is_window)
            assert _paths(tree, wanted) == _trie_of(model.latest_first(text[-1]))
            argmax = rng.integers(0, 4, drafter.num_nodes)
            if window:
                nodes = [0, *range(drafter.num_nodes - (ngram - 1) * window + 1, drafter.num_nodes)]  # the window is last
                cells = np.asarray(tree.tokens)[nodes].reshape(ngram - 1, window)
                bottom = argmax[-window:]
                for column in range(window):
                    model.insert([*cells[:, column], bottom[column]])
            new = rng.integers(0, 4, rng.integers(1, drafter.max_depth + 2)).tolist()[:ngram]
            buffer[len(text) : len(text) + len(new)] = new
            text += new
            for end in range(len(text) - len(new) + 1, len(text) + 1):
                model.insert(text[end - ngram : end])
            path = jnp.full(drafter.max_depth + 1, NO_NODE)
            zeros = jnp.zeros((drafter.num_nodes, 0))
            feedback = Feedback(tree, tree.tokens, jnp.asarray(argmax, jnp.int32), zeros, zeros, path, jnp.int32(len(new)))
            state = update(drafter.tables, state, _context(buffer, len(text)), feedback)


def test_context_database_forgets_the_oldest_ngrams():
    drafter = drafters.hd(order="c", ngram=3, window=0, num_drafts=2, history=4)
    buffer = np.asarray([1, 2, 3, 4, 5, 6, 1, 0, 0])
    state = drafter.init(drafter.tables, _context(buffer, 7))
    tree = drafter.draft(drafter.tables, state, _context(buffer, 7))
    assert int(is_node(tree).sum()) == 1  # (1 2 3) is the fifth from the end
    larger = drafters.hd(order="c", ngram=3, window=0, num_drafts=2, history=5)
    tree = larger.draft(larger.tables, larger.init(larger.tables, _context(buffer, 7)), _context(buffer, 7))
    assert tree.tokens.tolist()[:3] == [1, 2, 3]


def test_a_finished_row_teaches_nothing():
    drafter = drafters.hd(order="c", ngram=3, window=2, num_drafts=2, history=16)
    buffer = np.asarray([1, 2, 3, 1, 2, 0, 0, 0])
    state = drafter.init(drafter.tables, _context(buffer, 5))
    tree = drafter.draft(drafter.tables, state, _context(buffer, 5))
    zeros = jnp.zeros((drafter.num_nodes, 0))
    feedback = Feedback(tree, tree.tokens, tree.tokens, zeros, zeros, jnp.full(drafter.max_depth + 1, NO_NODE), jnp.int32(0))
    after = drafter.update(drafter.tables, state, _context(buffer, 5), feedback)
    np.testing.assert_array_equal(after.log, state.log)


def test_window_is_a_tree_of_columns_under_a_first_row():
    drafter = drafters.hd(order="c", ngram=4, window=4, num_drafts=1)
    buffer = np.arange(10)
    tree = drafter.draft(drafter.tables, drafter.init(drafter.tables, _context(buffer, 10)), _context(buffer, 10))
    assert tree.tokens.shape == (15,)  # the root, a draft of three, and eleven cells
    assert tree.parents.tolist()[4:] == [0, 4, 5, 0, 4, 5, 6, 7, 8, 9, 10]
    assert tree.is_window.tolist() == [False] * 4 + [True] * 11
    depths = draft_tree.depths(draft_tree.ancestor_mask(tree))
    assert depths.tolist()[4:] == [1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5]
    assert int(depths.max()) <= drafter.max_depth


@functools.cache
def _databases(on_host: bool = False) -> Databases:
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 12, 200).astype(np.int32) for _ in range(8)]
    corpus = [rng.integers(2, 12, 400).astype(np.int32) for _ in range(8)]
    statistics = SuffixArray.build(corpus) if on_host else NgramTrie.build(corpus, max_order=6, min_documents=2)
    return Databases(model=FrequentNgrams.build(documents, n=5), statistics=statistics)


def _drafts(order: str, num_drafts: int, buffer: np.ndarray, length: int) -> list[tuple[str, tuple[int, ...]]]:
    """(source, path) of every node that no other node continues."""
    drafter = drafters.hd(_databases(), order=order, window=0, num_drafts=num_drafts)
    state = drafter.init(drafter.tables, _context(buffer, length))
    tree = drafter.draft(drafter.tables, state, _context(buffer, length))
    used = np.asarray(is_node(tree))
    parents, out = np.asarray(tree.parents), []
    for node in range(1, len(parents)):
        if used[node] and node not in parents[used]:
            path, at = [], node
            while at:
                path.append(int(tree.tokens[at]))
                at = parents[at]
            out.append((drafter.source_names[int(tree.sources[node])], tuple(reversed(path))))
    return out


ORDERS = ["".join(p) for size in (1, 2, 3) for p in itertools.permutations("cms", size)]


def test_tables_are_made_once_for_the_same_databases():
    databases = _databases()
    first, second = drafters.hd(databases), drafters.hd(databases, num_drafts=7)
    assert all(a is b for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    assert jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.parametrize("order", ORDERS)
def test_databases_are_asked_in_order_until_enough_drafts_are_found(order):
    buffer = np.random.default_rng(2).integers(2, 12, 64)
    alone = {letter: [path for _, path in _drafts(letter, 7, buffer, 60)] for letter in order}
    assert all(alone.values())
    names = {"c": "context", "m": "model", "s": "statistics"}
    for num_drafts in (1, 4, 7):
        found = _drafts(order, num_drafts, buffer, 60)
        expected: list[tuple[str, tuple[int, ...]]] = []
        for letter in order:
            for path in alone[letter]:
                if not any(path == kept[: len(path)] for _, kept in expected):
                    expected.append((names[letter], path))
        expected = expected[:num_drafts]
        leaves = [(s, p) for s, p in expected if not any(p == o[: len(p)] and p != o for _, o in expected)]
        assert found == leaves


def test_statistics_on_the_host_draft_what_the_device_does(lm, monkeypatch):
    import sys

    from hd_jax.drafters import hd as _  # noqa: F401

    module = sys.modules["hd_jax.drafters.hd"]
    databases = _databases(on_host=True)
    on_device = drafters.hd(databases, order="s", window=0)
    monkeypatch.setattr(module, "MAX_DEVICE_BYTES", 0)
    on_host = drafters.hd(databases, order="s", window=0)
    assert jax.tree.structure(on_host) == jax.tree.structure(drafters.hd(databases, order="s", window=0))
    assert on_device.refresh is None and on_host.refresh is not None
    prompt = np.random.default_rng(2).integers(2, 12, 30).tolist()
    a = decode.generate(lm, prompt, drafter=on_device, max_new_tokens=30, loop="host")
    b = decode.generate(lm, prompt, drafter=on_host, max_new_tokens=30, loop="host")
    c = decode.generate(lm, prompt, drafter=on_host, max_new_tokens=30)
    assert a.tokens == c.tokens == b.tokens == decode.generate(lm, prompt, max_new_tokens=30).tokens
    assert a.source_counts == b.source_counts
    assert sum(a.source_counts["statistics"]["proposed"]) > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_databases_and_the_window_together_write_plain_decodings_tokens(lm, temperature):
    prompt = np.random.default_rng(3).integers(2, 12, 30).tolist()
    options = {"max_new_tokens": 50, "temperature": temperature}
    reference = decode.generate(lm, prompt, **options)
    drafter = drafters.hd(_databases())
    out = decode.generate(lm, prompt, drafter=drafter, **options)
    assert exactness.check(lm, drafter, reference, out, temperature=temperature).is_explained
    assert drafter.num_nodes == 1 + 27 + 28


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "x"}, "letters 'cms'"),
        ({"order": "cc"}, "at most once"),
        ({"order": ""}, "letters 'cms'"),
        ({"ngram": 1}, "ngram must be at least 2"),
        ({"window": -1}, "window must be at least 0"),
        ({"num_drafts": 0}, "num_drafts must be at least 1"),
        ({"history": 14, "order": "c"}, "history must be at least"),
        ({"num_nodes": 20, "order": "c"}, "needs at least 29 nodes"),
        ({"order": "cm"}, "model database is missing"),
        ({"order": "cs"}, "statistics database is missing"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        drafters.hd(**options)
