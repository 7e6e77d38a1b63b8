"""Questions in Spec-Bench's format: one JSON object a line with `question_id`, `category` and `turns`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence

EMBEDDED = pathlib.Path(__file__).parent / "assets" / "questions.jsonl"
TASKS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
MT_BENCH_CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
CATEGORIES = (*MT_BENCH_CATEGORIES, *TASKS[1:])


@dataclasses.dataclass(frozen=True)
class Question:
    index: int  # Position among its file's questions: it keys the noise, whatever selection runs.
    question_id: int | str
    category: str
    turns: tuple[str, ...]

    @property
    def task(self) -> str:
        """Spec-Bench's task: its eight MT-bench categories are one."""
        return task_of(self.category)


def task_of(category: str) -> str:
    return "mt_bench" if category in MT_BENCH_CATEGORIES else category


def read(path: str | pathlib.Path) -> list[Question]:
    """Reads a question file.

    Raises:
      ValueError: a line is not a question, or an id occurs twice; the message names the file and the line.
      OSError: the file cannot be read.
    """
    out: list[Question] = []
    lines_by_id: dict[int | str, int] = {}
    for number, line in enumerate(pathlib.Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            question = _parse(line, len(out))
            if question.question_id in lines_by_id:
                raise ValueError(f"question_id {question.question_id!r} was used in line {lines_by_id[question.question_id]}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        lines_by_id[question.question_id] = number
        out.append(question)
    if not out:
        raise ValueError(f"{path}: no questions in this file")
    return out


def _parse(line: bytes, index: int) -> Question:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from error
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object with question_id, category and turns")
    missing = [key for key in ("question_id", "category", "turns") if key not in fields]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    question_id, category, turns = fields["question_id"], fields["category"], fields["turns"]
    if isinstance(question_id, bool) or not isinstance(question_id, int | str):
        raise ValueError(f"question_id is {question_id!r}; a whole number or a string is needed")
    if category not in CATEGORIES:
        raise ValueError(f"category {category!r} is unknown; known: {', '.join(CATEGORIES)}")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError("turns must be a list of one or more strings that are not empty")
    return Question(index, question_id, category, tuple(turns))


def select(questions: Iterable[Question], tasks: Sequence[str], limit: int | None = None) -> list[Question]:
    """The questions of `tasks`, in the file's order; the first `limit` of each task.

    Raises:
      ValueError: a task is unknown or named twice, or no question is left.
    """
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"task {task!r} is unknown; known: {', '.join(TASKS)}")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"a task is named twice in {','.join(tasks)}")
    taken = dict.fromkeys(tasks, 0)
    out = []
    for question in questions:
        if question.task in taken and (limit is None or taken[question.task] < limit):
            taken[question.task] += 1
            out.append(question)
    if not out:
        raise ValueError(f"no question of the tasks {', '.join(tasks)} in the question file")
    return out
