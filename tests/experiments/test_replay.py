"""Replay: the steps of decoding without the model, the form of recorded answers, and what a run leaves behind."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
from letters import ANSWERS, QUESTIONS, Letters, settings_in, write_lines

from experiments import questions, replay, replay_databases, traces
from experiments.replay import Settings
from experiments.traces import Turn
from hd_jax import decode, draft_tree, drafters
from hd_jax.databases.collection import Databases
from hd_jax.draft_tree import NO_SOURCE, NO_TOKEN, DraftTree
from hd_jax.drafters import Drafter, pld


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Settings:
    monkeypatch.setattr(replay.tokenizers, "load", lambda name, template: Letters())
    return settings_in(tmp_path)


# The steps


def steps_of(drafter, *texts: Turn) -> list[tuple[list[int], list[int]]]:
    return [(outcome.accept_lengths, outcome.num_nodes) for outcome in replay.replayed(drafter, texts)]


def test_the_steps_of_a_text_worked_out_by_hand():
    """PLD with two tokens a draft.

    text           5 6 7 8 9 5 6 | 7 8 9 1 5 6
    first step     5 6 was followed by 7 8: both are right, and the model adds 9
    second step    7 8 9 was followed by 5 6: wrong, the model adds 1
    third step     nothing begins with 1: no draft, the model adds 5
    fourth step    5 was followed by 6 7: 6 is right, and the text ends
    """
    text = Turn(0, 0, "qa", 0, [5, 6, 7, 8, 9, 5, 6], [7, 8, 9, 1, 5, 6])
    assert steps_of(pld(num_nodes=3), text) == [([3, 1, 1, 1], [2, 2, 0, 2])]


@pytest.mark.parametrize(("name", "options"), [("pld", {}), ("hd", {"window": 0})])
def test_a_replay_takes_the_steps_that_decoding_took(lm, name, options):
    documents = [jnp.asarray([5, 6, 7, 8, 9, 10, 11] * 3)]
    forms = {kind: form.build(documents, **settings) for kind, (form, _, settings) in replay_databases.FORMS.items()}
    drafter = drafters.make(name, Databases(**forms), options)
    prompts = [[3, 4, 5] * 4, [7, 8, 9, 10, 7, 8], list(range(2, 40))]
    decoded = [decode.generate(lm, prompt, drafter=drafter, max_new_tokens=150) for prompt in prompts]
    assert any(max(result.accept_lengths) > 1 for result in decoded), "nothing is drafted rightly: the test would show little"
    texts = [Turn(i, i, "qa", 0, result.prompt_tokens, result.tokens) for i, result in enumerate(decoded)]
    for result, outcome in zip(decoded, replay.replayed(drafter, texts), strict=True):
        assert outcome.accept_lengths == result.accept_lengths
        assert sum(outcome.num_nodes) == pytest.approx(result.nodes_per_step * result.num_steps)
        for index, source in enumerate(drafter.source_names):
            assert outcome.counts[0, index].tolist() == result.source_counts[source]["proposed"]
            assert outcome.counts[1, index].tolist() == result.source_counts[source]["accepted"]


@functools.cache
def watcher() -> Drafter:
    """Drafts 7 -> 8 and 9 -> 8 after the root, and keeps the targets it is told; renewed, it keeps those of before too."""

    def init(tables, context):
        return jnp.zeros((1, 5), jnp.int32)

    def draft(tables, state, context):
        tokens = jnp.stack([context.root, *jnp.asarray([7, 8, 9, 8])])
        return DraftTree(tokens, jnp.asarray([-1, 0, 1, 0, 3]), jnp.full(5, NO_SOURCE), jnp.zeros(5, bool), jnp.ones(5))

    def update(tables, state, context, feedback):
        assert feedback.top_logits.shape == feedback.top_tokens.shape == (5, 0)
        return state.at[-1].set(jnp.where(feedback.argmax == feedback.targets, feedback.targets, -100))

    def renew(tables, state, context):
        return jnp.concatenate([state, jnp.zeros((1, 5), jnp.int32)])

    return Drafter("watcher", 5, 2, ("guess",), draft, init=init, update=update, renew=renew)


def test_feedback_tells_nothing_of_nodes_off_the_recorded_path():
    outcome = next(replay.replayed(watcher(), [Turn(0, 0, "qa", 0, [1, 2], [7, 8, 3])]))
    assert outcome.accept_lengths == [3]
    assert outcome.drafter_state[0].tolist() == [[7, 8, 3, NO_TOKEN, NO_TOKEN]]


def test_what_a_drafter_has_learned_passes_from_text_to_text():
    texts = [Turn(0, 0, "qa", 0, [1, 2], [7, 8, 3]), Turn(1, 1, "qa", 0, [1, 2], [9, 8, 4])]
    *_, last = replay.replayed(watcher(), texts)
    assert last.drafter_state[0].tolist() == [[7, 8, 3, NO_TOKEN, NO_TOKEN], [9, NO_TOKEN, NO_TOKEN, 8, 4]]


def test_drafters_that_look_up_on_the_host_are_asked_before_every_step():
    seen = []

    def refresh(context):
        seen.append(int(context.length))
        return context.tokens[context.length - 1 :][:1] + 1  # counting on is always right

    def draft(tables, state, context):
        return draft_tree.from_chain(context.root, context.host, jnp.int32(1))

    counter = Drafter("counter", 2, 1, ("count",), draft, refresh=refresh)
    assert steps_of(counter, Turn(0, 0, "qa", 0, [1, 2], [3, 4, 5, 6])) == [([2, 2], [1, 1])]
    assert seen == [2, 2, 4]  # the first time to compile


# Recorded answers


def texts_of(asked, answers, tmp_path) -> list[Turn]:
    """The texts, each record through its file."""
    read = questions.read(write_lines(tmp_path / "question.jsonl", asked))
    return traces.turns(read, read, traces.read(write_lines(tmp_path / "answers.jsonl.gz", answers)), Letters())


def test_prompts_hold_the_recorded_answers_before_them_and_answers_end_unless_cut(tmp_path):
    a, again, cut, _ = texts_of(QUESTIONS, ANSWERS, tmp_path)
    assert (a.question_id, a.task, a.index, again.index) == (1, "mt_bench", 0, 1)
    assert a.prompt == [30, 0, 1, 2, 0, 1, 2, 31]
    assert a.answer == [0, 1, 2, 0, 1, 2, 0, 1, 3, 27]
    assert again.prompt == [*a.prompt, *a.answer[:-1], 30, 0, 6, 0, 8, 13, 31]
    assert cut.answer == [25, 24, 25, 24, 25, 24]


def test_token_ids_are_taken_as_they_are(tmp_path):
    answers = [{**ANSWERS[0], "turns": ["?"], "new_tokens": [3], "token_ids": [[4, 5, 27]]}, *ANSWERS[1:]]
    assert texts_of(QUESTIONS, answers, tmp_path)[3].answer == [4, 5, 27]


@pytest.mark.parametrize("has_ids", [False, True])
def test_answer_files_are_records_too(tmp_path, has_ids):
    """Those of Spec-Bench, and those of our own main job, which hold the token ids."""
    answers = []
    for answer in ANSWERS:
        parts = {name: answer[name] for name in ("turns", "new_tokens")}
        ids = {"hd_jax": {"turns": [{"tokens": [5] * count} for count in answer["new_tokens"]]}} if has_ids else {}
        answers.append({"question_id": answer["question_id"], "category": answer["category"], "choices": [parts], **ids})
    found, expected = texts_of(QUESTIONS, answers, tmp_path), texts_of(QUESTIONS, ANSWERS, tmp_path)
    if has_ids:
        assert [text.answer for text in found] == [[5] * len(text.answer) for text in expected]
    else:
        assert found == expected


def changed(index, **fields):
    return [{**answer, **fields} if i == index else answer for i, answer in enumerate(ANSWERS)]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "answers.jsonl.gz: no recorded answers"),
        ([*ANSWERS[:2], '{"question_id": 2, "turns'], "answers.jsonl.gz, line 3: Invalid control character"),
        ([{"question_id": 1, "turns": []}], "line 1: lacks category, new_tokens"),
        ([{"question_id": 1, "category": "qa", "choices": []}], "line 1: choices is not that of an answer file"),
        (changed(1, turns="text"), "line 2: turns must be a list of one or more strings"),
        (changed(1, new_tokens=[10]), "line 2: new_tokens must be 2 whole numbers of at least 1, one a turn, not \\[10\\]"),
        (changed(1, new_tokens=[10, 0]), "line 2: new_tokens must be 2 whole numbers"),
        (changed(1, question_id=3), "line 2: question_id 3 was used in line 1"),
        (changed(0, token_ids=[[1, 2]]), "line 1: token_ids holds \\[2\\] tokens, but new_tokens says \\[10\\]"),
        (changed(2, token_ids=[[1, 2, 3, 4, 5, 40]]), "question 2: the recorded token id 40 is outside .* vocabulary of 32"),
        (ANSWERS[:2], "1 questions without a recorded answer, the first one is 2"),
        (changed(0, question_id=9), "1 recorded answers to no question, the first one is 9"),
        (changed(1, turns=["a"], new_tokens=[2]), "the number of turns of question 1 is 2, that of its recorded answer 1"),
        (changed(2, category="rag"), "the category of question 2 is qa, that of its recorded answer rag"),
        (changed(0, new_tokens=[14]), "not written with this tokenizer: 1 of 4 turns .* turn 1 of question 3: 10, recorded 14"),
    ],
)
def test_bad_records_are_named(answers, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        texts_of(QUESTIONS, answers, tmp_path)


def test_a_few_texts_that_encode_otherwise_are_no_fault(tmp_path):
    asked = [{"question_id": i, "category": "qa", "turns": ["a"]} for i in range(100)]
    answers = [
        {"question_id": i, "category": "qa", "turns": ["abcdef"], "new_tokens": [12 if i < 2 else 5]} for i in range(100)
    ]
    assert len(texts_of(asked, answers, tmp_path)) == 100
    answers[50]["new_tokens"] = [12]
    with pytest.raises(ValueError, match="3 of 100 turns have another number"):
        texts_of(asked, answers, tmp_path)


# A run


def test_a_run_writes_its_rows_and_tables(settings, tmp_path):
    shown = replay.run(settings, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = {(row["method"], row["task"]): row for row in summary["results"]}
    assert set(rows) == {(method, task) for method in ("pld", "hd") for task in ("mt_bench", "qa", "overall")}
    for (method, task), row in rows.items():
        assert row["state"] == "cold"
        assert row["budget"] == {"pld": 10, "hd": 28}[method]
        assert row["tokens"] == {"mt_bench": 17, "qa": 16, "overall": 33}[task]
        assert row["tokens_per_step"] == row["tokens"] / row["steps"] >= 1
        assert row["draft_us"] > 0
        accepted = sum(sum(counts["accepted"]) for counts in row["acceptance"].values())
        assert row["tokens"] - 2 * row["steps"] <= accepted < row["tokens"]  # a step that ends a text may have no bonus
        assert row["nodes_per_step"] * row["steps"] == pytest.approx(
            sum(sum(counts["proposed"]) for counts in row["acceptance"].values())
        )
    assert (
        rows["hd", "qa"]["acceptance"]["model"]["accepted"][0] + rows["hd", "qa"]["acceptance"]["statistics"]["accepted"][0] > 0
    )
    assert [d["name"] for d in summary["databases"]] == ["model", "model_text", "statistics", "trigrams"]
    assert summary["databases"][0]["tokens"] == 21  # an end token after each answer
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["flags"]["traces"] == "answers.jsonl"
    assert str(tmp_path) not in json.dumps([config, summary])
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"| hd 28 | {rows['hd', 'mt_bench']['tokens_per_step']:.2f} |" in report
    assert "hd ran with window=0" in report and "hd ran with window=0" in shown
    assert (tmp_path / "out" / "tokens_per_step.png").stat().st_size > 1000
    assert (tmp_path / "out" / "budgets.png").stat().st_size > 1000


def test_a_stopped_run_goes_on_with_the_parts_it_lacks(settings, tmp_path, monkeypatch):
    folder, ran = tmp_path / "out", []
    real = replay.replay

    def stopping(drafter, texts, advance):
        ran.append(drafter.name)
        if drafter.name == "hd" and ran.count("hd") == 1:
            raise KeyboardInterrupt
        return real(drafter, texts, advance)

    monkeypatch.setattr(replay, "replay", stopping)
    with pytest.raises(KeyboardInterrupt):
        replay.run(settings, folder)
    assert not (folder / "summary.json").exists() and not (folder / "report.md").exists()
    with pytest.raises(ValueError, match="is of another run: flags was"):
        replay.run(Settings(**{**vars(settings), "limit": 1}), folder)
    replay.run(settings, folder)
    assert ran == ["pld", "hd", "hd"]
    assert len(json.loads((folder / "summary.json").read_text())["results"]) == 6
    with pytest.raises(ValueError, match="holds a finished replay"):
        replay.run(settings, folder)


def test_a_drafter_is_given_the_size_of_the_tokenizers_vocabulary(settings, tmp_path, monkeypatch):
    """When its options are tried, and when it runs."""
    seen = []

    def sized(*, vocab_size):
        seen.append(vocab_size)
        return replay.drafters.pld()

    monkeypatch.setitem(replay.drafters.MAKERS, "sized", sized)
    replay.run(Settings(**{**vars(settings), "methods": ("sized",), "limit": 1}), tmp_path / "out")
    assert seen == [len(Letters().token_classes)] * 2


def test_a_limit_takes_the_first_questions_of_each_task(settings, tmp_path):
    replay.run(Settings(**{**vars(settings), "methods": ("pld",), "limit": 1}), tmp_path / "out")
    turns = json.loads((tmp_path / "out" / "parts" / "pld-cold.json").read_text())["turns"]
    assert [(turn["question_id"], turn["turn"]) for turn in turns] == [(1, 1), (1, 2), (2, 1)]


def test_budgets_and_memory_make_parts(settings, monkeypatch):
    def grown(databases=None, *, num_nodes=65, remember=512, style="wide"):
        raise NotImplementedError

    monkeypatch.setitem(replay.drafters.MAKERS, "grown", grown)
    values = {**vars(settings), "methods": ("pld", "grown", "grown:num_nodes=5:style=deep"), "budgets": (8, 16), "warm": True}
    plan = replay.plan(Settings(**values))
    assert [(part.file_name, part.options) for part in plan] == [
        ("pld-cold.json", {}),
        ("grown-budget=8-cold.json", {"num_nodes": 9, "remember": 0}),
        ("grown-budget=16-cold.json", {"num_nodes": 17, "remember": 0}),
        ("grown-budget=8-warm.json", {"num_nodes": 9}),
        ("grown-budget=16-warm.json", {"num_nodes": 17}),
        ("grown-num_nodes=5-style=deep-cold.json", {"num_nodes": 5, "style": "deep", "remember": 0}),
        ("grown-num_nodes=5-style=deep-warm.json", {"num_nodes": 5, "style": "deep"}),
    ]


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": ("pld", "hdd")},
            "there is no drafter 'hdd'; known: none, pld, lookahead, rest, recycling, suffix, aded, hd, hd_tree",
        ),
        ({"methods": ("pld", "pld")}, "names pld twice"),
        ({"methods": ("hd:window=3",)}, "a window's nodes need the model's logits; replay it with window=0"),
        ({"methods": ("recycling",)}, "method recycling drafts from the model's logits: it cannot be replayed"),
        (
            {"methods": ("lookahead:window=0",)},
            "method lookahead-window=0 drafts from the model's logits: it cannot be replayed",
        ),
        ({"methods": ("hd:order=xyz",)}, "method hd-order=xyz: hd's order is a choice of the letters"),
        ({"methods": ("hd:size=3",)}, "drafter hd has no option size"),
        ({"methods": ("hd:budget=adaptive",)}, "a budget goes by the cost of steps, which only a --timed replay has"),
        ({"methods": ("pld:num_nodes=200",)}, "is 199 deep; at most 127 is possible"),
        ({"model_corpus": None}, "method hd: the model database is missing"),
        ({"databases": "folder"}, "--databases and corpora: give ready databases, or the corpora"),
    ],
)
def test_bad_settings_are_told_before_anything_is_built(settings, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        replay.run(Settings(**{**vars(settings), **changes}), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_other_drafters_that_need_logits_are_refused(settings, tmp_path, monkeypatch):
    def own():
        return Drafter("own", 2, 1, ("logits",), lambda *_: None, num_top_logits=8)  # pyright: ignore

    monkeypatch.setitem(replay.drafters.MAKERS, "own", own)
    with pytest.raises(ValueError, match="method own drafts from the model's logits: it cannot be replayed"):
        replay.run(Settings(**{**vars(settings), "methods": ("own",)}), tmp_path / "out")


def test_a_broken_corpus_leaves_nothing_behind(settings, tmp_path):
    corpus = write_lines(tmp_path / "other.jsonl", [{"text": "abc"}, {"txt": "abc"}])
    with pytest.raises(ValueError, match=r"other\.jsonl, line 2: a record needs"):
        replay.run(
            Settings(**{**vars(settings), "statistics_corpus": corpus, "model_corpus": None, "methods": ("pld",)}),
            tmp_path / "o",
        )
    assert not (tmp_path / "o").exists() and not (tmp_path / "cache").exists()


# Databases


def build(settings, cache, **changes):
    values = {**vars(settings), **changes}
    names = ("model_corpus", "statistics_corpus", "statistics_tokens")
    return replay_databases.from_corpora(*(values[name] for name in names), Letters(), cache)


def test_databases_are_built_once(settings, tmp_path, monkeypatch):
    first, facts = build(settings, tmp_path / "cache")
    assert first.model_text.text.tolist()[:5] == Letters().encode("whowh", add_bos=False)
    monkeypatch.setattr(replay_databases, "_tokenized", None)  # would fail if called
    again, facts_again = build(settings, tmp_path / "cache")
    assert facts == facts_again
    assert again.statistics.text.tolist() == first.statistics.text.tolist()
    monkeypatch.undo()
    other = write_lines(tmp_path / "other.jsonl", [{"text": "nothing of before"[:7]}])
    assert build(settings, tmp_path / "cache", statistics_corpus=other)[1][2]["tokens"] == 8


def test_a_part_of_a_corpus_is_random_documents_up_to_a_number_of_tokens(settings, tmp_path):
    corpus = write_lines(tmp_path / "many.jsonl", [{"text": chr(97 + i) * 4} for i in range(20)])
    small = build(settings, tmp_path / "cache", statistics_corpus=corpus, statistics_tokens=10)[0].statistics.text
    large = build(settings, tmp_path / "cache", statistics_corpus=corpus, statistics_tokens=30)[0].statistics.text
    assert [len(text[text >= 0]) for text in (small, large)] == [10, 30]
    assert small[:12].tolist() == large[:12].tolist()
    assert small[:8].tolist() != [0, 0, 0, 0, -6, 1, 1, 1]


# The program


def test_a_missing_file_is_one_line_and_status_two(tmp_path):
    write_lines(tmp_path / "question.jsonl", QUESTIONS)
    (tmp_path / "tok").mkdir()
    command = ["-m", "experiments.replay", "--traces=none.jsonl", "--questions=question.jsonl", "--tokenizer=tok"]
    root = pathlib.Path(replay.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "no tokenizer" in done.stderr
