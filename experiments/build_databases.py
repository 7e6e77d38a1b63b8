r"""Builds the databases that drafters draft from.

    python -m experiments.build_databases --kind=model --prompts=prompts.jsonl --output=model.safetensors
    python -m experiments.build_databases --kind=model_text --prompts=prompts.jsonl --output=model_text.safetensors
    python -m experiments.build_databases --kind=statistics --form=ngrams --inputs=a.jsonl.gz,b.txt --output=text.safetensors
    python -m experiments.build_databases --kind=statistics --form=suffix_array --inputs=a.jsonl.gz --output=text.safetensors
    python -m experiments.build_databases --kind=trigrams --inputs=a.jsonl.gz --output=trigrams.safetensors
    python -m experiments.build_databases --kind=sampled --num_tokens=1000000 --output=sampled.safetensors

Kinds:

    model       D_m: the most frequent n-grams of the model's own greedy answers to a file of prompts.
    model_text  D_m as text: a suffix array of the same answers.
    statistics  D_s, of text: n-grams that occur in several documents, without the running text, or a suffix array of it.
    trigrams    the likeliest successors of token pairs of text.
    sampled     a suffix array of text that the model samples itself, at temperature 1, from its BOS token on.

The first two and the last run the model. Their answers are kept in `<output>.answers.jsonl`, one line each as they come, so a
job that was stopped goes on where it was, and a database with other settings is built from the same answers. The others
need a tokenizer alone.

Prompts are a .jsonl or .jsonl.gz file with, on each line, "turns": ["...", ...] (the first one is asked), "turns":
[{"role", "content"}, ...] (up to the first user's), or "prompt". Inputs are .txt files, a document each, or .jsonl and
.jsonl.gz files with a document on each line: "text" (and "prompt"), or "turns" as above.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import json
import os
import pathlib
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import flags

from experiments import program

_GREEDY = ("model", "model_text")  # kinds of the model's answers to prompts
_PIECE_CHARACTERS = 1 << 20  # of a text file, tokenized at once

# The flags that belong to each kind, besides those of every kind.
KINDS = {
    "model": ("prompts", "ngram", "max_ngrams", "max_new_tokens", "batch_size", "max_tokens"),
    "model_text": ("prompts", "max_new_tokens", "batch_size", "max_tokens"),
    "statistics": ("inputs", "form", "answers_only", "exclude_sources", "max_order", "min_documents", "max_tokens"),
    "trigrams": ("inputs", "answers_only", "exclude_sources", "max_pairs", "max_successors", "max_tokens"),
    "sampled": ("num_tokens", "max_new_tokens", "batch_size", "seed"),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What to build; the flags of the same names."""

    kind: str
    output: str
    model: str | None = None
    prompts: str | None = None
    inputs: tuple[str, ...] = ()
    form: str = "ngrams"
    answers_only: bool = True
    exclude_sources: tuple[str, ...] = ()
    num_tokens: int = 1_000_000
    max_tokens: int | None = None
    max_bytes: int | None = None
    ngram: int = 5
    max_ngrams: int = 100_000
    max_order: int = 6
    min_documents: int = 3
    max_pairs: int | None = None
    max_successors: int = 12
    max_new_tokens: int = 256
    batch_size: int = 8
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """What the database's file says of its making: files by their names, and the flags of this kind."""
        out = {name: getattr(self, name) for name in ("max_bytes", *KINDS[self.kind])}
        for name in {"inputs", "prompts"} & set(out):
            paths = [out[name]] if name == "prompts" else out[name]
            out[name] = [pathlib.Path(path).name for path in paths]
        return out


@dataclasses.dataclass(frozen=True)
class Library:
    """The functions of `hd_jax` that run a model or its tokenizer; tests put others in their place."""

    load: Callable[..., Any]
    generate: Callable[..., Any]
    load_tokenizer: Callable[[str | None], Any]

    @classmethod
    def default(cls) -> Library:
        from hd_jax import decode  # Late, so that flag errors come at once.
        from hd_jax.models import tokenizer

        return cls(decode.load, decode.generate, lambda name: tokenizer.load(name or decode.EMBEDDED))


@dataclasses.dataclass(frozen=True)
class Request:
    """One text to decode."""

    tokens: list[int]
    seed: int = 0

    @property
    def crc32(self) -> str:
        """Tells an answer to this request from one to another."""
        return f"{zlib.crc32(json.dumps([self.tokens, self.seed]).encode()):08x}"


def run(job: Job, library: Library) -> str:
    """Builds and writes the database; returns a line that says what it holds.

    Raises:
      ValueError: the job lacks something, or a file is not what it should be; most of it before any long work.
      OSError: a file cannot be read or written.
    """
    from hd_jax.databases.frequent_ngrams import FrequentNgrams
    from hd_jax.databases.ngram_trie import NgramTrie
    from hd_jax.databases.suffix_array import SuffixArray
    from hd_jax.databases.trigrams import TrigramCounts

    started = time.perf_counter()
    output = pathlib.Path(job.output)
    _check(job, output)
    if job.kind in (*_GREEDY, "sampled"):
        lm = library.load(job.model)
        fingerprint = lm.tokenizer.fingerprint
        documents = _answers(job, lm, library.generate)
    else:
        tokenizer = library.load_tokenizer(job.model)
        fingerprint = tokenizer.fingerprint
        documents = _tokenized(job, tokenizer)
    if not documents:
        raise ValueError(f"there is no text in {', '.join(job.inputs) or job.prompts}")
    if job.kind == "model":
        database = FrequentNgrams.build(documents, job.ngram, job.max_ngrams, job.max_bytes)
        holds = f"{len(database.counts)} n-grams"
    elif job.kind == "trigrams":
        database = TrigramCounts.build(
            documents, max_successors=job.max_successors, max_pairs=job.max_pairs, max_bytes=job.max_bytes
        )
        holds = f"{len(database.pairs)} pairs, {len(database.counts)} tri-grams"
    elif job.kind == "statistics" and job.form == "ngrams":
        database = NgramTrie.build(documents, max_order=job.max_order, min_documents=job.min_documents, max_bytes=job.max_bytes)
        holds = f"{database.num_ngrams} n-grams"
    else:
        database = SuffixArray.build(documents, max_bytes=job.max_bytes)
        holds = f"{len(database.text)} tokens with separators"
    num_tokens = sum(len(document) for document in documents)
    database.save(output, fingerprint=fingerprint, settings={**job.settings(), "num_tokens": num_tokens})
    return (
        f"{output}: {holds}, {database.num_bytes / 1e6:.2f} MB, from {num_tokens} tokens in {len(documents)} documents, "
        f"{time.perf_counter() - started:.1f} s"
    )


def _check(job: Job, output: pathlib.Path) -> None:
    if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(f"--output={output}: cannot be written; its folder must exist and be writable")
    if job.kind in _GREEDY and not job.prompts:
        raise ValueError(f"--kind={job.kind} needs --prompts, a .jsonl or .jsonl.gz file")
    if job.kind in ("statistics", "trigrams") and not job.inputs:
        raise ValueError(f"--kind={job.kind} needs --inputs, a comma list of .txt, .jsonl or .jsonl.gz files")
    for path in [*job.inputs, *([job.prompts] if job.prompts else [])]:
        endings = (".jsonl", ".jsonl.gz") if path == job.prompts else (".txt", ".jsonl", ".jsonl.gz")
        if not path.endswith(endings):
            raise ValueError(f"{path}: the name must end in {' or '.join(endings)}")
        if not pathlib.Path(path).is_file():
            raise ValueError(f"{path}: there is no such file")


# Text


def _tokenized(job: Job, tokenizer: Any) -> list[np.ndarray]:
    """The inputs' documents, int32[n] each, up to max_tokens in all."""
    from hd_jax.databases import SEPARATOR

    def encoded() -> Iterator[np.ndarray]:
        for path in job.inputs:
            for pieces in read_documents(path, job.answers_only, job.exclude_sources):
                ids: list[int] = []
                for piece in pieces:
                    ids += [*([SEPARATOR] if ids else []), *tokenizer.encode(piece, add_bos=False)]
                yield np.array(ids, np.int32)

    bar = tqdm.tqdm(_limited(encoded(), job.max_tokens), "reading", unit=" documents")
    return [document for document in bar if len(document)]


def _limited(documents: Iterable[np.ndarray], max_tokens: int | None) -> Iterator[np.ndarray]:
    """The first documents, the last one cut, with max_tokens in all."""
    num_left = max_tokens
    for document in documents:
        if num_left is not None:
            document = document[:num_left]
            num_left -= len(document)
        yield document
        if num_left == 0:
            return


def read_documents(path: str, answers_only: bool = True, exclude_sources: Sequence[str] = ()) -> Iterator[list[str]]:
    """The documents of a text or JSONL file, each a list of pieces that do not run on into one another.

    Args:
      path: its ending says its format.
      answers_only: leave out a "prompt", and the turns of other roles than the assistant's.
      exclude_sources: leave out records whose "source" begins so.

    Raises:
      ValueError: a line is not such a record; the message names the file and the line.
    """
    if path.endswith(".txt"):
        with open(path, encoding="utf-8") as file:
            try:
                yield list(iter(lambda: "".join(file.readlines(_PIECE_CHARACTERS)), ""))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
        return
    for number, record in read_jsonl(path):
        if exclude_sources and str(record.get("source", "")).startswith(tuple(exclude_sources)):
            continue
        if "text" in record:
            pieces = [record["text"]] if answers_only else [record.get("prompt", ""), record["text"]]
        elif isinstance(record.get("turns"), list):
            pieces = [_content(turn) for turn in record["turns"] if not answers_only or _role(turn) == "assistant"]
        else:
            raise ValueError(f'{path}, line {number}: a record needs "text" or a list of "turns"')
        if not all(isinstance(piece, str) for piece in pieces):
            raise ValueError(f'{path}, line {number}: a text is not a string; turns are strings or {{"role", "content"}}')
        yield [piece for piece in pieces if piece]


def read_prompts(path: str) -> list[str | list[dict[str, str]]]:
    """The prompts of a file: texts, or messages up to the first user's.

    Raises:
      ValueError: a line is not a prompt; the message names the file and the line.
    """
    out: list[str | list[dict[str, str]]] = []
    for number, record in read_jsonl(path):
        turns = record.get("turns")
        if isinstance(turns, list) and turns and isinstance(turns[0], str):
            prompt = turns[0]
        elif isinstance(turns, list) and all(isinstance(_content(turn), str) for turn in turns):
            first = next((i for i, turn in enumerate(turns) if _role(turn) == "user"), -1)
            prompt = [{"role": turn["role"], "content": turn["content"]} for turn in turns[: first + 1]]
        else:
            prompt = record.get("prompt")
        if not prompt or not isinstance(prompt, str | list):
            raise ValueError(f'{path}, line {number}: a record needs "turns" with a user\'s, or a "prompt"')
        out.append(prompt)
    if not out:
        raise ValueError(f"{path}: no prompts in this file")
    return out


def read_jsonl(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbered records of a .jsonl or .jsonl.gz file; empty lines are skipped.

    Raises:
      ValueError: a line is not a JSON object, or the file not what its name says.
    """
    number = 0
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError("not a JSON object")
                    yield number, record
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def _role(turn: Any) -> str:
    return turn.get("role", "") if isinstance(turn, dict) else "assistant"


def _content(turn: Any) -> Any:
    return turn.get("content") if isinstance(turn, dict) else turn


# Answers


def _answers(job: Job, lm: Any, generate: Callable[..., Any]) -> list[np.ndarray]:
    """The model's answers to the job's requests, int32[n] each: those kept from earlier runs, then new ones."""
    if job.kind in _GREEDY:
        assert job.prompts is not None
        temperature, max_tokens = 0.0, job.max_tokens
        requests: Iterable[Request] = _requests(read_prompts(job.prompts), lm)
    else:
        if lm.tokenizer.bos_id is None:
            raise ValueError("this model's tokenizer has no BOS token for a text to begin with")
        temperature, max_tokens = 1.0, job.num_tokens
        requests = (Request([lm.tokenizer.bos_id], job.seed + index) for index in itertools.count())

    def decode(batch: Sequence[Request]) -> list[Any]:
        return generate(
            lm,
            [request.tokens for request in batch],
            drafter=None,
            max_new_tokens=job.max_new_tokens,
            temperature=temperature,
            seed=[request.seed for request in batch],
        )

    header = {
        "model": job.model or "embedded",
        "tokenizer": lm.tokenizer.fingerprint,
        "temperature": temperature,
        "max_new_tokens": job.max_new_tokens,
    }
    path = pathlib.Path(job.output + ".answers.jsonl")
    answers = collect_answers(path, header, requests, decode, batch_size=job.batch_size, max_tokens=max_tokens)
    return [document for document in _limited(answers, max_tokens) if len(document)]


def _requests(prompts: Sequence[str | list[dict[str, str]]], lm: Any) -> list[Request]:
    """The prompts in the model's chat format; those that take more than half of its context are left out."""
    out = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if lm.tokenizer.has_chat_template:
            tokens = lm.tokenizer.chat(messages)
        else:
            tokens = lm.tokenizer.encode("\n".join(message["content"] for message in messages))
        if len(tokens) <= lm.max_context // 2:
            out.append(Request(tokens))
    if len(out) < len(prompts):
        print(f"{len(prompts) - len(out)} prompts of over {lm.max_context // 2} tokens, half of the context, are left out")
    return out


def collect_answers(
    path: pathlib.Path,
    header: dict[str, Any],
    requests: Iterable[Request],
    decode: Callable[[Sequence[Request]], list[Any]],
    *,
    batch_size: int,
    max_tokens: int | None,
) -> list[np.ndarray]:
    """The answers to requests, those kept in a file first; new ones are appended to it.

    Args:
      path: of the file. Its first line is the header, then comes a line for each answer, in the requests' order.
      header: what the answers depend on besides the requests.
      requests: what to answer.
      decode: requests -> results with `tokens` and `text`.
      batch_size: requests decoded together.
      max_tokens: answers are collected until they have so many tokens; None for no bound.

    Returns:
      int32[n] each.

    Raises:
      ValueError: the file holds answers to other requests, or of another model or setting.
    """
    answers: list[np.ndarray] = []
    waiting = iter(requests)
    for number, line in enumerate(_kept_lines(path)):
        try:
            record = json.loads(line)
            if number == 0:
                found, expected = record, header
            else:
                request = next(waiting, None)
                found, expected = record["request"], request and request.crc32
                answers.append(np.array(record["tokens"], np.int32))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number + 1}: not an answer that this program wrote ({error!r})") from error
        if found != expected:
            what = f"written with {found}, but this job is {expected}" if number == 0 else "not this job's request"
            raise ValueError(f"{path}, line {number + 1}: {what}; give another --output, or remove the file")

    waiting = list(waiting) if max_tokens is None else waiting
    num_tokens = sum(map(len, answers))
    total = len(answers) + len(waiting) if isinstance(waiting, list) else max_tokens
    unit = " answers" if max_tokens is None else " tokens"
    waiting = iter(waiting)
    with path.open("ab", buffering=0) as file, tqdm.tqdm(total=total, desc="answering", unit=unit) as bar:
        if not file.tell():
            file.write(json.dumps(header).encode() + b"\n")
        bar.update(len(answers) if max_tokens is None else num_tokens)
        while max_tokens is None or num_tokens < max_tokens:
            batch = list(itertools.islice(waiting, batch_size))
            if not batch:
                break
            for request, result in zip(batch, decode(batch), strict=True):
                record = {"request": request.crc32, "tokens": [int(t) for t in result.tokens], "text": result.text}
                file.write(json.dumps(record).encode() + b"\n")
                answers.append(np.array(record["tokens"], np.int32))
                num_tokens += len(answers[-1])
                bar.update(1 if max_tokens is None else len(answers[-1]))
    return answers


def _kept_lines(path: pathlib.Path) -> list[bytes]:
    """The lines of a file, if there is one. A last line that was cut while it was written is removed from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    return io.BytesIO(content[:end]).readlines()


def define_flags() -> None:
    """Defines the flags; a function, so that tests can import several programs."""
    defaults = Job("", "")
    flags.DEFINE_enum("kind", None, list(KINDS), "What to build; see above.", required=True)
    flags.DEFINE_string("output", None, "File to write.", required=True)
    flags.DEFINE_string("model", None, "Model folder or hub name; by default the embedded model.")
    flags.DEFINE_string("prompts", None, "model, model_text: file of prompts.")
    flags.DEFINE_list("inputs", [], "statistics, trigrams: comma list of files.")
    flags.DEFINE_enum("form", defaults.form, ["ngrams", "suffix_array"], "statistics: without or with the running text.")
    flags.DEFINE_bool("answers_only", defaults.answers_only, "statistics, trigrams: of chats, only what the assistant says.")
    flags.DEFINE_list("exclude_sources", [], 'statistics, trigrams: leave out records whose "source" begins so.')
    flags.DEFINE_integer("max_bytes", None, "Of the database.", lower_bound=1)

    def define(name: str, help_text: str, lower_bound: int = 1) -> None:
        flags.DEFINE_integer(name, getattr(defaults, name), help_text, lower_bound=lower_bound)

    define("max_tokens", "model, model_text, statistics, trigrams: read or generate so many tokens at most.")
    define("num_tokens", "sampled: tokens to sample.")
    define("ngram", "model: n of the n-grams.", 2)
    define("max_ngrams", "model: n-grams to keep.")
    define("max_order", "statistics, ngrams: the longest n-grams.")
    define("min_documents", "statistics, ngrams: keep an n-gram that occurs in so many documents.")
    define("max_pairs", "trigrams: pairs to keep.")
    define("max_successors", "trigrams: successors to keep of a pair.")
    define("max_new_tokens", "model, model_text, sampled: tokens of an answer at most.")
    define("batch_size", "model, model_text, sampled: answers decoded together.")
    define("seed", "sampled: of the first text; each has the next one.", 0)


def _given_job() -> Job:
    given: dict[str, Any] = {field.name: flags.FLAGS[field.name] for field in dataclasses.fields(Job)}
    kind = given["kind"].value
    of_some_kind = set(itertools.chain(*KINDS.values()))
    foreign = [f"--{name}" for name in given if given[name].present and name in of_some_kind - set(KINDS[kind])]
    if foreign:
        raise ValueError(f"--kind={kind} has no {', '.join(foreign)}; it has --{', --'.join(KINDS[kind])}")
    values: dict[str, Any] = {}
    for name, flag in given.items():
        values[name] = tuple(flag.value) if isinstance(flag.value, list) else flag.value
    return Job(**values)


def main(argv: Sequence[str]) -> None:
    del argv
    job = _given_job()
    try:
        print(run(job, Library.default()))
    except KeyboardInterrupt:
        is_kept = job.kind in (*_GREEDY, "sampled")
        print("\nStopped" + ("; the answers are kept, and the same command goes on." if is_kept else "."), file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    define_flags()
    program.run(main)
