"""What a run of the main job is: its settings, its methods, and the config.json that records them beside its results."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import questions, report
from experiments.questions import Question

PLAIN = "none"
CONFIG_FILE = "config.json"
BUDGET = "budget"  # a method's option that is not its drafter's
FIXED = "fixed"
BUDGETS = (FIXED, "adaptive")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What runs; each field is the flag of its name. `methods` starts with plain decoding."""

    model: str | None
    questions: str | None
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    limit: int | None
    num_nodes: int | None
    temperature: float
    max_new_tokens: int
    dtype: str | None
    seed: int
    batch_size: int
    mesh: str | None
    exact: bool
    budget: str | None
    warm: bool = False
    repeats: int = 1


@dataclasses.dataclass(frozen=True)
class Method:
    """A drafter's name and options, written as `hd:window=0:order=cm`."""

    drafter: str
    options: dict[str, int | float | str]

    @property
    def label(self) -> str:
        """Names the method in files and tables: `hd-window=0-order=cm`."""
        return "-".join([self.drafter, *(f"{key}={value}" for key, value in self.options.items())])


def parse_method(text: str) -> Method:
    """Raises ValueError where `text` is not name:key=value:key=value."""
    name, *pairs = text.split(":")
    for piece, form in ((name, r"\w+"), *((pair, r"\w+=[\w.+-]+") for pair in pairs)):
        if not re.fullmatch(form, piece):
            raise ValueError(f"method {text!r}: {piece!r} is not of the form name:key=value:key=value, as in hd:window=0")
    keys = [pair.split("=")[0] for pair in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"method {text!r}: an option is given twice")
    values = [pair.split("=")[1] for pair in pairs]
    return Method(name, {key: _value(text) for key, text in zip(keys, values, strict=True)})


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def budget_of(label: str, value: Any) -> str | None:
    """The budget that an option or flag names, as `hd_jax` takes it. Raises ValueError for one that there is not."""
    if value not in (None, *BUDGETS):
        raise ValueError(f"method {label}: the budget is {' or '.join(BUDGETS)}, not {value!r}")
    return None if value == FIXED else value


def rivals(methods: Mapping[str, tuple[str, str | None]]) -> dict[str, list[str]]:
    """The methods of fixed budgets with which each one of an adaptive budget is compared: its drafter's, and plain decoding.

    Args:
      methods: the drafter's name and the budget of each label.
    """
    fixed = [label for label, (_, budget) in methods.items() if budget is None]
    return {
        label: [other for other in fixed if methods[other][0] in (PLAIN, drafter)]
        for label, (drafter, budget) in methods.items()
        if budget is not None
    }


def parse_methods(text: str) -> tuple[str, ...]:
    """The methods of a comma list, plain decoding first whether it was named or not; ValueError for one named twice."""
    names = [name.strip() for name in text.split(",")]
    labels = [parse_method(name).label for name in names]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"--methods names {', '.join(twice)} twice")
    return (PLAIN, *(name for name in names if name != PLAIN))


def describe(config: RunConfig, lm: Any, chosen: Sequence[Question], skipped: Sequence[str]) -> dict[str, Any]:
    """What config.json says.

    Args:
      config: of the run.
      lm: the loaded model.
      chosen: the questions that run.
      skipped: a line for each one that was left out.
    """
    import jax  # Late, so that flag errors come at once.

    methods = [parse_method(text) for text in config.methods]
    return {
        "flags": dataclasses.asdict(config),
        "methods": {method.label: {"drafter": method.drafter, "options": method.options} for method in methods},
        "model": {
            "name": config.model or "the embedded model",
            "fingerprint": _fingerprint(pathlib.Path(lm.folder)),
            "dtype": lm.config.dtype,
            "max_context": lm.max_context,
        },
        "questions": {
            "sha256": hashlib.sha256(pathlib.Path(config.questions or questions.EMBEDDED).read_bytes()).hexdigest(),
            "question_ids": [question.question_id for question in chosen],
            "skipped": list(skipped),
        },
        "environment": {
            "jax": jax.__version__,
            "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
            "num_devices": jax.device_count(),
            "num_cpus": os.cpu_count(),
        },
    }


def compare(folder: pathlib.Path, facts: dict[str, Any]) -> None:
    """Raises ValueError if `folder` holds the config.json of another run than `facts` describes."""
    if not (folder / CONFIG_FILE).exists():
        return
    there, now = _read(folder), json.loads(json.dumps(facts))
    changed = [f"{part} was {there.get(part)}, is {now[part]}" for part in now if there.get(part) != now[part]]
    if changed:
        raise ValueError(f"{folder / CONFIG_FILE} is of another run: {'; '.join(changed)}; start a new run")


def write(folder: pathlib.Path, facts: dict[str, Any]) -> None:
    report.write_file(folder / CONFIG_FILE, json.dumps(facts, indent=2) + "\n")


def _read(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        out = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no run: there is no config.json") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(out, dict) or not isinstance(out.get("flags"), dict):
        raise ValueError(f"{path}: not the config of a run")
    return out


def _fingerprint(folder: pathlib.Path) -> str:
    """Of a model folder: each file's name, size and first MiB, so that large weights need not be read."""
    out = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            out.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode() + file.read(2**20))
    return out.hexdigest()


def resumed(folder: pathlib.Path, given: RunConfig, given_names: Sequence[str]) -> RunConfig:
    """The config of the run in `folder`; ValueError where one of the flags that were given says otherwise."""
    stored = _read(folder)["flags"]
    names = [field.name for field in dataclasses.fields(RunConfig)]
    if sorted(stored) != sorted(names):
        raise ValueError(f"{folder / 'config.json'}: the flags are {sorted(stored)}; this program has {sorted(names)}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    config = RunConfig(**values)
    conflicts = [
        f"--{name} is {getattr(given, name)!r} here and {getattr(config, name)!r} there"
        for name in names
        if name in given_names and getattr(given, name) != getattr(config, name)
    ]
    if conflicts:
        raise ValueError(
            f"the run in {folder} has other settings: {'; '.join(conflicts)}; leave the flags out, or start a new run"
        )
    return config
