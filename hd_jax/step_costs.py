"""What a decoding step costs on this device by the number of nodes it verifies: measured once, and kept on disk.

The very program that will decode is timed, drafter and commit included, so a curve belongs to one model, drafter, batch size
and size of the cache. Its key is the program's text: a program that has changed is measured anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from hd_jax import budget, compilation, loop, sharding

NUM_STEPS = 6  # that are asked for at once
LONG_MS = 20.0  # of steps that are timed, and of those before: after a pause steps are slow at first, plain ones most
NUM_ROUNDS = 8  # whose medians count, after one to warm up
FOLDER = "step_costs"  # inside that of JAX's compilation cache

_known: dict[Hashable, list[float]] = {}  # times of the programs that this process has run, by key

_bound = functools.partial(sharding.put, where=None)  # as what decodes is, or the program would be compiled twice

Dispatch = Callable[[loop.Request, loop.State, int], tuple[loop.State, loop.Record]]


def measure(
    dispatch: Dispatch, request: loop.Request, state: loop.State, sizes: Sequence[int]
) -> tuple[list[float], loop.State]:
    """Milliseconds of a step of each kind: one that drafts nothing, then those that draft, by the size that they verify.

    The kinds take turns, and medians are of their ratios to the first in the same turn: a slow moment slows all alike. The
    steps of a kind are run for LONG_MS before they are timed: the first ones would pay for what the kind before them, a
    larger or a smaller one, has left in the processor's caches. What a dispatch takes besides its steps does not count, unless
    steps of the kind have a dispatch each, as drafts with the host. A text may outgrow the cache meanwhile: what it writes is
    clamped to the last slots.

    Args:
      dispatch: runs a number of steps at most; the state is donated.
      request: whose prompts are decoded; neither its limits nor its stop tokens count.
      state: before the first step.
      sizes: Z of them, of the budget.

    Returns:
      1 + Z times, and the state, whose rows have ended, and of which only the cache's slots before the prompts' last tokens are
      as they were.
    """
    request = _endless(request)
    run = functools.partial(_run, dispatch, request)
    begun = functools.partial(_begun, request, sizes)

    def run_long(state: loop.State) -> tuple[int, int, float, loop.State]:
        """Steps for LONG_MS: their number, that of dispatches, the milliseconds, and the state."""
        num_steps, num_dispatches, total = 0, 0, 0.0
        while total < LONG_MS or num_steps < NUM_STEPS:
            count, ms, state = run(state, NUM_STEPS)
            num_steps, num_dispatches, total = num_steps + count, num_dispatches + 1, total + ms
        return num_steps, num_dispatches, total, state

    times, idle = np.zeros((2, 1 + len(sizes), NUM_ROUNDS + 1))  # of a step, and what of it is its part of a dispatch
    for place in range(NUM_ROUNDS + 1):
        for kind in range(1 + len(sizes)):
            *_, state = run_long(begun(kind, state))
            num_steps, num_dispatches, ms, state = run_long(state)
            _, idle_ms, state = run(state, 0)
            times[kind, place] = ms / num_steps
            idle[kind, place] = idle_ms * num_dispatches / num_steps if num_dispatches < num_steps else 0
    of_steps = times[:, 1:] - np.median(idle, axis=1, keepdims=True)
    return (np.median(of_steps[0]) * np.median(of_steps / of_steps[0], axis=1)).tolist(), _ended(state)


def run_each(dispatch: Dispatch, request: loop.Request, state: loop.State, sizes: Sequence[int]) -> loop.State:
    """One step of each kind, whose first run in a process is slow. Arguments and state are those of `measure`."""
    request = _endless(request)
    for kind in range(1 + len(sizes)):
        *_, state = _run(dispatch, request, _begun(request, sizes, kind, state), 1)
    return _ended(state)


def _endless(request: loop.Request) -> loop.Request:
    """The request without limits and stop tokens."""
    return request._replace(
        limits=_bound(np.full_like(request.limits, np.iinfo(np.int32).max)),
        stop_tokens=_bound(np.full_like(request.stop_tokens, np.iinfo(np.int32).min)),  # not NO_TOKEN, which ends a record
    )


def _begun(request: loop.Request, sizes: Sequence[int], kind: int, state: loop.State) -> loop.State:
    """At the prompts' ends, with a budget that takes steps of this kind alone."""
    assert state.budget is not None
    # No size is chosen whose cost is infinite. Where nothing is to be drafted, drafts promise nothing, and the wait is
    # not over before the end; elsewhere they are worth more than steps without one, whose cost is infinite too.
    only = np.full(1 + len(sizes), np.inf, np.float32)
    only[kind] = 1.0
    is_drafting = np.bool_(kind != budget.PLAIN)
    forced = {"costs": only, "is_drafting": is_drafting, "wait": np.int32(np.iinfo(np.int32).max)}
    forced |= {"tokens": np.float32(is_drafting), "cost": np.float32(1)}
    texts = {"lengths": np.array(request.prompt_lengths), "is_finished": np.zeros_like(state.is_finished)}
    return jax.block_until_ready(state._replace(**_bound(texts), budget=state.budget._replace(**_bound(forced))))


def _ended(state: loop.State) -> loop.State:
    return state._replace(is_finished=_bound(np.ones_like(state.is_finished)))


def _run(dispatch: Dispatch, request: loop.Request, state: loop.State, num_steps: int) -> tuple[int, float, loop.State]:
    """One dispatch: how many steps it took, of so many at most, its milliseconds, and the state."""
    clock = time.perf_counter()
    state, record = dispatch(request, state, num_steps)
    count = int(np.count_nonzero(record.pass_sizes))
    return count, (time.perf_counter() - clock) * 1e3, state


def of_program(
    key: Hashable,
    lower: Callable[[], Any],
    dispatch: Dispatch,
    request: loop.Request,
    state: loop.State,
    sizes: Sequence[int],
) -> tuple[list[float], loop.State]:
    """As `measure`, unless this process knows the times of the program by its key, or they are on disk, where they are kept.

    The program is what `lower` gives; it is lowered only for a key that is not known. Then it has run all kinds of steps.
    """
    if key not in _known:
        path = path_of(lower().as_text())
        times = read(path, sizes) if path else None
        if times is not None:
            state = run_each(dispatch, request, state, sizes)
        else:
            times, state = measure(dispatch, request, state, sizes)
            if path:
                write(path, sizes, times)
        _known[key] = times
    return _known[key], state


def shape_key(tree: Any) -> Hashable:
    """Equal for arguments that the same compiled program takes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def path_of(program: str) -> pathlib.Path | None:
    """Where the curve of a program is kept, by its text and how it is compiled; None where JAX keeps no compilation cache."""
    folder = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 - it is not in the type stubs
    if folder is None:
        return None
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, jax {jax.__version__}"
    device += f", {compilation.options()}, {os.environ.get('XLA_FLAGS', '')}"
    digest = hashlib.sha256(f"{device}\n{program}".encode()).hexdigest()
    return pathlib.Path(folder) / FOLDER / f"{digest}.json"


def read(path: pathlib.Path, sizes: Sequence[int]) -> list[float] | None:
    """The times that a file holds; None if there is none, or not of these sizes."""
    try:
        stored = json.loads(path.read_text())
        times = [float(ms) for ms in stored["ms"]]
        return times if stored["sizes"] == list(sizes) and len(times) == 1 + len(sizes) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(path: pathlib.Path, sizes: Sequence[int], times: Sequence[float]) -> None:
    """Writes beside the place and renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{uuid.uuid4().hex}")
    temporary.write_text(json.dumps({"sizes": list(sizes), "ms": list(times)}))
    os.replace(temporary, path)
