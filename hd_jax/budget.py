"""The adaptive budget: how many nodes of a draft each step verifies, by what passes cost and by what drafts have earned.

A drafter's tree of N nodes holds a smaller tree in every prefix: its first n nodes. A step verifies the first n of one of a few
compiled sizes, for all rows of a batch the one that promises most tokens for its cost; size 1 drafts nothing.

What a size would have earned is learned in hindsight. A drafted tree is kept until the text, however it was verified, has
gone on to a token that the tree does not hold. Then the depth that the text reached in each prefix is known, in those
that were not verified too, and enters a moving average:

    tree   c -> d -> e -> f , c -> x     sizes 1, 2, 4, 6
    text   c d e g                       depths 0, 1, 2, 2: the sizes would have appended 1, 2, 3, 3 tokens

One tree a row is watched at a time. When no size earns its cost, steps verify the root alone for a while, then one draft is
tried again. The waits are in proportion to what a try costs, and as long as tries fail, they grow: so useless tries take at
most a ninth of the time, and a thirty-third in the end.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax import draft_tree
from hd_jax.draft_tree import NO_TOKEN, DraftTree

SIZES = (4, 8, 16, 32, 64)  # nodes of a pass besides 1 and the drafter's N, where they are smaller
MIN_RATIO = 4 / 3  # of N to the next smaller size: each size is a program to compile
# Tokens that the first drafted size is taken to add before anything is known, and what each next one adds to that. By
# simulation on the embedded model's answers to the embedded questions, with four drafters and two cost curves, mean speeds
# differ by two per cent from a gain of 0.35 to 1.4: so it is a low one, which spares short answers the tries.
FIRST_GAIN = 0.5
GAIN_RATIO = 0.7
RATE = 0.2  # weight of the newest tree
FIRST_WAIT, MAX_WAIT = 8, 32  # before the first try, where drafts are not expected to pay, and at most: by a try's extra cost
NOTHING_WATCHED = 0  # in place of a length


class Watched(NamedTuple):
    """A drafted tree of every row, and the text's length when it was drafted."""

    tree: DraftTree  # [B, N]
    ancestors: jax.Array  # bool[B, N, N]
    lengths: jax.Array  # int32[B], the root included; or NOTHING_WATCHED


class State(NamedTuple):
    """Z sizes, ascending; the first is 1."""

    costs: jax.Array  # float32[Z], of a step of each size, in any unit
    gains: jax.Array  # float32[Z - 1], tokens a step that each size adds to the next smaller one
    chosen: jax.Array  # int32[], index of the next step's size; 0: nothing is drafted
    wait: jax.Array  # int32[], further steps without a draft before the next try
    next_wait: jax.Array  # int32[], the wait after the next failure, in units of the extra cost of the draft that failed
    watched: Watched


def sizes_of(num_nodes: int) -> tuple[int, ...]:
    """The sizes for a drafter of N nodes."""
    return tuple(sorted({1, *(size for size in SIZES if size * MIN_RATIO < num_nodes), num_nodes}))


@functools.partial(jax.jit, static_argnames=("sizes", "num_rows", "num_nodes"))
def start(sizes: tuple[int, ...], costs: jax.Array, num_rows: int, num_nodes: int) -> State:
    """Before the first step.

    Args:
      sizes: Z of them; this and the last two are static.
      costs: float32[Z], as in a State.
      num_rows: B.
      num_nodes: N.
    """
    tree = jax.vmap(draft_tree.root_only, in_axes=(0, None))(jnp.zeros(num_rows, jnp.int32), num_nodes)
    ancestors = jnp.zeros((num_rows, num_nodes, num_nodes), bool)
    watched = Watched(tree, ancestors, jnp.full(num_rows, NOTHING_WATCHED, jnp.int32))
    gains = jnp.asarray(FIRST_GAIN * GAIN_RATIO ** np.arange(len(sizes) - 1), jnp.float32)
    chosen = jnp.argmax(_values(gains, costs)).astype(jnp.int32)
    wait = jnp.where(chosen > 0, 0, _steps(FIRST_WAIT, jnp.min(costs[1:]), costs))
    return State(jnp.array(costs), gains, chosen, wait, jnp.int32(FIRST_WAIT), watched)  # its own costs: a state is donated


def smallest(state: State, sizes: Sequence[int], tree: DraftTree) -> jax.Array:
    """int32[]: index of the cheapest size that holds as many nodes of the batch's trees as the chosen one."""
    places = jnp.arange(tree.parents.shape[1])
    is_held = draft_tree.is_node(tree) & (places < jnp.asarray(sizes)[state.chosen])
    num_held = jnp.max(jnp.where(is_held, places + 1, 1))
    return jnp.argmin(jnp.where(np.asarray(sizes) >= num_held, state.costs, jnp.inf)).astype(jnp.int32)


def watch(state: State, tree: DraftTree, ancestors: jax.Array, lengths: jax.Array) -> State:
    """Begins to watch a step's trees where none is watched. `lengths` int32[B]: of the text, when they were drafted."""
    is_new = state.watched.lengths == NOTHING_WATCHED
    pick = lambda new, old: jnp.where(is_new.reshape(-1, *[1] * (old.ndim - 1)), new, old)  # noqa: E731
    return state._replace(watched=jax.tree.map(pick, Watched(tree, ancestors, lengths), state.watched))


def reached(watched: Watched, sizes: Sequence[int], tokens: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How deep the text got in each prefix of one row's tree.

    Args:
      watched: of the row, without the axis B.
      sizes: Z of them.
      tokens: int32[S], the text.
      length: int32[], of it.

    Returns:
      int32[Z] depths, and bool[] whether they are final: the text's next token is known, and the tree does not hold it.
    """
    tree, ancestors = watched.tree, watched.ancestors
    depths = draft_tree.depths(ancestors)
    slots = watched.lengths - 1 + depths
    said = jnp.where(slots < length, tokens.at[slots].get(mode="fill", fill_value=NO_TOKEN), NO_TOKEN)
    is_said = draft_tree.is_node(tree) & ~tree.is_window & (tree.tokens == said)
    is_on_path = ~jnp.any(ancestors & ~is_said, axis=-1)
    is_within = np.arange(tree.tokens.shape[0]) < np.asarray(sizes)[:, None]  # [Z, N]
    by_size = jnp.max(jnp.where(is_on_path & is_within, depths, 0), axis=-1)
    return by_size, (watched.lengths != NOTHING_WATCHED) & (watched.lengths + by_size[-1] < length)


def advance(state: State, sizes: Sequence[int], tokens: jax.Array, lengths: jax.Array) -> State:
    """The state after a step: learns from the trees whose depths are final, and chooses the next size.

    Args:
      state: the step's trees are watched, if it drafted any.
      sizes: Z of them.
      tokens: int32[B, S], the texts after the step.
      lengths: int32[B], of them.
    """
    reach = jax.vmap(functools.partial(reached, sizes=tuple(sizes)))
    nowhere = jnp.zeros((lengths.size, len(sizes)), jnp.int32), jnp.zeros(lengths.size, bool)
    is_watching = jnp.any(state.watched.lengths != NOTHING_WATCHED)
    depths, is_final = jax.lax.cond(is_watching, lambda: reach(state.watched, tokens=tokens, length=lengths), lambda: nowhere)
    num_final = jnp.sum(is_final)
    mean = jnp.sum(jnp.where(is_final[:, None], jnp.diff(depths, axis=1), 0), axis=0) / jnp.maximum(num_final, 1)
    weight = 1 - (1 - RATE) ** num_final.astype(jnp.float32)  # as if they had come one by one
    gains = state.gains + weight * (mean - state.gains)
    watched = state.watched._replace(lengths=jnp.where(is_final, NOTHING_WATCHED, state.watched.lengths))

    values = _values(gains, state.costs)
    best = jnp.argmax(values)
    has_failed = (best == 0) & (state.chosen > 0)
    after_failure = _steps(state.next_wait, state.costs[state.chosen], state.costs)
    wait = jnp.where(best > 0, 0, jnp.where(has_failed, after_failure, jnp.maximum(state.wait - 1, 0)))
    next_wait = jnp.where(has_failed, jnp.minimum(2 * state.next_wait, MAX_WAIT), state.next_wait)
    next_wait = jnp.where(best > 0, FIRST_WAIT, next_wait)
    chosen = jnp.where(wait > 0, 0, 1 + jnp.argmax(values[1:]))
    return State(state.costs, gains, chosen.astype(jnp.int32), wait, next_wait, watched)


def without_rows(state: State, rows: jax.Array) -> State:
    """The state when other texts have taken the places of some rows: int32[any], those out of range do not count."""
    lengths = state.watched.lengths.at[rows].set(NOTHING_WATCHED, mode="drop")
    return state._replace(watched=state.watched._replace(lengths=lengths))


def _steps(wait: jax.Array | int, cost: jax.Array, costs: jax.Array) -> jax.Array:
    """int32[]: steps of size 1, at least one, that take `wait` times as long as a step of some cost takes more than they do."""
    return jnp.maximum(jnp.ceil(wait * (cost / costs[0] - 1)), 1).astype(jnp.int32)


def _values(gains: jax.Array, costs: jax.Array) -> jax.Array:
    """float32[Z]: expected tokens of a step of each size, over its cost."""
    return (1 + jnp.concatenate([jnp.zeros(1), jnp.cumsum(gains)])) / costs
