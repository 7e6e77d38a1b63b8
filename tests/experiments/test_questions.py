import json

import pytest

from experiments import questions


def _line(**changes):
    fields = {"question_id": 1, "category": "qa", "turns": ["Why?"], **changes}
    return json.dumps({key: value for key, value in fields.items() if value is not None})


def test_embedded_questions_cover_spec_bench():
    read = questions.read(questions.EMBEDDED)
    counts = {task: sum(question.task == task for question in read) for task in questions.TASKS}
    assert counts == dict.fromkeys(questions.TASKS, 8)
    assert sorted(q.category for q in read if q.task == "mt_bench") == sorted(questions.MT_BENCH_CATEGORIES)
    assert {len(q.turns) for q in read if q.task == "mt_bench"} == {2}
    assert all(len(q.turns[0].split()) >= 150 for q in read if q.task == "summarization")
    assert [q.index for q in read] == list(range(48))


def test_read_keeps_ids_turns_and_order(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(_line(question_id="a", category="math", turns=["x", "y"], reference=["z"]) + "\n\n" + _line(question_id=7))
    first, second = questions.read(path)
    assert first == questions.Question(0, "a", "math", ("x", "y"))
    assert second == questions.Question(1, 7, "qa", ("Why?",))
    assert (first.task, second.task) == ("mt_bench", "qa")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", "not JSON"),
        (b'"\xff"', "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (_line(category=None, turns=None).encode(), "lacks category, turns"),
        (_line(category="poetry").encode(), "'poetry' is unknown; known: writing, .*, rag"),
        (_line(turns=[]).encode(), "turns must be"),
        (_line(turns=["a", " "]).encode(), "turns must be"),
        (_line(turns="a").encode(), "turns must be"),
        (_line(question_id=True).encode(), "question_id is True"),
        (_line(question_id=1.5).encode(), "question_id is 1.5"),
        (_line(question_id=0).encode(), "was used in line 1"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_bytes(_line(question_id=0).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        questions.read(path)
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert "\n" not in str(error.value)


def test_an_empty_file_is_an_error(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="no questions"):
        questions.read(path)


def test_select_takes_the_first_of_each_task():
    categories = ["qa", "math", "rag", "coding", "qa", "writing", "rag"]
    all_questions = [questions.Question(i, i, category, ("x",)) for i, category in enumerate(categories)]
    ids = lambda *args: [q.question_id for q in questions.select(all_questions, *args)]  # noqa: E731
    assert ids(questions.TASKS) == [0, 1, 2, 3, 4, 5, 6]
    assert ids(questions.TASKS, 1) == [0, 1, 2]
    assert ids(("rag", "mt_bench"), 2) == [1, 2, 3, 6]


@pytest.mark.parametrize(
    ("tasks", "message"), [(("qa", "sums"), "'sums' is unknown"), (("qa", "qa"), "twice"), (("rag",), "no question")]
)
def test_select_refuses(tasks, message):
    with pytest.raises(ValueError, match=message):
        questions.select([questions.Question(0, 0, "qa", ("x",))], tasks)
