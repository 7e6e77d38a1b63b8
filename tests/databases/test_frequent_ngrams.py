"""D_m against counting in plain Python."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from test_continuation_table import lookup_all, naive_best
from test_ngram_trie import corpus

from hd_jax.databases import SEPARATOR
from hd_jax.databases.frequent_ngrams import FrequentNgrams


def naive(documents, n):
    counts = Counter(ngram for d in documents for ngram in {tuple(d[i : i + n].tolist()) for i in range(len(d) - n + 1)})
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("max_ngrams", [5, 60, 100_000])
def test_ngrams_and_table_equal_a_naive_count(n, max_ngrams):
    documents = corpus(n, num_documents=40, max_length=12)
    expected = naive(documents, n)[:max_ngrams]
    database = FrequentNgrams.build(documents, n, max_ngrams)
    assert [tuple(row) for row in database.ngrams.tolist()] == [ngram for ngram, _ in expected]
    assert database.counts.tolist() == [count for _, count in expected]
    by_first = defaultdict(dict)
    for ngram, count in expected:
        by_first[ngram[0]][ngram[1:]] = count
    table = database.to_table()
    suffixes = np.arange(5, dtype=np.int32)[:, None]
    assert lookup_all(table, suffixes) == [naive_best(by_first[token], 7) for token in range(5)]


def test_all_answers_and_their_last_ngrams_count():
    documents = [np.array([10 * i, 10 * i + 1, 10 * i + 2], np.int32) for i in range(1, 40)]
    database = FrequentNgrams.build(documents, 3)
    assert database.ngrams.tolist() == [d.tolist() for d in documents]


def test_an_answer_that_repeats_itself_counts_once():
    documents = [np.array([1, 2, 1, 2, 1, 2]), np.array([3, 4, SEPARATOR, 3, 4]), np.array([3, 4, SEPARATOR, 5])]
    database = FrequentNgrams.build(documents, 2)
    assert database.ngrams.tolist() == [[3, 4], [1, 2], [2, 1]] and database.counts.tolist() == [2, 1, 1]


def test_bounds_and_file(tmp_path):
    documents = corpus(0)
    assert FrequentNgrams.build(documents, 5, max_bytes=24 * 9 + 23).ngrams.shape == (9, 5)
    database = FrequentNgrams.build(documents, 5, 20)
    database.save(tmp_path / "m", fingerprint="f")
    opened = FrequentNgrams.open(tmp_path / "m", "f")
    np.testing.assert_array_equal(opened.ngrams, database.ngrams)
    np.testing.assert_array_equal(opened.counts, database.counts)
    assert FrequentNgrams.build([], 5).ngrams.shape == (0, 5)
    with pytest.raises(ValueError, match="n >= 2"):
        FrequentNgrams.build(documents, 1)
