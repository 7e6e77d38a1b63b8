"""What a run of the main job says: rates from the answers, tables, `summary.json`, `report.md` and plots.

Works on answers as they stand in the answer files (`experiments.answers`), so it needs no model. Tokens are
counted by ids for every method, plain decoding included; every time is prefill + decoding, without compilation.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure

from experiments import questions
from experiments.answers import Answer

OVERALL = "overall"
LOOP_NGRAM = 8
WARM = "-warm"  # ends the label of a method that remembers earlier requests
NUM_PARTS = 4  # of a run, to see whether drafts get better as it goes on
TERMINAL_WIDTH = 100
STEP_RANGES = ((0, 8), (8, 32), (32, None))  # of a turn, over which the sizes of passes are told


def summarize(answers: Mapping[str, Sequence[Answer]], plain: str = "none") -> list[dict[str, Any]]:
    """One row for each method and task that has questions, and "overall".

    Args:
      answers: of each method, the same questions for all.
      plain: the method that the others are compared with.

    Returns:
      Rows of
        method, task, questions, turns, tokens, steps,
        speedup: mean over questions of tokens per second, over plain decoding's (Spec-Bench's definition),
        speedup_total: total tokens over total seconds, over plain decoding's; speedup_decode: the same without prefill,
        tokens_per_second: total tokens over total seconds; tokens_per_second_mean: the mean of the questions' rates,
        tokens_per_step: total tokens over total steps, the bonus token included,
        nodes_per_step: draft nodes verified, mean over steps,
        prefill_ms, decode_ms: sums; ms_per_step: decode_ms over steps,
        draft_us: drafting alone for one step, mean over the answers where it was measured,
        near_ties, near_ties_per_100k: explained differences from plain decoding, of turns, and per 100,000 tokens,
        pass_sizes: for each of STEP_RANGES, steps by the number of nodes of their pass,
        acceptance: for each source, nodes proposed and accepted by depth, the root's children first.

    Raises:
      ValueError: a method has other questions than plain decoding.
    """
    expected = [answer["question_id"] for answer in answers[plain]]
    for method, rows in answers.items():
        if [answer["question_id"] for answer in rows] != expected:
            raise ValueError(f"the answers of {method} are not to the same questions, in the same order, as those of {plain}")
    out = []
    for method, rows in answers.items():
        for task in (*questions.TASKS, OVERALL):
            chosen = _of_task(rows, task)
            if chosen:
                out.append({"method": method, "task": task, **_rates(chosen, _of_task(answers[plain], task))})
    return out


def growth(answers: Mapping[str, Sequence[Answer]]) -> list[dict[str, Any]]:
    """Tokens per step as a run goes on: for each method rows of method, part (from 1) and tokens_per_step.

    The parts are NUM_PARTS stretches of the questions of each task, in their order; so each part holds all tasks alike.
    """
    out = []
    for method, rows in answers.items():
        parts: list[list[Answer]] = [[] for _ in range(NUM_PARTS)]
        for task in questions.TASKS:
            of_task = _of_task(rows, task)
            for place, answer in enumerate(of_task):
                parts[place * NUM_PARTS // len(of_task)].append(answer)
        for number, part in enumerate(parts, 1):
            if part:
                rate = _sum(part, "new_tokens") / _sum(part, "decoding_steps")
                out.append({"method": method, "part": number, "tokens_per_step": rate})
    return out


def _of_task(answers: Sequence[Answer], task: str) -> list[Answer]:
    return [answer for answer in answers if task in (OVERALL, questions.task_of(answer["category"]))]


def _rates(answers: Sequence[Answer], plain: Sequence[Answer]) -> dict[str, Any]:
    turns = [turn for answer in answers for turn in answer["hd_jax"]["turns"]]
    tokens, steps = _sum(answers, "new_tokens"), _sum(answers, "decoding_steps")
    decode_ms = _turns_sum(answers, "decode_ms")
    near_ties = sum(not turn["verdict"]["is_equal"] for turn in turns)
    draft_us = [answer["hd_jax"]["draft_us"] for answer in answers if answer["hd_jax"]["draft_us"] is not None]
    return {
        "questions": len(answers),
        "turns": len(turns),
        "tokens": tokens,
        "steps": steps,
        "speedup": _mean_rate(answers) / _mean_rate(plain),
        "speedup_total": _total_rate(answers) / _total_rate(plain),
        "speedup_decode": tokens / decode_ms * _turns_sum(plain, "decode_ms") / _sum(plain, "new_tokens"),
        "tokens_per_second": _total_rate(answers),
        "tokens_per_second_mean": _mean_rate(answers),
        "tokens_per_step": tokens / steps,
        "nodes_per_step": sum(turn["nodes_per_step"] * turn["steps"] for turn in turns) / steps,
        "prefill_ms": _turns_sum(answers, "prefill_ms"),
        "decode_ms": decode_ms,
        "ms_per_step": decode_ms / steps,
        "draft_us": sum(draft_us) / len(draft_us) if draft_us else None,
        "near_ties": near_ties,
        "near_ties_per_100k": 100_000 * near_ties / tokens,
        "pass_sizes": [_sizes_of(turns, slice(*ends)) for ends in STEP_RANGES],
        "acceptance": _acceptance(turns),
    }


def _sizes_of(turns: Sequence[dict], steps: slice) -> dict[str, int]:
    """Steps by the number of nodes of their pass, as JSON has it."""
    counts = collections.Counter(size for turn in turns for size in turn["pass_sizes"][steps])
    return {str(size): count for size, count in sorted(counts.items())}


def regrets(rows: Sequence[dict], rivals: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """How methods of an adaptive budget compare with the best fixed one in hindsight.

    Args:
      rows: of `summarize`.
      rivals: of each method of an adaptive budget, the methods of fixed budgets that it is compared with.

    Returns:
      For each method and task: `best`, the rival with the most tokens per second, and `regret`, the share of its speed that the
      method falls short of; negative where the method is faster.
    """
    speed = {(row["method"], row["task"]): row["tokens_per_second"] for row in rows}
    out = []
    for method, others in rivals.items():
        for task in [row["task"] for row in rows if row["method"] == method]:
            best = max(others, key=lambda other, task=task: speed[other, task])
            regret = 1 - speed[method, task] / speed[best, task]
            out.append({"method": method, "task": task, "best": best, "regret": regret})
    return out


def _sum(answers: Sequence[Answer], key: str) -> Any:
    return sum(sum(answer["choices"][0][key]) for answer in answers)


def _turns_sum(answers: Sequence[Answer], key: str) -> float:
    return sum(turn[key] for answer in answers for turn in answer["hd_jax"]["turns"])


def _total_rate(answers: Sequence[Answer]) -> float:
    return _sum(answers, "new_tokens") / _sum(answers, "wall_time")


def _mean_rate(answers: Sequence[Answer]) -> float:
    return sum(_total_rate([answer]) for answer in answers) / len(answers)


def _acceptance(turns: Sequence[dict]) -> dict[str, dict[str, list[int]]]:
    out: dict[str, dict[str, list[int]]] = {}
    for turn in turns:
        for source, counts in turn["source_counts"].items():
            total = out.setdefault(source, {"proposed": [], "accepted": []})
            for kind, by_depth in counts.items():
                total[kind] += [0] * (len(by_depth) - len(total[kind]))
                for depth, count in enumerate(by_depth):
                    total[kind][depth] += count
    return out


def is_looping(tokens: Sequence[int]) -> bool:
    """Whether an n-gram of LOOP_NGRAM tokens occurs twice."""
    ngrams = [tuple(tokens[i : i + LOOP_NGRAM]) for i in range(len(tokens) - LOOP_NGRAM + 1)]
    return len(set(ngrams)) < len(ngrams)


def loop_share(answers: Sequence[Answer]) -> float:
    """Answers (turns) that loop, over all. Loops flatter every drafter."""
    turns = [turn["tokens"] for answer in answers for turn in answer["hd_jax"]["turns"]]
    return sum(map(is_looping, turns)) / len(turns)


def write(
    folder: pathlib.Path,
    title: str,
    answers: Mapping[str, Sequence[Answer]],
    skipped: Sequence[str],
    facts: Sequence[str],
    rivals: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Writes summary.json, report.md and the plots into `folder`.

    Args:
      folder: of the run.
      title: one line that says what ran.
      answers: of each method.
      skipped: a line for each question that was left out.
      facts: further lines about the run.
      rivals: as for `regrets`.

    Returns:
      The tables and facts as text for a terminal.
    """
    rows = summarize(answers)
    loops = loop_share(answers["none"])
    grown, regret = growth(answers), regrets(rows, rivals or {})
    summary = {"results": rows, "growth": grown, "skipped": list(skipped), "loop_share": loops, "regret": regret}
    plots = {
        "speedup": _plot_by_task(rows, "speedup"),
        "tokens_per_step": _plot_by_task(rows, "tokens_per_step"),
        "growth": _plot_growth(grown),
        "acceptance": _plot_acceptance(rows),
    }
    for name, figure in plots.items():
        write_figure(folder / f"{name}.png", figure)
    notes = [
        *facts,
        f"{loops:.0%} of plain decoding's answers repeat an {LOOP_NGRAM}-gram: loops flatter every drafter.",
        _near_tie_line(rows),
        *([f"Left out, as their prompts do not fit the context ({len(skipped)}): {'; '.join(skipped)}"] if skipped else []),
    ]
    tables = [(caption, note, *_grid(rows, kind)) for kind, (caption, note) in _TABLES.items()]
    if rivals:
        sizes = _sizes_grid(rows, list(rivals))
        tables += [(*_REGRET, *_regret_grid(regret)), (*_SIZES, *sizes)]
    lines = [f"# {title}", *(f"- {note}" for note in notes)]
    for caption, note, head, body in tables:
        lines += [f"\n## {caption}\n\n{note}\n", markdown(head, body)]
    for caption, note, grid in (
        (
            "Speedup of decoding",
            "all tokens / all seconds of steps, without prefill, over plain decoding's",
            _grid(rows, "speedup_decode"),
        ),
        ("Time of a step", "milliseconds of decoding over steps, drafting included", _grid(rows, "ms_per_step")),
        ("Nodes a step", "draft nodes verified, mean over steps", _grid(rows, "nodes_per_step")),
        (
            "Draft time",
            "microseconds of drafting alone for one step, mean over the answers where it was measured",
            _grid(rows, "draft_us"),
        ),
        ("Growth", f"tokens per step in the {NUM_PARTS} parts of each task's questions, in their order", _growth_grid(grown)),
        ("Acceptance by source and task", "nodes accepted over nodes proposed", _task_acceptance_grid(rows)),
        ("Acceptance by source and depth", "nodes accepted over nodes proposed, overall", _acceptance_grid(rows)),
    ):
        lines += [f"\n## {caption}\n\n{note}\n", markdown(*grid)]
    lines += ["\n## Plots\n", *(f"![{name}]({name}.png)" for name in plots)]
    write_file(folder / "report.md", "\n".join(lines) + "\n")
    write_file(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    text = [f"{caption} ({note})\n{aligned(head, body)}\n" for caption, note, head, body in tables]
    return "\n".join([*text, *(textwrap.fill(note, TERMINAL_WIDTH) for note in notes)])


_TABLES = {
    "speedup": ("Speedup", "mean of the questions' tokens per second, over plain decoding's"),
    "tokens_per_step": ("Mean accepted tokens", "tokens per decoding step, the model's own included"),
    "cost": ("Overall", "total: all tokens / all seconds, over plain decoding's; near-ties: per 100,000 tokens"),
}
_REGRET = ("Regret", "of the adaptive budget: share of the best fixed method's tokens/s that is missed; negative is faster")
_SIZES = ("Sizes of passes", "share of steps by nodes of the pass, over the steps of an answer")
_COST_COLUMNS = {
    "total": ("speedup_total", "{:.2f}"),
    "tokens/s": ("tokens_per_second", "{:.1f}"),
    "steps": ("steps", "{}"),
    "nodes/step": ("nodes_per_step", "{:.1f}"),
    "prefill s": ("prefill_ms", "{:.1f}"),
    "decode s": ("decode_ms", "{:.1f}"),
    "draft us": ("draft_us", "{:.0f}"),
    "near-ties": ("near_ties_per_100k", "{:.1f}"),
}


def _near_tie_line(rows: Sequence[dict]) -> str:
    counts = {row["method"]: row["near_ties"] for row in rows if row["task"] == OVERALL}
    if not any(counts.values()):
        return "Every method's token ids equal plain decoding's."
    told = ", ".join(f"{method} {count}" for method, count in counts.items() if count)
    return f"Turns that differ from plain decoding's by an explained near-tie: {told}; all others are equal by token ids."


def _grid(rows: Sequence[dict], kind: str) -> tuple[list[str], list[list[str]]]:
    """Head and body of a table, methods as rows."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    by_key = {(row["method"], row["task"]): row for row in rows}
    if kind != "cost":
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        form = {"nodes_per_step": ".1f", "draft_us": ".0f"}.get(kind, ".2f")
        show = lambda value: "-" if value is None else format(value, form)  # noqa: E731
        return ["method", *tasks], [[m, *(show(by_key[m, task][kind]) for task in tasks)] for m in methods]
    body = []
    for method in methods:
        cells = [method]
        for name, (key, form) in _COST_COLUMNS.items():
            value = by_key[method, OVERALL][key]
            scaled = value / 1000 if name.endswith(" s") else value
            cells.append("-" if value is None else form.format(scaled))
        body.append(cells)
    return ["method", *_COST_COLUMNS], body


def _growth_grid(grown: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    methods, parts = (list(dict.fromkeys(row[key] for row in grown)) for key in ("method", "part"))
    by_key = {(row["method"], row["part"]): f"{row['tokens_per_step']:.2f}" for row in grown}
    return ["method", *(f"part {part}" for part in parts)], [[m, *(by_key[m, part] for part in parts)] for m in methods]


def _task_acceptance_grid(rows: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    shares: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        for source, counts in row["acceptance"].items():
            accepted, proposed = (sum(counts[kind]) for kind in ("accepted", "proposed"))
            if proposed:
                shares.setdefault((row["method"], source), {})[row["task"]] = f"{accepted}/{proposed}"
    return ["method", "source", *tasks], [[*key, *(found.get(task, "") for task in tasks)] for key, found in shares.items()]


def _regret_grid(regret: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    tasks = list(dict.fromkeys(row["task"] for row in regret))
    by_key = {(row["method"], row["task"]): row for row in regret}
    body = []
    for method in dict.fromkeys(row["method"] for row in regret):
        cells = [f"{by_key[method, task]['regret']:.2f}" for task in tasks]
        body += [[method, *cells], ["  best", *(by_key[method, task]["best"].split("-", 1)[-1] for task in tasks)]]
    return ["method", *tasks], body


def _sizes_grid(rows: Sequence[dict], methods: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    overall = [row for row in rows if row["task"] == OVERALL and row["method"] in methods]
    sizes = sorted({int(size) for row in overall for counts in row["pass_sizes"] for size in counts})
    body = []
    for row in overall:
        for (start, end), counts in zip(STEP_RANGES, row["pass_sizes"], strict=True):
            total = sum(counts.values())
            shares = [f"{counts.get(str(size), 0) / total:.0%}" if total else "" for size in sizes]
            body.append([row["method"], f"{start + 1}-{end or ''}", *shares])
    return ["method", "steps", *map(str, sizes)], body


def _acceptance_grid(rows: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    found = [(row["method"], source, c) for row in rows if row["task"] == OVERALL for source, c in row["acceptance"].items()]
    found = [entry for entry in found if any(entry[2]["proposed"])]
    depth = max((d for _, _, counts in found for d, proposed in enumerate(counts["proposed"], 1) if proposed), default=0)
    body = []
    for method, source, counts in found:
        cells = [f"{a}/{p}" if p else "" for a, p in zip(counts["accepted"], counts["proposed"], strict=True)][:depth]
        body.append([method, source, *cells, *[""] * (depth - len(cells))])
    return ["method", "source", *(f"depth {d}" for d in range(1, depth + 1))], body


def aligned(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; the first is cut so that a line fits the terminal."""
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    widths[0] = min(widths[0], max(8, TERMINAL_WIDTH - sum(widths[1:]) - 2 * (len(head) - 1)))
    cut = lambda cell: cell if len(cell) <= widths[0] else cell[: widths[0] - 1] + "~"  # noqa: E731
    lines = [
        [cut(row[0]).ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in (head, *body)
    ]
    return "\n".join("  ".join(line) for line in lines)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def _plot_by_task(rows: Sequence[dict], key: str) -> matplotlib.figure.Figure:
    head, body = _grid(rows, key)
    figure = matplotlib.figure.Figure(figsize=(max(9, len(body)), 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(body)
    colors = _colors(rows)
    for index, (method, *values) in enumerate(body):
        places = [place + (index - (len(body) - 1) / 2) * width for place in range(len(values))]
        hatch = "///" if method.endswith(WARM) else None
        axes.bar(places, [float(value) for value in values], width, label=method, color=colors[method], hatch=hatch)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(head) - 1), head[1:])
    axes.set_ylabel("speedup over plain decoding" if key == "speedup" else "tokens per decoding step")
    figure.legend(fontsize="small", ncols=5, loc="outside upper center")
    return figure


def _colors(rows: Sequence[dict]) -> dict[str, Any]:
    """A color for each method, the same for a warm one and its cold one."""
    methods = dict.fromkeys(row["method"] for row in rows)
    found = colors([method.removesuffix(WARM) for method in methods])
    return {method: found[method.removesuffix(WARM)] for method in methods}


def colors(names: Sequence[str]) -> dict[str, Any]:
    """A color for each different name."""
    different = list(dict.fromkeys(names))
    palette = matplotlib.colormaps["tab20" if len(different) > 10 else "tab10"]
    return {name: palette(index % palette.N) for index, name in enumerate(different)}


def _plot_growth(grown: Sequence[dict]) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for method, color in _colors(grown).items():
        drawn = [(row["part"], row["tokens_per_step"]) for row in grown if row["method"] == method]
        style = "-" if method.endswith(WARM) else "--"
        axes.plot(*zip(*drawn, strict=True), style, marker="o", label=method, color=color)
    axes.set_xticks(sorted({row["part"] for row in grown}))
    axes.set_xlabel("part of each task's questions")
    axes.set_ylabel("tokens per decoding step")
    figure.legend(fontsize="small", ncols=5, loc="outside upper center")
    return figure


def _plot_acceptance(rows: Sequence[dict]) -> matplotlib.figure.Figure:
    overall = [row for row in rows if row["task"] == OVERALL and any(any(c["proposed"]) for c in row["acceptance"].values())]
    columns = min(max(len(overall), 1), 4)
    num_rows = max(-(-len(overall) // columns), 1)
    figure = matplotlib.figure.Figure(figsize=(max(9, 3 * columns), 3.5 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, columns, sharey=True, squeeze=False)
    for axes, row in zip(grid.flat, overall, strict=False):
        for source, counts in row["acceptance"].items():
            drawn = [(d, a / p) for d, (a, p) in enumerate(zip(counts["accepted"], counts["proposed"], strict=True), 1) if p]
            if drawn:
                axes.plot(*zip(*drawn, strict=True), marker="o", label=source)
        axes.set_title(row["method"], fontsize="small")
        axes.set_xlabel("depth")
        axes.legend(fontsize="x-small")
    for axes in grid.flat[len(overall) :]:
        axes.set_axis_off()
    grid[0, 0].set_ylim(0, 1)
    for axes in grid[:, 0]:
        axes.set_ylabel("nodes accepted / proposed")
    return figure


def write_file(path: pathlib.Path, text: str) -> None:
    """Writes beside the place and renames."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_figure(path: pathlib.Path, figure: matplotlib.figure.Figure) -> None:
    """Writes a PNG file whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, path)
