"""What `hd_tree`'s sources propose, on a GPU: one Pallas kernel in place of the operations of candidates.py.

As operations of XLA, a level of the tree is 17 kernels of little work, each of which takes the time of being started. Here
one ranks the nodes of the level before, and in another each program takes the node of its rank and looks up, merges and judges
what may follow; a lane is a place for a candidate. What features are multiplied by stands in candidates.py too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hd_jax import ranking
from hd_jax.databases import successor_table
from hd_jax.databases.successor_table import SuccessorTable
from hd_jax.draft_tree import NO_TOKEN
from hd_jax.drafters import text_index
from hd_jax.drafters.base import Context
from hd_jax.drafters.candidates import (
    COUNT_BITS,
    COUNTS_A_WORD,
    HIT_BOUNDS,
    MATCH_LENGTHS,
    NEWEST_PLACE,
    NUM_OWN_FEATURES,
    PLACE_BITS,
    SOURCE_NAMES,
    TABLES,
    Level,
    State,
    text_sizes,
)
from hd_jax.drafters.text_index import LONG_KEY, MAX_MATCH, NUM_BUCKETS, RING, TextIndex
from hd_jax.models.tokenizer import TOKEN_CLASSES

NUM_MATCHES = 2 * RING


def expand(
    tables: dict[str, Any],
    state: State,
    context: Context,
    before: Level,
    width: int,
    sources: str,
    max_match: int,
    num_successors: int,
    *,
    interpret: bool = False,
) -> tuple[Level, jax.Array]:
    """As `candidates.expand`, by the network and without "r"."""
    net, table = tables["weights"], tables.get("successors")
    letters = [letter for letter in TABLES if letter in sources]
    num_matches = NUM_MATCHES if "c" in sources else 0
    num_listed = min(num_successors, table.num_successors) if table is not None else 0
    num_places = num_matches + len(letters) * num_listed + 1
    facts = jnp.concatenate([text_sizes(context), state.hit_rates])
    of_all = net["bias"] + facts @ net["features"][-facts.shape[0] :]  # what every candidate of every text has
    ranks = ranking.ranks(before.scores.reshape(-1))
    arrays = (before, ranks, state.seen, state.seen.num_seen[None], table, tables["classes"], net, of_all)

    widths = (1, MAX_MATCH, *[num_places] * 5)  # of Level's arrays
    dtypes = [jnp.float32 if name == "scores" else jnp.int32 for name in Level._fields]
    found = pl.pallas_call(
        functools.partial(_kernel, num_matches, max_match, letters, num_listed),
        grid=(width,),
        in_specs=jax.tree.map(lambda _: pl.BlockSpec(), arrays),
        out_specs=[pl.BlockSpec((None, size), lambda q: (q, 0)) for size in widths],
        out_shape=[jax.ShapeDtypeStruct((width, size), dtype) for size, dtype in zip(widths, dtypes, strict=True)],
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="expand",
    )(*arrays)
    level = Level(*found)
    return level._replace(chosen=level.chosen[:, 0]), ranks >= width


def _kernel(
    num_matches: int,
    max_match: int,
    letters: list[str],
    num_successors: int,
    before: Level,  # of references, as all that follows
    ranks_ref,  # [Q I], of the level before
    index: TextIndex,
    num_seen_ref,  # [1]
    table: Any,  # SuccessorTable, or None
    classes_ref,  # [V]
    net: dict[str, Any],
    of_all_ref,  # [hidden]
    *out_refs,  # of one text, as Level
):
    out = Level(*out_refs)
    # This text: that of the node which stands at this program's rank.
    num_before = ranks_ref.shape[0]
    nodes = jnp.minimum(jnp.arange(pl.next_power_of_2(num_before)), num_before - 1)
    chosen = jnp.max(jnp.where(ranks_ref[nodes] == pl.program_id(0), nodes, 0))
    row, place = chosen // before.tokens.shape[1], chosen % before.tokens.shape[1]
    base = before.scores[row, place]
    newest = before.tokens[row, place]
    older = lambda back: before.suffixes[row, MAX_MATCH - back]  # noqa: E731
    token_at = lambda back: jnp.where(back > 0, older(jnp.maximum(back, 1)), newest)  # noqa: E731
    max_order = table.max_order if letters else 0
    newest_first = [newest, *[older(back) for back in range(1, max(LONG_KEY, max_order))]]

    num_places = out.tokens.shape[0]
    numbers = jnp.arange(pl.next_power_of_2(num_places))
    is_place = numbers < num_places
    lanes = jnp.minimum(numbers, num_places - 1)  # those beyond the last one repeat it, and write the same again
    is_none = lanes == num_places - 1
    if num_matches:
        following, places, lengths = _matches(index, token_at, newest_first, num_seen_ref[0], max_match)
    else:
        following, places, lengths = jnp.full(RING, NO_TOKEN), jnp.zeros(RING, jnp.int32), jnp.zeros(RING, jnp.int32)
    match_places = jnp.arange(following.shape[0])

    # Each lane's token.
    tokens = jnp.max(jnp.where(lanes[:, None] == match_places, following, NO_TOKEN), axis=1)
    lists = _lists(table, newest_first, num_successors) if letters else []
    for which, (start, end, *_) in enumerate(lists):
        entries = start + lanes - num_matches - which * num_successors
        is_own = (lanes >= num_matches + which * num_successors) & (entries < end)
        tokens = jnp.where(is_own, table.tokens[jnp.where(is_own, entries, 0)], tokens)

    # What the context says of it, counts in words; its longest match and the latest place of that.
    of_context = tokens[:, None] == following
    totals, counts = _counts(of_context, lengths)
    is_known = jnp.max(jnp.where(of_context & (match_places < lanes[:, None]), 1, 0), axis=1) > 0
    best = jnp.max(jnp.where(of_context, lengths << PLACE_BITS | places & NEWEST_PLACE, -1), axis=1)
    longest = jnp.where(best >= 0, best >> PLACE_BITS, 0)

    # What the tables say.
    probabilities = {}
    for which, (letter, (start, end, *_)) in enumerate(zip(letters, lists, strict=True)):
        entries = start + jnp.arange(pl.next_power_of_2(num_successors))
        is_entry = entries < end
        listed = jnp.where(is_entry, table.tokens[jnp.where(is_entry, entries, 0)], NO_TOKEN)
        own = jnp.where(is_entry, table.probabilities[jnp.where(is_entry, entries, 0)], 0.0)
        found = jnp.max(jnp.where(tokens[:, None] == listed, own, 0.0), axis=1)
        is_known |= (found > 0) & (lanes >= num_matches + (which + 1) * num_successors)
        probabilities[letter] = found
    is_candidate = (tokens != NO_TOKEN) & ~is_known

    # The features that candidates.py describes, in its order, each with the row of weights that it has in the first layer.
    class_of = lambda token: classes_ref[token % classes_ref.shape[0]]  # noqa: E731
    classes, newest_class = class_of(tokens), class_of(newest)
    of_text = [jnp.log(1 + total) * 0.5 for total in totals]
    shared: list[tuple[Any, Any]] = list(enumerate(of_text, NUM_OWN_FEATURES))
    shared.append((NUM_OWN_FEATURES + len(totals) + newest_class, 1.0))
    first_row = NUM_OWN_FEATURES + len(totals) + len(TOKEN_CLASSES)
    for letter, (start, end, order, count) in zip(letters, lists, strict=True):
        first = jnp.where(start < end, table.probabilities[start], 0.0)
        of_table = (order * 0.3, jnp.log(1 + count.astype(jnp.float32)) * 0.3, jnp.log(first + 1e-3) * 0.5)
        shared += enumerate(of_table, first_row + 3 * list(TABLES).index(letter))
    own = [
        jnp.where(total > 0, jnp.log(count + 0.1) - jnp.log(1 + total), 0.0)
        for count, total in zip(counts, totals, strict=True)
    ]
    own += [jnp.log(probabilities.get(letter, jnp.zeros(lanes.shape)) + 1e-3) * 0.5 for letter in TABLES]
    class_row = len(own)
    occurrences = jnp.log(1 + index.occurrences[tokens % NUM_BUCKETS].astype(jnp.float32))
    single = [classes == newest_class, tokens == newest, occurrences]
    single = [jnp.where(is_none, 0.0, values.astype(jnp.float32)) for values in single] + [is_none.astype(jnp.float32)]
    own = [*enumerate(own), *enumerate(single, class_row + len(TOKEN_CLASSES))]
    x = _first_layer(net["features"], of_all_ref[...], shared, own)
    hidden = jnp.arange(x.shape[1])
    x += jnp.where(is_none[:, None], 0.0, net["features"][class_row + classes[:, None], hidden[None, :]])
    activate = lambda x: jnp.maximum(x, 0.01 * x)  # noqa: E731 - leaky ReLU
    x = activate(jnp.dot(activate(x), net["hidden"][...]) + net["hidden_bias"][...])
    logits = jnp.where((is_candidate | is_none) & is_place, jnp.sum(x * net["out"][...], axis=1), -jnp.inf)
    highest = jnp.max(logits)
    estimates = logits - highest - jnp.log(jnp.sum(jnp.exp(logits - highest)))

    kinds = sum((longest >= bound).astype(jnp.int32) for bound in HIT_BOUNDS) - 1
    sources = jnp.full(lanes.shape, SOURCE_NAMES.index("recycled"))
    for name, letter in (("statistics", "s"), ("model", "m")):
        if letter in letters:
            sources = jnp.where(probabilities[letter] > 0, SOURCE_NAMES.index(name), sources)
    ends = jnp.arange(MAX_MATCH)
    out.chosen[...] = jnp.full(1, chosen)
    out.suffixes[ends] = token_at(MAX_MATCH - 1 - ends)
    out.tokens[lanes] = tokens
    out.scores[lanes] = jnp.where(is_candidate, base + estimates, -jnp.inf)
    out.matches[lanes] = longest
    out.places[lanes] = best & NEWEST_PLACE
    out.sources[lanes] = jnp.where(longest > 0, kinds, sources)


def _counts(of_context: jax.Array, lengths: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """How many of int32[R] matches reach each of MATCH_LENGTHS, of all, float32[], and of those of bool[I, R], float32[I]."""
    totals, counts = [], []
    for first in range(0, len(MATCH_LENGTHS), COUNTS_A_WORD):
        reaches = [(lengths >= bound).astype(jnp.int32) for bound in MATCH_LENGTHS[first : first + COUNTS_A_WORD]]
        words = sum(reach << COUNT_BITS * number for number, reach in enumerate(reaches))
        for sums, found in ((jnp.sum(words), totals), (jnp.sum(jnp.where(of_context, words, 0), axis=1), counts)):
            read = (sums >> COUNT_BITS * number & (1 << COUNT_BITS) - 1 for number in range(COUNTS_A_WORD))
            found += [count.astype(jnp.float32) for count in read]
    return totals, counts


def _first_layer(weights, of_all: jax.Array, shared: Sequence[tuple], own: Sequence[tuple]) -> jax.Array:
    """float32[I, hidden]: what a text's features, float32[], and a candidate's, float32[I], add to it, each by its row."""
    hidden = jnp.arange(of_all.shape[0])
    for row, value in shared:
        of_all += value * weights[row, hidden]
    x = of_all[None, :]
    for row, values in own:
        x += values[:, None] * weights[row, hidden]
    return x


def _matches(
    index: TextIndex,
    token_at: Callable[[jax.Array], jax.Array],
    newest_first: list[jax.Array],
    num_seen: jax.Array,
    max_match: int,
):
    """`text_index.matches` of one text, int32[R] each."""
    size = index.text.shape[0]
    number = jnp.arange(NUM_MATCHES)
    is_long = number >= RING
    short_key, long_key = text_index.buckets(newest_first[:LONG_KEY])
    places = index.places[jnp.where(is_long, long_key, short_key), number % RING]
    num_compared = max(max_match, LONG_KEY)
    back = jnp.arange(MAX_MATCH)
    stood = places[:, None] - back
    differs = (index.text[stood % size] != token_at(back)) | (stood < jnp.maximum(num_seen - size, 0))
    lengths = jnp.min(jnp.where(differs & (back < num_compared), back, num_compared), axis=1)
    lengths = jnp.where((lengths >= LONG_KEY) == is_long, jnp.minimum(lengths, max_match), 0)
    return jnp.where(lengths > 0, index.text[(places + 1) % size], NO_TOKEN), places, lengths


def _lists(table: SuccessorTable, newest_first: list[jax.Array], num_successors: int) -> list[tuple[jax.Array, ...]]:
    """Of each joined table, by the longest context that it knows: where its list of successors begins, where the first
    `num_successors` of them end, and the context's length and count, all int32[]; see `successor_table.lookup`."""
    orders = jnp.arange(pl.next_power_of_2(table.max_order))
    keys, fingerprints = jnp.zeros_like(orders, jnp.uint32), jnp.zeros_like(orders, jnp.uint32)
    for order, (key, fingerprint) in enumerate(zip(*successor_table.hashes(newest_first[: table.max_order]), strict=True)):
        keys, fingerprints = jnp.where(orders == order, key, keys), jnp.where(orders == order, fingerprint, fingerprints)
    found = []
    for which in range(table.bucket_bases.shape[0]):
        buckets = table.bucket_bases[which] + (keys & table.bucket_masks[which]).astype(jnp.int32)
        start, end = table.bucket_starts[buckets], table.bucket_starts[buckets + 1]
        places = start[:, None] + jnp.arange(pl.next_power_of_2(table.bucket_width))
        is_asked = (places < end[:, None]) & (orders < table.max_order)[:, None]
        is_found = is_asked & (table.fingerprints[jnp.where(is_asked, places, 0)] == fingerprints[:, None])
        longest = jnp.max(jnp.where(is_found, (orders + 1)[:, None] << successor_table.PLACE_BITS | places, 0))
        order, context = longest >> successor_table.PLACE_BITS, longest & (1 << successor_table.PLACE_BITS) - 1
        start, end = table.entry_starts[context], table.entry_starts[jnp.where(order > 0, context + 1, 0)]
        end = jnp.where(order > 0, jnp.minimum(end, start + num_successors), start)
        found.append((start, end, order, jnp.where(order > 0, table.counts[context], 0)))
    return found
