"""How texts begin, and how they come into a batch.

The rows of a batch have nothing to do with each other. Where one has ended, `admit` puts another text in its place: a row that
was prefilled and started alone, so that all texts start by the same programs, whatever the batch's size.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hd_jax import budget, loop, sharding
from hd_jax.draft_tree import NO_SOURCE, NO_TOKEN
from hd_jax.drafters.base import Context, Drafter
from hd_jax.loop import Logprobs, Request, State, StepSettings
from hd_jax.models.llama import Cache, Llama


@functools.partial(jax.jit, static_argnames="mesh")
def init_drafter(drafter: Drafter, request: Request, tokens: jax.Array, kept: Any, *, mesh: sharding.AnyMesh = None) -> Any:
    """The drafter's state for prompts int32[B, S]; `kept` is the state of an earlier request that it may renew, or None."""
    contexts = Context(tokens, request.prompt_lengths, request.prompt_lengths)
    if kept is not None and drafter.renew is not None:
        return sharding.over_rows(drafter.renew, mesh)(drafter.tables, kept, contexts)
    return sharding.over_rows(drafter.init, mesh)(drafter.tables, contexts)


def start(
    drafter: Drafter,
    request: Request,
    cache: Cache,
    tokens: jax.Array,
    drafter_state: Any,
    settings: StepSettings,
    *,
    mesh: sharding.AnyMesh = None,
) -> State:
    """The state before the first step, without a budget; the cache holds all prompt tokens but the last of each row.

    Steps donate their state: what the caller keeps besides is copied.
    """
    state = _before_text(drafter, request, tokens, settings, mesh=mesh)._replace(cache=cache, drafter=drafter_state)
    return sharding.put(state, None) if mesh is None else state


@functools.partial(jax.jit, static_argnames=("settings", "mesh"))
def _before_text(
    drafter: Drafter, request: Request, tokens: jax.Array, settings: StepSettings, *, mesh: sharding.AnyMesh
) -> State:
    """As `start`, with neither cache nor the drafter's state, which pass through no program: they are large."""
    num_rows, num_slots = tokens.shape
    logprobs = None
    if settings.num_logprobs:
        top = (num_rows, num_slots, settings.num_logprobs)
        logprobs = Logprobs(jnp.zeros((num_rows, num_slots)), jnp.zeros(top), jnp.full(top, NO_TOKEN, jnp.int32))
    state = State(
        cache=(),
        tokens=jnp.array(tokens),  # copies, or a program would hand its arguments on
        lengths=jnp.array(request.prompt_lengths),
        is_finished=request.prompt_lengths >= request.limits,
        sources=jnp.full((num_rows, num_slots), NO_SOURCE, jnp.int8),
        drafter=(),
        counts=jnp.zeros((num_rows, 2, len(drafter.source_names), drafter.max_depth + 1), jnp.int32),
        logprobs=logprobs,
    )
    return sharding.constrain(state, sharding.by_rows(mesh))


def with_budget(state: State, settings: StepSettings, costs: jax.Array | None, num_nodes: int) -> State:
    """The state with an adaptive budget that has learned nothing yet, for trees of `num_nodes`; as it is without costs.

    The costs, float32[1 + Z], are bound to the device (`sharding.put`), as the state is.
    """
    if costs is None:
        return state
    return state._replace(budget=budget.start(settings.sizes, costs, state.lengths.size, num_nodes))


@functools.partial(jax.jit, static_argnames=("model", "part_size"))
def widened(model: Llama, state: State, *, part_size: int) -> State:
    """The state of a batch whose places are all free, from one of one row a part of the mesh; neither has a budget.

    The row stands in all `part_size` (static) places of its part, and has ended in each.
    """
    state = sharding.repeated(state, part_size, model.mesh)
    return loop.pinned(model, state._replace(is_finished=jnp.ones_like(state.is_finished)))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def admit(model: Llama, state: State, new: State, places: jax.Array) -> State:
    """The state (donated) with new rows, one a part of the mesh, in the places of rows that have ended.

    Args:
      model: static.
      state: of B rows.
      new: of one row a part, before its first step; without a budget.
      places: int32[parts], of each new row within its part; one out of range leaves the part as it is.
    """

    def put(rows: State, row: State, place: jax.Array) -> State:
        return jax.tree.map(lambda old, new: old.at[place[0]].set(new[0], mode="drop"), rows, row)

    rows = sharding.within_parts(put, model.mesh)(state._replace(budget=None), new, places)
    if state.budget is not None:  # which one device has, so one part
        rows = rows._replace(budget=budget.without_rows(state.budget, places))
    return loop.pinned(model, rows)
