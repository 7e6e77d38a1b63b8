"""The adaptive budget: how many nodes of a draft each step verifies, by what passes cost and by what drafts promise.

A drafter's tree of N nodes holds a smaller tree in every prefix: its first n nodes. A step verifies the first n of one of a few
compiled sizes, for all rows of a batch the one that promises most tokens for its cost; with size 1, the root alone.

What a size promises is the sum of its nodes' probabilities, by the drafter's own estimate. What it would have earned is learned
in hindsight, and corrects the estimates: a drafted tree is kept until the text, however it was verified, has gone on to a token
that the tree does not hold. Then the depth that the text reached in each prefix is known, in those that were not verified too:

    tree   c -> d -> e -> f , c -> x     sizes 1, 2, 4, 6
    text   c d e g                       depths 0, 1, 2, 2: the sizes would have appended 1, 2, 3, 3 tokens

One tree a row is watched at a time. Moving averages of both, promised and earned, give each size's correction.

When drafts promise too little for what they cost, steps verify the root alone for a while, undrafted; then one draft is tried
again. A try is verified only as far as it promises to pay, so most cost no more than the drafting. The waits are in proportion
to that, and as long as tries fail, they grow: useless drafting takes at most a seventeenth of the time, and one part in 129 in
the end. A wait ends at once when the text shows that what was drafted last would have paid, verified or not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax import draft_tree
from hd_jax.draft_tree import NO_TOKEN, ROOT_INDEX, DraftTree

SIZES = (4, 8, 16, 32, 64)  # nodes of a pass besides 1 and the drafter's N, where they are smaller
MIN_RATIO = 4 / 3  # of N to the next smaller size: each size is a program to compile
# Tokens that the first drafted size is taken to add before anything is known, and what each next one adds to that. By
# simulation on the embedded model's answers to the embedded questions, a low gain spares short answers useless drafts, and
# loses little in long ones: with `hd_tree`, 0.3 / 0.5 / 0.8 gave 1.62 / 1.65 / 1.57 times plain decoding's speed.
FIRST_GAIN = 0.5
GAIN_RATIO = 0.7
RATE = 0.2  # weight of the newest tree
FIRST_WAIT, MAX_WAIT = 16, 128  # before the first try, where drafts are not expected to pay, and at most: by a try's extra cost
MIN_PROMISE = 1e-3  # tokens; a correction divides by what was promised
NOTHING_WATCHED = 0  # in place of a length
PLAIN, ROOT_ALONE = 0, 1  # places in the costs: a step that drafts nothing, and one that drafts and verifies the root alone


class Watched(NamedTuple):
    """A drafted tree of every row, and the text's length when it was drafted."""

    tree: DraftTree  # [B, N]
    ancestors: jax.Array  # bool[B, N, N]
    promised: jax.Array  # float32[B, Z - 1]
    lengths: jax.Array  # int32[B], the root included; or NOTHING_WATCHED


class State(NamedTuple):
    """Z sizes, ascending; the first is 1."""

    costs: jax.Array  # float32[1 + Z], in any unit: of a step that drafts nothing, then of one that drafts, by what it verifies
    earned: jax.Array  # float32[Z - 1], tokens a draft that each size would have added to the next smaller one
    promised: jax.Array  # float32[Z - 1], of the same drafts, by their own probabilities
    tokens: jax.Array  # float32[], of the latest drafted steps, as they promised to append after correction
    cost: jax.Array  # float32[], of these steps
    is_drafting: jax.Array  # bool[], whether the next step drafts
    wait: jax.Array  # int32[], further steps without a draft before the next try
    next_wait: jax.Array  # int32[], the wait after the next failure, in units of what drafting adds to a step's cost
    watched: Watched


def sizes_of(num_nodes: int) -> tuple[int, ...]:
    """The sizes for a drafter of N nodes."""
    return tuple(sorted({1, *(size for size in SIZES if size * MIN_RATIO < num_nodes), num_nodes}))


@functools.partial(jax.jit, static_argnames=("sizes", "num_rows", "num_nodes"))
def start(sizes: tuple[int, ...], costs: jax.Array, num_rows: int, num_nodes: int) -> State:
    """Before the first step.

    Args:
      sizes: Z of them; this and the last two are static.
      costs: float32[1 + Z], as in a State.
      num_rows: B.
      num_nodes: N.
    """
    tree = jax.vmap(draft_tree.root_only, in_axes=(0, None))(jnp.zeros(num_rows, jnp.int32), num_nodes)
    ancestors = jnp.zeros((num_rows, num_nodes, num_nodes), bool)
    promised = jnp.zeros((num_rows, len(sizes) - 1))
    watched = Watched(tree, ancestors, promised, jnp.full(num_rows, NOTHING_WATCHED, jnp.int32))
    gains = _first_gains(sizes)
    _, tokens, cost = _best(gains, costs)
    wait = jnp.where(_pays(tokens, cost, costs), 0, _steps(FIRST_WAIT, costs))
    return State(
        costs=jnp.array(costs),  # its own: a state is donated
        earned=jnp.array(gains),
        promised=jnp.array(gains),
        tokens=tokens,
        cost=cost,
        is_drafting=wait == 0,
        wait=wait,
        next_wait=jnp.int32(FIRST_WAIT),
        watched=watched,
    )


def promises(tree: DraftTree, sizes: Sequence[int]) -> jax.Array:
    """float32[Z - 1]: the tokens that each size adds to the next smaller one by the probabilities of one row's nodes.

    Where a drafter has no estimate, nodes share what a size is taken to add before anything is known.
    """
    places = np.arange(tree.tokens.shape[0])
    first_size = np.maximum(np.searchsorted(sizes, places + 1) - 1, 0)  # the size, above 1, that first holds each place
    unknown = _first_gains(sizes) / np.diff(sizes)
    probabilities = jnp.where(tree.probabilities >= 0, tree.probabilities, unknown[first_size])  # NaN is unknown too
    is_counted = draft_tree.is_node(tree) & ~tree.is_window & (places != ROOT_INDEX)
    is_of_size = first_size == np.arange(len(sizes) - 1)[:, None]
    return jnp.sum(jnp.where(is_counted & is_of_size, probabilities, 0.0), axis=1)


def choose(
    state: State, sizes: Sequence[int], tree: DraftTree, ancestors: jax.Array, lengths: jax.Array, is_finished: jax.Array
) -> tuple[jax.Array, State]:
    """The size for a step's drafts, which are watched from now on in rows where nothing is.

    Args:
      state: before the step.
      sizes: Z of them.
      tree: of B rows, N places.
      ancestors: bool[B, N, N] of it.
      lengths: int32[B], of the texts.
      is_finished: bool[B], rows that do not count; not all of them.

    Returns:
      int32[] index of the size, 0 where the root alone is worth verifying, and the state.
    """
    promised = jax.vmap(functools.partial(promises, sizes=tuple(sizes)))(tree)
    mean = jnp.sum(jnp.where(is_finished[:, None], 0.0, promised), axis=0) / jnp.sum(~is_finished)
    size, tokens, cost = _best(mean * state.earned / jnp.maximum(state.promised, MIN_PROMISE), state.costs)
    is_new = state.watched.lengths == NOTHING_WATCHED
    pick = lambda new, old: jnp.where(is_new.reshape(-1, *[1] * (old.ndim - 1)), new, old)  # noqa: E731
    watched = jax.tree.map(pick, Watched(tree, ancestors, promised, lengths), state.watched)
    tokens, cost = state.tokens + RATE * (tokens - state.tokens), state.cost + RATE * (cost - state.cost)
    return size, state._replace(tokens=tokens, cost=cost, watched=watched)


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
    """The state after a step: learns from the trees whose depths are final, and says whether the next step drafts.

    Args:
      state: the step's trees are watched, if it drafted any.
      sizes: Z of them.
      tokens: int32[B, S], the texts after the step.
      lengths: int32[B], of them.
    """
    state, would_pay = jax.lax.cond(
        jnp.any(state.watched.lengths != NOTHING_WATCHED),
        lambda: _learned(state, sizes, tokens, lengths),
        lambda: (state, jnp.bool_(False)),
    )
    pays = would_pay | _pays(state.tokens, state.cost, state.costs)
    after_failure = _steps(state.next_wait, state.costs)
    wait = jnp.where(state.is_drafting, after_failure, jnp.maximum(state.wait - 1, 0))
    next_wait = jnp.where(state.is_drafting, jnp.minimum(2 * state.next_wait, MAX_WAIT), state.next_wait)
    wait, next_wait = jnp.where(pays, 0, wait), jnp.where(pays, FIRST_WAIT, next_wait)
    return state._replace(is_drafting=wait == 0, wait=wait, next_wait=next_wait)


def _learned(state: State, sizes: Sequence[int], tokens: jax.Array, lengths: jax.Array) -> tuple[State, jax.Array]:
    """The state after what it watches has shown its depths, as `advance`; and bool[], whether drafting would have paid.

    For that the trees that are final must pay for all rows: wrong trees are final sooner, and right ones come alone then.
    """
    watched = state.watched
    depths, is_final = jax.vmap(functools.partial(reached, sizes=tuple(sizes)))(watched, tokens=tokens, length=lengths)
    num_final = jnp.sum(is_final)
    weight = 1 - (1 - RATE) ** num_final.astype(jnp.float32)  # as if they had come one by one

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_final[:, None], values, 0), axis=0)

    def moved(average: jax.Array, values: jax.Array) -> jax.Array:
        return average + weight * (total(values) / jnp.maximum(num_final, 1) - average)

    earned = jnp.diff(depths, axis=1)
    _, added, cost = _best(total(earned) / lengths.size, state.costs)
    learned = state._replace(
        earned=moved(state.earned, earned),
        promised=moved(state.promised, watched.promised),
        watched=watched._replace(lengths=jnp.where(is_final, NOTHING_WATCHED, watched.lengths)),
    )
    return learned, _pays(added, cost, state.costs) & (num_final > 0)


def without_rows(state: State, rows: jax.Array) -> State:
    """The state when other texts have taken the places of some rows: int32[any], those out of range do not count."""
    lengths = state.watched.lengths.at[rows].set(NOTHING_WATCHED, mode="drop")
    return state._replace(watched=state.watched._replace(lengths=lengths))


def _first_gains(sizes: Sequence[int]) -> jax.Array:
    """float32[Z - 1]: what each size is taken to add before anything is known."""
    return jnp.asarray(FIRST_GAIN * GAIN_RATIO ** np.arange(len(sizes) - 1), jnp.float32)


def _steps(wait: jax.Array | int, costs: jax.Array) -> jax.Array:
    """int32[]: undrafted steps that take `wait` times as long as drafting adds to one; none, where it adds nothing."""
    return jnp.maximum(jnp.ceil(wait * (costs[ROOT_ALONE] / costs[PLAIN] - 1)), 0).astype(jnp.int32)


def _pays(tokens: jax.Array, cost: jax.Array, costs: jax.Array) -> jax.Array:
    """bool[]: whether steps that append so many tokens at such a cost are faster than those that draft nothing."""
    return tokens / cost > 1 / costs[PLAIN]


def _best(gains: jax.Array, costs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the size that appends most tokens for its cost: its int32[] index, the tokens and the cost, float32[]."""
    tokens = 1 + jnp.concatenate([jnp.zeros(1), jnp.cumsum(gains)])
    size = jnp.argmax(tokens / costs[ROOT_ALONE:]).astype(jnp.int32)
    return size, tokens[size], costs[ROOT_ALONE:][size]
