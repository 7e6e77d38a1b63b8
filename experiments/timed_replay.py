"""Timed replay: the speed of drafters at a model's shape, on recorded answers, without the model's weights.

The speed of a step depends on the model's shape, and acceptance on its tokens. So a model of the shape, with random weights,
does all of its work (prefill, draft, verification, commit), and recorded tokens stand in for those that it draws.

Questions are the outer loop and methods the inner one, in an order that rotates, so that a machine that other work slows down
for a while slows all methods alike. Every cache has the slots that the longest text needs: one program a method. Each method
runs once before it is timed. What a drafter has learned about acceptance passes from request to request, as in
`experiments.replay`.

Answers are kept as the main job keeps them, in `<method>.jsonl`, so that a run that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tqdm

from experiments import answers, report
from experiments.answers import Answer
from experiments.questions import Question
from experiments.traces import Turn
from hd_jax import runner
from hd_jax.drafters.base import Drafter
from hd_jax.models.config import ModelConfig
from hd_jax.models.llama import empty_cache
from hd_jax.result import Result
from hd_jax.runner import LM, Options, Row

WARM_UP_TOKENS = 64
MAX_DEPTH = 127  # of any method's drafts
AS_RECORDED = {"is_equal": True, "is_explained": False, "position": None, "gap": None, "tolerance": None, "message": ""}


@dataclasses.dataclass(frozen=True)
class Contender:
    """What is timed."""

    label: str
    drafter: Drafter  # its tables on the device
    budget: str | None  # as `runner.Options` has it


def check_lengths(config: ModelConfig, shape: str, texts: Sequence[Turn]) -> None:
    """Raises ValueError where a text does not fit the shape's context."""
    longest = max(texts, key=_length)
    if _length(longest) > config.max_context:
        raise ValueError(
            f"turn {longest.index + 1} of question {longest.question_id!r} has {_length(longest)} tokens with its prompt; the "
            f"context of shape {shape} has {config.max_context}"
        )


def num_slots(texts: Sequence[Turn]) -> int:
    """S of every cache."""
    return runner.num_slots(max(map(_length, texts)), MAX_DEPTH)


def run(
    folder: pathlib.Path,
    lm: LM,
    contenders: Sequence[Contender],
    chosen: Sequence[Question],
    texts: Sequence[Turn],
    recall: Callable[[Drafter, Sequence[Turn]], Any],
) -> dict[str, list[Answer]]:
    """Times what `folder` does not hold yet.

    Args:
      folder: of the run.
      lm: of the shape.
      contenders: the methods.
      chosen: the questions.
      texts: their recorded turns, in the same order.
      recall: gives a drafter's state after some texts, for a run that goes on.

    Returns:
      The answers of each method.

    Raises:
      ValueError: a file of answers is not of this run.
    """
    slots = num_slots(texts)
    paths = {contender.label: folder / f"{contender.label}.jsonl" for contender in contenders}
    stored = {label: answers.read(path, chosen) for label, path in paths.items()}
    turns_of = {question.question_id: [t for t in texts if t.question_id == question.question_id] for question in chosen}
    states: dict[str, Any] = {}
    with tqdm.tqdm(total=len(chosen) * len(contenders), unit=" answers", dynamic_ncols=True) as progress:
        progress.update(sum(map(len, stored.values())))
        for contender in contenders:
            done = stored[contender.label]
            if len(done) < len(chosen):
                progress.set_postfix_str(f"{contender.label}, compiling")
                known = [text for question in chosen[: len(done)] for text in turns_of[question.question_id]]
                states[contender.label] = None
                if known and contender.drafter.renew is not None:
                    states[contender.label] = recall(contender.drafter, known)
                first = texts[0]
                decode(lm, contender, dataclasses.replace(first, answer=first.answer[:WARM_UP_TOKENS]), slots, None)
        for index, question in enumerate(chosen):
            shift = index % len(contenders)
            for contender in (*contenders[shift:], *contenders[:shift]):
                label = contender.label
                if len(stored[label]) > index:
                    continue
                progress.set_postfix_str(f"{label}, {question.task}")
                results = []
                for text in turns_of[question.question_id]:
                    result, states[label] = decode(lm, contender, text, slots, states[label])
                    results.append(result)
                answer = answers.make(label, question, results, [AS_RECORDED] * len(results), draft_us=None)
                answers.append(paths[label], [answer])
                stored[label].append(answer)
                progress.update()
    return stored


def decode(lm: LM, contender: Contender, text: Turn, num_slots: int, kept: Any) -> tuple[Result, Any]:
    """Decodes a recorded text.

    Args:
      lm: the model.
      contender: the method.
      text: the record.
      num_slots: of the cache.
      kept: the drafter's state after an earlier text, for it to renew; or None.

    Returns:
      The result, and the state for the next text.

    Raises:
      RuntimeError: the tokens are not those of the record.
    """
    *_, last = runner.run(
        lm,
        contender.drafter,
        [Row(text.prompt, 0, recorded=text.answer)],
        Options(budget=contender.budget),
        kept_cache=empty_cache(lm.config, 1, num_slots),
        kept_drafter_state=kept,
    )
    (result,) = last.results
    if result.tokens != text.answer:
        place = f"turn {text.index + 1} of question {text.question_id!r}"
        raise RuntimeError(f"method {contender.label}, {place}: the tokens are not those of the record")
    return result, last.state.drafter if contender.drafter.renew is not None else None


def write(
    folder: pathlib.Path,
    facts: Mapping[str, Any],
    stored: Mapping[str, Sequence[Answer]],
    notes: Sequence[str],
    rivals: Mapping[str, Sequence[str]],
) -> str:
    """Writes the report, which says what a timed replay is. `facts` are those of config.json; the rest is `report.write`'s."""
    where, model = facts["environment"], facts["model"]
    named = model["name"]
    lines = [
        f"Not a trained model: {named} is a shape, its weights are random. It does all of its work (prefill, draft, "
        "verification, commit), and recorded tokens stand in for those that it draws. So acceptance is that of the record "
        "with any weights, and time is that of this shape on this device.",
        f"{facts['num_turns']} turns of {facts['flags']['traces']}, {facts['num_tokens']} tokens, equal to the record in every "
        f"method; {model['shape']['dtype']}, batch size 1, {model['num_slots']} cache slots; {where['device']} "
        f"({where['num_cpus']} CPU cores), jax {where['jax']}.",
        "A time is prefill + decoding, without compilation. Questions are the outer loop and methods the inner one.",
        "What a drafter has learned about acceptance passes from request to request; no answer is remembered.",
        *notes,
    ]
    return report.write(
        folder, f"Timed replay: the shape of {named}, random weights, recorded tokens", stored, [], lines, rivals
    )


def _length(text: Turn) -> int:
    return len(text.prompt) + len(text.answer)
