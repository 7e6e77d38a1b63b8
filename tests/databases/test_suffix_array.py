"""The suffix array against a naive search."""

import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from test_continuation_table import as_list, lookup_all, naive_best
from test_ngram_trie import as_paths, corpus, naive_prefixes

from hd_jax.databases import SEPARATOR, suffix_array
from hd_jax.databases.collection import Databases
from hd_jax.databases.suffix_array import SuffixArray


def naive_continuations(documents, suffix, length):
    counts = Counter()
    for document in documents:
        pieces = [[]]
        for token in document.tolist():
            pieces.append([]) if token == SEPARATOR else pieces[-1].append(token)
        for piece in pieces:
            for start in range(len(piece) - len(suffix)):
                if tuple(piece[start : start + len(suffix)]) == suffix:
                    counts[tuple(piece[start + len(suffix) : start + len(suffix) + length])] += 1
    return counts


@pytest.mark.parametrize("highest", [3, 300, 70_000, 2**31 - 1])
def test_suffixes_are_sorted_whatever_the_width_of_the_ids(highest):
    documents = [np.where(d == 3, highest, d).astype(np.int32) for d in corpus(1, num_documents=12)]
    database = SuffixArray.build([*documents, np.array([0, SEPARATOR, 0, 1])])
    text = database.text.tolist()
    assert database.suffix_array.tolist() == sorted(range(len(text)), key=lambda place: text[place:])
    assert database.suffix_array.dtype == np.int32 and database.num_bytes == 8 * len(text)


@pytest.mark.parametrize(("key_length", "length"), [(1, 4), (2, 4), (3, 1), (6, 2)])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_continuations_and_table_equal_a_naive_search(monkeypatch, key_length, length, chunk):
    monkeypatch.setattr(suffix_array, "_CHUNK", chunk)
    documents = corpus(2, num_documents=50, vocab=3)
    documents.append(np.array([0, 1, 2, SEPARATOR, 0, 1, 2], np.int32))
    database = SuffixArray.build(documents)
    table = database.to_table(key_length, 5, length)
    suffixes = np.array(list(np.ndindex(*[4] * key_length)), np.int32)
    suffixes = suffixes[np.random.default_rng(0).permutation(len(suffixes))[:60]]
    looked_up = lookup_all(table, suffixes)
    num_hits = 0
    for index, suffix in enumerate(suffixes):
        expected = naive_best(naive_continuations(documents, tuple(suffix.tolist()), length), 5)
        assert as_list(database.continuations(suffix, 5, length)) == expected
        assert looked_up[index] == expected
        num_hits += bool(expected)
    assert num_hits >= 3


def test_separators_and_other_tokens_match_nothing():
    database = SuffixArray.build([np.array([1, 2, 3]), np.array([1, 2])])
    for suffix in ([SEPARATOR], [3, SEPARATOR], [2, SEPARATOR, 1], [9], [2, 1], [3], [1] * 50):
        assert as_list(database.continuations(suffix, 4, 2)) == []
    assert as_list(database.continuations([2], 4, 2)) == [((3,), 1)]
    assert as_list(SuffixArray.build([]).continuations([1], 4, 2)) == []
    assert SuffixArray.build([]).to_table(1, 4, 2).num_keys == 0


def test_many_occurrences_are_sampled_evenly(monkeypatch):
    rng = np.random.default_rng(0)
    followers = rng.choice(4, size=8000, p=[0.5, 0.3, 0.15, 0.05])
    documents = [np.stack([np.full(8000, 9), followers], axis=1).reshape(-1)]
    database = SuffixArray.build(documents)
    exact = as_list(database.continuations([9], 4, 1))
    assert sum(count for _, count in exact) == pytest.approx(8000, abs=4)
    monkeypatch.setattr(suffix_array, "MAX_SAMPLED", 100)
    sampled = as_list(database.continuations([9], 4, 1))
    assert [c for c, _ in sampled] == [(0,), (1,), (2,), (3,)]
    np.testing.assert_allclose([count for _, count in sampled], np.bincount(followers), atol=2 * 8000 / 100)
    assert sampled == as_list(database.continuations([9], 4, 1))


def test_file_round_trip_and_bounds(tmp_path):
    documents = corpus(3)
    database = SuffixArray.build(documents)
    database.save(tmp_path / "s", fingerprint="f")
    opened = SuffixArray.open(tmp_path / "s", "f")
    assert isinstance(opened.text.base, np.memmap) and isinstance(opened.suffix_array.base, np.memmap)
    assert as_list(opened.continuations([1, 2], 5, 3)) == as_list(database.continuations([1, 2], 5, 3)) != []
    bounded = opened.to_table(2, 5, 3, max_bytes=600)
    assert 0 < bounded.num_keys < 16 and bounded.num_bytes <= 600
    cut = SuffixArray.build(documents, max_bytes=8 * 50 + 7)
    assert cut.num_bytes == 400 and cut.text[:-1].tolist() == database.text[:49].tolist() and cut.text[-1] == SEPARATOR
    assert SuffixArray.build(documents, max_bytes=7).num_bytes == 0


def naive_extensions(documents, suffix, max_depth):
    """How often each sequence of 1 to max_depth tokens follows a suffix."""
    counts = Counter()
    for depth in range(1, max_depth + 1):
        found = naive_continuations(documents, suffix, depth)
        counts.update({path: count for path, count in found.items() if len(path) == depth})
    return counts


@pytest.mark.parametrize(("max_nodes", "max_depth"), [(1, 1), (5, 3), (12, 2), (64, 10), (1000, 10)])
def test_frequent_prefixes_and_longest_suffix_equal_a_naive_search(max_nodes, max_depth):
    documents = [*corpus(2, num_documents=40, vocab=3), np.array([0, 1, 2, SEPARATOR, 0, 1, 2, 7], np.int32)]
    database = SuffixArray.build(documents)
    rng = np.random.default_rng(1)
    lengths = set()
    for _ in range(60):
        tokens = rng.integers(0, 3, rng.integers(0, 9))
        tokens[: rng.integers(0, 3)] = rng.choice([SEPARATOR, 7, 50])
        suffix = tuple(tokens.tolist())
        expected = naive_prefixes(naive_extensions(documents, suffix, max_depth), max_nodes, max_depth)
        assert as_paths(*database.frequent_prefixes(tokens, max_nodes, max_depth)) == expected
        totals = [naive_extensions(documents, suffix[len(suffix) - n :], 1).total() for n in range(min(len(suffix), 6) + 1)]
        length = max([n for n in range(2, len(totals)) if totals[n]], default=0)
        assert database.longest_suffix(tokens, 6, 2) == (length, totals[length] if length else 0)
        lengths.add(length)
    assert lengths >= {0, 2, 4, 5, 6}
    assert as_paths(*SuffixArray.build([]).frequent_prefixes([1], 4, 2)) == []


KILLED_BUILD = """
import os, signal, sys
import numpy as np
from hd_jax.databases import files
from hd_jax.databases.suffix_array import SuffixArray

def save_half(arrays, path, metadata):
    save_file(arrays, path, metadata)
    os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)

save_file = files.save_file
if sys.argv[2] == "while writing":
    files.save_file = save_half
else:
    os.replace = lambda beside, path: os.kill(os.getpid(), signal.SIGKILL)
SuffixArray.build([np.arange(1000)]).save(sys.argv[1], fingerprint="f")
"""


@pytest.mark.parametrize("moment", ["while writing", "before renaming"])
def test_a_build_that_is_killed_leaves_nothing_that_opens(tmp_path, moment):
    path = tmp_path / "statistics.safetensors"
    for older in (None, SuffixArray.build([np.array([1, 2, 3])])):
        if older:
            older.save(path, fingerprint="f")
        ended = subprocess.run([sys.executable, "-c", KILLED_BUILD, path, moment], capture_output=True, text=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        if older:
            assert Databases(tmp_path, "f").statistics.longest_suffix([1, 2], 2, 1) == (2, 1)
        else:
            with pytest.raises(ValueError, match="statistics database is missing"):
                _ = Databases(tmp_path, "f").statistics
    if moment == "while writing":
        for beside in set(tmp_path.iterdir()) - {path}:
            with pytest.raises(ValueError, match="truncated"):
                SuffixArray.open(beside, "f")
