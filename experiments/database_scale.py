r"""What a suffix array costs to build, keep and ask, by the size of its corpus.

    python -m experiments.database_scale --tokens=1000000,10000000,100000000 --corpus=F.jsonl.gz --tokenizer=D

Each size is made from the corpus: its documents are repeated as often as it takes, with a share of the tokens (drawn anew
for each copy) replaced by others of the corpus, so that copies have much in common and long matches end. Every 50th
document is held out: the suffixes that are looked up come from these alone, at places and of lengths (1 to 16) drawn at
random. A size runs in a process of its own, so that the peak memory is that of its build, documents included.

Times are medians of single calls, each suffix asked once; 99th percentiles are in the file:

    find      the rank range of a suffix
    longest   `longest_suffix`: the longest suffix of 2 to 16 tokens that occurs
    prefixes  `frequent_prefixes`: a trie of 64 nodes, at most 10 deep, of what follows that suffix

`open` is the first opening by the process that wrote the file, so it comes from the system's file cache.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import flags

from experiments import build_databases, program, report

HELD_OUT_EVERY = 50  # documents
MAX_SUFFIX, MIN_SUFFIX = 16, 2
MAX_NODES, MAX_DEPTH = 64, 10


def grown(documents: Sequence[np.ndarray], num_tokens: int, substitution_rate: float, seed: int) -> list[np.ndarray]:
    """Copies of int32[n] documents, with tokens replaced at random, up to `num_tokens` in all."""
    rng = np.random.default_rng(seed)
    once = np.concatenate(documents)
    ends = np.cumsum([len(document) for document in documents])
    text = np.resize(once, num_tokens)
    for start in range(len(once), num_tokens, len(once)):  # the first copy stays as it is
        copy = text[start : start + len(once)]
        places = rng.integers(0, len(copy), rng.binomial(len(copy), substitution_rate))
        copy[places] = once[rng.integers(0, len(once), len(places))]
    num_copies = -(-num_tokens // len(once))
    all_ends = (np.arange(num_copies)[:, None] * len(once) + ends).reshape(-1)
    return [document for document in np.split(text, all_ends[all_ends < num_tokens]) if len(document)]


def measure(
    num_tokens: int,
    documents: Sequence[np.ndarray],
    held_out: np.ndarray,
    folder: str,
    substitution_rate: float,
    num_suffixes: int,
    seed: int,
) -> dict[str, Any]:
    """Builds, saves, opens and asks a database of one size; see the module.

    Args:
      num_tokens: of the corpus.
      documents: int32[n] each, that it is grown from.
      held_out: int32[m], text that the suffixes come from.
      folder: for the file, which is removed.
      substitution_rate: share of the tokens that is replaced.
      num_suffixes: that are looked up.
      seed: of whatever is drawn.
    """
    from hd_jax.databases.suffix_array import SuffixArray

    corpus = grown(documents, num_tokens, substitution_rate, seed)
    path = pathlib.Path(folder) / f"{num_tokens}.safetensors"
    clock = time.perf_counter()
    database = SuffixArray.build(corpus)
    built = time.perf_counter()
    database.save(path, fingerprint="", settings={})
    saved = time.perf_counter()
    num_documents = len(corpus)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    del corpus, database
    try:
        opening = time.perf_counter()
        database = SuffixArray.open(path, "")
        opened = time.perf_counter()
        rng = np.random.default_rng(seed)
        ends = rng.integers(MAX_SUFFIX, len(held_out), num_suffixes)
        contexts = [held_out[end - MAX_SUFFIX : end] for end in ends]
        suffixes = [c[-length:] for c, length in zip(contexts, rng.integers(1, MAX_SUFFIX + 1, num_suffixes), strict=True)]
        times: dict[str, list[float]] = {}
        times["find"], _ = _timed(database.find, suffixes)
        times["longest_suffix"], found = _timed(lambda c: database.longest_suffix(c, MAX_SUFFIX, MIN_SUFFIX), contexts)
        matched = [context[-length:] for context, (length, _) in zip(contexts, found, strict=True) if length]
        times["frequent_prefixes"], _ = _timed(lambda s: database.frequent_prefixes(s, MAX_NODES, MAX_DEPTH), matched)
        num_bytes = path.stat().st_size
    finally:
        path.unlink()
    return {
        "tokens": num_tokens,
        "documents": num_documents,
        "build_s": built - clock,
        "save_s": saved - built,
        "peak_bytes": peak,
        "bytes_per_token": num_bytes / num_tokens,
        "open_s": opened - opening,
        **{f"{name}_us": float(np.median(taken)) for name, taken in times.items()},
        **{f"{name}_p99_us": float(np.percentile(taken, 99)) for name, taken in times.items()},
        "mean_matched_length": float(np.mean([length for length, _ in found])),
    }


def _timed(ask: Callable[[np.ndarray], Any], questions: Iterable[np.ndarray]) -> tuple[list[float], list[Any]]:
    """Microseconds of each call, and what it returned."""
    times, answers = [], []
    for question in questions:
        clock = time.perf_counter()
        answers.append(ask(question))
        times.append((time.perf_counter() - clock) * 1e6)
    return times, answers


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The figures as text, a line for each size."""
    head = ["tokens", "build s", "save s", "peak GB", "bytes/token", "open s", "find us", "longest us", "prefixes us"]
    body = [
        [
            f"{row['tokens']:,}",
            f"{row['build_s']:.1f}",
            f"{row['save_s']:.1f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['bytes_per_token']:.3f}",
            f"{row['open_s']:.3f}",
            *(f"{row[f'{name}_us']:.0f}" for name in ("find", "longest_suffix", "frequent_prefixes")),
        ]
        for row in rows
    ]
    return head, body


def read_corpus(path: str, tokenizer: str | None) -> tuple[list[np.ndarray], np.ndarray]:
    """The documents of a file, int32[n] each, and the held-out ones end to end.

    Raises:
      ValueError: the file is not what its name says, or too small to hold text out.
    """
    from hd_jax import decode
    from hd_jax.models import tokenizer as tokenizers

    encode = tokenizers.load(tokenizer or decode.EMBEDDED).encode
    documents, held_out = [], []
    for number, pieces in enumerate(tqdm.tqdm(build_databases.read_documents(path), "reading", unit=" documents")):
        tokens = [token for piece in pieces for token in encode(piece, add_bos=False)]
        if tokens:
            (held_out if number % HELD_OUT_EVERY == 0 else documents).append(np.array(tokens, np.int32))
    if not documents or sum(map(len, held_out)) <= MAX_SUFFIX:
        raise ValueError(
            f"{path} holds too little text: some of every {HELD_OUT_EVERY}th document is held out, from the first on"
        )
    return documents, np.concatenate(held_out)


def define_flags() -> None:
    """Defines the flags; a function, so that tests can import several programs."""
    flags.DEFINE_list("tokens", ["1000000", "10000000", "100000000"], "Sizes of the corpus, in tokens.")
    flags.DEFINE_string("corpus", None, "A .txt, .jsonl or .jsonl.gz file, as in build_databases.", required=True)
    flags.DEFINE_string("tokenizer", None, "Folder or hub name of a tokenizer; by default the embedded model's.")
    flags.DEFINE_float("substitution_rate", 0.02, "Share of the tokens that is replaced.", 0.0, 1.0)
    flags.DEFINE_integer("num_suffixes", 2000, "Suffixes that are looked up.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of whatever is drawn.", lower_bound=0)
    flags.DEFINE_string("work_dir", None, "Folder for the databases while they are measured; by default a temporary one.")
    flags.DEFINE_string("output_dir", None, "Folder for database_scale.json and .md; by default nothing is written.")


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    sizes = sorted(program.whole_numbers("tokens", most=2**31 - 1))
    if not values.corpus.endswith((".txt", ".jsonl", ".jsonl.gz")) or not pathlib.Path(values.corpus).is_file():
        raise ValueError(f"--corpus={values.corpus}: there is no such .txt, .jsonl or .jsonl.gz file")
    if values.work_dir and not os.access(values.work_dir, os.W_OK):
        raise ValueError(f"--work_dir={values.work_dir}: the folder must exist and be writable")
    if values.output_dir:
        pathlib.Path(values.output_dir).mkdir(parents=True, exist_ok=True)
    documents, held_out = read_corpus(values.corpus, values.tokenizer)
    rows = []
    options: dict[str, Any] = {name: values[name].value for name in ("substitution_rate", "num_suffixes", "seed")}
    with tempfile.TemporaryDirectory(dir=values.work_dir) as folder:
        for size in tqdm.tqdm(sizes, "measuring", unit=" sizes"):
            spawned = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawned) as pool:
                rows.append(pool.submit(measure, size, documents, held_out, folder, **options).result())
    head, body = table(rows)
    grown_from = f"{sum(map(len, documents))} tokens of {pathlib.Path(values.corpus).name}"
    facts = f"grown from {grown_from}; {platform.machine()}, {os.cpu_count()} CPU cores"
    print(f"{facts}\n{report.aligned(head, body)}")
    if values.output_dir:
        folder = pathlib.Path(values.output_dir)
        record = {"facts": facts, "tokenizer": pathlib.Path(values.tokenizer or "embedded").name, **options, "results": rows}
        report.write_file(folder / "database_scale.json", json.dumps(record, indent=1) + "\n")
        report.write_file(
            folder / "database_scale.md", f"# Suffix arrays by size\n\n{facts}\n\n{report.markdown(head, body)}\n"
        )
        print(f"Written to {folder}")


if __name__ == "__main__":
    define_flags()
    program.run(main)
