r"""Tokens per second of methods by the size of the batch, texts that wait taking the places of those that end.

    python -m experiments.throughput --methods=none,hd_tree:num_nodes=16:budget=adaptive --batch_sizes=1,4,16

A round asks the first turns of all questions in one call for each method and batch size, one after the other, so that a
machine that other work slows down for a while slows all of them alike. A first round compiles, warms up and compares each
text with plain decoding's of batch size 1, as the main job does; medians over the others are reported. A rate is all tokens
over the seconds of prefill and steps, what the host does in between included, compilation not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib.figure
import tqdm
from absl import flags

from experiments import program, questions, report, run_config, specbench
from experiments.run_config import PLAIN
from hd_jax import decode, exactness
from hd_jax.drafters.base import Drafter
from hd_jax.result import Result
from hd_jax.runner import LM

DEFAULT_METHODS = "none,hd_tree:num_nodes=16,hd_tree:num_nodes=16:budget=adaptive"


@dataclasses.dataclass(frozen=True)
class Case:
    """What a rate is measured of."""

    label: str  # of the method
    drafter: Drafter
    budget: str | None
    batch_size: int


def cases_of(lm: LM, methods: Sequence[str], batch_sizes: Sequence[int]) -> list[Case]:
    """Each method at each size, the methods in turn within a size.

    Raises:
      ValueError: no such method or option.
    """
    made = []
    for method in map(run_config.parse_method, methods):
        options: dict[str, Any] = dict(method.options)
        budget = run_config.budget_of(method.label, options.pop(run_config.BUDGET, None))
        made.append(Case(method.label, decode.make_drafter(lm, method.drafter, **options), budget, 1))
    return [dataclasses.replace(case, batch_size=size) for size in batch_sizes for case in made]


def decoded(lm: LM, case: Case, prompts: Sequence[Any], max_new_tokens: int) -> list[Result]:
    """A Result for each prompt."""
    options = {"max_new_tokens": max_new_tokens, "budget": case.budget, "batch_size": case.batch_size}
    return decode.generate(lm, prompts, drafter=case.drafter, **options)


def rate(results: Sequence[Result]) -> float:
    """Tokens per second of all texts together."""
    return sum(len(result.tokens) for result in results) / sum(result.share_ms for result in results) * 1e3


def compared(lm: LM, case: Case, plain: Sequence[Result], results: Sequence[Result]) -> int:
    """How many texts differ from plain decoding's by an explained near-tie.

    Raises:
      UnexplainedDifference: one differs otherwise.
    """
    num_rows, near_ties = min(case.batch_size, len(results)), 0
    for index, (expected, result) in enumerate(zip(plain, results, strict=True)):
        verdict = exactness.check(lm, case.drafter, expected, result, num_rows=num_rows, budget=case.budget)
        if not verdict.is_explained:
            where = f"{case.label}, batch size {case.batch_size}, question {index}"
            raise specbench.UnexplainedDifference(f"{where}: {verdict.message}")
        near_ties += not verdict.is_equal
    return near_ties


def measure(
    lm: LM, cases: Sequence[Case], prompts: Sequence[Any], *, max_new_tokens: int, num_rounds: int
) -> list[dict[str, Any]]:
    """A row for each case; plain decoding must be among them at each batch size.

    Returns:
      Rows of method, batch_size, rates (tokens per second of each round), median, over_plain (the median over that of plain
      decoding in batches of this size), tokens, tokens_per_step, nodes_per_pass (mean over the texts' steps, the root included)
      and near_ties (texts).

    Raises:
      UnexplainedDifference: a text is not plain decoding's.
    """
    alone = Case(PLAIN, decode.make_drafter(lm, PLAIN), None, 1)
    plain, rows = decoded(lm, alone, prompts, max_new_tokens), []
    for case in cases:
        results = decoded(lm, case, prompts, max_new_tokens)
        sizes = [size for result in results for size in result.pass_sizes]
        tokens = sum(len(result.tokens) for result in results)
        rows.append(
            {
                "method": case.label,
                "batch_size": case.batch_size,
                "rates": [],
                "tokens": tokens,
                "tokens_per_step": tokens / len(sizes),
                "nodes_per_pass": statistics.mean(sizes),
                "near_ties": compared(lm, case, plain, results),
            }
        )
    for _ in tqdm.tqdm(range(num_rounds), unit="round", dynamic_ncols=True):
        for case, row in zip(cases, rows, strict=True):
            row["rates"].append(rate(decoded(lm, case, prompts, max_new_tokens)))
    for row in rows:
        row["median"] = statistics.median(row["rates"])
    plain_rates = {row["batch_size"]: row["median"] for row in rows if row["method"] == PLAIN}
    return [row | {"over_plain": row["median"] / plain_rates[row["batch_size"]]} for row in rows]


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and body, a line for each row of `measure`."""
    head = ["method", "batch", "tokens/s", "min", "max", "over plain", "tokens/step", "nodes/pass", "near-ties"]
    body = []
    for row in rows:
        rates = [f"{value:.0f}" for value in (row["median"], min(row["rates"]), max(row["rates"]))]
        shown = [f"{row[key]:.2f}" for key in ("over_plain", "tokens_per_step", "nodes_per_pass")]
        body.append([row["method"], str(row["batch_size"]), *rates, *shown, str(row["near_ties"])])
    return head, body


def plot(rows: Sequence[dict[str, Any]]) -> matplotlib.figure.Figure:
    """Tokens per second by batch size, a line for each method; the bars go from the slowest round to the fastest."""
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    sizes = sorted({row["batch_size"] for row in rows})
    for method, color in report.colors([row["method"] for row in rows]).items():
        drawn = sorted((row for row in rows if row["method"] == method), key=lambda row: row["batch_size"])
        medians = [row["median"] for row in drawn]
        below = [row["median"] - min(row["rates"]) for row in drawn]
        above = [max(row["rates"]) - row["median"] for row in drawn]
        axes.errorbar(
            [row["batch_size"] for row in drawn], medians, [below, above], label=method, color=color, marker="o", capsize=3
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("texts decoded together")
    axes.set_ylabel("tokens per second, all texts")
    axes.legend(fontsize="small")
    return figure


def _prompts(lm: LM, num_questions: int | None, max_new_tokens: int) -> list[list[dict[str, str]]]:
    """Chats of one message each: the first turns of embedded questions, spread evenly over the file, whose answers fit."""
    asked = [[{"role": "user", "content": question.turns[0]}] for question in questions.read(questions.EMBEDDED)]
    fitting = [chat for chat in asked if len(lm.tokenizer.chat(chat)) + max_new_tokens <= lm.max_context]
    count = len(fitting) if num_questions is None else num_questions
    if not 0 < count <= len(fitting):
        raise ValueError(f"{len(fitting)} questions and their answers fit the model's context of {lm.max_context}, not {count}")
    return [fitting[index * len(fitting) // count] for index in range(count)]


def define_flags() -> None:
    """Defines the flags; a function, so that tests can import several programs."""
    flags.DEFINE_string("model", None, "Model folder or hub name; by default the embedded model.")
    flags.DEFINE_string(
        "methods", DEFAULT_METHODS, "Comma list; options as in hd_tree:num_nodes=16. Plain decoding always runs."
    )
    flags.DEFINE_list("batch_sizes", ["1", "4", "16"], "Texts decoded together.")
    flags.DEFINE_integer("num_questions", None, "Of the embedded ones; by default all.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 128, "Tokens of an answer at most.", lower_bound=1)
    flags.DEFINE_integer("num_rounds", 5, "Rounds; medians over them are reported.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of parameters and cache; by default the model's.")
    flags.DEFINE_string("output_dir", None, "Folder for throughput.json, .md and .png; by default nothing is written.")


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    batch_sizes = program.whole_numbers("batch_sizes")
    methods = run_config.parse_methods(values.methods)
    lm = decode.load(values.model, dtype=values.dtype)
    prompts = _prompts(lm, values.num_questions, values.max_new_tokens)
    cases = cases_of(lm, methods, batch_sizes)
    try:
        rows = measure(lm, cases, prompts, max_new_tokens=values.max_new_tokens, num_rounds=values.num_rounds)
    except specbench.UnexplainedDifference as error:
        sys.exit(f"error: {error}")
    head, body = table(rows)
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, jax {jax.__version__}"
    facts = f"{lm.config.dtype}, {len(prompts)} questions, at most {values.max_new_tokens} tokens each, {device}"
    print(f"{facts}\n{report.aligned(head, body)}")
    if values.output_dir:
        folder = pathlib.Path(values.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"model": values.model or "embedded", "facts": facts, "methods": methods, "results": rows}
        report.write_file(folder / "throughput.json", json.dumps(record, indent=1) + "\n")
        text = f"# Throughput\n\n{facts}\n\n{report.markdown(head, body)}\n\n![throughput](throughput.png)\n"
        report.write_file(folder / "throughput.md", text)
        report.write_figure(folder / "throughput.png", plot(rows))
        print(f"Written to {folder}")


if __name__ == "__main__":
    define_flags()
    program.run(main)
