"""The n-gram trie against counting in plain Python."""

from collections import Counter, defaultdict

import jax
import numpy as np
import pytest
from test_continuation_table import as_list, lookup_all, naive_best

from hd_jax.databases import SEPARATOR
from hd_jax.databases.ngram_trie import NgramTrie


def corpus(seed, num_documents=30, max_length=25, vocab=4):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, rng.integers(0, max_length)).astype(np.int32) for _ in range(num_documents)]


def naive_counts(documents, max_order, min_documents):
    counts, seen_in = Counter(), defaultdict(set)
    for number, document in enumerate(documents):
        for start in range(len(document)):
            for order in range(1, max_order + 1):
                ngram = tuple(document[start : start + order].tolist())
                if len(ngram) == order and SEPARATOR not in ngram:
                    counts[ngram] += 1
                    seen_in[ngram].add(number)
    return {ngram: count for ngram, count in counts.items() if len(seen_in[ngram]) >= min_documents}


def naive_continuations(kept, max_order, suffix, length):
    """Of the kept n-grams that extend `suffix` by at most `length`, those that no kept n-gram extends further."""
    longer = {ngram[:-1] for ngram in kept}
    full = min(len(suffix) + length, max_order)
    return {
        ngram[len(suffix) :]: count
        for ngram, count in kept.items()
        if ngram[: len(suffix)] == suffix and len(suffix) < len(ngram) <= full and (len(ngram) == full or ngram not in longer)
    }


@pytest.mark.parametrize("min_documents", [1, 3, 8])
@pytest.mark.parametrize("max_order", [1, 2, 4, 6])
def test_counts_equal_a_naive_count(max_order, min_documents):
    documents = corpus(max_order)
    documents.append(np.array([1, 2, SEPARATOR, 1, 2, 3, SEPARATOR], np.int32))
    trie = NgramTrie.build(documents, max_order=max_order, min_documents=min_documents)
    expected = naive_counts(documents, max_order, min_documents)
    found = {}
    for order in range(1, max_order + 1):
        ngrams, counts = trie.ngrams(order)
        rows = [tuple(row) for row in ngrams.tolist()]
        assert rows == sorted(rows)
        found.update(zip(rows, counts.tolist(), strict=True))
    assert found == expected and trie.num_ngrams == len(expected)


@pytest.mark.parametrize(("key_length", "length"), [(1, 4), (2, 4), (2, 1), (5, 4), (4, 1)])
def test_continuations_and_table_equal_a_naive_search(key_length, length):
    documents, max_order = corpus(8, num_documents=60, vocab=2), 6
    trie = NgramTrie.build(documents, max_order=max_order, min_documents=4)
    kept = naive_counts(documents, max_order, 4)
    table = trie.to_table(key_length, 5, length)
    suffixes = np.array(list(np.ndindex(*[3] * key_length)), np.int32)
    rng = np.random.default_rng(0)
    suffixes = suffixes[rng.permutation(len(suffixes))[:80]]
    looked_up = lookup_all(table, suffixes)
    num_hits = 0
    for index, suffix in enumerate(suffixes):
        expected = naive_best(naive_continuations(kept, max_order, tuple(suffix.tolist()), length), 5)
        assert as_list(trie.continuations(suffix, 5, length)) == expected
        assert looked_up[index] == expected
        num_hits += bool(expected)
    assert num_hits >= 2


def test_nothing_follows_the_longest_ngrams():
    trie = NgramTrie.build(corpus(0), max_order=2, min_documents=1)
    for suffix in ([0, 1], [0, 1, 2], []):
        assert [x.shape for x in trie.continuations(suffix, 3, 4)] == [(0, 4), (0,), (0,)]
    with pytest.raises(ValueError, match="keys of 1 to 1 tokens, not 2"):
        trie.to_table(2, 3, 4)


@pytest.mark.parametrize("share", [0.7, 0.3, 0.02])
def test_byte_bound_keeps_the_most_frequent(share):
    documents = corpus(5, num_documents=80)
    full = NgramTrie.build(documents, min_documents=2)
    bound = int(full.num_bytes * share)
    trie = NgramTrie.build(documents, min_documents=2, max_bytes=bound)
    assert trie.num_bytes <= bound and 0 < trie.num_ngrams < full.num_ngrams
    counts = naive_counts(documents, 6, 2)
    found = {tuple(row): count for m in range(1, 7) for row, count in zip(*(x.tolist() for x in trie.ngrams(m)), strict=True)}
    threshold = min(found.values())
    assert found == {ngram: count for ngram, count in counts.items() if count >= threshold}
    # The next lower count would not have fitted.
    more = sum(12 if len(ngram) < 6 else 8 for ngram, count in counts.items() if count >= threshold - 1) + 20
    assert threshold > 1 and more > bound


def test_file_round_trip(tmp_path):
    trie = NgramTrie.build(corpus(1), min_documents=3)
    trie.save(tmp_path / "t", fingerprint="f", settings={"inputs": ["a"]})
    opened = NgramTrie.open(tmp_path / "t", "f")
    for mine, theirs in zip(jax.tree.leaves(vars(trie)), jax.tree.leaves(vars(opened)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert isinstance(opened.tokens[0].base, np.memmap) and opened.max_order == 6
    assert as_list(opened.continuations([1], 4, 3)) == as_list(trie.continuations([1], 4, 3)) != []


def test_empty_corpora_and_bad_input():
    for documents in ([], [np.empty(0, np.int32)], corpus(0, num_documents=2)):
        trie = NgramTrie.build(documents, min_documents=3)
        assert trie.num_ngrams == 0 and trie.to_table(1, 2, 3).num_keys == 0
        assert as_list(trie.continuations([1], 2, 3)) == []
    with pytest.raises(ValueError, match="must be at least 1"):
        NgramTrie.build([], max_order=0)
    with pytest.raises(ValueError, match="less than the 20 bytes"):
        NgramTrie.build(corpus(0), max_bytes=19)
    with pytest.raises(ValueError, match="document 1 holds an id that is neither"):
        NgramTrie.build([np.array([1]), np.array([-1])])
    with pytest.raises(ValueError, match=r"document 0 is float64\[2\]"):
        NgramTrie.build([np.ones(2)])


def naive_prefixes(extensions, max_nodes, max_depth):
    """The trie of Counter `extensions` (continuation -> occurrences, with all its prefixes): (path, count), best first."""
    ranked = sorted(extensions.items(), key=lambda item: (-item[1], len(item[0]), item[0]))
    return [(path, count) for path, count in ranked if len(path) <= max_depth][:max_nodes]


def as_paths(tokens, parents, counts):
    """(path, count) of each node; a parent stands before its children."""
    paths = []
    for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True):
        assert -1 <= parent < len(paths)
        paths.append((*paths[parent], token) if parent >= 0 else (token,))
    assert all(array.dtype == np.int32 for array in (tokens, parents, counts))
    return list(zip(paths, counts.tolist(), strict=True))


@pytest.mark.parametrize(("max_nodes", "max_depth"), [(1, 1), (5, 3), (12, 2), (64, 10), (1000, 10)])
def test_frequent_prefixes_and_longest_suffix_equal_a_naive_search(max_nodes, max_depth):
    documents, max_order = corpus(8, num_documents=60, vocab=3), 5
    trie = NgramTrie.build(documents, max_order=max_order, min_documents=3)
    kept = naive_counts(documents, max_order, 3)
    rng = np.random.default_rng(1)
    num_hits, lengths = 0, set()
    for _ in range(60):
        tokens = rng.integers(0, 4, rng.integers(0, 7))
        suffix = tuple(tokens.tolist())
        extensions = Counter({n[len(suffix) :]: c for n, c in kept.items() if n[: len(suffix)] == suffix and n != suffix})
        expected = naive_prefixes(extensions, max_nodes, max_depth)
        assert as_paths(*trie.frequent_prefixes(tokens, max_nodes, max_depth)) == expected
        num_hits += bool(expected)
        found = [n for n in range(2, len(suffix) + 1) if any(k[:n] == suffix[-n:] and len(k) > n for k in kept)]
        length = max([n for n in found if n <= 3], default=0)
        assert trie.longest_suffix(tokens, 3, 2) == (length, kept.get(suffix[len(suffix) - length :], 0))
        lengths.add(length)
    assert num_hits >= 10 and lengths == {0, 2, 3}
