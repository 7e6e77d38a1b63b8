"""Hierarchy Drafting (HD; Cho et al., NAACL Findings 2025, arXiv 2502.05609).

Three databases are asked in order of temporal locality until enough drafts are found (section 3 of the paper):

    c  context-dependent, D_c   n-grams of the prompt, of the accepted text and of a Jacobi window; for each first token the
                                most recently seen distinct continuations
    m  model-dependent, D_m     the most frequent n-grams of the model's own answers, by their first token
    s  statistics-dependent, D_s  a large corpus, by the last two tokens, then by the last one

D_c is a log of the n-grams in the order in which they were seen. The paper keeps for each token a least-recently-used set
of the `num_drafts` latest distinct continuations: reading the log backwards and leaving out repetitions gives that set.

The Jacobi window (section 3.1; Fu et al. 2024) is nodes of the same tree that are never accepted. Row 0 is a line of guesses
from the root on, and every column continues downwards (here width 4, n-gram 4):

    root -> a1 -> a2 -> a3        a node's ancestors are its column above and row 0 to its left
     |      |     |     |
     b0     b1    b2    b3        after a step, the likeliest tokens after the last row are the next row; each
     |      |     |     |         column and its new token are an n-gram for D_c; row 0 is dropped
     c0     c1    c2    c3
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax import draft_tree
from hd_jax.databases.collection import Databases
from hd_jax.databases.continuation_table import lookup
from hd_jax.draft_tree import NO_SOURCE, NO_TOKEN, DraftTree
from hd_jax.drafters.base import Context, Drafter

SOURCES = {"c": "context", "m": "model", "s": "statistics"}
KEY_LENGTHS = (2, 1)  # of the suffixes that D_s is asked for, in this order
MAX_DEVICE_BYTES = 256 * 2**20  # of a D_s that is kept on the device, and of each of its tables there


class _State(NamedTuple):
    log: jax.Array  # int32[R, n], a ring of n-grams
    num_logged: jax.Array  # int32[], n-grams ever written
    window: jax.Array  # int32[n - 1, W]; [0, 0] stands for the root


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
    # A step's n-grams must fit the log: one a column of the window, and one a token.
    least_history = window + max(ngram - 1, ngram - 3 + window) + 1
    bounds = {"ngram": (ngram, 2), "window": (window, 0), "num_drafts": (num_drafts, 1), "history": (history, least_history)}
    for name, (value, least) in bounds.items():
        if value < least:
            raise ValueError(f"hd's {name} must be at least {least}, not {value}")
    window_nodes = max((ngram - 1) * window - 1, 0)
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
        max_depth=max(ngram - 1, ngram - 3 + window),
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

    def init(tables, context: Context) -> _State:
        del tables
        num_ngrams = jnp.maximum(context.length - length, 0)
        slots = jnp.arange(history)
        # Ring slot r holds the newest n-gram whose number is r modulo the ring's size.
        starts = slots + history * ((num_ngrams - 1 - slots) // history)
        picked = context.tokens[jnp.clip(starts[:, None] + jnp.arange(ngram), 0, context.tokens.shape[0] - 1)]
        log = jnp.where((slots < num_ngrams)[:, None], picked, NO_TOKEN)
        cells = jnp.arange((ngram - 1) * window).reshape(ngram - 1, window)
        guesses = context.tokens[(7919 * (cells + 1)) % context.length]  # scattered tokens of the prompt, always the same
        return _State(log, num_ngrams, guesses)

    def recent(state: _State, root: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The latest distinct continuations of `root` in the log: int32[G, C], bool[G]."""
        slots = jnp.arange(history)
        written = slots + history * ((state.num_logged - 1 - slots) // history)  # number of the n-gram in each slot
        rank = jnp.where((state.log[:, 0] == root) & (slots < state.num_logged), written, -1)

        def take(rank, _):
            newest = jnp.argmax(rank)
            value = state.log[newest, 1:]
            is_repeated = jnp.all(state.log[:, 1:] == value, axis=-1)
            return jnp.where(is_repeated, -1, rank), (value, rank[newest] >= 0)

        _, (values, is_found) = jax.lax.scan(take, rank, None, length=num_drafts, unroll=True)
        return values, is_found

    def draft(tables, state: _State, context: Context) -> DraftTree:
        root = context.root
        found: list[tuple[jax.Array, jax.Array, str]] = []  # int32[G, C], int32[G], source
        for letter in order:
            if letter == "c":
                values, is_found = recent(state, root)
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
        return draft_tree.join(_window_tree(state.window, root), trie) if window else trie

    def update(tables, state: _State, context: Context, feedback) -> _State:
        del tables
        max_appended = feedback.path.shape[0]
        back = jnp.arange(max_appended)
        ends = context.length - feedback.num_appended + back  # slots of the appended tokens, oldest first
        starts = ends - length
        accepted = context.tokens[jnp.clip(starts[:, None] + jnp.arange(ngram), 0, context.tokens.shape[0] - 1)]
        is_new = (back < feedback.num_appended) & (starts >= 0)
        window_tokens = state.window
        if window:
            bottom = feedback.argmax[(ngram - 2) * window + jnp.arange(window)]  # after the window's last row
            columns = state.window.at[0, 0].set(feedback.tree.tokens[draft_tree.ROOT_INDEX])
            columns = jnp.concatenate([columns, bottom[None]])  # [n, W]
            window_tokens = columns[1:]
            # The accepted text is written last: it is the most recent, and surer than the window's guesses.
            accepted = jnp.concatenate([columns.T, accepted])
            is_new = jnp.concatenate([jnp.broadcast_to(feedback.num_appended > 0, window), is_new])
        place = (state.num_logged + jnp.cumsum(is_new) - 1) % history
        log = state.log.at[jnp.where(is_new, place, history)].set(accepted, mode="drop")
        return state._replace(log=log, num_logged=state.num_logged + jnp.sum(is_new), window=window_tokens)

    def _window_tree(tokens: jax.Array, root: jax.Array) -> DraftTree:
        cells = np.arange((ngram - 1) * window).reshape(ngram - 1, window)  # node index of each cell; [0, 0] is the root
        parents = np.empty_like(cells)
        parents[0] = cells[0] - 1
        parents[1:] = cells[:-1]
        return DraftTree(
            tokens=tokens.at[0, 0].set(root).reshape(-1),
            parents=jnp.asarray(parents.reshape(-1), jnp.int32).at[0].set(draft_tree.NO_PARENT),
            sources=jnp.full(cells.size, NO_SOURCE, jnp.int32),
            is_window=jnp.arange(cells.size) > 0,
        )

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
