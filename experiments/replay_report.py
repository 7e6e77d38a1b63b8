"""What a replay says: `summary.json`, `report.md`, tables and plots, from the parts that `experiments.replay` measured."""

from __future__ import annotations

import json
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np

from experiments import questions, report
from experiments.report import OVERALL

PLOTS = ("tokens_per_step", "budgets")
_COSTS = ("method", "state", "budget", "table_bytes", "state_bytes", "make_s")
_NOTES = (
    "Mean accepted tokens: tokens over steps, the model's own token of each step (the bonus) included, pooled over all steps.",
    "A budget is the number of nodes drafted a step at most, the root not counted.",
    "Even and odd: tokens per step of the questions at these places (from 0). hd_tree's weights were fitted on even ones.",
    "Draft us: the median step without a model, that is drafting, walking the tree and bookkeeping.",
    "Tables: a method's databases on the device; the time is that of making them, less what a method before it made.",
    "Cold: earlier answers are forgotten; warm: they are remembered. Learned acceptance is kept in both.",
)


def summarize(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each part and task, and "overall".

    Args:
      parts: as `replay.run` makes them: method, state, budget, is_fixed, the costs, and what `replay.replay` returns.

    Returns:
      Rows of
        method, state ("cold" or "warm"), budget (drafted nodes a step at most, the root not counted), task,
        tokens_per_step: tokens over steps, the bonus included, pooled,
        nodes_per_step: nodes drafted, over steps,
        draft_us: median over steps; a step has the median of its turn,
        turns, tokens, steps,
        by_place: tokens_per_step of the questions at "even" and at "odd" places of their file (from 0), None without any,
        acceptance: for each source, nodes "proposed" and "accepted" by depth, depth 1 first.
    """
    rows = []
    for part in parts:
        for task in (*questions.TASKS, OVERALL):
            turns = [turn for turn in part["turns"] if task in (OVERALL, turn["task"])]
            if turns:
                tokens, steps = (sum(turn[key] for turn in turns) for key in ("tokens", "steps"))
                counts = [found for of_task, found in part["counts"].items() if task in (OVERALL, of_task)]
                rows.append(
                    {
                        "method": part["method"],
                        "state": part["state"],
                        "budget": part["budget"],
                        "task": task,
                        "tokens_per_step": tokens / steps,
                        "nodes_per_step": sum(turn["nodes"] for turn in turns) / steps,
                        "draft_us": float(np.median(np.repeat([t["draft_us"] for t in turns], [t["steps"] for t in turns]))),
                        "turns": len(turns),
                        "tokens": tokens,
                        "steps": steps,
                        "by_place": {name: _pooled(turns, half) for half, name in enumerate(("even", "odd"))},
                        "acceptance": _summed(counts),
                    }
                )
    return rows


def _pooled(turns: Sequence[Mapping[str, Any]], part: int) -> float | None:
    """Tokens over steps of the questions at even (part 0) or odd (1) places."""
    chosen = [turn for turn in turns if turn["place"] % 2 == part]
    return sum(turn["tokens"] for turn in chosen) / sum(turn["steps"] for turn in chosen) if chosen else None


def _summed(counts: Sequence[Mapping[str, Mapping[str, list[int]]]]) -> dict[str, dict[str, list[int]]]:
    kinds = ("proposed", "accepted")
    return {source: {k: np.sum([c[source][k] for c in counts], axis=0).tolist() for k in kinds} for source in counts[0]}


def write(
    folder: pathlib.Path,
    title: str,
    parts: Sequence[Mapping[str, Any]],
    databases: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> str:
    """Writes report.md, the plots and, last, summary.json into `folder`.

    Args:
      folder: of the run.
      title: one line that says what ran.
      parts: what was measured.
      databases: what is known of each that was built: name, corpus, tokens, num_bytes, tokenize_s, build_s.
      notes: further lines about the run.

    Returns:
      The tables and notes as text for a terminal.
    """
    rows = summarize(parts)
    for name, figure in zip(PLOTS, (_plot_by_task(rows), _plot_by_budget(rows, parts)), strict=True):
        report.write_figure(folder / f"{name}.png", figure)
    notes = [*_NOTES, *notes]
    tables = [("Mean accepted tokens", *_task_table(rows)), ("Cost, overall", *_cost_table(rows, parts))]
    if databases:
        tables.append(("Databases", *_database_table(databases)))
    lines = [f"# {title}\n", *(f"- {note}" for note in notes)]
    for caption, head, body in [*tables, *_acceptance_tables(rows)]:
        lines += [f"\n## {caption}\n", report.markdown(head, body)]
    lines += ["\n## Plots\n", *(f"![{name}]({name}.png)" for name in PLOTS)]
    report.write_file(folder / "report.md", "\n".join(lines) + "\n")
    costs = [{key: part[key] for key in _COSTS} for part in parts]
    summary = {"results": rows, "methods": costs, "databases": list(databases)}
    report.write_file(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    text = [f"{caption}\n{report.aligned(head, body)}\n" for caption, head, body in tables]
    return "\n".join([title + "\n", *text, *(textwrap.fill(note, report.TERMINAL_WIDTH) for note in notes)])


def _name(row: Mapping[str, Any]) -> str:
    """Of a part, in tables and plots."""
    return f"{row['method']} {row['budget']}{' warm' * (row['state'] == 'warm')}"


def _task_table(rows: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    tasks = [task for task in (*questions.TASKS, OVERALL) if any(row["task"] == task for row in rows)]
    by_key = {(_name(row), row["task"]): row["tokens_per_step"] for row in rows}
    names = dict.fromkeys(_name(row) for row in rows)
    return ["method and budget", *tasks], [[name, *(f"{by_key[name, task]:.2f}" for task in tasks)] for name in names]


def _cost_table(rows: Sequence[dict], parts: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = [
        "method and budget",
        "tokens/step",
        "even",
        "odd",
        "nodes/step",
        "draft us",
        "steps",
        "tables MB",
        "state MB",
        "made in s",
    ]
    body = []
    for row, part in zip([row for row in rows if row["task"] == OVERALL], parts, strict=True):
        halves = ["" if value is None else f"{value:.3f}" for value in row["by_place"].values()]
        measured = [f"{row['tokens_per_step']:.3f}", *halves, f"{row['nodes_per_step']:.1f}", f"{row['draft_us']:.0f}"]
        cost = [f"{part['table_bytes'] / 1e6:.1f}", f"{part['state_bytes'] / 1e6:.2f}", f"{part['make_s']:.1f}"]
        body.append([_name(row), *measured, str(row["steps"]), *cost])
    return head, body


def _database_table(databases: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["database", "corpus", "tokens", "MB", "tokenized in s", "built in s"]
    body = [
        [
            d["name"],
            d["corpus"],
            str(d["tokens"]),
            f"{d['num_bytes'] / 1e6:.1f}",
            f"{d['tokenize_s']:.1f}",
            f"{d['build_s']:.1f}",
        ]
        for d in databases
    ]
    return head, body


def _acceptance_tables(rows: Sequence[dict]) -> list[tuple[str, list[str], list[list[str]]]]:
    """For each part, nodes accepted over nodes proposed: by source, and by source and depth."""
    out = []
    for row in rows:
        found = {name: c for name, c in row["acceptance"].items() if any(c["proposed"])}
        if row["task"] != OVERALL or not found:
            continue
        depth = max(d for c in found.values() for d, proposed in enumerate(c["proposed"], 1) if proposed)
        body = []
        for name, c in found.items():
            cells = [f"{a}/{p}" if p else "" for a, p in zip(c["accepted"][:depth], c["proposed"], strict=False)]
            accepted, proposed = sum(c["accepted"]), sum(c["proposed"])
            body.append([name, f"{accepted}/{proposed} ({accepted / proposed:.1%})", *cells])
        head = ["source", "all depths", *(f"depth {d}" for d in range(1, depth + 1))]
        out.append((f"Nodes accepted over proposed: {_name(row)}", head, body))
    return out


def _plot_by_task(rows: Sequence[dict]) -> matplotlib.figure.Figure:
    """Bars of each method at its largest budget."""
    largest: dict[tuple[str, str], int] = {}
    for row in rows:
        key = (row["method"], row["state"])
        largest[key] = max(row["budget"], largest.get(key, 0))
    drawn = list(largest)
    head, body = _task_table([row for row in rows if row["budget"] == largest[row["method"], row["state"]]])
    figure = matplotlib.figure.Figure(figsize=(max(9, len(body)), 5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(body)
    colors = report.colors([method for method, _ in drawn])
    for index, ((method, state), (name, *values)) in enumerate(zip(drawn, body, strict=True)):
        places = [place + (index - (len(body) - 1) / 2) * width for place in range(len(values))]
        hatch = "///" if state == "warm" else None
        axes.bar(places, [float(value) for value in values], width, label=name, color=colors[method], hatch=hatch)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(head) - 1), head[1:])
    axes.set_ylabel("tokens per step")
    figure.legend(fontsize="small", ncols=3, loc="outside upper center")
    return figure


def _plot_by_budget(rows: Sequence[dict], parts: Sequence[Mapping[str, Any]]) -> matplotlib.figure.Figure:
    """Lines for methods that ran at several budgets, points for those of a fixed size."""
    lines: dict[str, list[tuple[int, float]]] = {}
    looks: dict[str, tuple[str, str]] = {}  # method and state of each line
    for row, part in zip([row for row in rows if row["task"] == OVERALL], parts, strict=True):
        name = _name(row) if part["is_fixed"] else f"{row['method']}{' warm' * (row['state'] == 'warm')}"
        lines.setdefault(name, []).append((row["budget"], row["tokens_per_step"]))
        looks[name] = (row["method"], row["state"])
    figure = matplotlib.figure.Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    colors = report.colors([method for method, _ in looks.values()])
    for name, points in lines.items():
        method, state = looks[name]
        marker = "s" if state == "warm" else "o"
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, label=name, color=colors[method])
    axes.set_xlabel("drafted nodes a step, at most")
    axes.set_ylabel("tokens per step, overall")
    axes.set_ylim(bottom=1)
    figure.legend(fontsize="small", ncols=2, loc="outside upper center")
    return figure
