r"""The main job: drafting methods side by side on Spec-Bench's tasks, every token checked against plain decoding's.

    python -m experiments.specbench
    python -m experiments.specbench --questions=question.jsonl --limit=5 --methods=none,pld,hd:window=0:order=cm

Questions are the outer loop and methods the inner one, so that a machine that other work slows down for a while slows
all methods alike. A method's turn 2 goes on from plain decoding's answer to turn 1. Every request starts with a fresh
drafter: neither the warm-up nor an earlier question leaks into it. With --warm, a method that learns from request to request
runs a second time, as `<method>-warm`, in a session that lasts from the first question to the last. With --batch_size,
questions are decoded together, and others take the places of those that are answered; a question's time is its share.

A run's folder holds, for each method, `<method>.jsonl` in Spec-Bench's answer format (its evaluation/speed.py reads it;
the field "hd_jax" is ours), and config.json, summary.json, report.md and plots. Answers are appended as they come, so a
run that was stopped goes on with --resume=FOLDER; a warm method is asked the answered questions again, to know what it knew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import inspect
import math
import os
import pathlib
import shlex
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tqdm
from absl import flags

from experiments import answers, program, questions, report, run_config
from experiments.answers import Answer
from experiments.questions import Question
from experiments.run_config import BUDGET, BUDGETS, CONFIG_FILE, PLAIN, Method, RunConfig

DEFAULT_METHODS = "none,pld,hd,hd:window=0:num_nodes=8,hd_tree:num_nodes=16:budget=adaptive"
WARM_UP_TEXT = "Say in one sentence what the weather is like on the moon, then count from one to ten."
WARM_UP_TOKENS = 16
BATCHES_A_CALL = 4  # so many times the batch's size are asked at once: only a call's last answers leave places free


class UnexplainedDifference(Exception):
    """A method's tokens differ from plain decoding's by more than the mode allows."""


@dataclasses.dataclass(frozen=True)
class Library:
    """The functions of `hd_jax` that the main job uses; tests put others in their place."""

    load: Callable[..., Any]
    makers: Mapping[str, Callable[..., Any]]
    make_drafter: Callable[..., Any]
    generate: Callable[..., Any]
    num_slots: Callable[[int, int], int]
    measure_draft_us: Callable[..., float]
    session: Callable[..., Any]
    check: Callable[..., Any]

    @classmethod
    def default(cls) -> Library:
        from hd_jax import decode, drafters, exactness, runner  # Late, so that flag errors come at once.

        return cls(
            load=decode.load,
            makers=drafters.MAKERS,
            make_drafter=decode.make_drafter,
            generate=decode.generate,
            num_slots=runner.num_slots,
            measure_draft_us=decode.measure_draft_us,
            session=decode.Session,
            check=exactness.check,
        )


class Bench:
    """A model and the methods' drafters.

    Raises:
      ValueError: no such model, method or option.
    """

    def __init__(self, library: Library, config: RunConfig, methods: Sequence[Method]):
        for method in methods:
            if method.drafter not in library.makers:
                raise ValueError(
                    f"method {method.label}: there is no drafter {method.drafter!r}; known: {', '.join(library.makers)}"
                )
        from hd_jax import sharding

        self.library, self.config = library, config
        sharding.check_rows(config.batch_size, sharding.mesh_sizes(config.mesh)["data"] if config.mesh else 1)
        self.lm = library.load(config.model, dtype=config.dtype, mesh=config.mesh)
        self.drafters: dict[str, Any] = {}
        self.budgets: dict[str, str | None] = {}
        self.sessions: dict[str, Any] = {}  # of warm methods
        for method in methods:
            options = dict(method.options)
            default = None if method.label == PLAIN else config.budget
            self.budgets[method.label] = run_config.budget_of(method.label, options.pop(BUDGET, default))
            if config.num_nodes is not None and "num_nodes" in inspect.signature(library.makers[method.drafter]).parameters:
                options.setdefault("num_nodes", config.num_nodes)
            try:
                drafter = library.make_drafter(self.lm, method.drafter, **options)
            except ValueError as error:
                raise ValueError(f"method {method.label}: {error}") from error
            self.drafters[method.label] = drafter
            if config.warm and drafter.renew is not None:
                self.drafters[method.label + report.WARM] = drafter
                self.budgets[method.label + report.WARM] = self.budgets[method.label]
                self.sessions[method.label + report.WARM] = library.session(self.lm, drafter=drafter)

        self._warm: set[tuple[str, int, int]] = set()  # method, rows and cache slots that ran before

    def num_prompt_tokens(self, messages: list[dict[str, str]]) -> int:
        return len(self.lm.tokenizer.chat(messages))

    def generate(self, label: str, prompts: list[list[dict[str, str]]], seeds: list[int]) -> list[Any]:
        """A Result for each prompt."""
        self.warm_up(label, self.num_rows(prompts), max(map(self.num_prompt_tokens, prompts)))
        if label in self.sessions:
            return [self._go_on(self.sessions[label], self.budgets[label], prompts[0], seeds[0])]
        return self._generate(label, prompts, seeds, self.config.max_new_tokens)

    def num_rows(self, asked: Sequence[Any]) -> int:
        """Of the batch in which so many questions of one call are decoded."""
        return min(self.config.batch_size, len(asked))

    def _go_on(self, session: Any, budget: str | None, messages: list[dict[str, str]], seed: int) -> Any:
        """A Result of a session that keeps what its drafter learned, but no cache: its prefill is that of other methods."""
        session.reset()
        session.messages = messages[:-1]
        config = self.config
        options = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "exact": config.exact}
        return session.generate(messages[-1]["content"], seed=seed, budget=budget, **options)

    def warm_up(self, label: str, num_rows: int, num_prompt_tokens: int) -> None:
        """Runs a method once for a batch of this size, if it did not run yet, on a text that is no question.

        A compiled program's first run is slower than the next ones, and each size of the cache is a program of its own.
        """
        end = min(num_prompt_tokens + self.config.max_new_tokens, self.lm.max_context)
        key = (label, num_rows, self.library.num_slots(end, self.drafters[label].max_depth))
        if key not in self._warm:
            self._warm.add(key)
            max_new_tokens = min(WARM_UP_TOKENS, self.config.max_new_tokens)
            text = self.lm.tokenizer.chat(_messages((WARM_UP_TEXT,), ()))
            prompt = (text * (end // len(text) + 1))[: max(end - max_new_tokens, 1)]
            self._generate(label, [prompt] * num_rows, [0] * num_rows, max_new_tokens)

    def _generate(self, label: str, prompts: list[Any], seeds: list[int], max_new_tokens: int) -> list[Any]:
        is_single = len(prompts) == 1  # is not sent as a batch
        out = self.library.generate(
            self.lm,
            prompts[0] if is_single else prompts,
            drafter=self.drafters[label],
            max_new_tokens=max_new_tokens,
            temperature=self.config.temperature,
            seed=seeds[0] if is_single else seeds,
            exact=self.config.exact,
            budget=self.budgets[label],
            batch_size=self.config.batch_size,
        )
        return [out] if is_single else out

    def verify(self, label: str, reference: Any, candidate: Any, seed: int, num_rows: int) -> dict[str, Any]:
        """The Verdict on a Result of a method, decoded in a batch of so many rows, against plain decoding's; a dictionary."""
        config = self.config
        verdict = self.library.check(
            self.lm,
            self.drafters[label],
            reference,
            candidate,
            temperature=config.temperature,
            seed=seed,
            exact=config.exact,
            num_rows=num_rows,
            budget=self.budgets[label],
        )
        kept = ("is_equal", "is_explained", "position", "gap", "tolerance", "message")
        return {name: getattr(verdict, name) for name in kept}

    def draft_us(self, label: str, tokens: list[int]) -> float:
        """Median microseconds of drafting alone for one step."""
        return self.library.measure_draft_us(self.lm, self.drafters[label], tokens[: self.lm.max_context - 1])

    def answer(self, label: str, batch: Sequence[Question], plain: Sequence[Answer], *, is_draft_timed: bool) -> list[Answer]:
        """Answers to questions with equally many turns.

        Args:
          label: of the method.
          batch: the questions.
          plain: plain decoding's answers to them; empty for plain decoding itself.
          is_draft_timed: whether drafting alone is measured too, on the first question.
        """
        seeds = [self.config.seed + question.index for question in batch]
        results: list[list[Any]] = [[] for _ in batch]
        verdicts: list[list[dict]] = [[] for _ in batch]
        for turn in range(len(batch[0].turns)):
            said = [answers.texts(a)[:turn] for a in plain] or [[result.text for result in row] for row in results]
            prompts = [_messages(question.turns, texts) for question, texts in zip(batch, said, strict=True)]
            for row, result in enumerate(self.generate(label, prompts, seeds)):
                expected = answers.tokens(plain[row], turn) if plain else result.tokens
                reference = dataclasses.replace(result, tokens=expected)
                verdicts[row].append(self.verify(label, reference, result, seeds[row], self.num_rows(batch)))
                results[row].append(result)
        draft_us: list[float | None] = [None] * len(batch)
        if is_draft_timed:
            draft_us[0] = self.draft_us(label, results[0][0].prompt_tokens + results[0][0].tokens)
        parts = zip(batch, results, verdicts, draft_us, strict=True)
        return [answers.make(label, q, r, v, draft_us=us) for q, r, v, us in parts]


def run(config: RunConfig, folder: pathlib.Path, library: Library) -> str:
    """Runs what `folder` does not hold yet, and writes the report.

    Of several processes, all read the folder before the first one writes to it: it must be the same one for all.

    Returns:
      The tables for the terminal; an empty text in the processes that do not write.

    Raises:
      ValueError: bad settings, questions or answer files.
      OSError: a file cannot be read or written.
      UnexplainedDifference: the answers up to and with the one that differs are in `folder`.
    """
    import jax  # Late, so that flag errors come at once.

    methods = [run_config.parse_method(text) for text in config.methods]
    chosen = questions.select(questions.read(config.questions or questions.EMBEDDED), config.tasks, config.limit)
    if config.warm and config.batch_size > 1:
        raise ValueError(f"a session answers one question at a time: --warm needs --batch_size=1, not {config.batch_size}")
    if config.warm and config.repeats > 1:
        raise ValueError(f"a session learns from every answer: --warm needs --repeats=1, not {config.repeats}")
    is_writer = jax.process_index() == 0  # All processes decode the same; one writes.
    with _claimed(folder) if is_writer else contextlib.nullcontext():
        bench = Bench(library, config, methods)
        chosen, skipped = _split_by_length(bench, chosen)
        facts = run_config.describe(config, bench.lm, chosen, skipped)
        run_config.compare(folder, facts)
        paths = {label: folder / f"{label}.jsonl" for label in bench.drafters}
        stored = {label: answers.read(path, chosen) for label, path in paths.items()}
        batches = _batches(chosen, config.batch_size)
        num_done, num_all = sum(map(len, stored.values())), len(chosen) * len(paths)
        if num_done < num_all:  # Whatever a method cannot do shows here, before anything is written.
            for label in paths:
                bench.warm_up(label, bench.num_rows(batches[0]), 1)
        if is_writer:
            run_config.write(folder, facts)
    num_done, num_all = num_done * config.repeats, num_all * config.repeats
    with tqdm.tqdm(total=num_all, initial=num_done, unit="answer", dynamic_ncols=True, disable=not is_writer) as progress:
        start, timed_tasks = 0, set()
        for batch in batches:
            rows = slice(start, start + len(batch))
            runs: dict[str, list[list[Answer]]] = {label: [] for label in paths}
            for label, path in list(paths.items()) * config.repeats:
                num_stored = len(stored[label][rows])
                if num_stored < len(batch) or (label in bench.sessions and len(stored[label]) < len(chosen)):
                    progress.set_postfix_str(f"{batch[0].task}, {label}")
                    plain = [] if label == PLAIN else next(iter(runs[PLAIN]), stored[PLAIN][rows])
                    is_timed = label != PLAIN and batch[0].task not in timed_tasks and not runs[label]
                    runs[label].append(bench.answer(label, batch, plain, is_draft_timed=is_timed))
                    progress.update(len(batch) - num_stored)
                    if len(runs[label]) == config.repeats:
                        new = [answers.median(again) for again in zip(*runs[label], strict=True)][num_stored:]
                        if is_writer:
                            answers.append(path, new)
                        stored[label] += new
                for answer in stored[label][rows]:
                    difference = answers.unexplained(answer)
                    if difference:
                        raise UnexplainedDifference(f"{label} differs from plain decoding without a near-tie in {difference}")
            start += len(batch)
            timed_tasks.add(batch[0].task)
    if not is_writer:
        return ""
    title = f"Spec-Bench: {facts['model']['name']}, temperature {config.temperature:g}"
    rivals = run_config.rivals({method.label: (method.drafter, bench.budgets[method.label]) for method in methods})
    return report.write(folder, title, stored, skipped, _fact_lines(config, facts), rivals)


@contextlib.contextmanager
def _claimed(folder: pathlib.Path) -> Iterator[None]:
    """Raises OSError where the folder cannot be written; takes a new folder away again if the body fails."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{uuid.uuid4().hex}"
    probe.touch()
    probe.unlink()
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()  # refuses if anything is in it
        raise


def _messages(turns: Sequence[str], said: Sequence[str]) -> list[dict[str, str]]:
    """The chat that ends with the user's turn after the answers `said`."""
    out = []
    for index, turn in enumerate(turns[: len(said) + 1]):
        out.append({"role": "user", "content": turn})
        out += [{"role": "assistant", "content": text} for text in said[index : index + 1]]
    return out


def _split_by_length(bench: Bench, chosen: Sequence[Question]) -> tuple[list[Question], list[str]]:
    """The questions whose prompts fit the context, however long earlier turns' answers are, and a line for each other one."""
    fitting, skipped = [], []
    for question in chosen:
        turns = range(len(question.turns))
        lengths = [
            bench.num_prompt_tokens(_messages(question.turns, [""] * t)) + t * bench.config.max_new_tokens for t in turns
        ]
        if max(lengths) < bench.lm.max_context:
            fitting.append(question)
        else:
            skipped.append(f"question {question.question_id} ({max(lengths)} of {bench.lm.max_context} tokens)")
    if not fitting:
        raise ValueError(f"no question's prompts fit the model's context: {'; '.join(skipped)}")
    return fitting, skipped


def _batches(chosen: Sequence[Question], batch_size: int) -> list[list[Question]]:
    """Neighbours with equally many turns, as many as one call is given: one, or a few times a batch's size."""
    size = batch_size if batch_size == 1 else batch_size * BATCHES_A_CALL
    out: list[list[Question]] = []
    for question in chosen:
        if out and len(out[-1]) < size and len(out[-1][0].turns) == len(question.turns):
            out[-1].append(question)
        else:
            out.append([question])
    return out


def _fact_lines(config: RunConfig, facts: dict[str, Any]) -> list[str]:
    where = facts["environment"]
    mesh = f"mesh {config.mesh}, " if config.mesh else ""
    return [
        f"{len(facts['questions']['question_ids'])} questions, at most {config.max_new_tokens} tokens a turn, batch size "
        f"{config.batch_size}, {mesh}{'exact' if config.exact else 'fast'} mode, seed {config.seed}; {where['device']} "
        f"({where['num_cpus']} CPU cores), jax {where['jax']}.",
        "A time is prefill + decoding, without compilation"
        + (f", the median of {config.repeats} runs of an answer" if config.repeats > 1 else "")
        + ". Questions are the outer loop and methods the inner one.",
    ]


def define_flags() -> None:
    """Defines the flags; a function, so that tests can import several programs."""
    flags.DEFINE_string("model", None, "Model folder or hub name in Hugging Face format; by default the embedded model.")
    flags.DEFINE_string("questions", None, "Question file in Spec-Bench's format; by default the embedded questions.")
    flags.DEFINE_string(
        "methods",
        None,
        f"Comma list; options as in hd:window=0:order=cm. Plain decoding always runs. By default {DEFAULT_METHODS}; on a mesh, "
        "which has no budget, without it.",
    )
    flags.DEFINE_list("tasks", list(questions.TASKS), "Comma list of tasks.")
    flags.DEFINE_integer("limit", None, "Questions of each task, the first ones; by default all.", lower_bound=1)
    flags.DEFINE_integer("num_nodes", None, "Nodes of a tree, the root included, for methods with this option.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0)
    flags.DEFINE_integer("max_new_tokens", 128, "Tokens of an answer at most.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of parameters, activations and cache; by default the model's.")
    flags.DEFINE_integer("seed", 0, "Keys the noise of sampling, with the question's place in its file.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 1, "Questions decoded together; others take the places of answered ones.", lower_bound=1)
    flags.DEFINE_integer("repeats", 1, "Runs of every answer, in turns with other methods; the median counts.", lower_bound=1)
    flags.DEFINE_bool("warm", False, "Also run methods that can remember earlier requests in a session of all questions.")
    program.define_mesh_flags()
    flags.DEFINE_bool("exact", False, "Exact mode: slower, and no difference is explained.")
    flags.DEFINE_enum(
        "budget",
        None,
        BUDGETS,
        "Nodes a step verifies: all, or as many as pay. By default all; or a method's own: hd_tree:budget=adaptive.",
    )
    flags.DEFINE_string("resume", None, "Folder of a run to go on with, by its own config.")
    flags.DEFINE_string("output_dir", None, "Folder for the results; by default results/<date-time>.")


def _given_config() -> RunConfig:
    values: dict[str, Any] = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(RunConfig)}
    if values["model"] and pathlib.Path(values["model"]).exists():
        values["model"] = os.path.abspath(values["model"])
    if not math.isfinite(values["temperature"]):
        raise ValueError(f"--temperature={values['temperature']}: a finite number is needed")
    if values["questions"]:
        values["questions"] = os.path.abspath(values["questions"])
    if values["methods"] is None:
        values["methods"] = DEFAULT_METHODS.removesuffix(":budget=adaptive") if values["mesh"] else DEFAULT_METHODS
    values["methods"], values["tasks"] = run_config.parse_methods(values["methods"]), tuple(values["tasks"])
    return RunConfig(**values)


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    config = _given_config()
    if values.resume:
        folder = pathlib.Path(values.resume)
        if values.output_dir and pathlib.Path(values.output_dir).absolute() != folder.absolute():
            raise ValueError(f"--output_dir={values.output_dir} and --resume={folder}: a run stays in its folder")
        given = [field.name for field in dataclasses.fields(RunConfig) if values[field.name].present]
        config = run_config.resumed(folder, config, given)
    else:
        folder = pathlib.Path(values.output_dir or f"results/{datetime.datetime.now():%Y-%m-%d-%H%M%S}")
        if (folder / CONFIG_FILE).exists():
            raise ValueError(f"{folder} holds a run: go on with --resume={folder}, or give another --output_dir")
    program.join_processes()
    try:
        tables = run(config, folder, Library.default())
        if tables:
            print(f"{tables}\nWritten to {folder}")
    except UnexplainedDifference as error:
        print(f"error: {error}; the answers are in {folder}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        if (folder / CONFIG_FILE).exists():
            command = f"python -m experiments.specbench --resume={shlex.quote(str(folder))}"
            print(f"\nStopped; what is done is kept. Go on with: {command}", file=sys.stderr)
        else:
            print("\nStopped before the first answer.", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # Not sys.exit: what the device still runs may crash in the interpreter's shutdown.


if __name__ == "__main__":
    define_flags()
    program.run(main)
