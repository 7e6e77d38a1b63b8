"""Answer files: a line for each question, in Spec-Bench's own format, so that its evaluation/speed.py reads them.

The field "hd_jax" is ours. It holds for each turn the token ids, which --resume and the comparison with plain decoding
need, and what the report is made of.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
import uuid
from collections.abc import Sequence
from typing import Any

from experiments.questions import Question

Answer = dict[str, Any]  # one line


def make(label: str, question: Question, results: Sequence[Any], verdicts: Sequence[dict], *, draft_us: float | None) -> Answer:
    """An answer from the `Result` and the verdict of each turn. Its times are its share of a batch's, so they can be summed.

    Args:
      label: of the method.
      question: that was asked.
      results: one a turn.
      verdicts: how each turn compares with plain decoding's.
      draft_us: median microseconds of drafting for one step; None if it was not measured for this question.
    """
    turns = [
        {
            "tokens": result.tokens,
            "num_prompt_tokens": len(result.prompt_tokens),
            "finish_reason": result.finish_reason,
            "steps": result.num_steps,
            "nodes_per_step": result.nodes_per_step,
            "pass_sizes": result.pass_sizes,
            "prefill_ms": result.prefill_ms,
            "decode_ms": result.share_ms - result.prefill_ms,
            "compile_ms": result.compile_ms,
            "source_counts": result.source_counts,
            "verdict": verdict,
        }
        for result, verdict in zip(results, verdicts, strict=True)
    ]
    choice = {
        "index": 0,
        "turns": [result.text for result in results],
        "decoding_steps": [turn["steps"] for turn in turns],
        "new_tokens": [len(turn["tokens"]) for turn in turns],
        "wall_time": [result.share_ms / 1000 for result in results],
        "accept_lengths": [length for result in results for length in result.accept_lengths],
    }
    return {
        "question_id": question.question_id,
        "category": question.category,
        "answer_id": uuid.uuid4().hex,
        "model_id": label,
        "choices": [choice],
        "tstamp": time.time(),
        "hd_jax": {"draft_us": draft_us, "turns": turns},
    }


def texts(answer: Answer) -> list[str]:
    """The text of each turn."""
    return answer["choices"][0]["turns"]


def tokens(answer: Answer, turn: int) -> list[int]:
    """The token ids of a turn, the stop token included."""
    return answer["hd_jax"]["turns"][turn]["tokens"]


def unexplained(answer: Answer) -> str | None:
    """Where and how the answer differs from plain decoding's without a near-tie that explains it; None if it does not."""
    for number, turn in enumerate(answer["hd_jax"]["turns"], 1):
        verdict = turn["verdict"]
        if not verdict["is_equal"] and not verdict["is_explained"]:
            place = f"question {answer['question_id']}, turn {number}, position {verdict['position']}"
            return f"{place}: {verdict['message']}"
    return None


def median(runs: Sequence[Answer]) -> Answer:
    """Of several runs of one method on one question, the one whose time is their median; or one that is unexplained."""
    for answer in runs:
        if unexplained(answer):
            return answer
    by_time = sorted(runs, key=lambda answer: sum(answer["choices"][0]["wall_time"]))
    chosen = by_time[(len(runs) - 1) // 2]
    return {**chosen, "hd_jax": {**chosen["hd_jax"], "draft_us": runs[0]["hd_jax"]["draft_us"]}}


def append(path: pathlib.Path, answers: Sequence[Answer]) -> None:
    """Adds lines to a file, which is closed when this returns."""
    with path.open("ab") as file:
        file.write(b"".join(json.dumps(answer).encode() + b"\n" for answer in answers))


def read(path: pathlib.Path, questions: Sequence[Question]) -> list[Answer]:
    """The answers that a file holds so far; none where there is no file.

    What follows the last line end was cut while it was being written, and is removed from the file.

    Args:
      path: of the file.
      questions: of the run, in its order; the file answers the first of them.

    Raises:
      ValueError: a line is not an answer to the run's question of that place.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    out = []
    for number, line in enumerate(content[:end].splitlines(), 1):
        try:
            answer = json.loads(line)
            question_id, num_turns = answer["question_id"], len(answer["hd_jax"]["turns"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not an answer that this program wrote ({error!r})") from error
        expected = questions[number - 1] if number <= len(questions) else None
        if expected is None or question_id != expected.question_id or num_turns != len(expected.turns):
            raise ValueError(
                f"{path}, line {number}: the run has no question {question_id!r} with {num_turns} turns in this place"
            )
        out.append(answer)
    return out
