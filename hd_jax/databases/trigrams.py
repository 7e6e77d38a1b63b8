"""The likeliest successors of token pairs: the model's representative in ADED (Liu et al., AAAI 2025, arXiv 2407.12021)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from hd_jax.databases import continuation_table, files
from hd_jax.databases.continuation_table import ContinuationTable
from hd_jax.databases.ngram_trie import NgramTrie

KIND = "trigrams"


@dataclasses.dataclass(frozen=True)
class TrigramCounts:
    """Pairs in ascending order; pair p's successors are entries starts[p] : starts[p + 1], the most frequent first.

    P(successor | pair) is its count over the pair's total.
    """

    pairs: np.ndarray  # int32[P, 2]
    totals: np.ndarray  # int32[P], occurrences of the pair with any successor, kept or not
    starts: np.ndarray  # int32[P + 1]
    successors: np.ndarray  # int32[M]
    counts: np.ndarray  # int32[M]

    @property
    def num_bytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in dataclasses.fields(self))

    @property
    def max_order(self) -> int:
        return 3

    @property
    def left_out(self) -> np.ndarray:
        """int64[P]: of the pair's occurrences, those before a token that was not kept."""
        kept = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])[self.starts]
        return self.totals - np.diff(kept)

    def ngrams(self, order: int) -> tuple[np.ndarray, np.ndarray]:
        """The n-grams that the pairs tell of: int32[R, order] ascending, and their counts int64[R]."""
        if order == 1:
            tokens, numbers = np.unique(self.pairs[:, 1], return_inverse=True)
            return tokens[:, None], np.bincount(numbers, self.totals, minlength=len(tokens)).astype(np.int64)
        if order == 2:
            return np.asarray(self.pairs), self.totals.astype(np.int64)
        numbers = np.repeat(np.arange(len(self.pairs)), np.diff(self.starts))
        ascending = np.lexsort([self.successors, numbers])
        rows = np.concatenate([self.pairs[numbers], self.successors[ascending][:, None]], axis=1)
        return rows, self.counts[ascending].astype(np.int64)

    @staticmethod
    def build(
        documents: Sequence[np.ndarray],
        *,
        max_successors: int = 12,
        max_pairs: int | None = None,
        max_bytes: int | None = None,
    ) -> TrigramCounts:
        """Counts the tri-grams of a corpus.

        Args:
          documents: int32[n] each.
          max_successors: to keep of each pair, the most frequent, ties by lower token.
          max_pairs: to keep, the most frequent, ties in ascending order.
          max_bytes: of the database; as max_pairs.

        Raises:
          ValueError: max_successors is less than 1, or a bound less than an empty database takes.
        """
        if max_successors < 1 or (max_pairs or 0) < 0 or (max_bytes is not None and max_bytes < 4):
            raise ValueError(
                "need max_successors >= 1, max_pairs >= 0 and max_bytes >= 4, "
                f"not {max_successors}, {max_pairs} and {max_bytes}"
            )
        trigrams, counts = NgramTrie.build(documents, max_order=3, min_documents=1).ngrams(3)
        is_new = np.ones(len(trigrams), bool)
        is_new[1:] = np.any(trigrams[1:, :2] != trigrams[:-1, :2], axis=1)
        numbers = np.cumsum(is_new) - 1
        pairs = trigrams[is_new, :2]
        totals = np.bincount(numbers, counts, minlength=len(pairs)).astype(np.int64)
        ranked = continuation_table.best_continuations(
            numbers, trigrams[:, 2:], np.ones(len(counts), np.int32), counts, max_successors
        )
        sizes = np.bincount(numbers[ranked], minlength=len(pairs))
        by_total = np.argsort(-totals, kind="stable")[:max_pairs]
        if max_bytes is not None:
            # A pair takes four numbers (two tokens, total, start), a successor two; one start more closes the list.
            num_fitting = np.searchsorted(np.cumsum(16 + 8 * sizes[by_total]), max_bytes - 4, "right")
            by_total = by_total[: int(num_fitting)]
        is_kept = np.zeros(len(pairs), bool)
        is_kept[by_total] = True
        entries = ranked[is_kept[numbers[ranked]]]
        return TrigramCounts(
            pairs=pairs[is_kept],
            totals=totals[is_kept].astype(np.int32),
            starts=np.concatenate([[0], np.cumsum(sizes[is_kept])]).astype(np.int32),
            successors=trigrams[entries, 2],
            counts=counts[entries],
        )

    def to_table(self, max_entries: int = 12, max_bytes: int | None = None) -> ContinuationTable:
        """The device form, keyed by the pair, one token a continuation; see `continuation_table.build`."""
        return continuation_table.build(
            np.repeat(self.pairs, np.diff(self.starts), axis=0),
            self.successors[:, None],
            np.ones(len(self.successors), np.int32),
            self.counts,
            max_entries=max_entries,
            max_bytes=max_bytes,
        )

    def save(self, path: str | os.PathLike[str], *, fingerprint: str, settings: dict | None = None) -> None:
        """Writes the database; `settings` is whatever describes its corpus."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        counts = {"pairs": len(self.pairs), "successors": len(self.successors)}
        files.save(path, KIND, fingerprint=fingerprint, settings=settings or {}, counts=counts, arrays=arrays)

    @staticmethod
    def open(path: str | os.PathLike[str], fingerprint: str | None, *, verify: bool = False) -> TrigramCounts:
        """Maps a database; see `files.open`."""
        return TrigramCounts(**files.open(path, KIND, fingerprint, verify=verify).arrays)
