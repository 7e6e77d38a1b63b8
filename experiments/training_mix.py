"""The training mix of the embedded model: records, their tokens in the chat template's form, and packed batches."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers
import tqdm

BOS, EOS, USER, ASSISTANT = "<s>", "</s>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content']"
    " + eos_token }}{% else %}{{ '<|user|>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# How often a record of a source is used in one pass over the data (fractions: that share of its records). Short
# instructions and answers would otherwise drown in task dialogues and command-line pages, and every answer would be that
# to a trivia question. A source that is not named counts once. The T0 slices are left out: their licences are not stated
# at the source.
SOURCE_WEIGHTS = {
    "yizhongw/self-instruct T0": 0.0,
    "google-research-datasets/dstc8": 0.15,
    "google-research-datasets/Taskmaster": 0.3,
    "alexa/Topical-Chat": 0.7,
    "teknium1/GPTeacher": 3.0,
    "LAION-AI/Open-Assistant": 4.0,
    "yizhongw/self-instruct data": 4.0,
    "tldr-pages": 0.15,
    "openai/grade-school-math": 2.0,
    "arkilpatel/SVAMP": 0.5,
    "uberspot/OpenTriviaQA": 0.2,
    "jhamburg/dats6450_nlp": 0.5,
    "Yale-LILY/FeTaQA": 3.0,
    "IBM/mt-rag": 3.0,
    "deepset-ai/COVID-QA": 3.0,
    "pubmedqa": 3.0,
    "primeqa/clapnq": 3.0,
    "allenai/scitldr": 3.0,
    "lauramanor": 3.0,
    "Yale-LILY/QMSum": 3.0,
}


@dataclasses.dataclass(frozen=True)
class Record:
    task: str
    source: str
    tokens: np.ndarray  # int32[n]
    is_target: np.ndarray  # bool[n], true where the token is to be predicted


def source_weight(source: str) -> float:
    return next((weight for prefix, weight in SOURCE_WEIGHTS.items() if source.startswith(prefix)), 1.0)


def read_records(path: pathlib.Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error


def training_files(folder: pathlib.Path) -> list[pathlib.Path]:
    files = sorted(p for p in folder.glob("*.jsonl.gz") if not p.name.startswith("validation"))
    if not files:
        raise ValueError(f"no .jsonl.gz files in {folder}")
    return files


def train_tokenizer(folder: pathlib.Path, vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE with a BOS, trained on every fourth record of the mix."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, USER, ASSISTANT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for path in training_files(folder):
            for index, record in enumerate(read_records(path)):
                if index % 4 == 0 and source_weight(record["source"]) > 0:
                    yield record["text"] if "text" in record else "\n".join(t["content"] for t in record["turns"])

    tokenizer.train_from_iterator(texts(), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return tokenizer


def encode(record: dict, tokenizer: tokenizers.Tokenizer) -> Record:
    """Tokens of a record in the chat template's form, with a mark on those that the loss falls on."""
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    bos, eos, user, assistant = (tokenizer.token_to_id(name) for name in (BOS, EOS, USER, ASSISTANT))
    tokens, marks = [bos], [False]
    if "text" in record:
        tokens += [*ids(record["text"]), eos]
        marks += [True] * (len(tokens) - 1)
    else:
        for turn in record["turns"]:
            is_answer = turn["role"] == "assistant"
            piece = [assistant, *ids(turn["content"]), eos] if is_answer else [user, *ids(turn["content"])]
            tokens += piece
            marks += [is_answer] * len(piece)
            if is_answer:
                marks[-len(piece)] = False  # The role token comes from the template.
    return Record(record["task"], record["source"], np.asarray(tokens, np.int32), np.asarray(marks))


def load_split(paths: Sequence[pathlib.Path], tokenizer: tokenizers.Tokenizer, sequence_length: int) -> list[Record]:
    """The records that fit a sequence; plain texts are cut into pieces, and dialogues are cut at the end of a turn."""
    out = []
    for path in tqdm.tqdm(paths, desc="tokenizing", unit="file"):
        for raw in read_records(path):
            if source_weight(raw["source"]) == 0:
                continue
            record = encode(raw, tokenizer)
            if "text" in raw:
                for start in range(0, len(record.tokens), sequence_length):
                    piece = slice(start, start + sequence_length)
                    out.append(dataclasses.replace(record, tokens=record.tokens[piece], is_target=record.is_target[piece]))
                continue
            turns = list(raw["turns"])
            while len(record.tokens) > sequence_length and len(turns) > 2:
                turns = turns[:-2]
                record = encode({**raw, "turns": turns}, tokenizer)
            if len(record.tokens) <= sequence_length:
                out.append(record)
    return out


def pack(records: Sequence[Record], sequence_length: int, rng: np.random.Generator) -> list[list[Record]]:
    """One pass over the data in random order: records drawn by their source's weight, packed first-fit into sequences."""
    chosen = []
    for record in records:
        weight = source_weight(record.source)
        chosen += [record] * (int(weight) + (rng.random() < weight % 1))
    order = rng.permutation(len(chosen))
    bins: list[tuple[int, list[Record]]] = []
    done = []
    for index in order:
        record = chosen[index]
        for slot, (used, content) in enumerate(bins):
            if used + len(record.tokens) <= sequence_length:
                content.append(record)
                bins[slot] = (used + len(record.tokens), content)
                break
        else:
            bins.append((len(record.tokens), [record]))
            if len(bins) > 48:
                fullest = max(range(len(bins)), key=lambda i: bins[i][0])
                done.append(bins.pop(fullest)[1])
    done += [content for _, content in bins]
    return [done[i] for i in rng.permutation(len(done))]


def batches(records: Sequence[Record], batch_size: int, sequence_length: int, seed: int, start: int) -> Iterator[dict]:
    """Batches from step `start` on; the same for the same seed, whatever the start."""
    step, epoch = 0, 0
    while True:
        sequences = pack(records, sequence_length, np.random.default_rng((seed, epoch)))
        for first in range(0, len(sequences) - batch_size + 1, batch_size):
            if step >= start:
                yield collate(sequences[first : first + batch_size], sequence_length)
            step += 1
        epoch += 1


def collate(sequences: Sequence[Sequence[Record]], sequence_length: int) -> dict:
    """tokens, segments, positions: int32[B, T]; where and what to predict: int32[M], weight 0 on padding."""
    shape = (len(sequences), sequence_length)
    tokens, segments, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    where: list[np.ndarray] = []
    for row, sequence in enumerate(sequences):
        cursor = 0
        for index, record in enumerate(sequence):
            piece = slice(cursor, cursor + len(record.tokens))
            tokens[row, piece], segments[row, piece] = record.tokens, index
            positions[row, piece] = np.arange(len(record.tokens))
            where.append(row * sequence_length + cursor + np.flatnonzero(record.is_target[1:]))
            cursor += len(record.tokens)
    found = np.concatenate(where)
    num_targets = int(0.6 * tokens.size)  # One static shape: more are dropped, fewer are padded.
    kept = np.zeros(num_targets, np.int32)
    kept[: len(found)] = found[:num_targets]
    weight = (np.arange(num_targets) < len(found)).astype(np.float32)
    return {
        "tokens": tokens,
        "segments": segments,
        "positions": positions,
        "where": kept,
        "targets": tokens.reshape(-1)[np.minimum(kept + 1, tokens.size - 1)],
        "weight": weight,
    }
