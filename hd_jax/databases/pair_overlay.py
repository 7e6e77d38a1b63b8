"""Rows of a successor matrix that changed: a bounded hash table on the device, by token pair.

A matrix of successors that learns is mostly as it was built. So the built one stays a read-only table, and a row that is
changed is copied here and changed here. A bucket holds one row: a pair that hashes to the bucket of another takes its place,
and the other is again as the corpus had it. So the size is fixed, and what is learned last is what stays.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax.draft_tree import NO_TOKEN


class PairOverlay(NamedTuple):
    """H buckets, a power of two, of up to k successors."""

    keys: jax.Array  # int32[H, 2], NO_TOKEN for an empty bucket
    tokens: jax.Array  # int32[H, k], the heaviest first, then NO_TOKEN
    weights: jax.Array  # float32[H, k], 0 there


def empty(num_buckets: int, num_successors: int) -> PairOverlay:
    """No row was changed yet."""
    return PairOverlay(
        keys=jnp.full((num_buckets, 2), NO_TOKEN, jnp.int32),
        tokens=jnp.full((num_buckets, num_successors), NO_TOKEN, jnp.int32),
        weights=jnp.zeros((num_buckets, num_successors), jnp.float32),
    )


def lookup(overlay: PairOverlay, pairs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The changed rows of pairs.

    Args:
      overlay: to look in.
      pairs: int32[Q, 2].

    Returns:
      Successors int32[Q, k], their weights float32[Q, k], and bool[Q], whether there is a row; without one the others have
      no meaning.
    """
    places = buckets(pairs, overlay.keys.shape[0])
    is_found = jnp.all(overlay.keys[places] == pairs, axis=-1) & (pairs[:, 1] != NO_TOKEN)
    return overlay.tokens[places], overlay.weights[places], is_found


def write(overlay: PairOverlay, pairs: jax.Array, tokens: jax.Array, weights: jax.Array, is_written: jax.Array) -> PairOverlay:
    """The overlay with new rows, those that hold something. Of several rows for one bucket, the last is written.

    Args:
      overlay: before.
      pairs: int32[Q, 2].
      tokens: int32[Q, k], as in the overlay.
      weights: float32[Q, k].
      is_written: bool[Q], which rows count.
    """
    num_buckets = overlay.keys.shape[0]
    is_written = is_written & (weights[:, 0] > 0)  # and so after rows were read for the weights: nothing is copied
    places = jnp.where(is_written, buckets(pairs, num_buckets), num_buckets)
    # A scatter has no order of its own, so each bucket is written once.
    is_later = ~np.tri(places.shape[0], dtype=bool)
    is_last = ~jnp.any((places[:, None] == places) & is_later, axis=1)
    places = jnp.where(is_last, places, num_buckets)  # out of range: dropped
    put = lambda array, rows: array.at[places].set(rows, mode="drop")  # noqa: E731
    return PairOverlay(put(overlay.keys, pairs), put(overlay.tokens, tokens), put(overlay.weights, weights))


def merge(tokens: jax.Array, weights: jax.Array, num_successors: int) -> tuple[jax.Array, jax.Array]:
    """Rows with the weights of equal tokens added up, and the heaviest kept.

    Args:
      tokens: int32[Q, I]; NO_TOKEN for an empty place.
      weights: float32[Q, I].
      num_successors: k, to keep, I at most.

    Returns:
      Tokens int32[Q, k] and weights float32[Q, k], the heaviest first, ties in the given order; NO_TOKEN and 0 where there
      are fewer with a weight.
    """
    is_same = tokens[:, :, None] == tokens[:, None, :]
    is_first = ~jnp.any(is_same & np.tri(tokens.shape[1], k=-1, dtype=bool), axis=-1) & (tokens != NO_TOKEN)
    sums = jnp.where(is_first, jnp.sum(jnp.where(is_same, weights[:, None, :], 0.0), axis=-1), 0.0)
    best, chosen = jax.lax.top_k(sums, num_successors)
    return jnp.where(best > 0, jnp.take_along_axis(tokens, chosen, axis=1), NO_TOKEN), best


def buckets(pairs: jax.Array, num_buckets: int) -> jax.Array:
    """The bucket of each pair, int32[Q], of int32[Q, 2] pairs."""
    value = jnp.uint32(0x9E3779B1)
    for column in range(2):
        value = (value ^ pairs[:, column].astype(jnp.uint32)) * jnp.uint32(0x85EBCA6B)
        value = value ^ (value >> 15)
    return (value & jnp.uint32(num_buckets - 1)).astype(jnp.int32)
