r"""Ways of searching ADED's matrix for a draft tree, by draft time and accepted tokens.

    python -m experiments.draft_search --traces=answers.jsonl --questions=question.jsonl --tokenizer=FOLDER --template=vicuna \
        --statistics_corpus=other.jsonl.gz --limit=3

All search the same matrix, which is not adapted, for trees of --num_nodes:

    best_first  level by level, by the product of probabilities, in the device loop
    jax         the paper's Monte Carlo search, in the device loop
    waves       the same with --wave visits at once
    mctx        the one of the library mctx, there too; needs the package
    numba       the paper's, compiled for the host; needs the package

Monte Carlo searches run with the paper's code's constants and 24 paths. Then `jax` runs with each c1 of --c1 and as many paths
as there are nodes, which tells what exploration is worth when trees are of one size. `first` says that children which were
not visited go before all others.

A draft's time is that of one call with its result awaited, for the numba search its look-up on the host and the call that
takes the result; the median over contexts of the answers. Tokens per step are those of `experiments.replay`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import program, questions, replay, replay_databases, report, traces
from experiments.traces import Turn
from hd_jax.databases.collection import Databases
from hd_jax.drafters import aded
from hd_jax.drafters.base import Context, Drafter
from hd_jax.drafters.tree_search import Puct
from hd_jax.models import tokenizer as tokenizers

LIBRARIES = {"mctx": "mctx_search", "numba": "numba_search"}  # variant: its module here
VARIANTS = ("best_first", "jax", "waves", *LIBRARIES)
NUM_TIMED = 200  # drafts


class Variant(NamedTuple):
    """One row of the table."""

    name: str
    settings: Puct | None  # None for best_first
    drafter: Drafter


def variants(
    databases: Databases,
    names: Sequence[str],
    c1_values: Sequence[float],
    iterations: Sequence[int],
    wave: int,
    num_nodes: int,
) -> list[Variant]:
    """What is compared.

    Raises:
      ValueError: there is no such variant, a package that one needs is missing, or waves do not divide the visits.
    """
    unknown = sorted(set(names) - set(VARIANTS))
    if unknown:
        raise ValueError(f"--variants names {', '.join(unknown)}; there are: {', '.join(VARIANTS)}")
    found = []
    if "best_first" in names:
        for depth in (4, 6):
            drafter = aded(databases, adapt="none", depth=depth, num_nodes=num_nodes)
            found.append(Variant(f"best_first, depth {depth}", None, drafter))
    table = aded(databases, adapt="none", num_nodes=num_nodes).tables
    paper = [Puct(iterations=count, is_unvisited_first=is_first) for count in iterations for is_first in (True, False)]
    sweep = [Puct(iterations=max(iterations), c1=c1, is_unvisited_first=False, num_paths=num_nodes - 1) for c1 in c1_values]
    for name in names:
        if name == "best_first":
            continue
        make = _maker(name, databases, table, num_nodes)
        wanted = paper + sweep if name == "jax" else paper
        if name == "waves":
            wanted = [settings._replace(wave=wave) for settings in paper]
        if name == "mctx":  # by its design, a child that was not visited has a value and is no exception
            wanted = [settings for settings in paper if not settings.is_unvisited_first]
        found += [Variant(name, settings, make(settings)) for settings in wanted]
    return found


def _maker(name: str, databases: Databases, table: Any, num_nodes: int) -> Callable[[Puct], Drafter]:
    if name not in LIBRARIES:
        return lambda settings: aded(
            databases,
            adapt="none",
            search="mcts",
            iterations=settings.iterations,
            wave=settings.wave,
            c1=settings.c1,
            unvisited_first=settings.is_unvisited_first,
            num_paths=settings.num_paths,
            num_nodes=num_nodes,
        )
    try:
        module = importlib.import_module(f"experiments.{LIBRARIES[name]}")
    except ImportError as error:
        raise ValueError(f"variant {name} needs the package {name} ({error}): pip install -e '.[search]'") from error
    return lambda settings: module.drafter(table, settings, num_nodes)


def draft_us(drafter: Drafter, texts: Sequence[Turn], num_timed: int) -> float:
    """Median microseconds of a draft, at places spread over the recorded answers."""
    draft = jax.jit(drafter.draft)
    places = [(text, len(text.prompt) + i) for text in texts for i in range(0, len(text.answer), 16)]
    places = places[:: max(len(places) // num_timed, 1)][:num_timed]
    size = max(len(text.prompt) + len(text.answer) for text in texts)
    tables, state, times = jax.device_put(drafter.tables), None, []
    for index, (text, length) in enumerate([places[0], *places]):
        tokens = np.zeros(size, np.int32)
        tokens[:length] = [*text.prompt, *text.answer][:length]
        host_context = Context(tokens, np.int32(length), np.int32(len(text.prompt)))  # pyright: ignore[reportArgumentType]
        context = jax.block_until_ready(jax.device_put(host_context))
        if state is None:
            state = jax.block_until_ready(drafter.init(tables, context))
        clock = time.perf_counter()
        if drafter.refresh is not None:
            context = context._replace(host=jax.tree.map(jnp.asarray, drafter.refresh(host_context)))
        jax.block_until_ready(draft(tables, state, context))
        if index:  # the first compiles
            times.append((time.perf_counter() - clock) * 1e6)
    return statistics.median(times)


def measure(variant: Variant, texts: Sequence[Turn]) -> dict[str, Any]:
    """The table's row of one variant; "tokens_per_step" and "nodes_per_step" are over all steps."""
    turns = replay.replay(variant.drafter, texts)["turns"]
    total = {name: sum(turn[name] for turn in turns) for name in ("tokens", "steps", "nodes")}
    return {
        "variant": variant.name,
        "settings": None if variant.settings is None else variant.settings._asdict(),
        "draft_us": draft_us(variant.drafter, texts, NUM_TIMED),
        "tokens_per_step": total["tokens"] / total["steps"],
        "nodes_per_step": total["nodes"] / total["steps"],
        **total,
    }


def tables(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and body of the report's table."""
    head = ["search", "visits", "at once", "c1", "first", "paths", "nodes/step", "tokens/step", "draft us"]
    body = []
    for row in rows:
        settings = row["settings"]
        shown = [""] * 5
        if settings is not None:
            is_first = "yes" if settings["is_unvisited_first"] else "no"
            visits = [str(settings["iterations"]), str(settings["wave"])]
            shown = [*visits, f"{settings['c1']:g}", is_first, str(settings["num_paths"])]
        figures = [f"{row['nodes_per_step']:.1f}", f"{row['tokens_per_step']:.3f}", f"{row['draft_us']:.0f}"]
        body.append([row["variant"], *shown, *figures])
    return head, body


def define_flags() -> None:
    """Defines the flags; a function, so that tests can import several programs."""
    flags.DEFINE_string("traces", None, "File of recorded answers.", required=True)
    flags.DEFINE_string("questions", None, "File of the questions, in Spec-Bench's format.", required=True)
    flags.DEFINE_string("tokenizer", None, "Folder or hub name of the tokenizer of the model that answered.", required=True)
    flags.DEFINE_enum("template", None, sorted(tokenizers.TEMPLATES), "Chat format; by default the tokenizer's own.")
    flags.DEFINE_string(
        "statistics_corpus", None, "Text that the tri-grams are counted in, .jsonl or .jsonl.gz.", required=True
    )
    flags.DEFINE_string("cache_dir", None, "Where databases are kept; by default ~/.cache/hd_jax/replay.")
    flags.DEFINE_integer("limit", 3, "Questions of each task, the first ones.", lower_bound=1)
    flags.DEFINE_list("variants", list(VARIANTS), "What to compare.")
    flags.DEFINE_list("c1", ["0", "1.814", "8", "32", "128"], "Weights of exploration to sweep.")
    flags.DEFINE_list("iterations", ["150"], "Visits of the Monte Carlo searches.")
    flags.DEFINE_integer("wave", 25, "Visits at once of the variant waves.", lower_bound=1)
    flags.DEFINE_integer("num_nodes", 64, "Size of the trees, the root included.", lower_bound=2)
    flags.DEFINE_string("output_dir", None, "Folder for draft_search.json and .md; by default nothing is written.")


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    try:
        c1_values, iterations = [float(text) for text in values.c1], [int(text) for text in values.iterations]
    except ValueError:
        raise ValueError("--c1 and --iterations are comma lists of numbers, as in --c1=0,32 --iterations=150") from None
    if not iterations or min(iterations) < 1 or min(c1_values, default=0.0) < 0:
        raise ValueError("--iterations needs numbers of at least 1, and --c1 numbers of at least 0")
    make = functools.partial(
        variants,
        names=values.variants,
        c1_values=c1_values,
        iterations=iterations,
        wave=values.wave,
        num_nodes=values.num_nodes,
    )
    make(replay_databases.placeholder(False, True))
    tokenizer = tokenizers.load(values.tokenizer, template=values.template)
    asked = questions.read(values.questions)
    chosen = questions.select(asked, questions.TASKS, values.limit)
    texts = traces.turns(asked, chosen, traces.read(values.traces), tokenizer)
    cache = pathlib.Path(values.cache_dir or replay.CACHE / "replay")
    databases, _ = replay_databases.from_corpora(None, values.statistics_corpus, None, tokenizer, cache)
    rows = []
    for variant in make(databases):
        rows.append(measure(variant, texts))
        print(" ".join(tables(rows[-1:])[1][0]), flush=True)
    head, body = tables(rows)
    facts = {
        "flags": {
            "traces": pathlib.Path(values.traces).name,
            "questions": pathlib.Path(values.questions).name,
            "tokenizer": pathlib.Path(values.tokenizer).name,
            "statistics_corpus": pathlib.Path(values.statistics_corpus).name,
            **{name: values[name].value for name in ("template", "limit", "variants", "c1", "iterations", "wave", "num_nodes")},
        },
        "num_turns": len(texts),
        "num_tokens": sum(len(text.answer) for text in texts),
        "device": jax.devices()[0].device_kind,
        "num_cpus": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in LIBRARIES if name in values.variants},
    }
    title = f"{facts['num_tokens']} tokens of {facts['flags']['traces']}, {facts['device']}, {facts['num_cpus']} cores"
    print(f"{title}\n{report.aligned(head, body)}")
    if values.output_dir:
        folder = pathlib.Path(values.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        report.write_file(folder / "draft_search.json", json.dumps({**facts, "rows": rows}, indent=1) + "\n")
        report.write_file(folder / "draft_search.md", f"# Searches for drafts\n\n{title}\n\n{report.markdown(head, body)}\n")
        print(f"Written to {folder}")


if __name__ == "__main__":
    define_flags()
    program.run(main)
