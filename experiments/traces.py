"""Recorded answers of a model, and the texts that a replay runs over.

A record is a .jsonl or .jsonl.gz file that stands beside a question file in Spec-Bench's format, one line for each of its
questions, in any order:

    {"question_id": 81, "category": "writing", "turns": ["Title: ...", "A ..."], "new_tokens": [514, 480]}

    turns       what the model answered to each turn of the question
    new_tokens  how many tokens it wrote in each, the end token included
    token_ids   optional, [[...], ...]: the tokens of each turn as they were written, the end token included

Or it is an answer file of Spec-Bench or of `experiments.specbench`, where `turns` and `new_tokens` are those of the first of
`choices`; the latter's token ids are taken as well.

Without `token_ids` a text is encoded again. It then has new_tokens - 1 ids, and the end token follows; or, if the answer
was cut at a limit, new_tokens. Tokenizers do not always return to the very ids that a model wrote, so single answers may
differ; more than MAX_DIFFERING of them tell that the tokenizer is another one.

A turn's prompt is the chat format's, over the question's turns and the recorded answers before it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.build_databases import read_jsonl
from experiments.questions import Question

MAX_DIFFERENCE = 2  # tokens that a text may have more or fewer than recorded
MAX_DIFFERING = 0.02  # of all turns that may differ by more


@dataclasses.dataclass(frozen=True)
class Trace:
    """The recorded answers to one question, one entry a turn."""

    question_id: int | str
    category: str
    turns: tuple[str, ...]
    new_tokens: tuple[int, ...]
    token_ids: tuple[tuple[int, ...], ...] | None


@dataclasses.dataclass(frozen=True)
class Turn:
    """One text to replay."""

    question_id: int | str
    place: int  # of the question in its file, from 0
    task: str
    index: int  # of the turn, from 0
    prompt: list[int]
    answer: list[int]


def read(path: str | pathlib.Path) -> list[Trace]:
    """Reads a file of recorded answers.

    Raises:
      ValueError: a line is no such record, or a question has two; the message names the file and the line.
      OSError: the file cannot be read.
    """
    out: list[Trace] = []
    lines_by_id: dict[int | str, int] = {}
    for number, record in read_jsonl(str(path)):
        try:
            trace = _parse(record)
            if trace.question_id in lines_by_id:
                raise ValueError(f"question_id {trace.question_id!r} was used in line {lines_by_id[trace.question_id]}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        lines_by_id[trace.question_id] = number
        out.append(trace)
    if not out:
        raise ValueError(f"{path}: no recorded answers in this file")
    return out


def _parse(record: dict[str, Any]) -> Trace:
    if "choices" in record:
        try:
            record = {**record, **record["choices"][0]}
            if "hd_jax" in record:
                record["token_ids"] = [turn["tokens"] for turn in record["hd_jax"]["turns"]]
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(f"choices is not that of an answer file ({error!r})") from error
    missing = [key for key in ("question_id", "category", "turns", "new_tokens") if key not in record]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    question_id, turns, counts = record["question_id"], record["turns"], record["new_tokens"]
    ids = record.get("token_ids")
    if isinstance(question_id, bool) or not isinstance(question_id, int | str):
        raise ValueError(f"question_id is {question_id!r}; a whole number or a string is needed")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError("turns must be a list of one or more strings")
    if not _is_whole(counts) or len(counts) != len(turns) or min(counts) < 1:
        raise ValueError(f"new_tokens must be {len(turns)} whole numbers of at least 1, one a turn, not {counts!r}")
    if ids is not None:
        if not isinstance(ids, list) or len(ids) != len(turns) or not all(_is_whole(turn) for turn in ids):
            raise ValueError(f"token_ids must be {len(turns)} lists of token ids, one a turn")
        if [len(turn) for turn in ids] != counts:
            raise ValueError(f"token_ids holds {[len(turn) for turn in ids]} tokens, but new_tokens says {counts}")
        ids = tuple(tuple(turn) for turn in ids)
    return Trace(question_id, str(record["category"]), tuple(turns), tuple(counts), ids)


def _is_whole(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


def check_questions(questions: Sequence[Question], traces: Sequence[Trace]) -> None:
    """Raises ValueError where the recorded answers are not to these questions."""
    asked = {question.question_id: question for question in questions}
    answered = {trace.question_id: trace for trace in traces}
    for what, ids in (
        ("recorded answers to no question", [i for i in answered if i not in asked]),
        ("questions without a recorded answer", [i for i in asked if i not in answered]),
    ):
        if ids:
            raise ValueError(f"the traces do not fit the questions: {len(ids)} {what}, the first one is {ids[0]!r}")
    for question_id, trace in answered.items():
        question = asked[question_id]
        for what, there, here in (
            ("the number of turns", len(question.turns), len(trace.turns)),
            ("the category", question.category, trace.category),
        ):
            if there != here:
                raise ValueError(
                    f"the traces do not fit the questions: {what} of question {question_id!r} is {there}, that of its recorded "
                    f"answer {here}"
                )


def turns(questions: Sequence[Question], chosen: Sequence[Question], traces: Sequence[Trace], tokenizer: Any) -> list[Turn]:
    """The texts of some of the questions, in their order; all of the recorded answers are checked.

    Args:
      questions: that were asked.
      chosen: those of them that are replayed.
      traces: the recorded answers to all questions.
      tokenizer: of the model that answered, with its chat format.

    Raises:
      ValueError: the traces are not of these questions, or not of this tokenizer.
    """
    check_questions(questions, traces)
    answers = {trace.question_id: _answers(trace, tokenizer) for trace in traces}
    _check_counts(traces, answers)
    by_id = {trace.question_id: trace for trace in traces}
    out = []
    for question in chosen:
        messages: list[dict[str, str]] = []
        for index, (asked, said) in enumerate(zip(question.turns, by_id[question.question_id].turns, strict=True)):
            messages.append({"role": "user", "content": asked})
            answer = answers[question.question_id][index]
            out.append(Turn(question.question_id, question.index, question.task, index, tokenizer.chat(messages), answer))
            messages.append({"role": "assistant", "content": said})
    return out


def _answers(trace: Trace, tokenizer: Any) -> list[list[int]]:
    """The tokens of each turn."""
    if trace.token_ids is not None:
        largest = max(max(ids) for ids in trace.token_ids)
        if largest >= tokenizer.vocab_size:
            raise ValueError(
                f"question {trace.question_id!r}: the recorded token id {largest} is outside the tokenizer's vocabulary of "
                f"{tokenizer.vocab_size}"
            )
        return [list(ids) for ids in trace.token_ids]
    out = []
    for text, count in zip(trace.turns, trace.new_tokens, strict=True):
        ids = tokenizer.encode(text, add_bos=False)
        # Of several end tokens, the one with the highest id ends a turn of a chat (Llama 3, Qwen).
        out.append(ids if len(ids) >= count else [*ids, tokenizer.eos_ids[-1]])
    return out


def _check_counts(traces: Sequence[Trace], answers: dict[int | str, list[list[int]]]) -> None:
    differing, num_turns = [], 0
    for trace in traces:
        for index, (ids, count) in enumerate(zip(answers[trace.question_id], trace.new_tokens, strict=True)):
            num_turns += 1
            if abs(len(ids) - count) > MAX_DIFFERENCE:
                differing.append((trace.question_id, index, len(ids), count))
    if len(differing) > MAX_DIFFERING * num_turns:
        question_id, index, found, count = differing[0]
        raise ValueError(
            f"these answers were not written with this tokenizer: {len(differing)} of {num_turns} turns have another number "
            f"of tokens than recorded, the first one is turn {index + 1} of question {question_id!r}: {found}, recorded {count}"
        )
