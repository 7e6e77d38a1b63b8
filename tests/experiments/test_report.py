import json

import pytest

from experiments import report


def _turn(num_tokens, steps, ms, *, nodes=0.0, counts=None, is_equal=True, tokens=None):
    return {
        "tokens": list(range(num_tokens)) if tokens is None else tokens,
        "steps": steps,
        "nodes_per_step": nodes,
        "pass_sizes": [int(nodes) + 1] * steps,
        "prefill_ms": ms / 4,
        "decode_ms": 3 * ms / 4,
        "source_counts": counts or {},
        "verdict": {"is_equal": is_equal, "is_explained": not is_equal, "position": 0, "message": ""},
    }


def _answer(question_id, category, turns, draft_us=None):
    choice = {
        "new_tokens": [len(turn["tokens"]) for turn in turns],
        "decoding_steps": [turn["steps"] for turn in turns],
        "wall_time": [(turn["prefill_ms"] + turn["decode_ms"]) / 1000 for turn in turns],
    }
    return {
        "question_id": question_id,
        "category": category,
        "choices": [choice],
        "hd_jax": {"draft_us": draft_us, "turns": turns},
    }


def _counts(proposed, accepted):
    return {"proposed": proposed, "accepted": accepted}


# Two questions of a task and one of another. Rates in tokens per second, by hand:
#   plain  q1 (10 + 30) / (1 + 1) = 20    q2 100 / 10 = 10    q3 60 / 2 = 30
#   hd     q1 (10 + 30) / (0.5 + 0.5) = 40    q2 100 / 8 = 12.5    q3 60 / 1 = 60
PLAIN = [
    _answer("q1", "math", [_turn(10, 10, 1000), _turn(30, 30, 1000)]),
    _answer("q2", "writing", [_turn(100, 100, 10_000)]),
    _answer("q3", "rag", [_turn(60, 60, 2000)]),
]
HD = [
    _answer(
        "q1",
        "math",
        [
            _turn(10, 5, 500, nodes=4.0, counts={"c": _counts([8, 4], [3, 1])}),
            _turn(30, 15, 500, nodes=8.0, counts={"c": _counts([10, 10, 2], [5, 5, 1]), "m": _counts([7], [2])}),
        ],
        draft_us=100.0,
    ),
    _answer("q2", "writing", [_turn(100, 80, 8000, nodes=2.0, is_equal=False)]),
    _answer("q3", "rag", [_turn(60, 20, 1000, nodes=6.0)], draft_us=50.0),
]


def test_rates_equal_those_computed_by_hand():
    rows = {(row["method"], row["task"]): row for row in report.summarize({"none": PLAIN, "hd": HD})}
    assert list(rows) == [(m, t) for m in ("none", "hd") for t in ("mt_bench", "rag", "overall")]
    overall, mt_bench = rows["hd", "overall"], rows["hd", "mt_bench"]

    assert mt_bench["speedup"] == pytest.approx(((40 + 12.5) / 2) / ((20 + 10) / 2))
    assert mt_bench["speedup_total"] == pytest.approx((140 / 9) / (140 / 12))
    assert rows["hd", "rag"]["speedup"] == rows["hd", "rag"]["speedup_total"] == pytest.approx(2.0)
    assert overall["speedup"] == pytest.approx((40 + 12.5 + 60) / (20 + 10 + 30))
    assert overall["speedup_total"] == pytest.approx((200 / 10) / (200 / 14))
    assert overall["tokens_per_second"] == pytest.approx(20.0)
    assert overall["tokens_per_second_mean"] == pytest.approx(37.5)

    assert (overall["tokens"], overall["steps"], overall["questions"], overall["turns"]) == (200, 120, 3, 4)
    assert overall["tokens_per_step"] == pytest.approx(200 / 120)
    assert overall["nodes_per_step"] == pytest.approx((4 * 5 + 8 * 15 + 2 * 80 + 6 * 20) / 120)
    assert overall["prefill_ms"] == pytest.approx(2500)
    assert overall["decode_ms"] == pytest.approx(7500)
    assert overall["draft_us"] == pytest.approx(75)
    assert (overall["near_ties"], overall["near_ties_per_100k"]) == (1, pytest.approx(500))
    assert overall["acceptance"] == {"c": _counts([18, 14, 2], [8, 6, 1]), "m": _counts([7], [2])}

    for task in ("mt_bench", "rag", "overall"):
        plain = rows["none", task]
        assert plain["speedup"] == plain["speedup_total"] == plain["tokens_per_step"] == 1.0
        assert plain["draft_us"] is None


def test_sizes_over_the_steps_and_regret_equal_those_computed_by_hand():
    rows = report.summarize({"none": PLAIN, "hd": HD, "hd-fixed": PLAIN})
    (overall,) = (row for row in rows if (row["method"], row["task"]) == ("hd", "overall"))
    first, second, rest = overall["pass_sizes"]
    assert first == {"3": 8, "5": 5, "7": 8, "9": 8}
    assert second == {"3": 24, "7": 12, "9": 7}
    assert rest == {"3": 48}
    regret = {(row["method"], row["task"]): row for row in report.regrets(rows, {"hd-fixed": ["none", "hd"]})}
    assert set(regret) == {("hd-fixed", task) for task in ("mt_bench", "rag", "overall")}
    assert regret["hd-fixed", "overall"]["best"] == "hd"
    assert regret["hd-fixed", "overall"]["regret"] == pytest.approx(1 - 10 / 14)
    assert report.regrets(rows, {}) == []


def test_other_questions_than_plain_decodings_are_refused():
    with pytest.raises(ValueError, match="answers of hd are not to the same questions"):
        report.summarize({"none": PLAIN, "hd": HD[:2]})


def test_loop_share_counts_answers_that_repeat_an_8_gram():
    loop, line = list(range(8)) * 2, list(range(7)) * 2 + [9]
    answers = [_answer(1, "qa", [_turn(0, 1, 1, tokens=tokens) for tokens in (loop, line[:8], [5] * 9, [5] * 8)])]
    assert report.loop_share(answers) == 0.5


def test_growth_is_over_parts_of_each_tasks_questions():
    rates = {"qa": (1, 2, 3, 4, 5), "rag": (2, 4)}
    answers = [_answer(i, task, [_turn(12 * rate, 12, 1)]) for task, all_of in rates.items() for i, rate in enumerate(all_of)]
    found = report.growth({"a": answers})
    # Of qa, questions 0 and 1, 2, 3, 4 are the parts; of rag, the first question is in part 1 and the second in part 3.
    assert [row["part"] for row in found] == [1, 2, 3, 4]
    assert [row["tokens_per_step"] for row in found] == pytest.approx([5 / 3, 3, 4, 5])


def test_write_leaves_the_named_files_and_fits_a_terminal(tmp_path):
    methods = {"none": PLAIN, "hd": HD, "hd-window=0-order=cms-num_drafts=12": HD}
    text = report.write(tmp_path, "A run", methods, ["question q9 (3000 of 2048 tokens)"], ["a fact"])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["acceptance.png", "growth.png", "report.md", "speedup.png", "summary.json", "tokens_per_step.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith(".png"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["results"] == report.summarize(methods)
    assert summary["skipped"] == ["question q9 (3000 of 2048 tokens)"]
    assert max(map(len, text.splitlines())) <= 100
    for told in (text, (tmp_path / "report.md").read_text()):
        assert "1.88" in told  # speedup of hd overall
        assert "question q9 (3000 of 2048 tokens)" in " ".join(told.split())
        assert "hd 1" in told  # near-ties
    assert "| hd | c | 8/18 | 6/14 | 1/2 |" in (tmp_path / "report.md").read_text()


def test_write_without_any_draft(tmp_path):
    text = report.write(tmp_path, "A run", {"none": PLAIN}, [], [])
    assert "Every method's token ids equal plain decoding's." in text
