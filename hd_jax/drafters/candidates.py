"""What `hd_tree`'s sources propose for the end of a text, and how likely each proposal is to be accepted.

The sources are those of hd_tree.py. Their answers are merged by token, and a small network estimates each one's probability,
that none of them is right included, from counts alone: how often the context continued so after a match of 1, 2, .. 16 tokens;
the tables' probabilities, orders and counts; how often each source was right lately in this text, by match length; the kinds
of the tokens. gpu_candidates.py does the same in one kernel.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from hd_jax import ranking
from hd_jax.databases import successor_table
from hd_jax.databases.collection import Databases
from hd_jax.databases.successor_table import Successors, SuccessorTable
from hd_jax.draft_tree import NO_TOKEN
from hd_jax.drafters import recycled_rows, text_index
from hd_jax.drafters.base import Context
from hd_jax.drafters.recycled_rows import Recycled
from hd_jax.drafters.text_index import MAX_MATCH, NUM_BUCKETS, TextIndex
from hd_jax.models.tokenizer import TOKEN_CLASSES

WEIGHTS = pathlib.Path(__file__).parents[1] / "assets" / "hd_tree.safetensors"
SUBSETS = ("c", "cm", "cs", "ms", "cms")  # of sources, each with weights of its own
MATCH_LENGTHS = (1, 2, 3, 4, 6, 8, 12, MAX_MATCH)  # at which counts are taken
COUNT_BITS, COUNTS_A_WORD = 6, 4  # of an int32, which has room for one more; a count is at most the places R of a text
LOG_COUNTS = np.log(np.arange(1 << COUNT_BITS, dtype=np.float32) + np.float32(0.1))
# What a source's hit rate is kept for: the context by the length of its longest match, and the two tables.
HIT_BOUNDS = (1, 3, 6, 10)  # shortest matches of the context's classes
SOURCE_NAMES = ("context 1-2", "context 3-5", "context 6-9", "context 10+", "model", "statistics", "recycled")
NUM_OWN_FEATURES = len(MATCH_LENGTHS) + 2 + len(TOKEN_CLASSES) + 3 + 1  # of a candidate alone; the others are its text's
NUM_SUCCESSORS = 24  # of a context in the tables
PLACE_BITS = 24  # of a place in the text, in a word whose upper bits hold a match's length
NEWEST_PLACE = (1 << PLACE_BITS) - 1  # that is told apart
# The databases of "m" and "s", and how their successor tables are made.
TABLES = {
    "m": ("model_text", {"num_successors": NUM_SUCCESSORS, "min_count": 1, "max_bytes": 256 * 2**20}),
    "s": ("statistics", {"num_successors": NUM_SUCCESSORS, "min_count": 2, "max_bytes": 512 * 2**20}),
}


class State(NamedTuple):
    """What one row knows."""

    seen: TextIndex
    hit_rates: jax.Array  # float32[6], as SOURCE_NAMES, of which the last has none
    recycled: Any  # RecycledRows with "r", else ()


class Candidates(NamedTuple):
    """What may follow each of Q texts. Of I places, some hold no candidate; the last stands for that no candidate is right."""

    tokens: jax.Array  # int32[Q, I]
    is_candidate: jax.Array  # bool[Q, I], each token once
    matches: jax.Array  # int32[Q, I], longest match of the context that was continued so; 0 for none
    places: jax.Array  # int32[Q, I], the latest place of such a match
    sources: jax.Array  # int32[Q, I], the first source that proposes the token, as SOURCE_NAMES
    features: jax.Array  # float32[Q, I, F]
    fixed: jax.Array  # float32[Q, I], probabilities by the hierarchy alone
    classes: jax.Array  # int32[Q], of the longest match: 0 for none, then by HIT_BOUNDS
    recycled: Recycled | None  # None without "r"
    recycled_sums: jax.Array  # float32[Q, I], its probabilities of the tokens
    favorites: jax.Array  # int32[Q, 6], each source's best guess, or NO_TOKEN


class Level(NamedTuple):
    """A level of the tree: Q texts, each of which ends with a node of the level before, and I places for what may follow it."""

    chosen: jax.Array  # int32[Q], those nodes' places in the level before, whose texts stand one after the other
    suffixes: jax.Array  # int32[Q, MAX_MATCH], the ends of the texts
    tokens: jax.Array  # int32[Q, I]
    scores: jax.Array  # float32[Q, I], the paths' log-probabilities; -inf where there is no candidate
    matches: jax.Array  # int32[Q, I], as those of Candidates, and so the next two
    places: jax.Array  # int32[Q, I]
    sources: jax.Array  # int32[Q, I]


def successor_tables(databases: Databases, sources: str) -> dict[str, SuccessorTable]:
    """The tables of "m" and "s", those that `sources` names, joined in this order; made once for the same databases.

    Raises:
      ValueError: there is no such database.
    """
    asked = tuple(letter for letter in TABLES if letter in sources)
    if not asked:
        return {}
    making = [(kind, settings) for kind, settings in (TABLES[letter] for letter in asked)]
    make = lambda: successor_table.join([databases.successors(kind, **settings) for kind, settings in making])  # noqa: E731
    return {"successors": databases.once(("hd_tree", asked), make)}


@functools.cache
def weights(sources: str) -> dict[str, jax.Array]:
    """The shipped weights for a set of sources."""
    named = [(*name.split("."), array) for name, array in load_file(WEIGHTS).items()]
    return {name: jnp.asarray(array) for subset, name, array in named if subset == sources}


def root_level(index: TextIndex) -> Level:
    """The level before the first: the last token of the text, which has one place."""
    nothing = jnp.zeros((1, 1), jnp.int32)
    suffixes, tokens = text_index.recent(index, 1)[None], text_index.recent(index)[None, -1:]
    return Level(nothing[0], suffixes, tokens, jnp.zeros((1, 1)), nothing, nothing, nothing)


def expand(
    tables: dict[str, Any],
    state: State,
    context: Context,
    before: Level,
    width: int,
    sources: str,
    max_match: int,
    num_successors: int,
) -> tuple[Level, jax.Array]:
    """The level after another: what may follow the `width` likeliest of its nodes; and bool[], which of all its nodes are left.

    Fewer than `width` may hold candidates; texts that end with a place that holds none have none.
    """
    earlier = before.scores.reshape(-1)
    base, chosen = ranking.top_k(earlier, width)
    shifted = before.suffixes[chosen // before.scores.shape[1], 1:]
    suffixes = jnp.concatenate([shifted, before.tokens.reshape(-1)[chosen][:, None]], axis=1)
    found = candidates(tables, state, context, suffixes, sources, max_match, num_successors)
    estimates = log_probabilities(tables, found)
    if found.recycled is not None:
        estimates = recycled_rows.mixed(state.recycled, found.recycled, found.classes, estimates, found.recycled_sums)
    scores = jnp.where(found.is_candidate, base[:, None] + estimates, -jnp.inf)
    level = Level(chosen, suffixes, found.tokens, scores, found.matches, found.places, found.sources)
    return level, jnp.all(jnp.arange(earlier.size) != chosen[:, None], axis=0)


def candidates(
    tables: dict[str, Any],
    state: State,
    context: Context,
    suffixes: jax.Array,
    sources: str,
    max_match: int,
    num_successors: int = NUM_SUCCESSORS,
) -> Candidates:
    """Asks the sources what may follow texts that end with int32[Q, MAX_MATCH] suffixes."""
    num_texts = suffixes.shape[0]
    last = suffixes[:, -1]
    blank = jnp.zeros((num_texts, 0), jnp.int32)
    following, places, matches = blank, blank, blank
    if "c" in sources:
        following, places, matches = text_index.matches(state.seen, suffixes, max_match)
    asked = [letter for letter in TABLES if letter in sources]
    no_answers = Successors(jnp.zeros((num_texts, 0, 0), jnp.int32), jnp.zeros((num_texts, 0, 0)), blank, blank)
    answers = successor_table.lookup(tables["successors"], suffixes, num_successors) if asked else no_answers
    recycled = recycled_rows.lookup(state.recycled, suffixes[:, -2:]) if "r" in sources else None
    no_token = jnp.full((num_texts, 1), NO_TOKEN)  # the last place: that no candidate is right
    from_rows = blank if recycled is None else recycled.tokens
    tokens = jnp.concatenate([following, answers.tokens.reshape(num_texts, -1), from_rows, no_token], axis=1)
    num_matches, number = following.shape[1], np.arange(tokens.shape[1])

    # What the context says of each token, over the places R that it followed: how many reach each match length, and how many
    # of its places are earlier ones, in words of several counts; the longest match and its latest place.
    of_context = tokens[:, :, None] == following[:, None]  # [Q, I, R]
    lengths = np.array(MATCH_LENGTHS).reshape(-1, COUNTS_A_WORD, 1)
    reaches = (matches[:, None, None] >= lengths).astype(jnp.int32)  # [Q, 2, 4, R]
    shifts = COUNT_BITS * np.arange(COUNTS_A_WORD, dtype=np.int32)
    words = jnp.sum(reaches << shifts[:, None], axis=2)  # [Q, 2, R]
    is_earlier = (number[:num_matches] < number[:, None])[:, None]  # [I, 1, R]
    words = words[:, None] + (is_earlier << COUNT_BITS * COUNTS_A_WORD).astype(np.int32)
    words = jnp.sum(jnp.where(of_context[:, :, None], words, 0), axis=-1)  # [Q, I, 2]
    counts = (words[..., None] >> shifts & (1 << COUNT_BITS) - 1).reshape(*tokens.shape, -1)  # [Q, I, 8]
    totals = jnp.sum(reaches, axis=-1).reshape(num_texts, -1).astype(jnp.float32)  # [Q, 8]
    rank = matches << PLACE_BITS | places & NEWEST_PLACE  # by the match's length, then the latest
    best = jnp.max(jnp.where(of_context, rank[:, None, :], -1), axis=-1, initial=-1)  # [Q, I]
    longest = jnp.where(best >= 0, best >> PLACE_BITS, 0)
    is_known = words[..., 0] >> COUNT_BITS * COUNTS_A_WORD > 0

    # And the tables and rows, each of which lists a token once.
    by_table = _listed(tokens[:, None], answers.tokens, answers.probabilities)  # [Q, T, I]
    probabilities = {letter: by_table[:, index] for index, letter in enumerate(asked)}
    for index, values in enumerate(probabilities.values(), 1):
        is_known |= (values > 0) & (number >= num_matches + index * answers.tokens.shape[2])
    is_candidate = (tokens != NO_TOKEN) & ~is_known

    none = jnp.zeros(num_texts)
    of_class = functools.partial(jax.nn.one_hot, num_classes=len(TOKEN_CLASSES))
    classes = tables["classes"]
    class_of = lambda token: classes[token % classes.shape[0]]  # noqa: E731
    node_features = [jnp.log1p(totals) * 0.5, of_class(class_of(last))]
    for letter in TABLES:
        values = (none,) * 3
        if letter in asked:
            index = asked.index(letter)
            first = jnp.log(answers.probabilities[:, index, 0] + 1e-3)
            values = (answers.orders[:, index], jnp.log1p(answers.counts[:, index]), first)
        node_features.append(jnp.stack(values, axis=1) * jnp.array([0.3, 0.3, 0.5]))
    node_features += [jnp.broadcast_to(x, (num_texts, x.shape[0])) for x in (text_sizes(context), state.hit_rates)]

    shared = jnp.concatenate(node_features, axis=1)
    share = jnp.asarray(LOG_COUNTS)[counts] - jnp.log1p(totals)[:, None]
    features = [jnp.where(totals[:, None, :] > 0, share, 0.0)]
    for letter in TABLES:
        values = probabilities.get(letter, jnp.zeros(tokens.shape))
        features.append(jnp.log(values + 1e-3)[..., None] * 0.5)
    is_none = jnp.broadcast_to(number == number[-1], tokens.shape)
    single = [
        class_of(tokens) == class_of(last)[:, None],
        tokens == last[:, None],
        jnp.log1p(state.seen.occurrences.astype(jnp.float32))[tokens % NUM_BUCKETS],
    ]
    own = jnp.concatenate([of_class(class_of(tokens)), jnp.stack([x.astype(jnp.float32) for x in single], axis=-1)], axis=-1)
    features.append(jnp.where(is_none[..., None], 0.0, own))
    features.append(is_none.astype(jnp.float32)[..., None])
    # In rows, as the network's product takes them: a CPU then makes them part by part, and not choosing one for every number.
    features = jnp.concatenate([part.reshape(tokens.size, -1) for part in features], axis=-1).reshape(*tokens.shape, -1)
    features = jnp.concatenate([features, jnp.broadcast_to(shared[:, None], (*tokens.shape, shared.shape[1]))], axis=-1)

    kinds = np.searchsorted(HIT_BOUNDS, np.arange(MAX_MATCH + 1), "right") - 1  # of a match's length
    other_source = jnp.full(tokens.shape, SOURCE_NAMES.index("recycled"))
    for name, letter in (("statistics", "s"), ("model", "m")):
        if letter in asked:
            other_source = jnp.where(probabilities[letter] > 0, SOURCE_NAMES.index(name), other_source)
    best_match = jnp.max(rank, axis=-1, initial=-1)
    favorite = jnp.max(jnp.where(rank == best_match[:, None], following, NO_TOKEN), axis=-1, initial=NO_TOKEN)
    best_length = jnp.maximum(best_match, 0) >> PLACE_BITS
    match_classes = jnp.where(best_length > 0, jnp.asarray(kinds)[best_length] + 1, 0)
    is_of_kind = match_classes[:, None] == jnp.arange(1, len(HIT_BOUNDS) + 1)
    favorites = [jnp.where(is_of_kind, favorite[:, None], NO_TOKEN)]
    favorites += [answers.tokens[:, asked.index(letter), :1] if letter in asked else no_token for letter in TABLES]
    return Candidates(
        tokens=tokens,
        is_candidate=is_candidate,
        matches=longest,
        places=best & NEWEST_PLACE,
        sources=jnp.where(longest > 0, jnp.asarray(kinds)[longest], other_source),
        features=features,
        fixed=_by_hierarchy(counts, totals, probabilities, is_candidate),
        favorites=jnp.concatenate(favorites, axis=1),
        classes=match_classes,
        recycled=recycled,
        recycled_sums=jnp.zeros(tokens.shape) if recycled is None else _listed(tokens, recycled.tokens, recycled.probabilities),
    )


def text_sizes(context: Context) -> jax.Array:
    """float32[2]: features of a text's size, of the answer's and the prompt's."""
    sizes = jnp.stack([context.length - context.prompt_length, context.prompt_length])
    return jnp.log1p(sizes.astype(jnp.float32)) * 0.2


def _listed(tokens: jax.Array, listed: jax.Array, probabilities: jax.Array) -> jax.Array:
    """The probabilities float32[..., I] of tokens int32[..., I] by lists [..., G] that hold a token once or, for 0, not."""
    # Floats that are not negative are ordered as their bits are, and a CPU finds maxima of integers in vector operations.
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)[..., None]
    found = jnp.max(jnp.where(listed[..., None] == tokens[..., None, :], bits, 0), axis=-2, initial=0)
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def _by_hierarchy(counts, totals, probabilities, is_candidate) -> jax.Array:
    """Probabilities float32[Q, I] by a fixed order: the longest match's shares, then what they leave to each table."""
    longest = jnp.maximum(jnp.sum(totals > 0, axis=-1) - 1, 0)  # the index of the longest match's length
    taken = functools.partial(jnp.take_along_axis, axis=-1)
    own = taken(counts, longest[:, None, None])[..., 0] / (taken(totals, longest[:, None]) + 0.5)
    fixed = jnp.where(is_candidate, own, 0.0)
    for values in probabilities.values():
        left = 1 - jnp.sum(fixed, axis=-1, keepdims=True)
        fixed = fixed + jnp.where(is_candidate, left * values, 0.0)
    return fixed


def log_probabilities(tables: dict[str, Any], found: Candidates) -> jax.Array:
    """The log-probability of each candidate, float32[Q, I], by all sources but what was recycled; -inf of other candidates.

    By the network, if the tables hold its weights, else by the hierarchy alone.
    """
    if "weights" not in tables:
        return jnp.log(found.fixed)
    places = np.arange(found.tokens.shape[1])
    num_recycled = 0 if found.recycled is None else found.recycled.tokens.shape[1]
    is_one = (found.is_candidate & (places < places[-1] - num_recycled)) | (places == places[-1])
    return jax.nn.log_softmax(jnp.where(is_one, network(tables["weights"], found.features), -jnp.inf), axis=-1)


def network(net: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    """Scores float32[Q, I], whose softmax are probabilities, from float32[Q, I, F]."""
    activate = lambda x: jnp.maximum(x, 0.01 * x)  # noqa: E731 - leaky ReLU

    def hidden(net, first: jax.Array) -> jax.Array:
        return activate(activate(first) @ net["hidden"] + net["hidden_bias"])

    def in_parts(net, x: jax.Array) -> jax.Array:  # a text's own features once
        own, shared = x[..., :NUM_OWN_FEATURES], x[:, :1, NUM_OWN_FEATURES:]
        of_text = shared @ net["features"][NUM_OWN_FEATURES:] + net["bias"]
        return hidden(net, own @ net["features"][:NUM_OWN_FEATURES] + of_text) @ net["out"]

    def at_once(net, x: jax.Array) -> jax.Array:  # on an accelerator a launch costs more than the work that it saves
        return jnp.sum(hidden(net, x @ net["features"] + net["bias"]) * net["out"], axis=-1)

    return jax.lax.platform_dependent(net, features, cpu=in_parts, default=at_once)
