r"""Mean accepted tokens without a model: drafters run over recorded answers.

    python -m experiments.replay --traces=answers.jsonl --questions=question.jsonl --tokenizer=FOLDER --template=vicuna \
        --model_corpus=own.jsonl.gz --statistics_corpus=other.jsonl.gz --methods=pld,hd:order=csm --budgets=8,16,32,64

With greedy decoding, what is accepted depends only on the tokens that the model wrote. So the loop that decodes
(`hd_jax.loop`) runs with a record of them (`experiments.traces` says in which form) in the model's place: drafters and their
state are those of decoding, and so are the steps of every drafter that learns from the text alone. The feedback knows no target
but the recorded ones, NO_TOKEN elsewhere: a drafter that learns from rejected nodes' targets is replayed at less than its
worth. Those that need the model's logits cannot be replayed (NEEDS_LOGITS); HD runs without its window.

A budget is the number of nodes drafted a step, the root not counted: `--budgets=8` makes drafters with num_nodes=9. Methods
of a fixed size (FIXED_SIZE), and those whose num_nodes is given, as in hd_tree:num_nodes=17, run once.

    cold   a drafter knows its databases and the request's own text
    warm   it also remembers earlier answers, in the order of the questions; for methods with an option `remember`

With --timed --shape=llama-2-7b, a model of that shape with random weights does all of its work while the recorded tokens stand
in for those that it draws: acceptance is that of the recorded answers, and time that of the shape's prefill and steps, on this
machine (`experiments.timed_replay`). Plain decoding runs beside the methods, and any of them may have an adaptive budget, as in
hd_tree:budget=adaptive.

A turn of a question is a request like any other. What a drafter has learned about acceptance passes from request to
request in both, by `Drafter.renew`. Databases are built from the two corpora once and kept in --cache_dir, or come ready
in a folder, --databases.

A run's folder holds config.json, summary.json, report.md and plots, and the turns of each method: in parts/, or of a timed
replay, in answer files. A run that was stopped goes on when the same command is given again, with what it lacks.
"""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from experiments import program, questions, replay_databases, replay_report, report, run_config, shapes, timed_replay, traces
from experiments.questions import Question
from experiments.run_config import BUDGET, CONFIG_FILE, PLAIN, Method
from experiments.traces import Turn
from hd_jax import admission, drafters, loop, runner
from hd_jax.databases import collection
from hd_jax.databases.collection import Databases
from hd_jax.draft_tree import NO_TOKEN
from hd_jax.drafters.base import Drafter
from hd_jax.drafters.candidates import WEIGHTS
from hd_jax.models import tokenizer as tokenizers

FIXED_SIZE = ("none", "pld", "hd", "rest")  # methods whose paper sets the number of nodes
# Without the model's logits, Token Recycling has nothing to draft, and what is left of Lookahead is hd:order=c:window=0.
NEEDS_LOGITS = ("lookahead", "recycling")
SYNC_EVERY = 256  # steps a dispatch, for drafters that need no host
CACHE = pathlib.Path.home() / ".cache" / "hd_jax"
MIN_TOKENS = 896  # that every text has room for: fewer sizes, so fewer programs are compiled


@dataclasses.dataclass(frozen=True)
class Part:
    """What one row of the tables is about."""

    method: Method
    is_warm: bool
    budget: int | None  # drafted nodes; None for the drafter's own number
    options: dict[str, Any]
    pass_budget: str | None = None  # of a timed replay: "adaptive"; None where every step verifies all nodes

    @property
    def state(self) -> str:
        return "warm" if self.is_warm else "cold"

    @property
    def file_name(self) -> str:
        size = "" if self.budget is None else f"-budget={self.budget}"
        return f"{self.method.label}{size}-{self.state}.json"

    @property
    def timed_label(self) -> str:
        """Names the part in a timed replay, as the main job names methods."""
        return self.method.label if self.budget is None else f"{self.method.label}-num_nodes={self.budget + 1}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags."""

    traces: str
    questions: str
    tokenizer: str
    template: str | None
    model_corpus: str | None
    statistics_corpus: str | None
    statistics_tokens: int | None
    databases: str | None
    cache_dir: str
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    warm: bool
    limit: int | None
    timed: bool
    shape: str | None


def run(settings: Settings, folder: pathlib.Path) -> str:
    """Replays what `folder` does not hold yet, and writes the report.

    Returns:
      The tables for the terminal.

    Raises:
      ValueError: bad settings, methods, traces or questions; all but damaged databases before any long work.
      OSError: a file cannot be read or written.
    """
    if settings.timed != (settings.shape is not None):
        raise ValueError("--timed and --shape belong together: a timed replay is that of a model's shape")
    if settings.timed and settings.warm:
        raise ValueError("--warm: a timed replay remembers no earlier answers")
    parts = plan(settings)
    tokenizer = tokenizers.load(settings.tokenizer, template=settings.template)
    if not tokenizer.has_chat_template:
        raise ValueError(f"{settings.tokenizer} has no chat template: name one with --template")
    asked = questions.read(settings.questions)
    chosen = questions.select(asked, questions.TASKS, settings.limit)
    texts = traces.turns(asked, chosen, traces.read(settings.traces), tokenizer)
    if settings.shape is not None:
        timed_replay.check_lengths(shapes.config_of(settings.shape, tokenizer), settings.shape, texts)
    databases = _ready_databases(settings, tokenizer)
    for part in parts:
        _make(part, databases)
    facts = _describe(settings, parts, tokenizer, texts)
    _check_folder(folder, facts)
    database_facts: list[dict[str, Any]] = []
    if settings.databases is None:
        databases, database_facts = replay_databases.from_corpora(
            settings.model_corpus,
            settings.statistics_corpus,
            settings.statistics_tokens,
            tokenizer,
            pathlib.Path(settings.cache_dir),
        )
    folder.mkdir(parents=True, exist_ok=True)
    run_config.write(folder, facts)
    if settings.shape is not None:
        return _run_timed(settings.shape, folder, parts, databases, tokenizer, chosen, texts, facts)
    (folder / "parts").mkdir(exist_ok=True)
    results = []
    with tqdm.tqdm(total=len(parts) * len(texts), unit=" turns", dynamic_ncols=True) as progress:
        for part in parts:
            path = folder / "parts" / part.file_name
            if path.exists():
                results.append(json.loads(path.read_text(encoding="utf-8")))
                progress.update(len(texts))
                continue
            progress.set_postfix_str(path.stem)
            clock = time.perf_counter()
            drafter = jax.block_until_ready(jax.device_put(_make(part, databases)))
            result = {
                "method": part.method.label,
                "state": part.state,
                "budget": drafter.num_nodes - 1,
                "is_fixed": part.budget is None,
                "table_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(drafter.tables)),
                "make_s": time.perf_counter() - clock,
                **replay(drafter, texts, progress.update),
            }
            report.write_file(path, json.dumps(result) + "\n")
            results.append(result)
    title = f"Replay of {facts['num_tokens']} tokens of {pathlib.Path(settings.traces).name}, {len(texts)} turns"
    return replay_report.write(folder, title, results, database_facts, _notes(parts))


def _run_timed(
    shape: str,
    folder: pathlib.Path,
    parts: Sequence[Part],
    databases: Databases,
    tokenizer: Any,
    chosen: Sequence[Question],
    texts: Sequence[Turn],
    facts: dict[str, Any],
) -> str:
    """As `run`, of a timed replay."""
    contenders = []
    for part in parts:
        drafter = jax.block_until_ready(jax.device_put(_make(part, databases)))
        contenders.append(timed_replay.Contender(part.timed_label, drafter, part.pass_budget))
    lm = shapes.random_model(shape, tokenizer)
    stored = timed_replay.run(folder, lm, contenders, chosen, texts, _learned)
    rivals = run_config.rivals({part.timed_label: (part.method.drafter, part.pass_budget) for part in parts})
    return timed_replay.write(folder, facts, stored, _notes(parts), rivals)


def _learned(drafter: Drafter, texts: Sequence[Turn]) -> Any:
    """A drafter's state after some texts; of an adaptive budget, as if it had verified all nodes."""
    *_, last = replayed(drafter, texts)
    return last.drafter_state


def _check_folder(folder: pathlib.Path, facts: dict[str, Any]) -> None:
    """Raises ValueError where the results cannot go: another run is there, or a finished one, or nothing can be written."""
    if (folder / "summary.json").exists():
        raise ValueError(f"{folder} holds a finished replay: give another --output_dir")
    run_config.compare(folder, facts)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"--output_dir={folder}: cannot be written")


def plan(settings: Settings) -> list[Part]:
    """The parts, in the order in which they run. Raises ValueError for a method that there is not, or that needs a model."""
    methods = [run_config.parse_method(text) for text in settings.methods]
    if settings.timed:
        methods = [Method(PLAIN, {}), *(method for method in methods if method.label != PLAIN)]
    labels = [method.label for method in methods]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"--methods names {', '.join(twice)} twice")
    parts = []
    for method in methods:
        if method.drafter not in drafters.MAKERS:
            known = ", ".join(drafters.MAKERS)
            raise ValueError(f"method {method.label}: there is no drafter {method.drafter!r}; known: {known}")
        if method.drafter in NEEDS_LOGITS:
            raise _needs_logits(method)
        known = inspect.signature(drafters.MAKERS[method.drafter]).parameters
        options = dict(method.options)
        if BUDGET in options and not settings.timed:
            raise ValueError(f"method {method.label}: a budget goes by the cost of steps, which only a --timed replay has")
        pass_budget = run_config.budget_of(method.label, options.pop(BUDGET, None))
        if "window" in known and options.setdefault("window", 0) != 0:
            raise ValueError(f"method {method.label}: a window's nodes need the model's logits; replay it with window=0")
        is_fixed = method.drafter in FIXED_SIZE or "num_nodes" not in known or "num_nodes" in options
        remembers = "remember" in known
        has_memory = remembers and options.get("remember", known["remember"].default) != 0
        for is_warm in (False, True):
            if is_warm and not (settings.warm and has_memory):
                continue
            state = {"remember": 0} if remembers and not is_warm else {}
            for budget in [None] if is_fixed else settings.budgets:
                size = {} if budget is None else {"num_nodes": budget + 1}
                parts.append(Part(method, is_warm, budget, {**options, **state, **size}, pass_budget))
    names = [part.timed_label for part in parts]
    again = sorted({name for name in names if settings.timed and names.count(name) > 1})
    if again:
        raise ValueError(f"--methods and --budgets name {', '.join(again)} twice")
    return parts


def _make(part: Part, databases: Databases) -> Drafter:
    try:
        classes = databases.token_classes
        vocab_size = None if classes is None else len(classes)
        drafter = drafters.make(part.method.drafter, databases, part.options, vocab_size=vocab_size)
    except ValueError as error:
        raise ValueError(f"method {part.method.label}: {error}") from error
    if drafter.num_top_logits:
        raise _needs_logits(part.method)
    if drafter.max_depth > (most := timed_replay.MAX_DEPTH):
        raise ValueError(f"method {part.method.label} is {drafter.max_depth} deep; at most {most} is possible")
    return drafter


def _needs_logits(method: Method) -> ValueError:
    return ValueError(f"method {method.label} drafts from the model's logits: it cannot be replayed without the model")


def _ready_databases(settings: Settings, tokenizer: Any) -> Databases:
    """Those of --databases; or else small ones in place of those that will be built, to try the methods' options with."""
    if settings.databases is None:
        has_model, has_statistics = settings.model_corpus is not None, settings.statistics_corpus is not None
        return replay_databases.placeholder(has_model, has_statistics, tokenizer.token_classes)
    if settings.model_corpus or settings.statistics_corpus or settings.statistics_tokens:
        raise ValueError("--databases and corpora: give ready databases, or the corpora that they are built from")
    if not pathlib.Path(settings.databases).is_dir():
        raise ValueError(f"--databases={settings.databases}: there is no such folder")
    return Databases(settings.databases, tokenizer.fingerprint, token_classes=tokenizer.token_classes)


class Outcome(NamedTuple):
    """What the replay of one text gave; lists have an entry a step."""

    accept_lengths: list[int]  # tokens appended, the bonus included
    num_nodes: list[int]  # drafted
    step_us: list[float]  # of the whole step without a model
    counts: np.ndarray  # int32[2, sources, max_depth], nodes proposed and accepted
    drafter_state: Any


def replay(drafter: Drafter, texts: Sequence[Turn], advance: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """Runs a drafter over recorded texts, in their order; its state passes from one to the next where it can be renewed.

    Args:
      drafter: the method.
      texts: what is replayed.
      advance: called after each text.

    Returns:
      "turns", a list with each text's question_id, place, task, turn, tokens, steps, nodes (drafted, in all steps), and
      draft_us, the median step's microseconds; "counts", by task and source, of nodes "proposed" and "accepted", a list
      by depth, depth 1 first; and "state_bytes", of the drafter's state at the end.
    """
    turns: list[dict[str, Any]] = []
    counts: dict[str, np.ndarray] = {}
    state = None
    for text, outcome in zip(texts, replayed(drafter, texts), strict=True):
        state = outcome.drafter_state
        counts[text.task] = counts.get(text.task, 0) + outcome.counts
        turns.append(
            {
                "question_id": text.question_id,
                "place": text.place,
                "task": text.task,
                "turn": text.index + 1,
                "tokens": sum(outcome.accept_lengths),
                "steps": len(outcome.accept_lengths),
                "nodes": sum(outcome.num_nodes),
                "draft_us": round(float(np.median(outcome.step_us)), 1),
            }
        )
        advance()
    by_source = {
        task: {
            name: {"proposed": found[0, i].tolist(), "accepted": found[1, i].tolist()}
            for i, name in enumerate(drafter.source_names)
        }
        for task, found in counts.items()
    }
    return {"turns": turns, "counts": by_source, "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state))}


def replayed(drafter: Drafter, texts: Iterable[Turn]) -> Iterator[Outcome]:
    """The outcome of each text.

    A step's time is its dispatch's over the dispatch's steps: drafting, the walk and the bookkeeping. For a drafter that
    looks up on the host, where a dispatch is one step, that look-up and the call are in it too. Compilation is not.
    """
    sync_every = SYNC_EVERY if drafter.refresh is None else 1
    compiled: set[int] = set()
    kept = None

    def dispatch(request: loop.Request, state: loop.State, max_steps: int) -> tuple[loop.State, loop.Record]:
        host = loop.refresh(drafter, request, state)
        limits = (np.int32(max_steps), np.int32(1))
        out = loop.run_steps(None, loop.StepSettings(), None, drafter, request, host, state, *limits, sync_every=sync_every)
        return jax.block_until_ready(out)

    for text in texts:
        request, tokens = _request(text)
        drafter_state = admission.init_drafter(drafter, request, tokens, kept)
        state = admission.start(drafter, request, (), tokens, drafter_state, loop.StepSettings())
        if tokens.shape[1] not in compiled:
            compiled.add(tokens.shape[1])
            state, _ = dispatch(request, state, 0)
        jax.block_until_ready(state)
        accept_lengths, num_nodes, step_us = [], [], []
        while not state.is_finished.all():
            clock = time.perf_counter()
            state, record = dispatch(request, state, sync_every)
            elapsed_us = (time.perf_counter() - clock) * 1e6
            appended, nodes = np.asarray(record.num_appended[0]), np.asarray(record.num_nodes[0])
            is_step = appended > 0
            accept_lengths += appended[is_step].tolist()
            num_nodes += nodes[is_step].tolist()
            step_us += [elapsed_us / is_step.sum()] * int(is_step.sum())
        kept = state.drafter  # what cannot be renewed is made anew
        yield Outcome(accept_lengths, num_nodes, step_us, np.asarray(state.counts[0, :, :, 1:]), state.drafter)


def _request(text: Turn) -> tuple[loop.Request, jax.Array]:
    """A recorded text as a request of one row, and its prompt, int32[1, S]."""
    whole = [*text.prompt, *text.answer]
    tokens = np.zeros((1, runner.num_slots(max(len(whole), MIN_TOKENS), timed_replay.MAX_DEPTH)), np.int32)
    tokens[0, : len(text.prompt)] = text.prompt
    recorded = np.full(tokens.shape, NO_TOKEN, np.int32)
    recorded[0, : len(whole)] = whole
    request = loop.Request(
        sampling=runner.sampling_of([runner.Row(text.prompt, 0)], runner.Options()),
        prompt_lengths=jnp.asarray([len(text.prompt)], jnp.int32),
        limits=jnp.asarray([len(whole)], jnp.int32),
        stop_tokens=jnp.full((1, 1), NO_TOKEN, jnp.int32),
        recorded=jnp.asarray(recorded),
    )
    return request, jnp.asarray(tokens)


def _describe(settings: Settings, parts: Sequence[Part], tokenizer: Any, texts: Sequence[Turn]) -> dict[str, Any]:
    """What config.json says: files by their names and hashes."""
    given = dataclasses.asdict(settings)
    named: dict[str, pathlib.Path] = {}
    for name in ("traces", "questions", "tokenizer", "model_corpus", "statistics_corpus", "databases"):
        if given[name] is not None:
            named[name] = pathlib.Path(given[name])
            given[name] = named[name].name
    del given["cache_dir"]
    named["hd_tree's weights"] = WEIGHTS
    hashes = {path.name: replay_databases.sha256(path) for path in named.values() if path.is_file()}
    if "databases" in named:
        for file in sorted(set(collection.FILES.values())):
            if (named["databases"] / file).is_file():
                hashes[file] = replay_databases.sha256(named["databases"] / file)
    model = {}
    if settings.shape is not None:
        config = shapes.config_of(settings.shape, tokenizer)
        model = {
            "name": settings.shape,
            "shape": dataclasses.asdict(config),
            "weights": "random",
            "num_slots": timed_replay.num_slots(texts),
        }
    return {
        "flags": given,
        "model": model,
        "parts": [
            {
                "file": f"{part.timed_label}.jsonl" if settings.timed else part.file_name,
                "drafter": part.method.drafter,
                "options": part.options,
            }
            for part in parts
        ],
        "sha256": hashes,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "num_turns": len(texts),
        "num_tokens": sum(len(text.answer) for text in texts),
        "environment": {
            "jax": jax.__version__,
            "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
            "num_cpus": os.cpu_count(),
        },
    }


def _notes(parts: Sequence[Part]) -> list[str]:
    """What the report should say of how the methods ran."""
    windowless = dict.fromkeys(
        part.method.label for part in parts if "window" in part.options and "window" not in part.method.options
    )
    return [f"Without the model there is no Jacobi window: {', '.join(windowless)} ran with window=0."] if windowless else []


def define_flags() -> None:
    """Defines the flags; a function, so that tests can import several programs."""
    flags.DEFINE_string("traces", None, "File of recorded answers.", required=True)
    flags.DEFINE_string("questions", None, "File of the questions, in Spec-Bench's format.", required=True)
    flags.DEFINE_string("tokenizer", None, "Folder or hub name of the tokenizer of the model that answered.", required=True)
    flags.DEFINE_enum("template", None, sorted(tokenizers.TEMPLATES), "Chat format; by default the tokenizer's own.")
    flags.DEFINE_string("model_corpus", None, "The model's other answers, .jsonl or .jsonl.gz with a text a line, for D_m.")
    flags.DEFINE_string("statistics_corpus", None, "Any text, in the same form, for D_s.")
    flags.DEFINE_integer("statistics_tokens", None, "Tokens of it to use, of documents in random order.", lower_bound=1)
    flags.DEFINE_string("databases", None, "Folder of ready databases, in place of the corpora.")
    flags.DEFINE_string("cache_dir", None, "Where databases are kept; by default ~/.cache/hd_jax/replay.")
    flags.DEFINE_list("methods", ["pld", "hd"], "Comma list; options as in hd:order=csm.")
    flags.DEFINE_list("budgets", ["8", "16", "32", "64"], "Comma list of drafted nodes a step, the root not counted.")
    flags.DEFINE_bool("warm", False, "Also run methods that can remember earlier answers with that memory.")
    flags.DEFINE_integer("limit", None, "Questions of each task, the first ones; by default all.", lower_bound=1)
    flags.DEFINE_bool("timed", False, "Time the steps of a model of --shape with random weights, beside plain decoding.")
    flags.DEFINE_enum("shape", None, list(shapes.SHAPES), "Of the model of a timed replay.")
    flags.DEFINE_string("output_dir", None, "Folder for the results; by default results/replay-<date-time>.")


def given_settings() -> Settings:
    values: dict[str, Any] = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Settings)}
    budgets = tuple(program.whole_numbers("budgets"))
    values["cache_dir"] = values["cache_dir"] or str(CACHE / "replay")
    values["methods"] = tuple(text.strip() for text in values["methods"])
    return Settings(**{**values, "budgets": budgets})


def main(argv: Sequence[str]) -> None:
    del argv
    settings = given_settings()
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
    folder = pathlib.Path(flags.FLAGS["output_dir"].value or f"results/replay-{datetime.datetime.now():%Y-%m-%d-%H%M%S}")
    try:
        print(run(settings, folder))
        print(f"Written to {folder}")
    except KeyboardInterrupt:
        again = f"; the same command with --output_dir={folder} goes on" if (folder / CONFIG_FILE).exists() else ""
        print(f"\nStopped{again}.", file=sys.stderr, flush=True)
        os._exit(130)  # Not sys.exit: what the device still runs may crash in the interpreter's shutdown.


if __name__ == "__main__":
    define_flags()
    program.run(main)
