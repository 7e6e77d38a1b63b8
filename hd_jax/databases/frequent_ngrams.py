"""The most frequent n-grams of a model's own answers: the model-dependent database D_m of HD.

Hierarchy Drafting (Cho et al., NAACL Findings 2025, arXiv 2502.05609), section 3.2: what a model has said, it says again. The
key of an n-gram is its first token, the rest is a draft. An n-gram counts once for each answer that it occurs in: what an
answer repeats is D_c's to draft.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from hd_jax.databases import SEPARATOR, continuation_table, files, join_documents
from hd_jax.databases.continuation_table import ContinuationTable

KIND = "frequent_ngrams"


@dataclasses.dataclass(frozen=True)
class FrequentNgrams:
    """The most frequent first, ties in ascending order."""

    ngrams: np.ndarray  # int32[M, n]
    counts: np.ndarray  # int32[M], documents that each occurs in

    @property
    def num_bytes(self) -> int:
        return self.ngrams.nbytes + self.counts.nbytes

    @staticmethod
    def build(
        documents: Sequence[np.ndarray], n: int = 5, max_ngrams: int = 100_000, max_bytes: int | None = None
    ) -> FrequentNgrams:
        """Counts for every n-gram the documents that it occurs in, and keeps the most frequent.

        Args:
          documents: int32[n_d] each, the model's answers.
          n: of the n-grams, at least 2.
          max_ngrams: to keep.
          max_bytes: of the database.

        Raises:
          ValueError: n is less than 2, or a bound is negative.
        """
        if n < 2 or max_ngrams < 0 or (max_bytes or 0) < 0:
            raise ValueError(f"need n >= 2 and bounds of at least 0, not n {n}, {max_ngrams} n-grams, {max_bytes} bytes")
        text, ends = join_documents(documents)
        text = np.pad(text, (0, n), constant_values=SEPARATOR)
        windows = np.lib.stride_tricks.sliding_window_view(text, n)
        places = np.flatnonzero(np.all(windows != SEPARATOR, axis=1))
        places = places[np.lexsort(windows[places].T[::-1])]  # stable: equal n-grams stay in the order of the text
        ngrams, document_of = windows[places], np.searchsorted(ends, places)
        is_new = np.ones(len(places), bool)
        is_new[1:] = np.any(ngrams[1:] != ngrams[:-1], axis=1)
        is_counted = is_new.copy()
        is_counted[1:] |= document_of[1:] != document_of[:-1]
        ngrams = ngrams[is_new]
        counts = np.bincount(np.cumsum(is_new)[is_counted] - 1, minlength=len(ngrams)).astype(np.int32)
        if max_bytes is not None:
            max_ngrams = min(max_ngrams, max_bytes // (4 * (n + 1)))
        kept = np.argsort(-counts, kind="stable")[:max_ngrams]
        return FrequentNgrams(ngrams[kept], counts[kept])

    def to_table(self, max_entries: int = 7, max_bytes: int | None = None) -> ContinuationTable:
        """The device form, keyed by the first token; see `continuation_table.build`."""
        keys, continuations = self.ngrams[:, :1], self.ngrams[:, 1:]
        lengths = np.full(len(keys), continuations.shape[1], np.int32)
        return continuation_table.build(keys, continuations, lengths, self.counts, max_entries=max_entries, max_bytes=max_bytes)

    def save(self, path: str | os.PathLike[str], *, fingerprint: str, settings: dict | None = None) -> None:
        """Writes the database; `settings` is whatever describes the answers."""
        settings = {**(settings or {}), "n": self.ngrams.shape[1]}
        arrays = {"ngrams": self.ngrams, "counts": self.counts}
        files.save(path, KIND, fingerprint=fingerprint, settings=settings, counts={"ngrams": len(self.counts)}, arrays=arrays)

    @staticmethod
    def open(path: str | os.PathLike[str], fingerprint: str | None, *, verify: bool = False) -> FrequentNgrams:
        """Maps a database; see `files.open`."""
        return FrequentNgrams(**files.open(path, KIND, fingerprint, verify=verify).arrays)
