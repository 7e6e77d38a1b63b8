"""The hierarchy in one trie: every source competes for every node, by the estimated probability that it is accepted.

Sources, in order of temporal locality (Hierarchy Drafting's; see hd.py):

    c  context-dependent: where the last tokens stood before in the text, with the length of the match
    m  model-dependent: a successor table of the model's own text
    s  statistics-dependent: a successor table of a corpus

From a node's path, each source is asked which tokens may come next. The answers are merged by token, and a small network
estimates each one's probability, that none of them is right included, from counts alone: how often the context continued
so after a match of 1, 2, .. 16 tokens; the tables' probabilities, orders and counts; how often each source was right lately
in this text, by match length; the kinds of the tokens. A path's probability is the product along it; so sources
mix along one path. The tree is the N - 1 likeliest nodes of all that were looked at.

Nodes are expanded in rounds, the likeliest `width` ones at a time, in vector operations of fixed shapes. After the last round,
nodes that a match in the context proposed are prolonged by what follows that match: so a long copy is as deep as it is likely.

What is learned where: the network's weights are shipped (experiments/fit_hd_tree.py fits them on recorded text of a model);
the sources' hit rates are learned while decoding, and are inputs of it.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from hd_jax import draft_tree
from hd_jax.databases.collection import Databases
from hd_jax.databases.successor_table import lookup
from hd_jax.draft_tree import NO_PARENT, NO_SOURCE, NO_TOKEN, UNUSED, DraftTree
from hd_jax.drafters.base import Context, Drafter, Feedback
from hd_jax.models.tokenizer import TOKEN_CLASSES

WEIGHTS = pathlib.Path(__file__).parents[1] / "assets" / "hd_tree.safetensors"
SUBSETS = ("c", "cm", "cs", "ms", "cms")  # of sources, each with weights of its own
MATCH_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # at which counts are taken
MAX_MATCH = MATCH_LENGTHS[-1]
# What a source's hit rate is kept for: the context by the length of its longest match, and the two tables.
HIT_BOUNDS = (1, 3, 6, 10)  # shortest matches of the context's classes
SOURCE_NAMES = ("context 1-2", "context 3-5", "context 6-9", "context 10+", "model", "statistics")
START_HIT_RATES = (0.30, 0.60, 0.75, 0.90, 0.45, 0.45)
HIT_RATE_STEP = 0.08  # weight of the newest outcome
RING = 16  # latest places that are remembered of a key
SHORT_KEY, LONG_KEY = 1, 3  # tokens of the two keys: places of short and of long matches do not push one another out
NUM_BUCKETS = 4096  # of each ring table, and of the occurrence counts
NUM_SUCCESSORS = 16  # of a context in the tables
TAIL_STARTS, TAIL_LENGTH = 16, 10  # nodes that are prolonged, and by how much
# The databases of "m" and "s", and how their successor tables are made.
TABLES = {
    "m": ("model_text", {"num_successors": NUM_SUCCESSORS, "min_count": 1, "max_bytes": 256 * 2**20}),
    "s": ("statistics", {"num_successors": NUM_SUCCESSORS, "min_count": 2, "max_bytes": 256 * 2**20}),
}


class Ring(NamedTuple):
    """The latest places of every key."""

    places: jax.Array  # int32[NUM_BUCKETS, RING], or -1
    fills: jax.Array  # int32[NUM_BUCKETS], places ever written


class State(NamedTuple):
    """One row's text, so indexed that a match is found without reading it through."""

    text: jax.Array  # int32[T], a ring: place p stands at p % T
    num_seen: jax.Array  # int32[], tokens ever written
    start: jax.Array  # int32[], the place where the request begins
    short: Ring  # places by their last token
    long: Ring  # by their last LONG_KEY tokens
    occurrences: jax.Array  # int32[NUM_BUCKETS], of each token (modulo NUM_BUCKETS) in the request
    hit_rates: jax.Array  # float32[6], as SOURCE_NAMES


class Candidates(NamedTuple):
    """What may follow each of Q texts. Of I places, some hold no candidate; place I is that no candidate is right."""

    tokens: jax.Array  # int32[Q, I]
    is_candidate: jax.Array  # bool[Q, I], each token once
    matches: jax.Array  # int32[Q, I], longest match of the context that was continued so; 0 for none
    places: jax.Array  # int32[Q, I], the latest place of such a match
    sources: jax.Array  # int32[Q, I], the first source that proposes the token, as SOURCE_NAMES
    node_features: jax.Array  # float32[Q, Fn]
    features: jax.Array  # float32[Q, I + 1, Fc]
    fixed: jax.Array  # float32[Q, I], probabilities by the hierarchy alone
    favorites: jax.Array  # int32[Q, 6], each source's best guess, or NO_TOKEN


def hd_tree(
    databases: Databases | None = None,
    *,
    sources: str = "cms",
    estimates: str = "learned",
    max_match: int = MAX_MATCH,
    rounds: int = 6,
    width: int | None = None,
    min_probability: float = 0.0,
    history: int = 8192,
    remember: int = 0,
    num_nodes: int = 64,
) -> Drafter:
    """The hierarchy in one trie.

    Args:
      databases: with text of the model (`model_text`) where `sources` has "m", and D_s where it has "s".
      sources: which are asked; one of SUBSETS.
      estimates: "learned", or "fixed": by the hierarchy alone, each source getting the probability that those before it left.
      max_match: longest match of the context that is told apart from longer ones, at most MAX_MATCH tokens.
      rounds: of expansion; nodes are at most this deep, and TAIL_LENGTH more where a match is prolonged.
      width: nodes that are expanded in a round, at most NUM_SUCCESSORS; by default a quarter of the drafted nodes, from 2 to 8.
      min_probability: nodes that are reached with less are left out.
      history: T, tokens of prompt and answer that are remembered.
      remember: tokens of earlier requests that a session remembers besides; 0 for none. They count as the context's own,
        which the weights were not fitted for: on recorded answers of Vicuna-7B that costs more than it brings.
      num_nodes: N, the root included.

    Raises:
      ValueError: an option is out of range, or there is no database that `sources` names.
    """
    letters = "".join(letter for letter in "cms" if letter in sources)
    if sorted(letters) != sorted(sources) or letters not in SUBSETS:
        raise ValueError(f"hd_tree's sources are one of {', '.join(SUBSETS)}, not {sources!r}")
    if estimates not in ("learned", "fixed"):
        raise ValueError(f"hd_tree's estimates are 'learned' or 'fixed', not {estimates!r}")
    width = min(max((num_nodes - 1) // 4, 2), 8) if width is None else width
    least = {"rounds": (rounds, 1), "width": (width, 1), "num_nodes": (num_nodes, 2), "remember": (remember, 0)}
    least |= {"history": (history, rounds + TAIL_LENGTH + MAX_MATCH), "max_match": (max_match, 1)}
    for name, (value, bound) in least.items():
        if value < bound:
            raise ValueError(f"hd_tree's {name} must be at least {bound}, not {value}")
    if width > NUM_SUCCESSORS:
        raise ValueError(f"hd_tree's width is at most {NUM_SUCCESSORS}, not {width}")
    if max_match > MAX_MATCH or not 0 <= float(min_probability) < 1:
        raise ValueError(f"hd_tree's max_match is at most {MAX_MATCH} and min_probability in [0, 1)")
    databases = databases or Databases()
    classes = databases.token_classes
    if classes is None:
        classes = np.full(1, TOKEN_CLASSES.index("other"))
    tables: dict[str, Any] = {"classes": jnp.asarray(classes, jnp.int32)}
    if estimates == "learned":
        tables["weights"] = weights(letters)
    tables |= {letter: databases.successors(kind, **making) for letter, (kind, making) in TABLES.items() if letter in letters}
    init, draft, update, renew = _functions(
        letters, estimates == "learned", max_match, rounds, width, float(min_probability), history, remember, num_nodes
    )
    return Drafter(
        "hd_tree",
        num_nodes=num_nodes,
        max_depth=min(rounds + TAIL_LENGTH * ("c" in letters), num_nodes - 1),
        source_names=SOURCE_NAMES,
        draft=draft,
        init=init,
        update=update,
        renew=renew,
        tables=tables,
    )


@functools.cache
def weights(sources: str) -> dict[str, jax.Array]:
    """The shipped weights for a set of sources."""
    named = [(*name.split("."), array) for name, array in load_file(WEIGHTS).items()]
    return {name: jnp.asarray(array) for subset, name, array in named if subset == sources}


@functools.lru_cache
def _functions(
    sources: str,
    is_learned: bool,
    max_match: int,
    rounds: int,
    width: int,
    min_probability: float,
    history: int,
    remember: int,
    num_nodes: int,
):
    def init(tables, context: Context) -> State:
        del tables
        return read(blank_state(history + remember), context)

    def renew(tables, state: State, context: Context) -> State:
        if remember:
            return resume(state, context)
        return init(tables, context)._replace(hit_rates=state.hit_rates)

    def update(tables, state: State, context: Context, feedback: Feedback) -> State:
        max_appended = feedback.path.shape[0]
        slots = context.length - feedback.num_appended + jnp.arange(max_appended)
        tokens = context.tokens[jnp.clip(slots, 0, context.tokens.shape[0] - 1)]
        return learn(tables, state, context, tokens, feedback.num_appended, sources, max_match)

    def draft(tables, state: State, context: Context) -> DraftTree:
        pool: list[dict[str, jax.Array]] = []  # of each round, the nodes that it found
        expanded: list[jax.Array] = []  # of each round, the ends of the texts that it asked about, int32[width, MAX_MATCH]
        # This round's ends, and the nodes there: their numbers in the pool, depths, log-probabilities. First, the root.
        suffixes, parents = recent(state)[None], jnp.full(1, NO_PARENT)
        depth_of, base = jnp.zeros(1, jnp.int32), jnp.zeros(1)
        is_expanded = jnp.zeros(0, bool)
        for index in range(rounds):
            found = candidates(tables, state, context, suffixes, sources, max_match)
            logits = log_probabilities(tables["weights"], found) if is_learned else jnp.log(found.fixed)
            scores = jnp.where(found.is_candidate, base[:, None] + logits, -jnp.inf)
            shape = scores.shape
            nodes = {
                "scores": scores,
                "tokens": found.tokens,
                "sources": found.sources,
                "matches": found.matches,
                "places": found.places,
                "parents": jnp.broadcast_to(parents[:, None], shape),
                "depths": jnp.broadcast_to(depth_of[:, None] + 1, shape),
                "origins": jnp.broadcast_to(index * width + jnp.arange(shape[0])[:, None], shape),
            }
            pool.append({name: values.reshape(-1) for name, values in nodes.items()})
            expanded.append(jnp.broadcast_to(suffixes, (width, MAX_MATCH)))
            is_expanded = jnp.concatenate([is_expanded, jnp.zeros(scores.size, bool)])
            if index < rounds - 1:
                every = {name: jnp.concatenate([part[name] for part in pool]) for name in pool[0]}
                base, chosen = jax.lax.top_k(jnp.where(is_expanded, -jnp.inf, every["scores"]), width)
                is_expanded = is_expanded.at[chosen].set(True)
                shifted = jnp.concatenate(expanded)[every["origins"][chosen]][:, 1:]
                suffixes = jnp.concatenate([shifted, every["tokens"][chosen][:, None]], axis=1)
                parents, depth_of = chosen, every["depths"][chosen]
        every = {name: jnp.concatenate([part[name] for part in pool]) for name in pool[0]}
        if "c" in sources:
            lengths = np.arange(MAX_MATCH + 1)
            fixed = jnp.log(jnp.asarray(lengths / (lengths + 1)))
            every = _with_tails(tables["weights"]["prolonged"] if is_learned else fixed, state, every, is_expanded)
        return _likeliest(context.root, every, min_probability, num_nodes)

    return init, draft, update, renew


def blank_state(size: int) -> State:
    """Nothing seen yet, and room for `size` tokens."""
    ring = Ring(jnp.full((NUM_BUCKETS, RING), -1, jnp.int32), jnp.zeros(NUM_BUCKETS, jnp.int32))
    return State(
        text=jnp.full(size, NO_TOKEN, jnp.int32),
        num_seen=jnp.int32(0),
        start=jnp.int32(0),
        short=ring,
        long=ring,
        occurrences=jnp.zeros(NUM_BUCKETS, jnp.int32),
        hit_rates=jnp.asarray(START_HIT_RATES, jnp.float32),
    )


def read(state: State, context: Context) -> State:
    """The state after a prompt; of one that is longer than the ring, its end."""
    size = min(state.text.shape[0], context.tokens.shape[0])
    start = jnp.maximum(context.length - size, 0)
    tokens = jax.lax.dynamic_slice_in_dim(context.tokens, start, size)
    return _append(state, tokens, context.length - start)


def resume(state: State, context: Context) -> State:
    """The state after another prompt. One that goes on from the last request, as in a chat, is read from there on."""
    size = state.text.shape[0]
    offsets = jnp.arange(min(size, context.tokens.shape[0]))
    num_known = state.num_seen - state.start
    is_known = (offsets >= num_known) | (state.text[(state.start + offsets) % size] == context.tokens[offsets])
    goes_on = jnp.all(is_known) & (num_known <= jnp.minimum(len(offsets), context.length))
    fresh = state._replace(start=state.num_seen, occurrences=jnp.zeros_like(state.occurrences))
    state = jax.tree.map(functools.partial(jnp.where, goes_on), state, fresh)
    num_known = jnp.where(goes_on, num_known, 0)
    return read(state, context._replace(tokens=jnp.roll(context.tokens, -num_known), length=context.length - num_known))


def learn(
    tables, state: State, context: Context, tokens: jax.Array, num_tokens: jax.Array, sources: str, max_match: int
) -> State:
    """The state after the first `num_tokens` of int32[P] `tokens`: hit rates by what was known before, then the text."""
    num_places = tokens.shape[0]
    line = jnp.concatenate([recent(state), tokens])
    before = line[jnp.arange(num_places)[:, None] + jnp.arange(MAX_MATCH)]  # int32[P, H], the text before each token
    favorites = candidates(tables, state, context, before, sources, max_match).favorites
    is_asked = (favorites != NO_TOKEN) & (jnp.arange(num_places) < num_tokens)[:, None]
    is_hit = is_asked & (favorites == tokens[:, None])
    # A moving average over the outcomes in their order: each weighs less by those that came after it.
    num_asked = jnp.sum(is_asked, axis=0)
    num_after = num_asked - jnp.cumsum(is_asked, axis=0)
    kept = 1 - HIT_RATE_STEP
    hit_rates = state.hit_rates * kept**num_asked + HIT_RATE_STEP * jnp.sum(is_hit * kept**num_after, axis=0)
    return _append(state, tokens, num_tokens)._replace(hit_rates=hit_rates)


def recent(state: State) -> jax.Array:
    """int32[MAX_MATCH]: the newest tokens, the newest last; NO_TOKEN where the text has not so many."""
    places = state.num_seen - MAX_MATCH + jnp.arange(MAX_MATCH)
    return jnp.where(places >= 0, state.text[places % state.text.shape[0]], NO_TOKEN)


def _append(state: State, tokens: jax.Array, num_tokens: jax.Array) -> State:
    size = state.text.shape[0]
    offsets = jnp.arange(tokens.shape[0])
    is_new = offsets < num_tokens
    text = state.text.at[jnp.where(is_new, (state.num_seen + offsets) % size, size)].set(tokens, mode="drop")
    ends = state.num_seen + offsets - 1  # a place is indexed once the token behind it is known
    keys = text[(ends[:, None] - jnp.arange(LONG_KEY)) % size]
    is_new_end = is_new & (ends >= 0)
    return state._replace(
        text=text,
        num_seen=state.num_seen + num_tokens,
        short=_pushed(state.short, _bucket(keys[:, :SHORT_KEY]), ends, is_new_end),
        long=_pushed(state.long, _bucket(keys), ends, is_new_end),
        occurrences=state.occurrences.at[jnp.where(is_new, tokens % NUM_BUCKETS, NUM_BUCKETS)].add(1, mode="drop"),
    )


def _bucket(newest_first: jax.Array) -> jax.Array:
    """int32[...] of int32[..., k] keys."""
    value = jnp.uint32(0x9E3779B1)
    for column in range(newest_first.shape[-1]):
        value = (value ^ newest_first[..., column].astype(jnp.uint32)) * jnp.uint32(0x85EBCA6B)
        value = value ^ (value >> 15)
    return (value % NUM_BUCKETS).astype(jnp.int32)


def _pushed(ring: Ring, buckets: jax.Array, places: jax.Array, is_new: jax.Array) -> Ring:
    """The ring after int32[P] places in their order, those that are new."""
    by_bucket = jnp.argsort(jnp.where(is_new, buckets, NUM_BUCKETS), stable=True)
    buckets, places = jnp.where(is_new, buckets, NUM_BUCKETS)[by_bucket], places[by_bucket]
    first = jnp.searchsorted(buckets, buckets, side="left")
    num_same = jnp.searchsorted(buckets, buckets, side="right") - first
    rank = jnp.arange(len(buckets)) - first
    slots = (ring.fills[jnp.minimum(buckets, NUM_BUCKETS - 1)] + rank) % RING
    is_kept = rank >= num_same - RING  # one that the same call overwrites is not written
    return Ring(
        places=ring.places.at[jnp.where(is_kept, buckets, NUM_BUCKETS), slots].set(places, mode="drop"),
        fills=ring.fills.at[buckets].add(1, mode="drop"),
    )


def candidates(
    tables: dict[str, Any], state: State, context: Context, suffixes: jax.Array, sources: str, max_match: int
) -> Candidates:
    """Asks the sources what may follow texts that end with int32[Q, MAX_MATCH] suffixes."""
    num_texts = suffixes.shape[0]
    last = suffixes[:, -1]
    blank = jnp.zeros((num_texts, 0), jnp.int32)
    following, places, matches = blank, blank, blank
    if "c" in sources:
        following, places, matches = _matches(state, suffixes, max_match)
    answers = {letter: lookup(tables[letter], suffixes) for letter in "ms" if letter in sources}
    tokens = jnp.concatenate([following, *(answer.tokens for answer in answers.values())], axis=1)
    num_matches = following.shape[1]
    is_same = (tokens[:, :, None] == tokens[:, None, :]) & (tokens != NO_TOKEN)[:, None, :]  # [Q, I, I]
    is_earlier = np.tri(tokens.shape[1], k=-1, dtype=bool)
    is_candidate = (tokens != NO_TOKEN) & ~jnp.any(is_same & is_earlier, axis=-1)

    # Each token's places in the context: counts by match length, the longest match and its latest place.
    of_context = is_same[:, :, :num_matches]  # [Q, I, R]
    reaches = (matches[:, :, None] >= np.array(MATCH_LENGTHS)).astype(jnp.float32)  # [Q, R, 8]
    counts = of_context.astype(jnp.float32) @ reaches  # [Q, I, 8]
    totals = jnp.sum(reaches, axis=1)  # [Q, 8]
    rank = matches * (1 << 24) + places % (1 << 24)  # 16 million places: by the match's length, then the latest
    best = jnp.max(jnp.where(of_context, rank[:, None, :], -1), axis=-1, initial=-1)  # [Q, I]
    longest = jnp.where(best >= 0, best >> 24, 0)

    # The tables' probabilities of each token.
    first, probabilities = num_matches, {}
    for letter, answer in answers.items():
        part = is_same[:, :, first : first + answer.tokens.shape[1]]
        probabilities[letter] = jnp.sum(part * answer.probabilities[:, None, :], axis=-1)
        first += answer.tokens.shape[1]

    none = jnp.zeros(num_texts)
    of_class = functools.partial(jax.nn.one_hot, num_classes=len(TOKEN_CLASSES))
    classes = tables["classes"]
    class_of = lambda token: classes[token % classes.shape[0]]  # noqa: E731
    node_features = [jnp.log1p(totals) * 0.5, of_class(class_of(last))]
    for letter in "ms":
        answer = answers.get(letter)
        values = (
            (answer.orders, jnp.log1p(answer.counts), jnp.log(answer.probabilities[:, 0] + 1e-3)) if answer else (none,) * 3
        )
        node_features.append(jnp.stack(values, axis=1) * jnp.array([0.3, 0.3, 0.5]))
    lengths = jnp.log1p(jnp.stack([context.length - context.prompt_length, context.prompt_length]).astype(jnp.float32)) * 0.2
    node_features += [jnp.broadcast_to(x, (num_texts, x.shape[0])) for x in (lengths, state.hit_rates)]

    # The last place is that no candidate is right: it has been counted nowhere.
    with_none = lambda values: jnp.pad(values, ((0, 0), (0, 1)) + ((0, 0),) * (values.ndim - 2))  # noqa: E731
    share = jnp.log((with_none(counts) + 0.1) / (totals[:, None, :] + 1))
    features = [jnp.where(totals[:, None, :] > 0, share, 0.0)]
    for letter in "ms":
        values = probabilities.get(letter, jnp.zeros(tokens.shape))
        features.append(jnp.log(with_none(values) + 1e-3)[..., None] * 0.5)
    features.append(with_none(of_class(class_of(tokens))))
    single = [
        class_of(tokens) == class_of(last)[:, None],
        tokens == last[:, None],
        jnp.log1p(state.occurrences[tokens % NUM_BUCKETS].astype(jnp.float32)),
    ]
    features.append(with_none(jnp.stack([x.astype(jnp.float32) for x in single], axis=-1)))
    is_none = jnp.arange(tokens.shape[1] + 1) == tokens.shape[1]
    features.append(jnp.broadcast_to(is_none[None, :, None].astype(jnp.float32), (num_texts, len(is_none), 1)))

    kinds = np.searchsorted(HIT_BOUNDS, np.arange(MAX_MATCH + 1), "right") - 1  # of a match's length
    in_m = probabilities.get("m", jnp.zeros(tokens.shape)) > 0
    from_tables = jnp.where(in_m, SOURCE_NAMES.index("model"), SOURCE_NAMES.index("statistics"))
    best_match = jnp.max(rank, axis=-1, initial=-1)
    favorite = jnp.max(jnp.where(rank == best_match[:, None], following, NO_TOKEN), axis=-1, initial=NO_TOKEN)
    is_matched = (best_match >> 24 > 0)[:, None]
    is_of_kind = is_matched & (jnp.asarray(kinds)[jnp.maximum(best_match, 0) >> 24][:, None] == jnp.arange(len(HIT_BOUNDS)))
    favorites = [jnp.where(is_of_kind, favorite[:, None], NO_TOKEN)]
    favorites += [answers[x].tokens[:, :1] if x in answers else jnp.full((num_texts, 1), NO_TOKEN) for x in "ms"]
    return Candidates(
        tokens=tokens,
        is_candidate=is_candidate,
        matches=longest,
        places=best % (1 << 24),
        sources=jnp.where(longest > 0, jnp.asarray(kinds)[longest], from_tables),
        node_features=jnp.concatenate(node_features, axis=1),
        features=jnp.concatenate(features, axis=-1),
        fixed=_by_hierarchy(counts, totals, probabilities, is_candidate),
        favorites=jnp.concatenate(favorites, axis=1),
    )


def _matches(state: State, suffixes: jax.Array, max_match: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What followed the ends of texts earlier: tokens int32[Q, 2 RING] (or NO_TOKEN), places, and matches' lengths."""
    size = state.text.shape[0]
    newest_first = suffixes[:, ::-1]
    short = state.short.places[_bucket(newest_first[:, :SHORT_KEY])]
    long = state.long.places[_bucket(newest_first[:, :LONG_KEY])]
    places = jnp.concatenate([short, long], axis=1)
    num_compared = max(max_match, LONG_KEY)
    back = jnp.arange(num_compared)
    stood = places[:, :, None] - back
    is_equal = (state.text[stood % size] == newest_first[:, None, :num_compared]) & (
        stood >= jnp.maximum(state.num_seen - size, 0)
    )
    matches = jnp.sum(jnp.cumprod(is_equal.astype(jnp.int32), axis=-1), axis=-1)
    is_long = np.arange(2 * RING) >= RING
    matches = jnp.where((matches >= LONG_KEY) == is_long, matches, 0)  # each place in one of the rings
    matches = jnp.minimum(matches, max_match)
    return jnp.where(matches > 0, state.text[(places + 1) % size], NO_TOKEN), places, matches


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


def log_probabilities(net: dict[str, jax.Array], found: Candidates) -> jax.Array:
    """The estimated log-probability of each candidate, float32[Q, I]; -inf where there is none."""
    scores = network(net, found.node_features, found.features)
    is_one = jnp.pad(found.is_candidate, ((0, 0), (0, 1)), constant_values=True)
    return jax.nn.log_softmax(jnp.where(is_one, scores, -jnp.inf), axis=-1)[:, :-1]


def network(net: dict[str, jax.Array], node_features: jax.Array, features: jax.Array) -> jax.Array:
    """Scores float32[Q, I + 1], whose softmax are probabilities, from float32[Q, Fn] and float32[Q, I + 1, Fc]."""
    relu = functools.partial(jax.nn.leaky_relu, negative_slope=0.01)
    hidden = relu(features @ net["features"] + (node_features @ net["node_features"] + net["bias"])[:, None, :])
    return relu(hidden @ net["hidden"] + net["hidden_bias"]) @ net["out"]


def _with_tails(
    prolonged: jax.Array, state: State, every: dict[str, jax.Array], is_expanded: jax.Array
) -> dict[str, jax.Array]:
    """The pool with the likeliest unexpanded nodes of the context's prolonged by what followed their matches."""
    size = state.text.shape[0]
    is_open = ~is_expanded & (every["matches"] > 0)
    scores, starts = jax.lax.top_k(jnp.where(is_open, every["scores"], -jnp.inf), TAIL_STARTS)
    ahead = jnp.arange(1, TAIL_LENGTH + 1)
    places = every["places"][starts][:, None] + 1 + ahead  # the node itself stands one behind its match
    matches = jnp.minimum(every["matches"][starts][:, None] + ahead, MAX_MATCH)
    steps = jnp.where(places < state.num_seen, prolonged[matches], -jnp.inf)
    numbers = every["scores"].shape[0] + jnp.arange(TAIL_STARTS * TAIL_LENGTH).reshape(TAIL_STARTS, TAIL_LENGTH)
    tails = {
        "scores": scores[:, None] + jnp.cumsum(steps, axis=1),
        "tokens": state.text[places % size],
        "sources": jnp.broadcast_to(every["sources"][starts][:, None], places.shape),
        "parents": jnp.concatenate([starts[:, None], numbers[:, :-1]], axis=1),
        "depths": every["depths"][starts][:, None] + ahead,
    }
    return {name: jnp.concatenate([every[name], values.reshape(-1)]) for name, values in tails.items()}


def _likeliest(root: jax.Array, every: dict[str, jax.Array], min_probability: float, num_nodes: int) -> DraftTree:
    """The tree of the pool's likeliest nodes. A node is no likelier than its parent; of equals the shallower comes first."""
    floor = np.log(min_probability) if min_probability else -np.inf
    scores = jnp.where(every["scores"] > floor, every["scores"] - 1e-4 * every["depths"], -jnp.inf)
    short = max(num_nodes - 1 - scores.shape[0], 0)
    best, chosen = jax.lax.top_k(jnp.pad(scores, (0, short), constant_values=-jnp.inf), num_nodes - 1)
    is_used = best > -jnp.inf
    chosen = jnp.minimum(chosen, scores.shape[0] - 1)
    index = (
        jnp.zeros(scores.shape[0] + 1, jnp.int32)
        .at[jnp.where(is_used, chosen, scores.shape[0])]
        .set(jnp.arange(1, num_nodes, dtype=jnp.int32))
    )
    parents = every["parents"][chosen]
    parents = jnp.where(parents == NO_PARENT, draft_tree.ROOT_INDEX, index[parents])
    blank = draft_tree.root_only(root, num_nodes)
    fill = lambda values, empty: jnp.where(is_used, values, empty).astype(jnp.int32)  # noqa: E731
    return blank._replace(
        tokens=blank.tokens.at[1:].set(fill(every["tokens"][chosen], 0)),
        parents=blank.parents.at[1:].set(fill(parents, UNUSED)),
        sources=blank.sources.at[1:].set(fill(every["sources"][chosen], NO_SOURCE)),
    )
