"""The device form of a corpus for drafting token by token: what may come next, and with which probability.

A context is the last k tokens of a text, k = 1 to K. Each kept context has a list of its likeliest successors, with
probabilities that are already interpolated with those of shorter contexts (absolute discounting; Ney, Essen and Kneser 1994):

    p_k(t | w_1 .. w_k) = max(count(w_1 .. w_k t) - D, 0) / n  +  D * distinct / n * p_(k-1)(t | w_2 .. w_k)

where n counts what followed the context, and `distinct` the different tokens among it; p_0 is the unigram distribution. What
a shorter context lends is its own list, and a context of one token lists only what followed it. So a lookup needs the list of
the longest kept context alone. A kept context's shorter ones occur as often at least, and are kept.

Contexts are found by hash: those of a bucket stand together, and a second hash tells them apart. Several tables can be joined:
their arrays stand end to end, each with buckets of its own, and are asked in the same few vector operations.

    bucket_starts    0      2  2      bucket b holds contexts bucket_starts[b] : bucket_starts[b + 1]
    fingerprints     f0 f1     f2     context i owns the successors entry_starts[i] : entry_starts[i + 1]
    entry_starts     0  3   5  9
    tokens           t0 t1 t2 ..      the likeliest first
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.databases.trigrams import TrigramCounts
from hd_jax.draft_tree import NO_TOKEN

MAX_ORDER = 5  # K, by default
DISCOUNT = 0.75  # D
MIN_PROBABILITY = 1e-3  # successors that are less likely are left out
PLACE_BITS = 28  # of a context's place among all; what is left of 31 holds its order
LARGEST_ORDER = (1 << 31 - PLACE_BITS) - 1
MAX_TEXT = 1 << 25  # tokens of running text whose n-grams are counted in memory


@flax.struct.dataclass
class SuccessorTable:
    """See the module. T tables, with C contexts in all, at most G successors of a context, W contexts in the fullest bucket."""

    bucket_bases: jax.Array  # int32[T], the first bucket of each table
    bucket_masks: jax.Array  # uint32[T], its number of buckets, a power of two, less one
    bucket_starts: jax.Array  # int32[buckets], one more a table than it has buckets
    fingerprints: jax.Array  # uint32[C + T W], W more a table than it has contexts; the next two as well
    entry_starts: jax.Array  # int32[C + T W]
    counts: jax.Array  # int32[C + T W], how often something followed the context
    tokens: jax.Array  # int32[successors + G]
    probabilities: jax.Array  # float32[successors + G]
    max_order: int = flax.struct.field(pytree_node=False)  # K
    num_successors: int = flax.struct.field(pytree_node=False)  # G
    bucket_width: int = flax.struct.field(pytree_node=False)  # W

    @property
    def num_contexts(self) -> int:
        """C."""
        return self.entry_starts.shape[0] - self.bucket_bases.shape[0] * self.bucket_width

    @property
    def num_bytes(self) -> int:
        """Of all arrays, padding included."""
        return sum(array.size * 4 for array in jax.tree.leaves(self))


class Successors(NamedTuple):
    """What each table knows about the ends of Q texts."""

    tokens: jax.Array  # int32[Q, T, G], NO_TOKEN where there are fewer
    probabilities: jax.Array  # float32[Q, T, G], descending; 0 there
    orders: jax.Array  # int32[Q, T], length of the context that was found; 0 for none
    counts: jax.Array  # int32[Q, T], how often something followed it


def lookup(table: SuccessorTable, suffixes: jax.Array, num_successors: int | None = None) -> Successors:
    """The successors of the longest kept context at the end of each text, by each table.

    Args:
      table: to look in.
      suffixes: int32[Q, H], H at least max_order; the last tokens of the texts, the newest last. Where a text begins,
        NO_TOKEN: no context holds it.
      num_successors: G, so many of the likeliest; by default all.
    """
    num_successors = min(num_successors or table.num_successors, table.num_successors)
    by_order = hashes([suffixes[:, -1 - back] for back in range(table.max_order)])
    keys, fingerprints = (jnp.stack(values, axis=1) for values in by_order)  # [Q, K]
    buckets = table.bucket_bases[:, None] + (keys[:, None] & table.bucket_masks[:, None]).astype(jnp.int32)  # [Q, T, K]
    bounds = table.bucket_starts[buckets[..., None] + np.arange(2)]
    places = bounds[..., :1] + jnp.arange(table.bucket_width, dtype=jnp.int32)  # [Q, T, K, W]
    in_bucket = _windows(table.fingerprints, bounds[..., 0], table.bucket_width)
    is_found = (in_bucket == fingerprints[:, None, :, None]) & (places < bounds[..., 1:])
    orders = jnp.arange(1, table.max_order + 1, dtype=jnp.int32)[:, None]
    # One maximum finds the longest context and its place.
    longest = jnp.max(jnp.where(is_found, orders << PLACE_BITS | places, 0), axis=(-2, -1))  # [Q, T]
    orders, context = longest >> PLACE_BITS, longest & (1 << PLACE_BITS) - 1
    bounds = table.entry_starts[context[..., None] + np.arange(2)]
    entries = bounds[..., :1] + jnp.arange(num_successors, dtype=jnp.int32)
    is_entry = (entries < bounds[..., 1:]) & (orders > 0)[..., None]
    own = lambda array: _windows(array, bounds[..., 0], num_successors)  # noqa: E731
    return Successors(
        tokens=jnp.where(is_entry, own(table.tokens), NO_TOKEN),
        probabilities=jnp.where(is_entry, own(table.probabilities), 0.0),
        orders=orders,
        counts=jnp.where(orders > 0, table.counts[context], 0),
    )


def _windows(array: jax.Array, starts: jax.Array, size: int) -> jax.Array:
    """[..., size]: what stands from each start on."""
    windows = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(array, start, size))(starts.reshape(-1))
    return windows.reshape(*starts.shape, size)


def join(tables: Sequence[SuccessorTable]) -> SuccessorTable:
    """One table that asks all of them, in their order.

    Raises:
      ValueError: together they have more contexts than places can number.
    """
    width = max(table.bucket_width for table in tables)
    num_successors = max(table.num_successors for table in tables)
    parts: dict[str, list[np.ndarray]] = {field.name: [] for field in dataclasses.fields(SuccessorTable)}
    num_buckets = num_contexts = num_entries = 0
    for table in tables:
        whole = {name: np.asarray(getattr(table, name)) for name in parts}
        more = table.bucket_bases.shape[0] * (width - table.bucket_width)
        own = {
            "bucket_bases": whole["bucket_bases"] + num_buckets,
            "bucket_masks": whole["bucket_masks"],
            "bucket_starts": whole["bucket_starts"] + num_contexts,
            "fingerprints": np.pad(whole["fingerprints"], (0, more)),
            "entry_starts": np.pad(whole["entry_starts"], (0, more), mode="edge") + num_entries,
            "counts": np.pad(whole["counts"], (0, more)),
            "tokens": whole["tokens"][: len(whole["tokens"]) - table.num_successors],
            "probabilities": whole["probabilities"][: len(whole["tokens"]) - table.num_successors],
        }
        for name, array in own.items():
            parts[name].append(array)
        num_buckets += len(own["bucket_starts"])
        num_contexts += len(own["fingerprints"])
        num_entries += len(own["tokens"])
    if num_contexts >= 1 << PLACE_BITS:
        raise ValueError(f"tables of {num_contexts} contexts are too large; at most {(1 << PLACE_BITS) - 1} are possible")
    parts["tokens"].append(np.full(num_successors, NO_TOKEN, np.int32))
    parts["probabilities"].append(np.zeros(num_successors, np.float32))
    arrays = {name: jnp.asarray(np.concatenate(columns)) for name, columns in parts.items() if columns}
    return SuccessorTable(
        **arrays,
        max_order=max(table.max_order for table in tables),
        num_successors=num_successors,
        bucket_width=width,
    )


def build(
    database: NgramTrie | SuffixArray | TrigramCounts,
    *,
    max_order: int = MAX_ORDER,
    num_successors: int = 16,
    min_count: int = 2,
    max_bytes: int | None = None,
    discount: float = DISCOUNT,
) -> SuccessorTable:
    """The table of a statistics database, or of tri-gram counts.

    Args:
      database: its n-grams of up to max_order + 1 tokens are counted; of a trie and of tri-grams, as far as their order
        goes. What tri-grams left out of a pair's successors is lent by the shorter context, as the discount is.
      max_order: K.
      num_successors: G.
      min_count: a context is kept if something followed it so often.
      max_bytes: of the table; min_count is doubled until it fits.
      discount: D. With 0 the probabilities are relative frequencies, and a shorter context counts only where no longer
        one is known.

    Raises:
      ValueError: an option is out of range, or the database is running text of more than MAX_TEXT tokens.
    """
    if max_order < 1 or num_successors < 1 or min_count < 1:
        values = f"{max_order}, {num_successors}, {min_count}"
        raise ValueError(f"max_order, num_successors and min_count must be at least 1, not {values}")
    if not 0 <= discount < 1:
        raise ValueError(f"discount must be at least 0 and less than 1, not {discount}")
    if max_order > LARGEST_ORDER:
        raise ValueError(f"max_order must be at most {LARGEST_ORDER}, not {max_order}")
    if isinstance(database, SuffixArray):
        if len(database.text) > MAX_TEXT:
            raise ValueError(
                f"a table of {len(database.text)} tokens of running text would take too long; at most {MAX_TEXT}. "
                "Build an n-gram database of it: python -m experiments.build_databases --kind=statistics --form=ngrams"
            )
        database = database.to_trie(max_order + 1)
    max_order = min(max_order, database.max_order - 1)
    if max_order < 1:
        raise ValueError("a table of successors needs n-grams of at least two tokens")
    ngrams = [database.ngrams(order) for order in range(1, max_order + 2)]
    left_out = np.zeros(0, np.int64)
    if isinstance(database, TrigramCounts) and max_order == 2:
        left_out = database.left_out
    while True:
        table = _build(ngrams, num_successors, min_count, discount, left_out)
        if max_bytes is None or table.num_bytes <= max_bytes:
            return table
        min_count *= 2
        if min_count > 1 << 24:
            raise ValueError(f"max_bytes {max_bytes} is less than an empty table takes")


class _Level(NamedTuple):
    """The kept contexts of one order, by ascending key, and their successors."""

    keys: np.ndarray  # uint64[C_k]
    counts: np.ndarray  # int64[C_k]
    sizes: np.ndarray  # int64[C_k], successors of each
    tokens: np.ndarray  # int32[M_k]
    probabilities: np.ndarray  # float32[M_k]


def _build(
    ngrams: list[tuple[np.ndarray, np.ndarray]], num_successors: int, min_count: int, discount: float, left_out: np.ndarray
) -> SuccessorTable:
    """The table of n-grams by order; `left_out`, if not empty, counts what the rows of the highest order do not, by context."""
    unigrams, unigram_counts = ngrams[0]
    total = max(int(unigram_counts.sum()), 1)
    # The unigrams stand for the successors of the empty context.
    shorter = _Level(
        keys=np.zeros(1, np.uint64),
        counts=np.array([total]),
        sizes=np.array([len(unigrams)]),
        tokens=unigrams[:, 0],
        probabilities=(unigram_counts / total).astype(np.float32),
    )
    levels = []
    for order, (rows, counts) in enumerate(ngrams[1:], 1):
        missing = left_out if order == len(ngrams) - 1 else left_out[:0]
        shorter = _interpolated(rows, counts.astype(np.int64), shorter, num_successors, min_count, discount, missing)
        levels.append(shorter)
    keys, counts, sizes = (np.concatenate([getattr(level, name) for level in levels]) for name in ("keys", "counts", "sizes"))
    tokens, probabilities = (np.concatenate([getattr(level, name) for level in levels]) for name in ("tokens", "probabilities"))
    starts = np.cumsum(sizes) - sizes
    num_buckets = 1 << max(len(keys) - 1, 0).bit_length()
    buckets = (keys & np.uint64(num_buckets - 1)).astype(np.int64)
    by_bucket = np.argsort(buckets, kind="stable")
    loads = np.bincount(buckets, minlength=num_buckets)
    width = int(loads.max(initial=1))
    sizes = sizes[by_bucket]
    entry_starts = np.concatenate([[0], np.cumsum(sizes)])
    entries = np.repeat(starts[by_bucket] - entry_starts[:-1], sizes) + np.arange(entry_starts[-1])
    fingerprints = (keys[by_bucket] >> np.uint64(32)).astype(np.uint32)
    return SuccessorTable(
        bucket_bases=jnp.zeros(1, jnp.int32),
        bucket_masks=jnp.full(1, num_buckets - 1, jnp.uint32),
        bucket_starts=jnp.asarray(np.concatenate([[0], np.cumsum(loads)]).astype(np.int32)),
        fingerprints=jnp.asarray(np.pad(fingerprints, (0, width))),
        entry_starts=jnp.asarray(np.pad(entry_starts, (0, width - 1), mode="edge").astype(np.int32)),
        counts=jnp.asarray(np.pad(counts[by_bucket], (0, width)).astype(np.int32)),
        tokens=jnp.asarray(np.pad(tokens[entries], (0, num_successors), constant_values=NO_TOKEN).astype(np.int32)),
        probabilities=jnp.asarray(np.pad(probabilities[entries], (0, num_successors)).astype(np.float32)),
        max_order=len(levels),
        num_successors=num_successors,
        bucket_width=width,
    )


def _interpolated(
    rows: np.ndarray,
    counts: np.ndarray,
    shorter: _Level,
    num_successors: int,
    min_count: int,
    discount: float,
    left_out: np.ndarray,
) -> _Level:
    """The level of contexts rows[:, :-1], from their successors rows[:, -1] and the level of contexts a token shorter.

    Args:
      rows: int32[R, k + 1], ascending.
      counts: int64[R].
      shorter: of order k - 1.
      num_successors: G.
      min_count: of a context.
      discount: D.
      left_out: int64[contexts], occurrences of each context that no row counts; empty for none.
    """
    order = rows.shape[1] - 1
    is_new = np.ones(len(rows), bool)
    is_new[1:] = np.any(rows[1:, :-1] != rows[:-1, :-1], axis=1)
    starts = np.flatnonzero(is_new)
    sizes = np.diff(starts, append=len(rows))
    totals = np.add.reduceat(counts, starts) if len(starts) else np.zeros(0, np.int64)
    missing = left_out if len(left_out) else np.zeros_like(totals)
    totals = totals + missing
    is_kept = totals >= min_count
    in_kept = np.repeat(is_kept, sizes)
    contexts = rows[starts[is_kept], :-1]
    sizes, totals, missing = sizes[is_kept], totals[is_kept], missing[is_kept]
    groups = np.repeat(np.arange(len(totals)), sizes)
    own_tokens, own = rows[in_kept, -1], np.maximum(counts[in_kept] - discount, 0) / totals[groups]
    backoff = (discount * sizes + missing) / totals  # the weight of the shorter context
    if order == 1:  # every token is a successor of the empty context: look up those that matter
        dense = np.zeros(int(max(shorter.tokens.max(initial=0), own_tokens.max(initial=0))) + 1)
        dense[shorter.tokens] = shorter.probabilities
        own = own + backoff[groups] * dense[own_tokens]
    else:
        parents = np.searchsorted(shorter.keys, _keys(contexts[:, 1:]))
        lent_sizes = shorter.sizes[parents]
        lent_starts = (np.cumsum(shorter.sizes) - shorter.sizes)[parents]
        lent_groups = np.repeat(np.arange(len(totals)), lent_sizes)
        within = np.arange(len(lent_groups)) - np.repeat(np.cumsum(lent_sizes) - lent_sizes, lent_sizes)
        lent = lent_starts[lent_groups] + within
        groups = np.concatenate([groups, lent_groups])
        own_tokens = np.concatenate([own_tokens, shorter.tokens[lent]])
        own = np.concatenate([own, backoff[lent_groups] * shorter.probabilities[lent]])
        pairs = groups.astype(np.int64) << 32 | own_tokens  # a token that both propose has the sum
        by_pair = np.argsort(pairs, kind="stable")
        pairs, own = pairs[by_pair], own[by_pair]
        firsts = np.flatnonzero(np.diff(pairs, prepend=-1))
        own = np.add.reduceat(own, firsts) if len(firsts) else own
        groups, own_tokens = pairs[firsts] >> 32, (pairs[firsts] & 0xFFFFFFFF).astype(np.int32)
    ranked = np.lexsort([-own, groups])
    ranked_groups = groups[ranked]
    first_of = np.searchsorted(ranked_groups, np.arange(len(totals)))
    place = np.arange(len(ranked)) - first_of[ranked_groups]
    ranked = ranked[(place < num_successors) & (own[ranked] >= MIN_PROBABILITY)]
    keys = _keys(contexts)
    by_key = np.argsort(keys, kind="stable")
    sizes = np.bincount(groups[ranked], minlength=len(totals))
    starts = (np.cumsum(sizes) - sizes)[by_key]
    sizes = sizes[by_key]
    entries = ranked[np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())]
    return _Level(keys[by_key], totals[by_key], sizes, own_tokens[entries], own[entries].astype(np.float32))


def _keys(contexts: np.ndarray) -> np.ndarray:
    """uint64[C] of int32[C, k] contexts: the fingerprint in the upper half, the hash in the lower one."""
    keys, fingerprints = (values[-1].astype(np.uint64) for values in hashes(list(contexts.T[::-1])))
    return fingerprints << np.uint64(32) | keys


def hashes(newest_first: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Two hashes uint32[...] of the contexts of 1 to K tokens, of K arrays int32[...]; the same for numpy and JAX arrays."""
    both = []
    for seed, factor in ((0x9E3779B1, 0x85EBCA6B), (0x7FEB352D, 0x846CA68B)):
        value, found = np.uint32(seed), []
        for token in newest_first:
            value = (value ^ token.astype(np.uint32)) * np.uint32(factor)
            value = (value ^ (value >> np.uint32(15))) * np.uint32(0xC2B2AE35)
            value = value ^ (value >> np.uint32(13))
            found.append(value)
        both.append(found)
    return both[0], both[1]
