"""Hierarchy Drafting (HD; Cho et al., NAACL Findings 2025, arXiv 2502.05609).

Three databases are asked in order of temporal locality until enough drafts are found (section 3 of the paper):

    c  context-dependent, D_c   n-grams of the prompt, of the accepted text and of a Jacobi window; for each first token the
                                most recently seen distinct continuations
    m  model-dependent, D_m     the most frequent n-grams of the model's own answers, by their first token
    s  statistics-dependent, D_s  a large corpus, by the last two tokens, then by the last one

D_c and its Jacobi window (section 3.1) are those of ngram_pool.py and jacobi_window.py, which Lookahead decoding shares.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax import draft_tree
from hd_jax.databases.collection import Databases
from hd_jax.databases.continuation_table import lookup
from hd_jax.draft_tree import NO_TOKEN, DraftTree
from hd_jax.drafters import jacobi_window, ngram_pool
from hd_jax.drafters.base import Context, Drafter, Feedback
from hd_jax.drafters.ngram_pool import State

SOURCES = {"c": "context", "m": "model", "s": "statistics"}
KEY_LENGTHS = (2, 1)  # of the suffixes that D_s is asked for, in this order
MAX_DEVICE_BYTES = 256 * 2**20  # of a D_s that is kept on the device, and of each of its tables there


def hd(
    databases: Databases | None = None,
    *,
    order: str = "cms",
    ngram: int = 5,
    window: int = 7,
    num_drafts: int = 7,
    num_nodes: int | None = None,
    history: int = 4096,
) -> Drafter:
    """Hierarchy Drafting, with the paper's settings as defaults.

    D_s is on the device, as tables keyed by two tokens and by one, unless it holds more than MAX_DEVICE_BYTES: then it is
    asked on the host before each step.

    Args:
      databases: with D_m where `order` has "m", and D_s where it has "s".
      order: which databases are asked, and in which order; letters of "cms", each at most once.
      ngram: n; drafts have n - 1 tokens.
      window: W, columns of the Jacobi window; 0 for none.
      num_drafts: at most so many drafts a step.
      num_nodes: N, the window's (n - 1) * W - 1 nodes and the root included; by default all drafts fit, and more than
        that are not used. Fewer cut the last drafts.
      history: R, n-grams that D_c remembers.

    Raises:
      ValueError: an option is out of range, or `order` names a database that there is none of.
    """
    if not order or len(set(order)) != len(order) or not set(order) <= set(SOURCES):
        raise ValueError(f"hd's order is a choice of the letters 'cms', each at most once, not {order!r}")
    bounds = {"ngram": (ngram, 2), "window": (window, 0), "num_drafts": (num_drafts, 1)}
    bounds["history"] = (history, ngram_pool.least_history(ngram, window))
    for name, (value, least) in bounds.items():
        if value < least:
            raise ValueError(f"hd's {name} must be at least {least}, not {value}")
    window_nodes = jacobi_window.num_nodes(ngram, window)
    full = 1 + window_nodes + num_drafts * (ngram - 1)
    num_nodes = full if num_nodes is None else min(num_nodes, full)
    if num_nodes < window_nodes + 2:
        raise ValueError(f"hd with window {window} needs at least {window_nodes + 2} nodes, not {num_nodes}; or window=0")
    databases = databases or Databases()
    tables: dict[str, Any] = {}
    refresh = None
    if "m" in order:
        tables["m"] = databases.table("model", max_entries=num_drafts)
    if "s" in order and databases.statistics.num_bytes > MAX_DEVICE_BYTES:
        lookup_on_host = functools.partial(_host_lookup, databases.statistics, num_drafts, ngram - 1)
        refresh = databases.once(("refresh", num_drafts, ngram), lookup_on_host)
    elif "s" in order:
        size = {"max_entries": num_drafts, "length": ngram - 1, "max_bytes": MAX_DEVICE_BYTES}
        tables["s"] = tuple(databases.table("statistics", key_length=k, **size) for k in KEY_LENGTHS)
    init, draft, update = _functions(order, ngram, window, num_drafts, num_nodes - window_nodes, history, refresh is not None)
    return Drafter(
        "hd",
        num_nodes=num_nodes,
        max_depth=max(ngram - 1, jacobi_window.max_depth(ngram, window)),
        source_names=tuple(SOURCES.values()),
        draft=draft,
        init=init,
        update=update,
        refresh=refresh,
        tables=tables,
    )


@functools.lru_cache
def _functions(order: str, ngram: int, window: int, num_drafts: int, num_trie_nodes: int, history: int, is_on_host: bool):
    length = ngram - 1

    def init(tables, context: Context) -> State:
        del tables
        return ngram_pool.start(context, ngram=ngram, width=window, history=history)

    def draft(tables, state: State, context: Context) -> DraftTree:
        root = context.root
        found: list[tuple[jax.Array, jax.Array, str]] = []  # int32[G, C], int32[G], source
        for letter in order:
            if letter == "c":
                values, is_found = ngram_pool.latest(state, root, num_drafts)
                found.append((values, jnp.where(is_found, length, 0), letter))
            elif letter == "m":
                values, lengths, _ = lookup(tables["m"], root[None])
                found.append((values, lengths, letter))
            elif is_on_host:
                values, lengths, at_length = context.host
                found.append((values, jnp.where(at_length == context.length, lengths, 0), letter))
            else:
                for table in tables["s"]:
                    last = context.length - table.key_length + jnp.arange(table.key_length)
                    values, lengths, _ = lookup(table, context.tokens[jnp.maximum(last, 0)])
                    found.append((values, jnp.where(last[0] >= 0, lengths, 0), letter))
        sized = [_fit(values, length) for values, _, _ in found]
        drafts = jnp.concatenate(sized)
        lengths = jnp.concatenate([jnp.minimum(lengths, length) for _, lengths, _ in found])
        sources = np.concatenate([np.full(v.shape[0], list(SOURCES).index(letter)) for v, _, letter in found])
        lengths = _first_distinct(drafts, lengths, num_drafts)
        trie = draft_tree.merge(root, drafts, lengths, jnp.asarray(sources, jnp.int32), num_trie_nodes)
        return draft_tree.join(trie, jacobi_window.tree(state.window, root)) if window else trie

    def update(tables, state: State, context: Context, feedback: Feedback) -> State:
        del tables
        return ngram_pool.learn(state, context, feedback)

    return init, draft, update


def _fit(drafts: jax.Array, length: int) -> jax.Array:
    """Cuts or pads int32[G, C] to C = length."""
    short = max(length - drafts.shape[1], 0)
    return jnp.pad(drafts, ((0, 0), (0, short)), constant_values=NO_TOKEN)[:, :length]


def _first_distinct(drafts: jax.Array, lengths: jax.Array, num_drafts: int) -> jax.Array:
    """The lengths int32[G] of the first `num_drafts` drafts that are no prefix of an earlier one; 0 for the others."""
    num_places, max_length = drafts.shape
    is_beyond = jnp.arange(max_length) >= lengths[:, None]
    is_prefix = jnp.all((drafts[:, None] == drafts[None]) | is_beyond[:, None], axis=-1) & (lengths[:, None] <= lengths[None])
    is_earlier = np.tri(num_places, k=-1, dtype=bool)
    is_kept = (lengths > 0) & ~jnp.any(is_prefix & is_earlier, axis=-1)
    return jnp.where(is_kept & (jnp.cumsum(is_kept) <= num_drafts), lengths, 0)


def _host_lookup(database, num_drafts: int, length: int):
    """Asks a host database for the drafts after a context's end: (int32[G, C], int32[G], int32[] length they hold at)."""

    def refresh(context: Context):
        end = int(context.length)
        drafts = np.full((len(KEY_LENGTHS) * num_drafts, length), NO_TOKEN, np.int32)
        lengths = np.zeros(len(drafts), np.int32)
        num_found = 0
        for key_length in KEY_LENGTHS:
            suffix = np.asarray(context.tokens[max(end - key_length, 0) : end])
            if len(suffix) == key_length:
                values, sizes, _ = database.continuations(suffix, num_drafts, length)
                drafts[num_found : num_found + len(values)] = values
                lengths[num_found : num_found + len(values)] = sizes
                num_found += len(values)
        return drafts, lengths, np.int32(end)

    return refresh
