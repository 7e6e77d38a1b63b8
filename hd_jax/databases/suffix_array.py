"""A corpus as running text with its suffix array: every continuation of every suffix, by binary search in mapped files.

    text           4 5 6 | 4 5 7 |                 | is SEPARATOR, which sorts before every token
    suffix_array   3 7 0 4 1 5 2 6                 where the suffixes in ascending order begin
    suffix 4 5     ranks 2 and 3 (places 0 and 4): continued by 6 and by 7

8 bytes a token. The suffixes are sorted by libdivsufsort over big-endian bytes. Measured at 10M tokens of a Zipf-distributed
32k vocabulary: pydivsufsort 1.7 s, PySAIS 2.6 s, prefix doubling in numpy 22 s.

A lookup is `find`: the rank range of one suffix, by two binary searches of log2(n) steps that each read a place and the few
tokens there. `longest_suffix` takes up to four of them for lengths up to 16. `frequent_prefixes` takes one, and looks at no
more than MAX_SAMPLED continuations. `experiments.database_scale`, medians in microseconds on 2 cores of an x86 server:

    tokens         find   longest_suffix   frequent_prefixes
    1,000,000        14               58                 104
    10,000,000       25              101                 121
    100,000,000      24              106                 109      built in 31 s with at most 2.3 GB
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import os
from collections.abc import Sequence

import numpy as np
import pydivsufsort

from hd_jax.databases import SEPARATOR, continuation_table, files, join_documents
from hd_jax.databases.continuation_table import ContinuationTable
from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.draft_tree import NO_TOKEN

KIND = "suffix_array"
# Occurrences of a suffix that are looked at. REST accepts as many tokens a step, to 0.1%, with 256, 512, 1024 or 4096 of 6M
# tokens of chat, and the time of a lookup grows with them.
MAX_SAMPLED = 1024
_ABOVE_ALL_TOKENS = 2**31
_CHUNK = 1 << 20  # places or ranks worked on at once


@dataclasses.dataclass(frozen=True)
class SuffixArray:
    """See the module."""

    text: np.ndarray  # int32[n], documents with a SEPARATOR after each
    suffix_array: np.ndarray  # int32[n]

    @property
    def num_bytes(self) -> int:
        return self.text.nbytes + self.suffix_array.nbytes

    @staticmethod
    def build(documents: Sequence[np.ndarray], *, max_bytes: int | None = None) -> SuffixArray:
        """Joins documents and sorts their suffixes.

        Args:
          documents: int32[n_d] each.
          max_bytes: of the database; the text is cut off behind what fits.
        """
        text, _ = join_documents(documents)
        if max_bytes is not None and len(text) > max_bytes // 8:
            text = text[: max_bytes // 8].copy()
            text[-1:] = SEPARATOR
        return SuffixArray(text, _sorted_suffixes(text))

    def find(self, suffix: np.ndarray | Sequence[int]) -> tuple[int, int]:
        """The occurrences of a suffix, int32[k], that a token follows: their first rank, and their number."""
        wanted = [int(token) for token in suffix]
        if SEPARATOR in wanted:
            return 0, 0
        text, places = self._views
        width = len(wanted) + 1

        def tokens_at(rank: int) -> list[int]:
            place = places[rank]
            return text[place : place + width].tolist()

        ranks = range(len(places))
        first = bisect.bisect_left(ranks, [*wanted, 0], key=tokens_at)  # a separator sorts before token 0
        if first == len(ranks) or tokens_at(first)[:-1] != wanted:
            return first, 0
        last = bisect.bisect_left(ranks, [*wanted, _ABOVE_ALL_TOKENS], lo=first, key=tokens_at)
        return first, last - first

    def continuations(
        self, suffix: np.ndarray | Sequence[int], max_candidates: int, length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best continuations of a suffix, as `continuation_table.best_continuations` chooses and ranks them.

        Of a suffix with more than MAX_SAMPLED occurrences, as many of them, evenly spaced in ascending order, are looked
        at, and the counts are scaled up.

        Args:
          suffix: int32[k].
          max_candidates: G.
          length: C, of a continuation; it is shorter where a document ends.

        Returns:
          int32[g, C] padded with NO_TOKEN, lengths int32[g], counts int32[g], g <= G.
        """
        first, num_found = self.find(suffix)
        if not num_found:
            return np.empty((0, length), np.int32), np.empty(0, np.int32), np.empty(0, np.int32)
        found, lengths = self._sampled(first, num_found, len(suffix), length)
        num_sampled = len(found)
        starts = np.flatnonzero(_is_new(found))
        counts = np.diff(starts, append=num_sampled) * num_found // num_sampled
        found, lengths, counts = found[starts], lengths[starts], counts.astype(np.int32)
        kept = continuation_table.best_continuations(np.zeros(len(starts), np.int64), found, lengths, counts, max_candidates)
        return found[kept], lengths[kept], counts[kept]

    def frequent_prefixes(
        self, suffix: np.ndarray | Sequence[int], max_nodes: int, max_depth: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What follows a suffix, as a trie of the most frequent prefixes of its continuations.

        Of a suffix with more than MAX_SAMPLED occurrences, as many of them, evenly spaced in ascending order, are looked
        at, and the counts are scaled up.

        Args:
          suffix: int32[k]; an empty one is followed by every token of the text.
          max_nodes: of the trie.
          max_depth: of its deepest node; a prefix of one token is at depth 1.

        Returns:
          Tokens, parents and counts, int32[n] each, n <= max_nodes: the nodes with the highest counts, in descending order,
          ties by depth and then by ascending tokens, so that a parent precedes its children. Parents index nodes; -1 is
          the suffix itself.
        """
        first, num_found = self.find(suffix)
        if not num_found or max_nodes < 1 or max_depth < 1:
            return np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int32)
        rows, lengths = self._sampled(first, num_found, len(suffix), max_depth)
        num_sampled = len(rows)
        # Rows are in ascending order, so those that share a prefix of d tokens are a run; [depth, row] lays all runs of a
        # depth end to end.
        is_new = np.ones((max_depth, num_sampled), bool)
        np.logical_or.accumulate((rows[1:] != rows[:-1]).T, axis=0, out=is_new[:, 1:])
        starts = np.flatnonzero(is_new)
        counts = np.diff(starts, append=is_new.size)
        depths, firsts = np.divmod(starts, num_sampled)
        run_of = np.cumsum(is_new) - 1
        parents = np.where(depths > 0, run_of[starts - num_sampled], -1)
        is_node = depths < lengths[firsts]  # else the document had ended
        best = np.flatnonzero(is_node)
        best = best[np.argsort(-counts[best], kind="stable")[:max_nodes]]
        index_of = np.full(len(starts) + 1, -1, np.int32)  # the last for the suffix itself
        index_of[best] = np.arange(len(best))
        tokens = rows[firsts[best], depths[best]]
        counts = counts[best] * num_found // num_sampled
        return tokens, index_of[parents[best]], counts.astype(np.int32)

    def longest_suffix(self, tokens: np.ndarray | Sequence[int], max_length: int, min_length: int) -> tuple[int, int]:
        """The longest suffix of int32[n] `tokens`, of min_length to max_length tokens, that stands in the text before a token.

        Returns:
          Its length, and the number of its occurrences that a token follows; 0 and 0 if there is none.
        """
        wanted = [int(token) for token in tokens[max(len(tokens) - max_length, 0) :]]
        # What holds of a suffix holds of the shorter ones, so the longest is found by bisection.
        shortest, longest = max(min_length, 1), len(wanted)
        length = count = 0
        while shortest <= longest:
            middle = (shortest + longest) // 2
            _, num_found = self.find(wanted[len(wanted) - middle :])
            if num_found:
                length, count, shortest = middle, num_found, middle + 1
            else:
                longest = middle - 1
        return length, count

    def to_table(self, key_length: int, max_entries: int, length: int, max_bytes: int | None = None) -> ContinuationTable:
        """The device form: of every k-gram of the text its continuations, counted over all of their occurrences.

        Raises:
          ValueError: as `continuation_table.build`.
        """
        width = key_length + length
        num_ranks = len(self.text)
        starts: list[np.ndarray] = []
        last = np.full((1, width), NO_TOKEN, np.int32)
        for first in range(0, num_ranks, _CHUNK):
            rows, lengths = self._windows(self.suffix_array[first : first + _CHUNK].astype(np.int64), width)
            starts.append(first + np.flatnonzero(_is_new(rows, last)))
            last = rows[-1:]
        runs = np.concatenate(starts) if starts else np.empty(0, np.int64)
        counts = np.diff(runs, append=num_ranks).astype(np.int32)
        rows, lengths = self._windows(self.suffix_array[runs].astype(np.int64), width)
        has_both = lengths > key_length
        rows, lengths, counts = rows[has_both], lengths[has_both] - key_length, counts[has_both]
        keys, found = rows[:, :key_length], rows[:, key_length:]
        groups = np.cumsum(_is_new(keys))
        kept = continuation_table.best_continuations(groups, found, lengths, counts, max_entries)
        return continuation_table.build(
            keys[kept],
            found[kept],
            lengths[kept],
            counts[kept],
            max_entries=max_entries,
            max_bytes=max_bytes,
            is_ranked=True,
        )

    def to_trie(self, max_order: int) -> NgramTrie:
        """All n-grams of the text of 1 to max_order tokens, with their counts. It takes about 100 bytes of memory a token."""
        documents = np.split(self.text, np.flatnonzero(self.text == SEPARATOR) + 1)
        return NgramTrie.build([document[:-1] for document in documents if len(document)], max_order=max_order, min_documents=1)

    @functools.cached_property
    def _views(self) -> tuple[memoryview, memoryview]:
        """The text and the suffix array in a form of which Python reads single numbers and short pieces fast."""
        return self.text.data, self.suffix_array.data

    def _sampled(self, first: int, num_found: int, key_length: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """What follows evenly spaced ones of the ranks from `first` on, as `_windows`."""
        num_sampled = min(num_found, MAX_SAMPLED)
        ranks = first + np.arange(num_sampled) * num_found // num_sampled
        return self._windows(self.suffix_array[ranks].astype(np.int64) + key_length, length)

    def _windows(self, places: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `width` tokens from int64[m] places, int32[m, width], up to the document's end; and how many, int32[m]."""
        last = len(self.text) - 1  # a separator
        rows = self.text[np.minimum(places[:, None] + np.arange(width), last)]
        is_within = np.logical_and.accumulate(rows != SEPARATOR, axis=1)
        return np.where(is_within, rows, NO_TOKEN).astype(np.int32), is_within.sum(axis=1).astype(np.int32)

    def save(self, path: str | os.PathLike[str], *, fingerprint: str, settings: dict | None = None) -> None:
        """Writes the database; `settings` is whatever describes its corpus."""
        arrays = {"text": self.text, "suffix_array": self.suffix_array}
        num_documents = int(np.sum(self.text == SEPARATOR))
        counts = {"tokens": len(self.text) - num_documents, "separators": num_documents}
        files.save(path, KIND, fingerprint=fingerprint, settings=settings or {}, counts=counts, arrays=arrays)

    @staticmethod
    def open(path: str | os.PathLike[str], fingerprint: str | None, *, verify: bool = False) -> SuffixArray:
        """Maps a database; see `files.open`."""
        return SuffixArray(**files.open(path, KIND, fingerprint, verify=verify).arrays)


def _sorted_suffixes(text: np.ndarray) -> np.ndarray:
    """The suffix array, int32[n]. Peak memory: 6 to 9 times the bytes of the shortest codes, and the result."""
    if not len(text):
        return np.empty(0, np.int32)
    num_bytes = max((int(text.max()) + 1).bit_length() + 7, 8) // 8  # of a code: token + 1, and 0 for a separator
    codes = np.empty((len(text), num_bytes), np.uint8)
    for first in range(0, len(text), _CHUNK):
        chunk = np.maximum(text[first : first + _CHUNK], -1) + 1
        codes[first : first + _CHUNK] = chunk.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 4 - num_bytes :]
    by_byte = pydivsufsort.divsufsort(codes.reshape(-1))
    del codes
    ranks, end = np.empty(len(text), np.int32), 0
    for first in range(0, len(by_byte), _CHUNK):
        places, offsets = np.divmod(by_byte[first : first + _CHUNK], num_bytes)
        places = places[offsets == 0]
        ranks[end : end + len(places)] = places
        end += len(places)
    return ranks


def _is_new(rows: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
    """Whether each row of int32[m, w] differs from the one before it, bool[m]; the first does, if there is none before."""
    is_new = np.ones(len(rows), bool)
    is_new[1:] = np.any(rows[1:] != rows[:-1], axis=1)
    if before is not None:
        is_new[:1] = np.any(rows[:1] != before)
    return is_new
