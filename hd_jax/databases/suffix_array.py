"""A corpus as running text with its suffix array: every continuation of every suffix, by binary search in mapped files.

    text           4 5 6 | 4 5 7 |                 | is SEPARATOR, which sorts before every token
    suffix_array   3 7 0 4 1 5 2 6                 where the suffixes in ascending order begin
    suffix 4 5     ranks 2 and 3 (places 0 and 4): continued by 6 and by 7

8 bytes a token. The suffixes are sorted by libdivsufsort over big-endian bytes. Measured at 10M tokens of a Zipf-distributed
32k vocabulary: pydivsufsort 1.7 s, PySAIS 2.6 s, prefix doubling in numpy 22 s.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import pydivsufsort

from hd_jax.databases import SEPARATOR, continuation_table, files, join_documents
from hd_jax.databases.continuation_table import ContinuationTable
from hd_jax.draft_tree import NO_TOKEN

KIND = "suffix_array"
MAX_SAMPLED = 4096  # occurrences of a suffix that are looked at
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

    def continuations(
        self, suffix: np.ndarray | Sequence[int], max_candidates: int, length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The most frequent continuations of a suffix, ties by lower tokens.

        Of a suffix with more than MAX_SAMPLED occurrences, as many of them, evenly spaced in ascending order, are looked
        at, and the counts are scaled up.

        Args:
          suffix: int32[k].
          max_candidates: G.
          length: C, of a continuation; it is shorter where a document ends.

        Returns:
          int32[g, C] padded with NO_TOKEN, lengths int32[g], counts int32[g], g <= G.
        """
        wanted = [int(token) for token in suffix]
        ranks = range(len(self.text))

        def start_of(rank: int) -> list[int]:
            place = self.suffix_array[rank]
            return self.text[place : place + len(wanted)].tolist()

        first = bisect.bisect_left(ranks, wanted, key=start_of)
        num_found = bisect.bisect_right(ranks, wanted, lo=first, key=start_of) - first
        if SEPARATOR in wanted or not num_found:
            return np.empty((0, length), np.int32), np.empty(0, np.int32), np.empty(0, np.int32)
        num_sampled = min(num_found, MAX_SAMPLED)
        sampled = first + np.arange(num_sampled) * num_found // num_sampled
        found, lengths = self._windows(self.suffix_array[sampled].astype(np.int64) + len(wanted), length)
        starts = np.flatnonzero(_is_new(found) & (lengths > 0))
        # A document's end sorts first and is no continuation, so each run ends where the next one starts.
        counts = np.diff(starts, append=num_sampled) * num_found // num_sampled
        found, lengths, counts = found[starts], lengths[starts], counts.astype(np.int32)
        kept = continuation_table.best_continuations(np.zeros(len(starts), np.int64), found, lengths, counts, max_candidates)
        return found[kept], lengths[kept], counts[kept]

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
            keys[kept], found[kept], lengths[kept], counts[kept], max_entries=max_entries, max_bytes=max_bytes
        )

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
