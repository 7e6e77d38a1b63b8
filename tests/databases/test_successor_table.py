"""Successor tables against counting in plain Python: interpolated probabilities, the longest kept context, bounds."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax.databases import SEPARATOR, successor_table
from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.databases.successor_table import DISCOUNT, MIN_PROBABILITY, Successors, SuccessorTable, build
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.draft_tree import NO_TOKEN

WIDTH = 8  # of the texts' ends that are looked up
_lookup_all = jax.jit(successor_table.lookup)

Contexts = dict[tuple[int, ...], tuple[int, dict[int, float]]]  # how often continued, and the kept successors


def _documents(num_tokens: int = 6, seed: int = 0, num_documents: int = 5, length: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.choice(num_tokens, length, p=_zipf(num_tokens)).astype(np.int32) for _ in range(num_documents)]


def _zipf(num_tokens: int) -> np.ndarray:
    weights = 1 / np.arange(1, num_tokens + 1)
    return weights / weights.sum()


def _reference(documents: list[np.ndarray], max_order: int, num_successors: int, min_count: int) -> Contexts:
    """Every kept context with its likeliest successors, by the formula of the module."""
    following: dict[tuple[int, ...], collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for document in (document.tolist() for document in documents):
        for place, token in enumerate(document):
            for order in range(min(max_order, place) + 1):
                following[tuple(document[place - order : place])][token] += 1
    total = sum(following[()].values())
    kept: Contexts = {(): (total, {token: count / total for token, count in following[()].items()})}
    for context in sorted((c for c in following if c), key=len):
        counts = following[context]
        n = sum(counts.values())
        if n < min_count:
            continue
        shorter = kept[context[1:]][1]
        # Of the empty context, what never followed this one is not asked for: it would be the whole vocabulary.
        tokens = set(counts) if len(context) == 1 else set(counts) | set(shorter)
        lent = DISCOUNT * len(counts) / n
        found = {t: max(counts[t] - DISCOUNT, 0) / n + lent * shorter.get(t, 0) for t in tokens}
        best = sorted(found, key=lambda t: -found[t])[:num_successors]
        kept[context] = n, {token: found[token] for token in best if found[token] >= MIN_PROBABILITY}
    del kept[()]
    return kept


def _ends(texts: list[tuple[int, ...]]) -> jax.Array:
    """int32[Q, WIDTH], what precedes a text is NO_TOKEN."""
    return jnp.asarray([[NO_TOKEN] * (WIDTH - len(text)) + list(text[-WIDTH:]) for text in texts], jnp.int32)


def _lookup(table: SuccessorTable, ends: jax.Array) -> Successors:
    """What the first of the joined tables knows."""
    return jax.tree.map(lambda x: x[:, 0], _lookup_all(table, ends))


def _assert_as(found: Successors, row: int, context: tuple[int, ...], kept: Contexts) -> None:
    """That a row is what is known of the longest kept end of a context."""
    starts = (start for start in range(len(context) + 1) if context[start:] in kept)
    longest = context[next(starts, len(context)) :]
    count, expected = kept.get(longest, (0, {}))
    assert (int(found.orders[row]), int(found.counts[row])) == (len(longest), count)
    tokens, probabilities = np.asarray(found.tokens[row]), np.asarray(found.probabilities[row])
    num_found = len(expected)
    assert np.all(tokens[num_found:] == NO_TOKEN) and np.all(probabilities[num_found:] == 0)
    np.testing.assert_allclose(probabilities[:num_found], sorted(expected.values(), reverse=True), rtol=1e-5)
    found_tokens = tokens[:num_found].tolist()
    assert len(set(found_tokens)) == num_found
    np.testing.assert_allclose(probabilities[:num_found], [expected[token] for token in found_tokens], rtol=1e-5)


@pytest.mark.parametrize("min_count", [1, 2, 7])
@pytest.mark.parametrize("max_order", [1, 2, 5])
@pytest.mark.parametrize("form", ["text", "ngrams"])
def test_every_kept_context_has_the_interpolated_probabilities(form, max_order, min_count):
    documents = _documents()
    if form == "text":
        database = SuffixArray.build(documents)
    else:
        database = NgramTrie.build(documents, max_order=max_order + 1, min_documents=1)
    table = build(database, max_order=max_order, num_successors=8, min_count=min_count)
    kept = _reference(documents, max_order, 8, min_count)
    assert table.max_order == max_order and table.num_contexts == len(kept)
    contexts = list(kept)
    found = _lookup(table, _ends(contexts))
    for row, context in enumerate(contexts):
        _assert_as(found, row, context, kept)
    if min_count == 1:  # whatever is in no list has less than MIN_PROBABILITY, but for contexts of one token
        sums = [sum(probabilities.values()) for context, (_, probabilities) in kept.items() if len(context) == 2]
        assert all(sum_ > 0.5 for sum_ in sums)


def test_of_many_successors_the_likeliest_are_kept_and_lent():
    documents = _documents(num_tokens=30, num_documents=8, length=200)
    table = build(SuffixArray.build(documents), max_order=3, num_successors=4, min_count=1)
    kept = _reference(documents, 3, 4, 1)
    contexts = [context for context, (_, expected) in kept.items() if len(set(expected.values())) == len(expected) == 4]
    # A tie at the border may be cut on either side, here or in what was lent: the exact ones are the many without.
    found = _lookup(table, _ends(contexts))
    num_equal = 0
    for row, context in enumerate(contexts):
        assert int(found.orders[row]) == len(context)
        num_equal += set(np.asarray(found.tokens[row]).tolist()) == set(kept[context][1])
    assert num_equal > 0.9 * len(contexts) > 100


def test_a_rare_successor_is_left_out():
    documents = [np.array([1, 2] * 2000 + [1, 3], np.int32)]
    found = _lookup(build(SuffixArray.build(documents), max_order=2), _ends([(1,), (2, 1)]))
    assert found.tokens[:, 0].tolist() == [2, 2]
    assert 3 not in np.asarray(found.tokens)


@pytest.mark.parametrize("min_count", [1, 4])
def test_the_longest_kept_context_answers(min_count):
    documents = _documents(num_tokens=9, seed=1)
    table = build(SuffixArray.build(documents), max_order=4, num_successors=9, min_count=min_count)
    kept = _reference(documents, 4, 9, min_count)
    rng = np.random.default_rng(2)
    texts = [tuple(rng.integers(0, 10, WIDTH).tolist()) for _ in range(200)]  # token 9 stands in no document
    found = _lookup(table, _ends(texts))
    for row, text in enumerate(texts):
        _assert_as(found, row, text[-4:], kept)
    assert set(np.asarray(found.orders).tolist()) >= {0, 1, 2}


def test_a_text_may_be_shorter_than_the_longest_context():
    documents = _documents(num_tokens=3)
    table = build(SuffixArray.build(documents), max_order=5)
    kept = _reference(documents, 5, 16, 2)
    texts = [tuple(documents[0][:length].tolist()) for length in range(4)]
    found = _lookup(table, _ends(texts))
    assert found.orders.tolist() == [0, 1, 2, 3]
    for row, text in enumerate(texts):
        _assert_as(found, row, text, kept)


def test_nothing_is_counted_across_separators():
    documents = [np.array([1, 2, SEPARATOR, 3, 4], np.int32), np.array([1, 2], np.int32)]
    found = _lookup(build(SuffixArray.build(documents), min_count=1), _ends([(1,), (2,), (4,), (3,)]))
    assert found.orders.tolist() == [1, 0, 0, 1]
    assert found.tokens[:, 0].tolist() == [2, NO_TOKEN, NO_TOKEN, 4]


def test_a_trie_of_low_order_gives_contexts_as_long_as_it_goes():
    documents = _documents()
    table = build(NgramTrie.build(documents, max_order=3, min_documents=1), max_order=5, min_count=1)
    assert table.max_order == 2 and int(_lookup(table, _ends([tuple(documents[0][:6].tolist())])).orders[0]) == 2
    with pytest.raises(ValueError, match="at least two tokens"):
        build(NgramTrie.build(documents, max_order=1, min_documents=1))


def test_a_pruned_trie_keeps_the_shorter_contexts_of_its_contexts():
    trie = NgramTrie.build(_documents(num_documents=40), max_order=5, min_documents=3, max_bytes=4000)
    table = build(trie, max_order=4, min_count=1)
    contexts = {tuple(row[:-1].tolist()) for order in range(2, 6) for row in trie.ngrams(order)[0]}
    assert table.num_contexts == len(contexts)
    assert all(context[1:] in contexts for context in contexts if len(context) > 1)
    found = _lookup(table, _ends(list(contexts)))
    assert found.orders.tolist() == [len(context) for context in contexts]
    probabilities = np.asarray(found.probabilities)
    assert np.all(np.diff(probabilities, axis=1) <= 0) and np.all(probabilities.sum(axis=1) < 1.001)


def test_max_bytes_keeps_the_contexts_that_are_frequent():
    database = SuffixArray.build(_documents(num_tokens=20, num_documents=20))
    whole = build(database, min_count=1)
    assert build(database, min_count=1, max_bytes=whole.num_bytes).num_bytes == whole.num_bytes
    half = build(database, min_count=1, max_bytes=whole.num_bytes // 2)
    assert 0 < half.num_bytes <= whole.num_bytes // 2 and 0 < half.num_contexts < whole.num_contexts
    equals = [build(database, min_count=count) for count in (2, 4, 8)]
    assert half.num_bytes == next(table.num_bytes for table in equals if table.num_bytes <= whole.num_bytes // 2)
    with pytest.raises(ValueError, match="max_bytes 16 is less than an empty table takes"):
        build(database, max_bytes=16)


def test_num_bytes_are_those_of_the_arrays():
    table = build(SuffixArray.build(_documents()))
    assert table.num_bytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(table)) > 0


def _assert_knows_nothing(table: SuccessorTable) -> None:
    found = _lookup(table, _ends([(), (1, 2, 3)]))
    assert found.orders.tolist() == found.counts.tolist() == [0, 0]
    assert np.all(np.asarray(found.tokens) == NO_TOKEN) and np.all(np.asarray(found.probabilities) == 0)


def test_a_table_of_nothing_knows_nothing():
    _assert_knows_nothing(build(SuffixArray.build([])))
    _assert_knows_nothing(build(SuffixArray.build(_documents()), min_count=10**6))


@pytest.mark.parametrize("name", ["max_order", "num_successors", "min_count"])
def test_options_are_checked(name):
    with pytest.raises(ValueError, match="must be at least 1, not"):
        build(SuffixArray.build(_documents()), **{name: 0})
    with pytest.raises(ValueError, match="max_order must be at most 7, not 8"):
        build(SuffixArray.build(_documents()), max_order=8)


def test_joined_tables_answer_as_each_does_alone():
    makings = [(3, 8, 1), (5, 16, 2), (1, 4, 1), (2, 3, 10**6)]  # the last one knows nothing
    tables = [
        build(SuffixArray.build(_documents(9, seed)), max_order=order, num_successors=size, min_count=count)
        for seed, (order, size, count) in enumerate(makings)
    ]
    rng = np.random.default_rng(5)
    texts = [(), (1,), *(tuple(rng.integers(0, 10, WIDTH).tolist()) for _ in range(200))]
    joined = successor_table.join(tables)
    assert joined.num_contexts == sum(table.num_contexts for table in tables)
    assert (joined.max_order, joined.num_successors) == (5, 16)
    nested = successor_table.join([successor_table.join(tables[:2]), successor_table.join(tables[2:])])
    for whole in (joined, nested):
        found = _lookup_all(whole, _ends(texts))
        for number, table in enumerate(tables):
            own = _lookup(table, _ends(texts))
            size = table.num_successors
            for ours, theirs in zip(found, own, strict=True):
                ours = np.asarray(ours[:, number])
                np.testing.assert_array_equal(ours if ours.ndim == 1 else ours[:, :size], theirs)
            assert np.all(np.asarray(found.tokens[:, number, size:]) == NO_TOKEN)
    assert set(np.asarray(found.orders[:, 1]).tolist()) >= {0, 1, 2, 3}


def test_tables_that_are_too_large_to_number_are_not_joined(monkeypatch):
    monkeypatch.setattr(successor_table, "PLACE_BITS", 6)
    with pytest.raises(ValueError, match="contexts are too large; at most 63"):
        successor_table.join([build(SuffixArray.build(_documents()))] * 2)


def test_running_text_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(successor_table, "MAX_TEXT", 100)
    with pytest.raises(ValueError, match=r"a table of 205 tokens of running text .* at most 100.*build_databases"):
        build(SuffixArray.build(_documents()))


@pytest.mark.parametrize(
    "documents",
    [_documents(), [], [np.array([SEPARATOR, 3, SEPARATOR, SEPARATOR, 3, 4], np.int32), np.empty(0, np.int32)]],
    ids=["random", "none", "separators"],
)
def test_a_suffix_array_has_the_trie_of_its_documents(documents):
    built, found = NgramTrie.build(documents, max_order=4, min_documents=1), SuffixArray.build(documents).to_trie(4)
    assert found.max_order == built.max_order == 4
    for name in ("tokens", "counts", "child_starts"):
        for ours, theirs in zip(getattr(found, name), getattr(built, name), strict=True):
            np.testing.assert_array_equal(ours, theirs)
