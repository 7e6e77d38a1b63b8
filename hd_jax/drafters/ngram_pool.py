"""The n-grams of a request, those of its text and those that a Jacobi window makes, and what they say may follow a token.

Hierarchy Drafting's D_c and Lookahead decoding's pool. It is a log of n-grams in the order in which they were seen. The papers
keep for each first token a least-recently-used set of so many distinct continuations: reading the log backwards and leaving
out repetitions gives that set.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hd_jax.draft_tree import NO_TOKEN
from hd_jax.drafters import jacobi_window
from hd_jax.drafters.base import Context, Feedback


class State(NamedTuple):
    """One row's pool, and the window that feeds it."""

    log: jax.Array  # int32[R, n], a ring of n-grams
    num_logged: jax.Array  # int32[], n-grams ever written
    window: jax.Array  # int32[n - 1, W], see jacobi_window; W = 0 for none


def least_history(ngram: int, width: int) -> int:
    """The smallest R: a step's n-grams must fit, one a column of the window, and one a token."""
    return width + max(ngram - 1, jacobi_window.max_depth(ngram, width)) + 1


def start(context: Context, *, ngram: int, width: int, history: int, is_of_text: bool = True) -> State:
    """The state at the beginning of a request.

    Args:
      context: the prompt.
      ngram: n.
      width: W.
      history: R.
      is_of_text: whether the n-grams of the prompt are in the pool, the newest R of them.
    """
    num_ngrams = jnp.maximum(context.length - (ngram - 1), 0) if is_of_text else jnp.int32(0)
    slots = jnp.arange(history)
    # Ring slot r holds the newest n-gram whose number is r modulo the ring's size.
    starts = slots + history * ((num_ngrams - 1 - slots) // history)
    log = jnp.where((slots < num_ngrams)[:, None], _ngrams_at(context, starts, ngram), NO_TOKEN)
    return State(log, num_ngrams, jacobi_window.guesses(context, ngram, width))


def latest(state: State, token: jax.Array, num_latest: int) -> tuple[jax.Array, jax.Array]:
    """The latest distinct continuations of a token, newest first: int32[num_latest, n - 1], and whether there is one each."""
    history = state.log.shape[0]
    slots = jnp.arange(history)
    written = slots + history * ((state.num_logged - 1 - slots) // history)  # number of the n-gram in each slot
    rank = jnp.where((state.log[:, 0] == token) & (slots < state.num_logged), written, -1)

    def take(rank, _):
        newest = jnp.argmax(rank)
        value = state.log[newest, 1:]
        is_other = jnp.zeros(history, bool)
        for column in range(1, state.log.shape[1]):  # not jnp.any over them, for which a GPU would launch one kernel more
            is_other |= state.log[:, column] != value[column - 1]
        return jnp.where(is_other, rank, -1), (value, rank[newest] >= 0)

    _, (values, is_found) = jax.lax.scan(take, rank, None, length=num_latest, unroll=True)
    return values, is_found


def learn(state: State, context: Context, feedback: Feedback, *, is_of_text: bool = True) -> State:
    """The state after a step: what the window made, then the n-grams that end with a token of the step.

    The text is written last: it is the most recent, and surer than the window's guesses.
    """
    history, ngram = state.log.shape
    window, width = state.window, state.window.shape[1]
    added: list[tuple[jax.Array, jax.Array]] = []  # int32[any, n] n-grams, and which of them are new
    if width:
        window, columns, is_verified = jacobi_window.advance(window, feedback)
        added.append((columns, jnp.broadcast_to(is_verified & (feedback.num_appended > 0), width)))
    if is_of_text:
        back = jnp.arange(feedback.path.shape[0])
        ends = context.length - feedback.num_appended + back  # slots of the appended tokens, oldest first
        starts = ends - (ngram - 1)
        added.append((_ngrams_at(context, starts, ngram), (back < feedback.num_appended) & (starts >= 0)))
    ngrams, is_new = (jnp.concatenate(parts) for parts in zip(*added, strict=True))
    place = (state.num_logged + jnp.cumsum(is_new) - 1) % history
    log = state.log.at[jnp.where(is_new, place, history)].set(ngrams, mode="drop")
    return State(log, state.num_logged + jnp.sum(is_new), window)


def _ngrams_at(context: Context, starts: jax.Array, ngram: int) -> jax.Array:
    """int32[any, n] of the slots int32[any]; those that are not within the text have no meaning."""
    return context.tokens[jnp.clip(starts[:, None] + jnp.arange(ngram), 0, context.tokens.shape[0] - 1)]
