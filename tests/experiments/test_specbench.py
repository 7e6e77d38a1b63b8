import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types

import matplotlib.figure
import pytest

from experiments import answers, questions, run_config, specbench
from experiments.questions import Question
from experiments.run_config import RunConfig
from hd_jax.exactness import Verdict
from hd_jax.result import Result


@dataclasses.dataclass
class FakeModel:
    """Answers with the bytes of "<last message>#<number of messages>"; drafters change how, not what."""

    folder: str
    max_context: int = 200
    requests: list = dataclasses.field(default_factory=list)  # (drafter's name, prompts, seeds) of each call
    interrupt_at: int | None = None  # call that Ctrl-C comes in
    budgets: set = dataclasses.field(default_factory=set)  # (drafter's name, budget) of all calls
    batch_sizes: set = dataclasses.field(default_factory=set)  # of all calls
    wrong: tuple = ()  # names of drafters whose answers to the second turns differ
    is_explained: bool = False

    config = types.SimpleNamespace(dtype="float32")
    tokenizer = types.SimpleNamespace(chat=lambda messages: list("".join(f"<{m['content']}>" for m in messages).encode()))

    def generate(self, lm, prompt, *, drafter, max_new_tokens, temperature, seed, exact, budget, batch_size):
        assert lm is self
        self.budgets.add((drafter.name, budget))
        is_batch = isinstance(prompt[0], list)  # of messages or of tokens
        prompts, seeds = (prompt, seed) if is_batch else ([prompt], [seed])
        assert len(prompts) == len(seeds)
        self.requests.append((drafter.name, prompts, seeds))
        self.batch_sizes.add(batch_size)
        if len(self.requests) == self.interrupt_at:
            raise KeyboardInterrupt
        results = [self._result(p, drafter, max_new_tokens, len(prompts)) for p in prompts if isinstance(p[0], dict)]
        if not results:
            return None  # nothing is asked of a warm-up's answers
        return results if is_batch else results[0]

    def session(self, lm, *, drafter):
        return FakeSession(self, drafter)

    def _result(self, messages, drafter, max_new_tokens, num_rows):
        text = f"{messages[-1]['content']}#{len(messages)}"[:max_new_tokens]
        if drafter.name in self.wrong and len(messages) > 1:
            text = text[:2] + "?" + text[3:]
        tokens, size = list(text.encode()), drafter.size
        return Result(
            text=text,
            tokens=tokens,
            prompt_tokens=self.tokenizer.chat(messages),
            finish_reason="length",
            accept_lengths=[min(size, len(tokens) - start) for start in range(0, len(tokens), size)],
            nodes_per_step=size - 1.0,
            pass_sizes=[size] * -(-len(tokens) // size),
            sources=["context"] * len(tokens),
            source_counts={"context": {"proposed": [4] * (size - 1), "accepted": [2] * (size - 1)}},
            compile_ms=7.0,
            prefill_ms=2.0,
            decode_ms=num_rows * len(tokens) / size,
            share_ms=2.0 + len(tokens) / size,
        )

    def check(self, lm, drafter, reference, candidate, **settings):
        assert lm is self
        assert reference.prompt_tokens == candidate.prompt_tokens
        if reference.tokens == candidate.tokens:
            return Verdict()
        return Verdict(2, self.is_explained, 0.5, 0.1, "token 2 differs")

    def library(self):
        def plain():
            return types.SimpleNamespace(name="none", size=1, max_depth=0, renew=None)

        def pairs(num_nodes=2, letter="", remember=0):
            if num_nodes > 9:
                raise ValueError(f"num_nodes {num_nodes} is too large")
            return types.SimpleNamespace(name=f"pairs{letter}", size=num_nodes, max_depth=1, renew=remember or None)

        makers = {"none": plain, "pairs": pairs}
        make = lambda lm, name, **options: makers[name](**options)  # noqa: E731
        draft_us = lambda lm, drafter, tokens: 3.0  # noqa: E731
        return specbench.Library(
            lambda name, dtype, mesh: self,
            makers,
            make,
            self.generate,
            lambda num_tokens, max_depth: -(-num_tokens // 64),
            draft_us,
            self.session,
            self.check,
        )


@dataclasses.dataclass
class FakeSession:
    """Accepts one token more a step with every request that went before."""

    model: FakeModel
    drafter: types.SimpleNamespace
    messages: list = dataclasses.field(default_factory=list)
    num_requests: int = 0

    def reset(self):
        self.messages = []

    def generate(self, message, *, seed, **options):
        drafter = types.SimpleNamespace(name=f"{self.drafter.name} in a session", size=self.drafter.size + self.num_requests)
        self.num_requests += 1
        messages = [*self.messages, {"role": "user", "content": message}]
        return self.model.generate(self.model, messages, drafter=drafter, seed=seed, batch_size=1, **options)


QUESTIONS = [
    {"question_id": 81, "category": "math", "turns": ["one plus one", "and two more"]},
    {"question_id": 82, "category": "coding", "turns": ["write a loop", "now faster"]},
    {"question_id": 5, "category": "qa", "turns": ["who wrote it"]},
    {"question_id": 6, "category": "rag", "turns": ["long " * 50]},
    {"question_id": 7, "category": "qa", "turns": ["when was it"]},
]


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Drawing takes most of a small run's time, and is tested with the report."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, path, **options: path.touch())


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return RunConfig(
        model=None,
        questions=str(path),
        methods=("none", "pairs", "pairs:num_nodes=3:letter=x"),
        tasks=questions.TASKS,
        limit=None,
        num_nodes=None,
        temperature=0.0,
        max_new_tokens=12,
        dtype=None,
        seed=100,
        batch_size=1,
        mesh=None,
        exact=False,
        budget=None,
    )


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("w")
    return FakeModel(str(tmp_path / "model"))


def _answers(folder):
    """All that a run answered, without what differs from run to run."""
    out = {}
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        out[path.name] = [{k: v for k, v in row.items() if k not in ("answer_id", "tstamp")} for row in rows]
    return out


def test_a_run_writes_answers_and_reports(config, model, tmp_path, capfd):
    text = specbench.run(config, tmp_path / "run", model.library())
    files = {path.name for path in (tmp_path / "run").iterdir()}
    labels = {"none", "pairs", "pairs-num_nodes=3-letter=x"}
    assert files == {f"{label}.jsonl" for label in labels} | {
        *("config.json", "summary.json", "report.md", "speedup.png", "tokens_per_step.png", "growth.png", "acceptance.png")
    }
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rows = {(row["method"], row["task"]): row for row in summary["results"]}
    assert set(rows) == {(label, task) for label in labels for task in ("mt_bench", "qa", "overall")}
    assert rows["pairs", "overall"]["tokens"] == 6 * 12
    assert rows["pairs", "overall"]["tokens_per_step"] == 2.0
    assert rows["pairs", "overall"]["speedup"] == pytest.approx((12 + 2) / (6 + 2))
    assert rows["pairs", "qa"]["draft_us"] == 3.0
    assert "question 6 (" in text  # does not fit
    assert "question 6 (" in (tmp_path / "run" / "report.md").read_text()
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["flags"]["max_new_tokens"] == 12
    assert stored["methods"]["pairs-num_nodes=3-letter=x"] == {"drafter": "pairs", "options": {"num_nodes": 3, "letter": "x"}}
    assert "12/12" in capfd.readouterr().err


def test_a_budget_is_a_methods_own_or_all_methods_but_plain_decodings(config, model, tmp_path):
    methods = ("none", "pairs:budget=adaptive", "pairs:num_nodes=3:letter=x")
    text = specbench.run(dataclasses.replace(config, methods=methods), tmp_path / "run", model.library())
    assert model.budgets == {("none", None), ("pairs", "adaptive"), ("pairsx", None)}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (overall,) = (row for row in summary["regret"] if row["task"] == "overall")
    assert (overall["method"], overall["best"]) == ("pairs-budget=adaptive", "pairs-num_nodes=3-letter=x")
    assert overall["regret"] == pytest.approx(1 - (12 / (2 + 6)) / (12 / (2 + 4)))
    assert "Sizes of passes" in text
    other = FakeModel(model.folder)
    changed = dataclasses.replace(config, methods=("none", "pairs", "pairs:budget=fixed:letter=y"), budget="adaptive")
    specbench.run(changed, tmp_path / "other", other.library())
    assert other.budgets == {("none", None), ("pairs", "adaptive"), ("pairsy", None)}


def test_an_answer_is_in_spec_benchs_format(config, model, tmp_path):
    specbench.run(config, tmp_path / "run", model.library())
    answer = json.loads((tmp_path / "run" / "pairs.jsonl").read_text().splitlines()[0])
    assert (answer["question_id"], answer["category"], answer["model_id"]) == (81, "math", "pairs")
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["turns"] == ["one plus one", "and two more"]
    assert choice["new_tokens"] == [12, 12]
    assert choice["decoding_steps"] == [6, 6]
    assert choice["wall_time"] == pytest.approx([0.008, 0.008])
    assert choice["accept_lengths"] == [2] * 12
    # What Spec-Bench's evaluation/speed.py does with a file:
    assert sum(choice["new_tokens"]) / sum(choice["wall_time"]) == pytest.approx(1500)


def test_questions_are_outer_and_turn_2_follows_plain_decoding(config, model, tmp_path):
    model.wrong, model.is_explained = ("pairs",), True
    specbench.run(dataclasses.replace(config, max_new_tokens=20), tmp_path / "run", model.library())
    asked = [request for request in model.requests if isinstance(request[1][0][0], dict)]
    assert [name for name, _, _ in asked[:8]] == ["none", "none", "pairs", "pairs", "pairsx", "pairsx", "none", "none"]
    second = [prompts[0] for _, prompts, _ in asked if len(prompts[0]) == 3]
    assert [prompt[1]["content"] for prompt in second[:3]] == ["one plus one#1"] * 3
    # Seeds by place in the file: the same for all methods, other for each question.
    assert [seeds for _, _, seeds in asked[::2][:6]] == [[100]] * 3 + [[101]] * 3
    assert asked[-1][2] == [104]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    overall = {row["method"]: row["near_ties"] for row in summary["results"] if row["task"] == "overall"}
    assert overall == {"none": 0, "pairs": 2, "pairs-num_nodes=3-letter=x": 0}


def test_each_size_of_a_methods_cache_is_warmed_up_on_other_text(config, model, tmp_path):
    specbench.run(config, tmp_path / "run", model.library())
    seen, turns = set(), {turn for question in QUESTIONS for turn in question["turns"]}
    for name, prompts, _ in model.requests:
        if isinstance(prompts[0][0], dict):
            size = -(-(len(model.tokenizer.chat(prompts[0])) + 12) // 64)
            assert (name, size) in seen
        else:
            assert not any(turn in bytes(prompts[0]).decode() for turn in turns)
            assert (name, -(-(len(prompts[0]) + 12) // 64)) not in seen
            seen.add((name, -(-(len(prompts[0]) + 12) // 64)))
    assert {name for name, _ in seen} == {"none", "pairs", "pairsx"}


def test_an_unexplained_difference_ends_the_run_after_its_answer(config, model, tmp_path):
    model.wrong = ("pairsx",)
    for _ in range(2):  # going on from there fails again
        with pytest.raises(specbench.UnexplainedDifference) as error:
            specbench.run(config, tmp_path / "run", model.library())
        assert "pairs-num_nodes=3-letter=x differs" in str(error.value)
        assert "question 81, turn 2, position 2: token 2 differs" in str(error.value)
        assert [len(rows) for rows in _answers(tmp_path / "run").values()] == [1, 1, 1]
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(("num_calls", "batch_size"), [(1, 1), (6, 1), (16, 1), (11, 4)])
def test_a_run_that_was_stopped_ends_with_the_same_answers(config, model, tmp_path, num_calls, batch_size):
    config = dataclasses.replace(config, batch_size=batch_size)
    specbench.run(config, tmp_path / "whole", model.library())
    other = FakeModel(model.folder, interrupt_at=num_calls)
    with pytest.raises(KeyboardInterrupt):
        specbench.run(config, tmp_path / "stopped", other.library())
    some = tmp_path / "stopped" / "none.jsonl"
    if some.exists():
        some.write_bytes(some.read_bytes()[:-20])  # cut while it was being written
    last = FakeModel(model.folder)
    specbench.run(config, tmp_path / "stopped", last.library())
    assert _answers(tmp_path / "stopped") == _answers(tmp_path / "whole")
    # Nothing more is left to do, not even a warm-up.
    idle = FakeModel(model.folder)
    specbench.run(config, tmp_path / "stopped", idle.library())
    assert idle.requests == []


@pytest.mark.parametrize("num_calls", [None, 9, 24])
def test_of_several_runs_of_an_answer_the_median_counts(config, model, tmp_path, num_calls):
    class Uneven(FakeModel):
        """The first run of an answer takes 30 ms, the second 10, the third 20."""

        def _result(self, messages, drafter, max_new_tokens, num_rows):
            result = super()._result(messages, drafter, max_new_tokens, num_rows)
            runs.append((drafter.name, str(messages)))
            return dataclasses.replace(result, share_ms=(30.0, 10.0, 20.0)[runs.count(runs[-1]) - 1])

    config = dataclasses.replace(config, repeats=3)
    if num_calls is not None:
        runs = []
        with pytest.raises(KeyboardInterrupt):
            specbench.run(config, tmp_path / "run", Uneven(model.folder, interrupt_at=num_calls).library())
    runs = []
    tables = specbench.run(config, tmp_path / "run", Uneven(model.folder).library())
    assert "the median of 3 runs of an answer" in " ".join(tables.split())
    for rows in _answers(tmp_path / "run").values():
        assert len(rows) == len(QUESTIONS) - 1  # one is too long
        for row in rows:
            assert set(row["choices"][0]["wall_time"]) == {0.02}
    assert any(row["hd_jax"]["draft_us"] for row in _answers(tmp_path / "run")["pairs.jsonl"])


def test_a_difference_in_any_run_is_told(config, model, tmp_path):
    class Unsteady(FakeModel):
        """Goes wrong from its thirtieth call on."""

        def generate(self, *arguments, **options):
            self.wrong = ("pairs",) if len(self.requests) >= 30 else ()
            return super().generate(*arguments, **options)

    with pytest.raises(specbench.UnexplainedDifference, match="pairs differs"):
        specbench.run(dataclasses.replace(config, repeats=3), tmp_path / "run", Unsteady(model.folder).library())


def test_a_session_is_not_asked_twice(config, model, tmp_path):
    with pytest.raises(ValueError, match="--warm needs --repeats=1"):
        specbench.run(dataclasses.replace(config, warm=True, repeats=2), tmp_path / "run", model.library())


def test_warm_methods_run_in_one_session(config, model, tmp_path):
    """Each request of a session knows those before it, also in a run that was stopped; only methods with a memory have one."""
    config = dataclasses.replace(config, methods=("none", "pairs", "pairs:remember=9"), warm=True)
    specbench.run(config, tmp_path / "whole", model.library())
    whole = _answers(tmp_path / "whole")
    assert set(whole) == {f"{name}.jsonl" for name in ("none", "pairs", "pairs-remember=9", "pairs-remember=9-warm")}
    lengths = [max(row["choices"][0]["accept_lengths"]) for row in whole["pairs-remember=9-warm.jsonl"]]
    assert lengths == [3, 5, 6, 7]  # of the last turn, the sixth request being the last
    other = FakeModel(model.folder, interrupt_at=19)
    with pytest.raises(KeyboardInterrupt):
        specbench.run(config, tmp_path / "stopped", other.library())
    assert 0 < len(_answers(tmp_path / "stopped")["pairs-remember=9-warm.jsonl"]) < 4
    specbench.run(config, tmp_path / "stopped", FakeModel(model.folder).library())
    assert _answers(tmp_path / "stopped") == whole


def test_a_batch_shares_its_time(config, model, tmp_path):
    specbench.run(dataclasses.replace(config, batch_size=2), tmp_path / "run", model.library())
    asked = [(name, len(prompts)) for name, prompts, _ in model.requests if isinstance(prompts[0][0], dict)]
    assert asked == [(name, 2) for name in ("none", "none", "pairs", "pairs", "pairsx", "pairsx", "none", "pairs", "pairsx")]
    assert model.batch_sizes == {2}
    answer = json.loads((tmp_path / "run" / "pairs.jsonl").read_text().splitlines()[0])
    assert answer["choices"][0]["wall_time"] == pytest.approx([0.008, 0.008])
    turn = answer["hd_jax"]["turns"][0]
    assert (turn["prefill_ms"], turn["decode_ms"]) == pytest.approx((2.0, 6.0))  # not the 12 until its end


@pytest.mark.parametrize(("batch_size", "expected"), [(1, [1] * 11), (2, [8, 1, 2]), (3, [8, 1, 2])])
def test_a_call_is_given_more_questions_than_a_batch_holds(batch_size, expected):
    """As many as find places one after another, with equally many turns."""
    chosen = [Question(i, i, "qa", ("a",) * (2 if i == 8 else 1)) for i in range(11)]
    batches = specbench._batches(chosen, batch_size)
    assert [len(batch) for batch in batches] == expected
    assert [question for batch in batches for question in batch] == chosen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("none", "magic")}, "method magic: there is no drafter 'magic'; known: none, pairs"),
        ({"methods": ("none", "pairs:num_nodes=10")}, "method pairs-num_nodes=10: num_nodes 10 is too large"),
        (
            {"methods": ("none", "pairs:budget=small")},
            "method pairs-budget=small: the budget is fixed or adaptive, not 'small'",
        ),
        ({"num_nodes": 10}, "method pairs: num_nodes 10 is too large"),
        ({"warm": True, "batch_size": 2}, "--warm needs --batch_size=1, not 2"),
        ({"tasks": ("qa", "sums")}, "task 'sums' is unknown"),
        ({"max_new_tokens": 400, "tasks": ("rag",)}, "no question's prompts fit"),
    ],
)
def test_bad_settings_are_refused_before_any_generation(config, model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        specbench.run(dataclasses.replace(config, **changes), tmp_path / "run", model.library())
    assert model.requests == []
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_refused_first(config, model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        specbench.run(config, tmp_path / "file" / "run", model.library())
    assert model.requests == []


def test_a_folder_of_another_run_is_refused(config, model, tmp_path):
    specbench.run(config, tmp_path / "run", model.library())
    before = _answers(tmp_path / "run")
    (pathlib.Path(model.folder) / "weights").write_text("W")
    with pytest.raises(ValueError, match="of another run: model was"):
        specbench.run(config, tmp_path / "run", model.library())
    assert _answers(tmp_path / "run") == before


def test_read_answers_names_a_broken_line(config, model, tmp_path):
    specbench.run(config, tmp_path / "run", model.library())
    path, asked = tmp_path / "run" / "none.jsonl", questions.read(config.questions)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{}\n")
    with pytest.raises(ValueError, match=r"none\.jsonl, line 2: not an answer"):
        answers.read(path, asked)
    path.write_text(lines[0] + lines[2])
    with pytest.raises(ValueError, match=r"none\.jsonl, line 2: the run has no question 5 "):
        answers.read(path, asked)
    path.write_text(lines[0] + lines[1][:30])
    assert [answer["question_id"] for answer in answers.read(path, asked)] == [81]
    assert path.read_text() == lines[0]


def test_methods():
    assert run_config.parse_methods("pld, hd:window=0:order=cm,none") == ("none", "pld", "hd:window=0:order=cm")
    method = run_config.parse_method("hd:window=-3:order=cm")
    assert (method.drafter, method.options, method.label) == ("hd", {"window": -3, "order": "cm"}, "hd-window=-3-order=cm")
    for text, message in [
        ("pld,pld", "names pld twice"),
        ("pld,", "method ''"),
        ("hd:window", "'window' is not of the form"),
        ("hd:a=1:a=2", "given twice"),
        ("../hd", "'../hd' is not of the form"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_config.parse_methods(text)


def test_resume_takes_the_folders_config(config, model, tmp_path):
    specbench.run(config, tmp_path / "run", model.library())
    given = dataclasses.replace(config, limit=3, seed=100, temperature=0.5)
    assert run_config.resumed(tmp_path / "run", given, ["seed"]) == config
    with pytest.raises(ValueError, match=r"--limit is 3 here and None there; --temperature is 0\.5 here and 0\.0 there"):
        run_config.resumed(tmp_path / "run", given, ["seed", "limit", "temperature"])
    with pytest.raises(ValueError, match="holds no run"):
        run_config.resumed(tmp_path, given, [])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--limit=0"], "limit"),
        (["--temperature=nan"], "finite"),
        (["--methods=hd:window"], "'window' is not of the form"),
        (["--questions=nowhere.jsonl"], "nowhere.jsonl"),
        (["--resume=nowhere"], "nowhere holds no run"),
        (["--resume=a", "--output_dir=b"], "a run stays in its folder"),
    ],
)
def test_bad_flags_end_with_one_line_and_status_2(tmp_path, args, message):
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(specbench.__file__).parents[1])}
    command = [sys.executable, "-m", "experiments.specbench", *args]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        ("KeyboardInterrupt", 130, "Stopped before the first answer."),
        ("specbench.UnexplainedDifference('hd differs')", 1, "error: hd differs; the answers are in "),
    ],
)
def test_exit_statuses(tmp_path, error, status, message):
    code = f"""
from experiments import program, specbench
def stop(config, folder, library):
    raise {error}
specbench.run = stop
specbench.define_flags()
program.run(specbench.main)
"""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(specbench.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr
