"""Tri-gram counts against counting in plain Python."""

from collections import Counter, defaultdict

import jax.numpy as jnp
import numpy as np
import pytest
from test_continuation_table import lookup_all
from test_ngram_trie import corpus

from hd_jax.databases import successor_table
from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.databases.trigrams import TrigramCounts
from hd_jax.draft_tree import NO_TOKEN


def naive(documents, max_successors):
    counts = defaultdict(Counter)
    for document in documents:
        for first, second, third in zip(document[:-2], document[1:-1], document[2:], strict=True):
            counts[int(first), int(second)][int(third)] += 1
    best = {pair: sorted(c.items(), key=lambda item: (-item[1], item[0]))[:max_successors] for pair, c in counts.items()}
    return best, {pair: c.total() for pair, c in counts.items()}


def as_dict(database):
    rows = list(zip(database.successors.tolist(), database.counts.tolist(), strict=True))
    starts = database.starts.tolist()
    pairs = [tuple(pair) for pair in database.pairs.tolist()]
    assert pairs == sorted(pairs)
    return {pair: rows[starts[i] : starts[i + 1]] for i, pair in enumerate(pairs)}


@pytest.mark.parametrize("max_successors", [1, 4, 12])
def test_counts_and_table_equal_a_naive_count(max_successors):
    documents = corpus(3, num_documents=60, vocab=15)
    database = TrigramCounts.build(documents, max_successors=max_successors)
    best, totals = naive(documents, max_successors)
    assert as_dict(database) == best
    assert dict(zip(map(tuple, database.pairs.tolist()), database.totals.tolist(), strict=True)) == totals
    table = database.to_table(3)
    pairs = [*best, (15, 0)]
    expected = [[((token,), count) for token, count in best.get(pair, [])[:3]] for pair in pairs]
    assert lookup_all(table, np.array(pairs, np.int32)) == expected


def test_bounds_keep_the_most_frequent_pairs():
    documents = corpus(4, num_documents=60, vocab=8)
    best, totals = naive(documents, 12)
    ranked = sorted(totals, key=lambda pair: (-totals[pair], pair))
    assert as_dict(TrigramCounts.build(documents, max_pairs=10)) == {pair: best[pair] for pair in ranked[:10]}
    full = TrigramCounts.build(documents)
    bounded = TrigramCounts.build(documents, max_bytes=full.num_bytes // 2)
    num_pairs = len(bounded.pairs)
    assert bounded.num_bytes <= full.num_bytes // 2 and 0 < num_pairs < len(ranked)
    assert as_dict(bounded) == {pair: best[pair] for pair in ranked[:num_pairs]}
    assert bounded.num_bytes + 16 + 8 * len(best[ranked[num_pairs]]) > full.num_bytes // 2


def test_the_successor_table_is_that_of_the_whole_corpus_if_nothing_was_left_out():
    documents = [np.concatenate(corpus(6, num_documents=60, vocab=9))]
    whole = successor_table.build(NgramTrie.build(documents, max_order=3, min_documents=1), max_order=2, min_count=1)
    counts = TrigramCounts.build(documents, max_successors=9)
    assert not counts.left_out.any()
    table = successor_table.build(counts, min_count=1)
    for first, second in counts.pairs[::5].tolist():
        suffix = jnp.asarray([[first, second]])
        expected, found = successor_table.lookup(whole, suffix), successor_table.lookup(table, suffix)
        assert found.orders.tolist() == [[2]] and found.counts.tolist() == expected.counts.tolist()
        as_row = lambda answer: dict(zip(answer.tokens[0, 0].tolist(), answer.probabilities[0, 0].tolist(), strict=True))  # noqa: E731
        # No tri-gram tells of a bigram before a separator or a document's end.
        assert as_row(found) == pytest.approx(as_row(expected), abs=0.02)


def test_what_was_left_out_of_a_pair_is_lent_by_its_second_token():
    documents = corpus(6, num_documents=60, vocab=9)
    best, totals = naive(documents, 2)
    counts = TrigramCounts.build(documents, max_successors=2)
    table = successor_table.build(counts, min_count=1, discount=0.0, num_successors=9)
    for place, pair in enumerate(map(tuple, counts.pairs.tolist())):
        kept = dict(best[pair])
        missing = totals[pair] - sum(kept.values())
        assert counts.left_out[place] == missing
        after = {b: n for (a, b), n in totals.items() if a == pair[1]}
        expected = {t: missing / totals[pair] * n / sum(after.values()) for t, n in after.items()} if after else {}
        for token, count in kept.items():
            expected[token] = expected.get(token, 0.0) + count / totals[pair]
        found = successor_table.lookup(table, jnp.asarray([pair]))
        row = dict(zip(found.tokens[0, 0].tolist(), found.probabilities[0, 0].tolist(), strict=True))
        row.pop(NO_TOKEN, None)
        assert row == pytest.approx({t: p for t, p in expected.items() if p >= successor_table.MIN_PROBABILITY}, abs=1e-5)


def test_file_round_trip_and_bad_input(tmp_path):
    database = TrigramCounts.build(corpus(0))
    database.save(tmp_path / "t", fingerprint="f")
    opened = TrigramCounts.open(tmp_path / "t", "f")
    assert as_dict(opened) == as_dict(database) != {}
    np.testing.assert_array_equal(opened.totals, database.totals)
    assert TrigramCounts.build([]).to_table().num_keys == 0
    with pytest.raises(ValueError, match="max_successors >= 1"):
        TrigramCounts.build([], max_successors=0)
