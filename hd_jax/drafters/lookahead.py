"""Lookahead decoding (Fu et al., ICML 2024, arXiv 2402.02057): the model drafts for itself, in a Jacobi window.

Besides the drafts, every step runs a window of guesses of what comes later (jacobi_window.py draws it). Each step's n-grams
of it go to a pool, and the pool's latest distinct n-grams that begin with the newest token are the next drafts. It needs no
database and no text to copy from, only arithmetic to spare: with the settings for a model of 7B parameters, which are the
defaults, a step has 120 nodes.

What the paper leaves open is as in its authors' code: the window's rows are the likeliest tokens at any temperature, it moves
on by one column a step whatever was accepted, and with its POOL_FROM_PROMPT the n-grams of the accepted text enter the pool
too. Two things differ: the window is full of tokens of the prompt at first, where the code fills it row by row and drafts
nothing meanwhile; and drafts with a common prefix share its nodes.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from hd_jax import draft_tree
from hd_jax.draft_tree import DraftTree
from hd_jax.drafters import jacobi_window, ngram_pool
from hd_jax.drafters.base import Context, Drafter, Feedback
from hd_jax.drafters.ngram_pool import State


@functools.lru_cache
def lookahead(
    *,
    ngram: int = 5,
    window: int = 15,
    num_drafts: int = 15,
    pool_from_prompt: bool = True,
    num_nodes: int | None = None,
    history: int = 4096,
) -> Drafter:
    """Lookahead decoding.

    Args:
      ngram: n, the paper's N; drafts have n - 1 tokens.
      window: W, columns of the window.
      num_drafts: the paper's G; at most so many drafts a step.
      pool_from_prompt: whether the n-grams of the prompt and of the accepted text are in the pool besides the window's.
      num_nodes: N, the window's (n - 1) * W - 1 nodes and the root included; by default all drafts fit, and more than
        that are not used. Fewer cut the last drafts.
      history: R, n-grams that the pool remembers.

    Raises:
      ValueError: an option is out of range.
    """
    bounds = {"ngram": (ngram, 2), "window": (window, 1), "num_drafts": (num_drafts, 1)}
    bounds["history"] = (history, ngram_pool.least_history(ngram, window))
    for name, (value, least) in bounds.items():
        if value < least:
            raise ValueError(f"lookahead's {name} must be at least {least}, not {value}")
    if pool_from_prompt not in (True, False):
        raise ValueError(f"lookahead's pool_from_prompt is true or false (1 or 0), not {pool_from_prompt!r}")
    window_nodes = jacobi_window.num_nodes(ngram, window)
    full = 1 + window_nodes + num_drafts * (ngram - 1)
    num_nodes = full if num_nodes is None else min(num_nodes, full)
    if num_nodes < window_nodes + 2:
        raise ValueError(f"lookahead with window {window} needs at least {window_nodes + 2} nodes, not {num_nodes}")
    is_of_text = bool(pool_from_prompt)

    def init(tables, context: Context) -> State:
        del tables
        return ngram_pool.start(context, ngram=ngram, width=window, history=history, is_of_text=is_of_text)

    def draft(tables, state: State, context: Context) -> DraftTree:
        del tables
        drafts, is_found = ngram_pool.latest(state, context.root, num_drafts)
        lengths = jnp.where(is_found, ngram - 1, 0)
        sources = jnp.zeros(num_drafts, jnp.int32)
        trie = draft_tree.merge(context.root, drafts, lengths, sources, num_nodes - window_nodes)
        return draft_tree.join(trie, jacobi_window.tree(state.window, context.root))

    def update(tables, state: State, context: Context, feedback: Feedback) -> State:
        del tables
        return ngram_pool.learn(state, context, feedback, is_of_text=is_of_text)

    return Drafter(
        "lookahead",
        num_nodes=num_nodes,
        max_depth=max(ngram - 1, jacobi_window.max_depth(ngram, window)),
        source_names=("pool",),
        draft=draft,
        init=init,
        update=update,
    )
