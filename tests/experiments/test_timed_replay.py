"""Timed replay: the steps of a replay with a model beside them, going on after a stop, and what is refused."""

from __future__ import annotations

import functools
import json

import jax.numpy as jnp
import pytest
from letters import Letters, settings_in

from experiments import questions, replay, shapes, timed_replay, traces
from experiments.replay import Settings
from hd_jax import draft_tree
from hd_jax.drafters import Drafter


@functools.cache
def alphabet() -> Drafter:
    """Drafts the next letter of the alphabet, and as many of them as it has seen requests before."""

    def init(tables, context):
        return jnp.int32(0)

    def draft(tables, state, context):
        return draft_tree.from_chain(context.root, context.root + 1 + jnp.arange(4), state)

    def renew(tables, state, context):
        return state + 1

    return Drafter("alphabet", 5, 4, ("guess",), draft, init=init, renew=renew)


@pytest.fixture
def timed(tmp_path, monkeypatch) -> Settings:
    """Of a timed run at the shape of a small model, of a drafter that learns and of an adaptive budget."""
    monkeypatch.setattr(replay.tokenizers, "load", lambda name, template: Letters())
    monkeypatch.setitem(shapes.SHAPES, "small", shapes._llama(32, 16, 32, 1, 2, 1, max_position_embeddings=64))
    monkeypatch.setitem(replay.drafters.MAKERS, "alphabet", alphabet)
    methods = ("alphabet", "pld:num_nodes=2:budget=adaptive")
    return Settings(**{**vars(settings_in(tmp_path)), "methods": methods, "timed": True, "shape": "small"})


LABELS = ("none", "alphabet", "pld-num_nodes=2-budget=adaptive")


def timed_answers(folder) -> dict[str, list]:
    return {label: [json.loads(line) for line in (folder / f"{label}.jsonl").read_text().splitlines()] for label in LABELS}


def test_a_timed_replay_takes_the_steps_of_a_replay_and_goes_on_where_it_was_stopped(timed, tmp_path, monkeypatch):
    folder, ran, stop_at = tmp_path / "out", [], 9
    real = timed_replay.decode

    def stopping(lm, contender, text, num_slots, kept):
        ran.append((contender.label, text.question_id, text.index, len(text.answer)))
        if len(ran) == stop_at:
            raise KeyboardInterrupt
        return real(lm, contender, text, num_slots, kept)

    monkeypatch.setattr(timed_replay, "decode", stopping)
    monkeypatch.setattr(timed_replay, "WARM_UP_TOKENS", 2)
    with pytest.raises(KeyboardInterrupt):
        replay.run(timed, folder)
    assert not (folder / "summary.json").exists()
    replay.run(timed, folder)

    asked = questions.read(timed.questions)
    texts = traces.turns(asked, asked, traces.read(timed.traces), Letters())
    warm_up = [(label, 1, 0, 2) for label in LABELS]
    by_question = {i: [(t.question_id, t.index, len(t.answer)) for t in texts if t.question_id == i] for i in (1, 2, 3)}
    whole = [(LABELS[i], *text) for i in range(3) for text in by_question[1]]
    whole += [(LABELS[i], *text) for i in (1, 2, 0) for text in by_question[2]]
    whole += [(LABELS[i], *text) for i in (2, 0, 1) for text in by_question[3]]
    again = 2 * (len(by_question[1]) - 1)  # of the method that was stopped in its second turn
    assert again == 2 and ran == warm_up + whole[:6] + warm_up + whole[4:]

    answers = timed_answers(folder)
    for found in answers.values():
        assert [turn["tokens"] for answer in found for turn in answer["hd_jax"]["turns"]] == [text.answer for text in texts]
    steps = [length for outcome in replay.replayed(alphabet(), texts) for length in outcome.accept_lengths]
    assert [n for answer in answers["alphabet"] for n in answer["choices"][0]["accept_lengths"]] == steps
    assert max(steps) > 1 and steps[:10] == [1] * 10  # nothing is drafted in the first turn

    summary = json.loads((folder / "summary.json").read_text())
    rows = {row["method"]: row for row in summary["results"] if row["task"] == "overall"}
    assert list(rows) == list(LABELS)
    assert rows["none"]["speedup"] == rows["none"]["speedup_decode"] == 1 and rows["none"]["tokens_per_step"] == 1
    assert {row["method"] for row in summary["regret"]} == {LABELS[2]}
    assert json.loads((folder / "config.json").read_text())["model"]["weights"] == "random"
    assert "Not a trained model: small is a shape, its weights are random." in (folder / "report.md").read_text()
    with pytest.raises(ValueError, match="holds a finished replay"):
        replay.run(timed, folder)


def test_other_tokens_than_the_recorded_ones_end_a_timed_replay(timed, tmp_path, monkeypatch):
    row = timed_replay.Row
    monkeypatch.setattr(timed_replay, "Row", lambda prompt, seed, recorded: row(prompt, seed, recorded=recorded[:-1]))
    with pytest.raises(RuntimeError, match="method none, turn 1 of question 1: the tokens are not those of the record"):
        replay.run(timed, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": None}, "--timed and --shape belong together"),
        ({"timed": False}, "--timed and --shape belong together"),
        ({"warm": True}, "--warm: a timed replay remembers no earlier answers"),
        ({"shape": "smaller"}, "there is no shape 'smaller'; there are: llama-68m, llama-160m, "),
        ({"shape": "tiny"}, "the tokenizer has 32 tokens, but shape tiny has a vocabulary of 31"),
        ({"shape": "short"}, "turn 2 of question 1 has 31 tokens with its prompt; the context of shape short has 30"),
        ({"methods": ("pld:budget=large",)}, "method pld-budget=large: the budget is fixed or adaptive, not 'large'"),
        ({"methods": ("hd_tree", "hd_tree:num_nodes=9")}, "--methods and --budgets name hd_tree-num_nodes=9 twice"),
        ({"methods": ("recycling",)}, "method recycling drafts from the model's logits: it cannot be replayed"),
    ],
)
def test_bad_settings_of_a_timed_replay_are_told_before_anything_is_built(timed, changes, message, tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes._llama(31, 16, 32, 1, 2, 1))
    monkeypatch.setitem(shapes.SHAPES, "short", shapes._llama(32, 16, 32, 1, 2, 1, max_position_embeddings=30))
    with pytest.raises(ValueError, match=message):
        replay.run(Settings(**{**vars(timed), **changes}), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
