"""A text so indexed that the places where its end stood before are found without reading it through.

Places are kept by their last token, for short matches, and by their last LONG_KEY tokens, for long ones: the latest RING of
each key. So the places of frequent tokens do not push those of long matches out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax.draft_tree import NO_TOKEN
from hd_jax.drafters.base import Context

MAX_MATCH = 16  # tokens of a match that are compared
RING = 16  # latest places that are remembered of a key
SHORT_KEY, LONG_KEY = 1, 3  # tokens of the two keys
NUM_BUCKETS = 4096  # of each kind of key, and of the occurrence counts


class TextIndex(NamedTuple):
    """One row's text and where what stands in it."""

    text: jax.Array  # int32[T], a ring: place p stands at p % T
    num_seen: jax.Array  # int32[], tokens ever written
    start: jax.Array  # int32[], the place where the request begins
    places: jax.Array  # int32[2 NUM_BUCKETS, RING], the latest of each key, or -1; short keys, then long ones
    fills: jax.Array  # int32[2 NUM_BUCKETS], places ever written
    occurrences: jax.Array  # int32[NUM_BUCKETS], of each token (modulo NUM_BUCKETS) in the request


class Matches(NamedTuple):
    """Where the ends of Q texts stood earlier, R = 2 RING places each; some hold no match."""

    tokens: jax.Array  # int32[Q, R], that followed there, or NO_TOKEN
    places: jax.Array  # int32[Q, R], of the last token that matches
    lengths: jax.Array  # int32[Q, R], tokens that match; 0 for no match


def blank(size: int) -> TextIndex:
    """Nothing seen yet, and room for `size` tokens."""
    return TextIndex(
        text=jnp.full(size, NO_TOKEN, jnp.int32),
        num_seen=jnp.int32(0),
        start=jnp.int32(0),
        places=jnp.full((2 * NUM_BUCKETS, RING), -1, jnp.int32),
        fills=jnp.zeros(2 * NUM_BUCKETS, jnp.int32),
        occurrences=jnp.zeros(NUM_BUCKETS, jnp.int32),
    )


def read(index: TextIndex, context: Context) -> TextIndex:
    """The index of a prompt; of one that is longer than the ring, its end."""
    size = min(index.text.shape[0], context.tokens.shape[0])
    start = jnp.maximum(context.length - size, 0)
    tokens = jax.lax.dynamic_slice_in_dim(context.tokens, start, size)
    return append(index, tokens, context.length - start)


def resume(index: TextIndex, context: Context) -> TextIndex:
    """The index after another prompt. One that goes on from the last request, as in a chat, is read from there on."""
    size = index.text.shape[0]
    offsets = jnp.arange(min(size, context.tokens.shape[0]))
    num_known = index.num_seen - index.start
    is_known = (offsets >= num_known) | (index.text[(index.start + offsets) % size] == context.tokens[offsets])
    goes_on = jnp.all(is_known) & (num_known <= jnp.minimum(len(offsets), context.length))
    fresh = index._replace(start=index.num_seen, occurrences=jnp.zeros_like(index.occurrences))
    index = jax.tree.map(functools.partial(jnp.where, goes_on), index, fresh)
    num_known = jnp.where(goes_on, num_known, 0)
    return read(index, context._replace(tokens=jnp.roll(context.tokens, -num_known), length=context.length - num_known))


def recent(index: TextIndex, num_skipped: int = 0) -> jax.Array:
    """int32[MAX_MATCH]: the newest tokens but for so many, the newest last; NO_TOKEN where the text has not so many."""
    places = index.num_seen - num_skipped - MAX_MATCH + jnp.arange(MAX_MATCH)
    return jnp.where(places >= 0, index.text[places % index.text.shape[0]], NO_TOKEN)


def append(index: TextIndex, tokens: jax.Array, num_tokens: jax.Array) -> TextIndex:
    """The index after the first `num_tokens` of int32[P] tokens more."""
    size = index.text.shape[0]
    offsets = jnp.arange(tokens.shape[0])
    is_new = offsets < num_tokens
    text = index.text.at[jnp.where(is_new, (index.num_seen + offsets) % size, size)].set(tokens, mode="drop")
    ends = index.num_seen + offsets - 1  # a place is indexed once the token behind it is known
    keys = jnp.stack(buckets([text[(ends - back) % size] for back in range(LONG_KEY)]))  # [2, P]
    places, fills = _pushed(index.places, index.fills, keys, ends, is_new & (ends >= 0))
    return index._replace(
        text=text,
        num_seen=index.num_seen + num_tokens,
        places=places,
        fills=fills,
        occurrences=index.occurrences.at[jnp.where(is_new, tokens % NUM_BUCKETS, NUM_BUCKETS)].add(1, mode="drop"),
    )


def matches(index: TextIndex, suffixes: jax.Array, max_match: int = MAX_MATCH) -> Matches:
    """Where the texts that end with int32[Q, MAX_MATCH] suffixes stood, by at most `max_match` tokens."""
    size = index.text.shape[0]
    newest_first = suffixes[:, ::-1]
    keys = jnp.stack(buckets([newest_first[:, back] for back in range(LONG_KEY)]), axis=1)
    places = index.places[keys].reshape(-1, 2 * RING)
    num_compared = max(max_match, LONG_KEY)
    back = jnp.arange(num_compared)
    stood = places[:, :, None] - back
    differs = (index.text[stood % size] != newest_first[:, None, :num_compared]) | (
        stood < jnp.maximum(index.num_seen - size, 0)
    )
    lengths = jnp.min(jnp.where(differs, back, num_compared), axis=-1)
    is_long = np.arange(2 * RING) >= RING
    lengths = jnp.where((lengths >= LONG_KEY) == is_long, lengths, 0)  # each place in one of the rings
    lengths = jnp.minimum(lengths, max_match)
    return Matches(jnp.where(lengths > 0, index.text[(places + 1) % size], NO_TOKEN), places, lengths)


def buckets(newest_first: Sequence[jax.Array]) -> list[jax.Array]:
    """The buckets int32[...] of the short and of the long key of texts whose last LONG_KEY tokens are int32[...] each."""
    found = []
    for kind, length in enumerate((SHORT_KEY, LONG_KEY)):
        value = np.uint32(0x9E3779B1)
        for token in newest_first[:length]:
            value = (value ^ token.astype(jnp.uint32)) * np.uint32(0x85EBCA6B)
            value = value ^ (value >> np.uint32(15))
        found.append((value % np.uint32(NUM_BUCKETS)).astype(jnp.int32) + kind * NUM_BUCKETS)
    return found


def _pushed(
    places: jax.Array, fills: jax.Array, buckets: jax.Array, new: jax.Array, is_new: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The rings after int32[P] new places in their order, those that are new, each in its int32[2, P] buckets."""
    num_buckets = fills.shape[0]
    buckets = jnp.where(is_new, buckets, num_buckets).reshape(-1)
    new = jnp.tile(new, 2)
    if len(buckets) < 128:  # the few of a step: all are compared with all
        is_same = buckets[:, None] == buckets
        rank, num_same = jnp.sum(jnp.tril(is_same, -1), axis=1), jnp.sum(is_same, axis=1)
    else:
        by_bucket = jnp.argsort(buckets, stable=True)
        buckets, new = buckets[by_bucket], new[by_bucket]
        first = jnp.searchsorted(buckets, buckets, side="left")
        rank, num_same = jnp.arange(len(buckets)) - first, jnp.searchsorted(buckets, buckets, side="right") - first
    slots = (fills[jnp.minimum(buckets, num_buckets - 1)] + rank) % RING
    is_kept = rank >= num_same - RING  # one that the same call overwrites is not written
    return (
        places.at[jnp.where(is_kept, buckets, num_buckets), slots].set(new, mode="drop"),
        fills.at[buckets].add(1, mode="drop"),
    )
