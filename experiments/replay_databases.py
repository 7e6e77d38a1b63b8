"""The databases of a replay: built from text corpora once, and kept in a folder under a name that says all of their making."""

from __future__ import annotations

import hashlib
import json
import pathlib
import time
from typing import Any

import numpy as np
import tqdm

from experiments.build_databases import read_documents
from hd_jax.databases import SEPARATOR, files, frequent_ngrams, suffix_array, trigrams
from hd_jax.databases.collection import Databases
from hd_jax.databases.frequent_ngrams import FrequentNgrams
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.databases.trigrams import TrigramCounts

# kind: (class, its kind of file, options of its build). D_m is the paper's 100,000 most frequent 5-grams, and ADED's code
# keeps the 12 likeliest successors of a pair.
FORMS: dict[str, tuple[Any, str, dict[str, int]]] = {
    "model": (FrequentNgrams, frequent_ngrams.KIND, {"n": 5, "max_ngrams": 100_000}),
    "model_text": (SuffixArray, suffix_array.KIND, {}),
    "statistics": (SuffixArray, suffix_array.KIND, {}),
    "trigrams": (TrigramCounts, trigrams.KIND, {"max_successors": 12}),
}
OF_STATISTICS = ("statistics", "trigrams")  # kinds that are built from the statistics corpus


def placeholder(has_model: bool, has_statistics: bool, token_classes: np.ndarray | None = None) -> Databases:
    """Databases of one short text, with which a drafter's options can be tried before the real ones are built."""
    document = [np.arange(16, dtype=np.int32)]
    made = {kind: FORMS[kind][0].build(document) for kind in _kinds(has_model, has_statistics)}
    return Databases(**made, token_classes=token_classes)


def _kinds(has_model: bool, has_statistics: bool) -> list[str]:
    return ["model", "model_text"] * has_model + [*OF_STATISTICS] * has_statistics


def from_corpora(
    model_corpus: str | None,
    statistics_corpus: str | None,
    statistics_tokens: int | None,
    tokenizer: Any,
    cache_dir: pathlib.Path,
) -> tuple[Databases, list[dict[str, Any]]]:
    """Opens the databases of two corpora, and builds those that `cache_dir` does not hold yet.

    Args:
      model_corpus: text that the model wrote, as `build_databases.read_documents` reads it; None for no D_m.
      statistics_corpus: any text; None for no D_s.
      statistics_tokens: take documents of it in a random order, always the same, up to so many tokens; None for all of it.
      tokenizer: of the model.
      cache_dir: made if it does not exist.

    Returns:
      The databases; and what is in them: name, corpus (file name), tokens, documents, num_bytes, tokenize_s, build_s.

    Raises:
      ValueError: a line of a corpus is no record, or a cached file is damaged.
      OSError: a file cannot be read or written.
    """
    given: dict[str, Any] = {}
    facts = []
    tokenized: dict[Any, tuple[list[np.ndarray], float]] = {}
    for kind in _kinds(model_corpus is not None, statistics_corpus is not None):
        form, file_kind, options = FORMS[kind]
        corpus, max_tokens = (statistics_corpus, statistics_tokens) if kind in OF_STATISTICS else (model_corpus, None)
        assert corpus is not None
        making = {
            "form": "texts and end tokens",
            "corpus": sha256(corpus),
            "tokenizer": tokenizer.fingerprint,
            "max_tokens": max_tokens,
            **options,
        }
        key = hashlib.sha256(json.dumps([kind, files.VERSION, making], sort_keys=True).encode()).hexdigest()[:16]
        path = cache_dir / f"{kind}-{key}.safetensors"
        if not path.exists():
            if (corpus, max_tokens) not in tokenized:
                clock = time.perf_counter()
                documents = _tokenized(corpus, max_tokens, tokenizer)
                tokenized[corpus, max_tokens] = documents, time.perf_counter() - clock
            documents, tokenize_s = tokenized[corpus, max_tokens]
            clock = time.perf_counter()
            database = form.build(documents, **options)
            settings = {
                "corpus": pathlib.Path(corpus).name,
                "tokens": sum(map(len, documents)),
                "documents": len(documents),
                "tokenize_s": tokenize_s,
                "build_s": time.perf_counter() - clock,
            }
            cache_dir.mkdir(parents=True, exist_ok=True)
            database.save(path, fingerprint=tokenizer.fingerprint, settings=settings)
        given[kind] = form.open(path, tokenizer.fingerprint)
        settings = files.open(path, file_kind, tokenizer.fingerprint).settings
        facts.append({"name": kind, "num_bytes": given[kind].num_bytes, **settings})
    return Databases(**given, token_classes=tokenizer.token_classes), facts


def sha256(path: str | pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenized(corpus: str, max_tokens: int | None, tokenizer: Any) -> list[np.ndarray]:
    """The corpus's documents, int32[n] each; with `max_tokens`, in a random order and up to so many, the last one cut."""
    documents = list(read_documents(corpus))
    if max_tokens is not None:
        documents = [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]
    out, num_left = [], float("inf") if max_tokens is None else max_tokens
    for pieces in tqdm.tqdm(documents, pathlib.Path(corpus).name, unit=" documents", dynamic_ncols=True):
        ids: list[int] = []
        for piece in pieces:
            ids += [*([SEPARATOR] if ids else []), *tokenizer.encode(piece, add_bos=False)]
        ids.append(tokenizer.eos_ids[-1])  # each text is an answer that ends
        if num_left < len(ids):
            ids = ids[: int(num_left)]
        out.append(np.array(ids, np.int32))
        num_left -= len(ids)
        if num_left <= 0:
            break
    return out
