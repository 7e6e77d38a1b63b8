"""Prompt lookup decoding (PLD; Saxena 2023): what followed the newest n-gram when it stood in the text before."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from hd_jax import draft_tree
from hd_jax.drafters.base import Drafter


@functools.lru_cache
def pld(max_ngram: int = 3, num_nodes: int = 11) -> Drafter:
    """PLD as Spec-Bench runs it.

    The text's last `max_ngram` tokens are looked up in the text itself. The draft is what follows their first occurrence
    that `num_nodes - 1` committed tokens follow. If there is none, the last `max_ngram - 1` tokens are tried, and so on.

    Args:
      max_ngram: longest suffix that is looked up, in tokens.
      num_nodes: N; tokens drafted a step, and the root.

    Raises:
      ValueError: an option is out of range.
    """
    if max_ngram < 1 or num_nodes < 2:
        raise ValueError(f"pld needs max_ngram of at least 1 and num_nodes of at least 2, not {max_ngram} and {num_nodes}")
    num_tokens = num_nodes - 1

    def draft(tables, state, context):
        del tables, state
        num_slots = context.tokens.shape[0]
        slots = jnp.arange(num_slots)
        # run[i]: how many of the newest tokens, up to max_ngram, stand just before slot i.
        is_equal = []
        for back in range(1, max_ngram + 1):
            newest = context.tokens[jnp.maximum(context.length - back, 0)]
            is_equal.append((jnp.roll(context.tokens, back) == newest) & (slots >= back) & (context.length >= back))
        run = jnp.sum(jnp.cumprod(jnp.stack(is_equal).astype(jnp.int32), axis=0), axis=0)
        is_complete = slots + num_tokens <= context.length
        best = jnp.max(jnp.where(is_complete, run, 0))
        # A run that is longer than the one looked for is a match as well: so the first slot whose run reaches `best`.
        start = jnp.argmax(is_complete & (run >= best))
        tokens = context.tokens[jnp.minimum(start + jnp.arange(num_tokens), num_slots - 1)]
        return draft_tree.from_chain(context.root, tokens, jnp.where(best > 0, num_tokens, 0))

    return Drafter("pld", num_nodes=num_nodes, max_depth=num_tokens, source_names=("context",), draft=draft)
