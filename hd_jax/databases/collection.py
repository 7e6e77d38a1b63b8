"""The databases that belong to one model: files in a folder, opened when a drafter first asks."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from hd_jax.databases import files, successor_table
from hd_jax.databases.continuation_table import ContinuationTable
from hd_jax.databases.frequent_ngrams import FrequentNgrams
from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.databases.successor_table import SuccessorTable
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.databases.trigrams import TrigramCounts

# File names; a statistics database is of either form.
FILES = {
    "model": "model.safetensors",
    "model_text": "model_text.safetensors",
    "statistics": "statistics.safetensors",
    "trigrams": "trigrams.safetensors",
}


class Databases:
    """D_m, in two forms, D_s and the tri-grams of a model.

    Attributes:
      folder: where the files are looked for; None for nowhere.
      fingerprint: of the tokenizer whose ids the files must hold; databases that are given are taken as they are.
      token_classes: int32[V], the tokenizer's; None where it is not known.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        fingerprint: str | None = None,
        *,
        model: FrequentNgrams | None = None,
        model_text: NgramTrie | SuffixArray | None = None,
        statistics: NgramTrie | SuffixArray | None = None,
        trigrams: TrigramCounts | None = None,
        token_classes: np.ndarray | None = None,
    ):
        self.folder = None if folder is None else pathlib.Path(folder)
        self.fingerprint = fingerprint
        self.token_classes = token_classes
        self._given: dict[str, Any] = {
            "model": model,
            "model_text": model_text,
            "statistics": statistics,
            "trigrams": trigrams,
        }
        self._made: dict[Any, Any] = {}

    @functools.cached_property
    def model(self) -> FrequentNgrams:
        """D_m as its most frequent n-grams. Raises ValueError where there is none, or it was built with another tokenizer."""
        return self._given["model"] or FrequentNgrams.open(self._path("model"), self.fingerprint)

    @functools.cached_property
    def model_text(self) -> NgramTrie | SuffixArray:
        """D_m as statistics of the model's own text, with every match length. Raises as `model`."""
        return self._given["model_text"] or open_statistics(self._path("model_text"), self.fingerprint)

    @functools.cached_property
    def statistics(self) -> NgramTrie | SuffixArray:
        """D_s. Raises ValueError where there is none, or it was built with another tokenizer."""
        return self._given["statistics"] or open_statistics(self._path("statistics"), self.fingerprint)

    @functools.cached_property
    def trigrams(self) -> TrigramCounts:
        """The likeliest successors of token pairs. Raises as `model`."""
        return self._given["trigrams"] or TrigramCounts.open(self._path("trigrams"), self.fingerprint)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned for the first time with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def table(self, kind: str, **settings: Any) -> ContinuationTable:
        """The device form of the "model" or "statistics" database; made once for the same settings."""
        return self.once((kind, *sorted(settings.items())), lambda: getattr(self, kind).to_table(**settings))

    def successors(self, kind: str, **settings: Any) -> SuccessorTable:
        """The successor table of the "model_text", "statistics" or "trigrams" database; made once for the same settings."""
        key = ("successors", kind, *sorted(settings.items()))
        return self.once(key, lambda: successor_table.build(getattr(self, kind), **settings))

    def _path(self, kind: str) -> pathlib.Path:
        path = None if self.folder is None else self.folder / FILES[kind]
        if path is None or not path.is_file():
            where = "no folder of databases was given" if path is None else f"{path} does not exist"
            raise ValueError(f"the {kind} database is missing: {where}; python -m experiments.build_databases builds one")
        return path


def open_statistics(path: pathlib.Path, fingerprint: str | None) -> NgramTrie | SuffixArray:
    """Opens a statistics database of either form, by what its header says."""
    opener = {"ngram_trie": NgramTrie, "suffix_array": SuffixArray}
    kind = files.kind_of(path)
    if kind not in opener:
        raise ValueError(f"{path} holds {kind}, not a statistics database ({', '.join(opener)})")
    return opener[kind].open(path, fingerprint)
