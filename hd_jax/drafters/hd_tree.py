"""The hierarchy in one trie: every source competes for every node, by the estimated probability that it is accepted.

Sources, in order of temporal locality (Hierarchy Drafting's; see hd.py):

    c  context-dependent: where the last tokens stood before in the text, with the length of the match (text_index.py)
    m  model-dependent: a successor table of the model's own text
    s  statistics-dependent: a successor table of a corpus
    r  recycled: what the model said itself, at any node that it verified, would come after a token pair or a token
       (recycled_rows.py); needs logits, so it is asked only if named

From a node's path, each source is asked which tokens may come next. The answers are merged by token, and a small network
estimates each one's probability, that none of them is right included, from counts alone: how often the context continued
so after a match of 1, 2, .. 16 tokens; the tables' probabilities, orders and counts; how often each source was right lately
in this text, by match length; the kinds of the tokens. A path's probability is the product along it; so sources
mix along one path. The tree is the N - 1 likeliest nodes of all that were looked at.

Nodes are expanded level by level, the likeliest ones of each, in vector operations of fixed shapes. After the last
level, nodes that a match in the context proposed are prolonged by what follows that match: so a long copy is as deep as it is
likely.

What is learned where: the network's weights are shipped (experiments/fit_hd_tree.py fits them on recorded text of a model);
the sources' hit rates are learned while decoding, and are inputs of it. Recorded text holds no logits, so the network knows
nothing of "r": the estimate is a mixture of its and of what was recycled, whose weights are learned while decoding too.
"""

from __future__ import annotations

import functools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from hd_jax import draft_tree, ranking
from hd_jax.databases import successor_table
from hd_jax.databases.collection import Databases
from hd_jax.databases.successor_table import Successors, SuccessorTable
from hd_jax.draft_tree import NO_PARENT, NO_SOURCE, NO_TOKEN, UNUSED, DraftTree
from hd_jax.drafters import recycled_rows, text_index
from hd_jax.drafters.base import Context, Drafter, Feedback
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
START_HIT_RATES = (0.30, 0.60, 0.75, 0.90, 0.45, 0.45)
HIT_RATE_STEP = 0.08  # weight of the newest outcome
MAX_LEARNED = 8  # tokens of a step whose outcomes count, the first ones
NUM_OWN_FEATURES = len(MATCH_LENGTHS) + 2 + len(TOKEN_CLASSES) + 3 + 1  # of a candidate alone; the others are its text's
NUM_SUCCESSORS, NUM_LATER_SUCCESSORS = 24, 12  # of a context in the tables; those that are looked at below the first level
WIDTH_RATIO = 0.65  # of the nodes that a level expands to those of the level before
TAIL_STARTS, TAIL_LENGTH = 16, 10  # nodes that are prolonged, and by how much
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


def hd_tree(
    databases: Databases | None = None,
    *,
    sources: str = "cms",
    estimates: str = "learned",
    max_match: int = MAX_MATCH,
    rounds: int | None = None,
    width: int | None = None,
    min_probability: float = 0.0,
    history: int = 8192,
    remember: int = 0,
    num_nodes: int = 64,
) -> Drafter:
    """The hierarchy in one trie.

    Args:
      databases: with text of the model (`model_text`) where `sources` has "m", and D_s where it has "s".
      sources: which are asked; one of SUBSETS, and "r" after it for what was recycled, which a session keeps.
      estimates: "learned", or "fixed": by the hierarchy alone, each source getting the probability that those before it left.
      max_match: longest match of the context that is told apart from longer ones, at most MAX_MATCH tokens.
      rounds: levels that are expanded; nodes are at most this deep, and TAIL_LENGTH more where a match is prolonged. By
        default 6, and 7 for 64 nodes or more.
      width: nodes of the first level that are expanded, at most NUM_SUCCESSORS; of each further one WIDTH_RATIO times as many.
        By default two fifths of the drafted ones, from 2 to 16.
      min_probability: nodes that are reached with less are left out.
      history: T, tokens of prompt and answer that are remembered.
      remember: tokens of earlier requests that a session remembers besides; 0 for none. They count as the context's own,
        which the weights were not fitted for: on recorded answers of Vicuna-7B that costs more than it brings.
      num_nodes: N, the root included.

    Raises:
      ValueError: an option is out of range, or there is no database that `sources` names.
    """
    letters = "".join(letter for letter in "cmsr" if letter in sources)
    if sorted(letters) != sorted(sources) or letters.removesuffix("r") not in SUBSETS:
        raise ValueError(f"hd_tree's sources are one of {', '.join(SUBSETS)}, or with r after it, not {sources!r}")
    if estimates not in ("learned", "fixed"):
        raise ValueError(f"hd_tree's estimates are 'learned' or 'fixed', not {estimates!r}")
    rounds = 6 + (num_nodes >= 64) if rounds is None else rounds
    width = min(max(math.ceil(0.4 * (num_nodes - 1)), 2), 16) if width is None else width
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
        tables["weights"] = weights(letters.removesuffix("r"))
    tables |= successor_tables(databases, letters)
    init, draft, update, renew = _functions(
        letters, max_match, rounds, width, float(min_probability), history, remember, num_nodes
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
        num_top_logits=recycled_rows.NUM_SUCCESSORS if "r" in letters else 0,
        tables=tables,
    )


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


@functools.lru_cache
def _functions(
    sources: str,
    max_match: int,
    rounds: int,
    first_width: int,
    min_probability: float,
    history: int,
    remember: int,
    num_nodes: int,
):
    def init(tables, context: Context) -> State:
        del tables
        return read(blank_state(history + remember, "r" in sources), context)

    def renew(tables, state: State, context: Context) -> State:
        return state._replace(seen=text_index.resume(state.seen, context) if remember else init(tables, context).seen)

    def update(tables, state: State, context: Context, feedback: Feedback) -> State:
        max_appended = feedback.path.shape[0]
        slots = context.length - feedback.num_appended + jnp.arange(max_appended)
        tokens = context.tokens[jnp.clip(slots, 0, context.tokens.shape[0] - 1)]
        state = learn(tables, state, context, tokens, feedback.num_appended, sources, max_match)
        if "r" in sources:
            state = state._replace(recycled=recycled_rows.write(state.recycled, context, feedback))
        return state

    def draft(tables, state: State, context: Context) -> DraftTree:
        levels: list[dict[str, jax.Array]] = []  # of each level, the nodes that were found
        num_pooled = 0
        # The ends of the texts that a level asks about, and the nodes there: their numbers in the pool, log-probabilities.
        suffixes, parents, base = text_index.recent(state.seen)[None], jnp.full(1, NO_PARENT), jnp.zeros(1)
        for index in range(rounds):
            num_successors = NUM_LATER_SUCCESSORS if index else NUM_SUCCESSORS
            found = candidates(tables, state, context, suffixes, sources, max_match, num_successors)
            logits = log_probabilities(tables, found)
            if found.recycled is not None:
                logits = recycled_rows.mixed(state.recycled, found.recycled, found.classes, logits, found.recycled_sums)
            scores = jnp.where(found.is_candidate, base[:, None] + logits, -jnp.inf)
            nodes = {
                "scores": scores,
                "tokens": found.tokens,
                "sources": found.sources,
                "matches": found.matches,
                "places": found.places,
                "parents": jnp.broadcast_to(parents[:, None], scores.shape),
                "depths": jnp.full(scores.shape, index + 1),
            }
            nodes = {name: values.reshape(-1) for name, values in nodes.items()}
            is_open = nodes["matches"] > 0
            if index < rounds - 1:
                width = max(round(first_width * WIDTH_RATIO**index), 1)
                base, chosen = ranking.top_k(nodes["scores"], min(width, scores.size))
                is_open &= nodes["scores"] < jnp.min(base)  # not base[-1], for which XLA would sort all scores
                shifted = suffixes[chosen // scores.shape[1], 1:]
                suffixes = jnp.concatenate([shifted, nodes["tokens"][chosen][:, None]], axis=1)
                parents = num_pooled + chosen
            nodes["open_scores"] = jnp.where(is_open, nodes["scores"], -jnp.inf)  # of those that may be prolonged
            levels.append(nodes)
            num_pooled += scores.size
        every = {name: jnp.concatenate([level[name] for level in levels]) for name in levels[0]}
        if "c" in sources:
            lengths = np.arange(MAX_MATCH + 1)
            fixed = jnp.log(jnp.asarray(lengths / (lengths + 1)))
            every = _with_tails(tables["weights"]["prolonged"] if "weights" in tables else fixed, state.seen, every)
        return _likeliest(context.root, every, min_probability, num_nodes)

    return init, draft, update, renew


def blank_state(size: int, is_recycling: bool = False) -> State:
    """Nothing seen yet, and room for `size` tokens."""
    recycled = recycled_rows.empty(len(HIT_BOUNDS) + 1) if is_recycling else ()
    return State(text_index.blank(size), jnp.asarray(START_HIT_RATES, jnp.float32), recycled)


def read(state: State, context: Context) -> State:
    """The state after a prompt; of one that is longer than the index has room for, its end."""
    return state._replace(seen=text_index.read(state.seen, context))


def learn(
    tables, state: State, context: Context, tokens: jax.Array, num_tokens: jax.Array, sources: str, max_match: int
) -> State:
    """The state after the first `num_tokens` of int32[P] `tokens`: what it learns of them by what it knew, then the text."""
    num_places = min(tokens.shape[0], MAX_LEARNED)
    line = jnp.concatenate([text_index.recent(state.seen), tokens])
    before = line[jnp.arange(num_places)[:, None] + jnp.arange(MAX_MATCH)]  # int32[P, H], the text before each token
    num_successors = NUM_SUCCESSORS if "r" in sources else 1  # of the best guesses
    found = candidates(tables, state, context, before, sources, max_match, num_successors)
    favorites, learned, is_new = found.favorites, tokens[:num_places, None], jnp.arange(num_places) < num_tokens
    is_asked = (favorites != NO_TOKEN) & is_new[:, None]
    is_hit = is_asked & (favorites == learned)
    # A moving average over the outcomes in their order: each weighs less by those that came after it.
    num_asked = jnp.sum(is_asked, axis=0)
    num_after = num_asked - jnp.cumsum(is_asked, axis=0)
    kept = 1 - HIT_RATE_STEP
    hit_rates = state.hit_rates * kept**num_asked + HIT_RATE_STEP * jnp.sum(is_hit * kept**num_after, axis=0)
    recycled = state.recycled
    if found.recycled is not None:
        is_right = found.is_candidate & (found.tokens == learned)
        sum_of = lambda values: jnp.sum(jnp.where(is_right, values, 0.0), axis=1)  # noqa: E731
        others, own = sum_of(jnp.exp(log_probabilities(tables, found))), sum_of(found.recycled_sums)
        recycled = recycled_rows.learn_shares(recycled, found.recycled, found.classes, others, own, is_new)
    # Always so; but the writing then waits for the reading, and is not to a copy of the whole index in every step.
    num_tokens = jnp.where(jnp.sum(hit_rates) < jnp.inf, num_tokens, 0)
    return State(text_index.append(state.seen, tokens, num_tokens), hit_rates, recycled)


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
    rank = matches * (1 << 24) + places % (1 << 24)  # 16 million places: by the match's length, then the latest
    best = jnp.max(jnp.where(of_context, rank[:, None, :], -1), axis=-1, initial=-1)  # [Q, I]
    longest = jnp.where(best >= 0, best >> 24, 0)
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
    sizes = jnp.log1p(jnp.stack([context.length - context.prompt_length, context.prompt_length]).astype(jnp.float32)) * 0.2
    node_features += [jnp.broadcast_to(x, (num_texts, x.shape[0])) for x in (sizes, state.hit_rates)]

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
    match_classes = jnp.where(best_match >> 24 > 0, jnp.asarray(kinds)[jnp.maximum(best_match, 0) >> 24] + 1, 0)
    is_of_kind = match_classes[:, None] == jnp.arange(1, len(HIT_BOUNDS) + 1)
    favorites = [jnp.where(is_of_kind, favorite[:, None], NO_TOKEN)]
    favorites += [answers.tokens[:, asked.index(letter), :1] if letter in asked else no_token for letter in TABLES]
    return Candidates(
        tokens=tokens,
        is_candidate=is_candidate,
        matches=longest,
        places=best % (1 << 24),
        sources=jnp.where(longest > 0, jnp.asarray(kinds)[longest], other_source),
        features=features,
        fixed=_by_hierarchy(counts, totals, probabilities, is_candidate),
        favorites=jnp.concatenate(favorites, axis=1),
        classes=match_classes,
        recycled=recycled,
        recycled_sums=jnp.zeros(tokens.shape) if recycled is None else _listed(tokens, recycled.tokens, recycled.probabilities),
    )


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


def _with_tails(prolonged: jax.Array, index: TextIndex, every: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The pool with the likeliest unexpanded nodes of the context's prolonged by what followed their matches."""
    size = index.text.shape[0]
    scores, starts = ranking.top_k(every["open_scores"], TAIL_STARTS)
    ahead = jnp.arange(1, TAIL_LENGTH + 1)
    places = every["places"][starts][:, None] + 1 + ahead  # the node itself stands one behind its match
    matches = jnp.minimum(every["matches"][starts][:, None] + ahead, MAX_MATCH)
    steps = jnp.where(places < index.num_seen, prolonged[matches], -jnp.inf)
    numbers = every["scores"].shape[0] + jnp.arange(TAIL_STARTS * TAIL_LENGTH).reshape(TAIL_STARTS, TAIL_LENGTH)
    tails = {
        "scores": scores[:, None] + jnp.cumsum(steps, axis=1),
        "tokens": index.text[places % size],
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
    best, chosen = ranking.top_k(jnp.pad(scores, (0, short), constant_values=-jnp.inf), num_nodes - 1)
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
        probabilities=blank.probabilities.at[1:].set(jnp.exp(every["scores"][chosen])),
    )
