"""The hierarchy in one trie: every source competes for every node, by the estimated probability that it is accepted.

Sources, in order of temporal locality (Hierarchy Drafting's; see hd.py):

    c  context-dependent: where the last tokens stood before in the text, with the length of the match (text_index.py)
    m  model-dependent: a successor table of the model's own text
    s  statistics-dependent: a successor table of a corpus
    r  recycled: what the model said itself, at any node that it verified, would come after a token pair or a token
       (recycled_rows.py); needs logits, so it is asked only if named

From a node's path, each source is asked which tokens may come next, and a small network estimates each one's probability
(candidates.py). A path's probability is the product along it; so sources mix along one path. The tree is the N - 1 likeliest
nodes of all that were looked at.

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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax import draft_tree, ranking
from hd_jax.databases.collection import Databases
from hd_jax.draft_tree import NO_PARENT, NO_SOURCE, NO_TOKEN, UNUSED, DraftTree
from hd_jax.drafters import candidates, gpu_candidates, recycled_rows, text_index
from hd_jax.drafters.base import Context, Drafter, Feedback
from hd_jax.drafters.candidates import HIT_BOUNDS, NUM_SUCCESSORS, SOURCE_NAMES, SUBSETS, Level, State
from hd_jax.drafters.text_index import MAX_MATCH, TextIndex
from hd_jax.models.tokenizer import TOKEN_CLASSES

START_HIT_RATES = (0.30, 0.60, 0.75, 0.90, 0.45, 0.45)
HIT_RATE_STEP = 0.08  # weight of the newest outcome
MAX_LEARNED = 8  # tokens of a step whose outcomes count, the first ones
NUM_LATER_SUCCESSORS = 12  # of a context in the tables that are looked at below the first level
WIDTH_RATIO = 0.65  # of the nodes that a level expands to those of the level before
TAIL_STARTS, TAIL_LENGTH = 16, 10  # nodes that are prolonged, and by how much


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
        tables["weights"] = candidates.weights(letters.removesuffix("r"))
    tables |= candidates.successor_tables(databases, letters)
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
        num_pooled, num_before = 0, 0  # nodes of all levels, and of all but the last
        level, width = candidates.root_level(state.seen), 1
        for index in range(rounds):
            num_successors = NUM_LATER_SUCCESSORS if index else NUM_SUCCESSORS
            settings = {"sources": sources, "max_match": max_match, "num_successors": num_successors}
            level, is_left = _expand(tables, state, context, level, width=min(width, level.scores.size), **settings)
            if levels:
                levels[-1]["open_scores"] = jnp.where(is_left, levels[-1]["open_scores"], -jnp.inf)
            parents = num_before + level.chosen if levels else jnp.full(1, NO_PARENT)
            shape = level.scores.shape
            nodes = {
                "scores": level.scores,
                "open_scores": jnp.where(level.matches > 0, level.scores, -jnp.inf),  # of those that may be prolonged
                "tokens": level.tokens,
                "sources": level.sources,
                "matches": level.matches,
                "places": level.places,
                "parents": jnp.broadcast_to(parents[:, None], shape),
                "depths": jnp.full(shape, index + 1),
            }
            levels.append({name: values.reshape(-1) for name, values in nodes.items()})
            num_before, num_pooled = num_pooled, num_pooled + level.scores.size
            width = max(round(first_width * WIDTH_RATIO**index), 1)
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
    found = candidates.candidates(tables, state, context, before, sources, max_match, num_successors)
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
        others, own = sum_of(jnp.exp(candidates.log_probabilities(tables, found))), sum_of(found.recycled_sums)
        recycled = recycled_rows.learn_shares(recycled, found.recycled, found.classes, others, own, is_new)
    # Always so; but the writing then waits for the reading, and is not to a copy of the whole index in every step.
    num_tokens = jnp.where(jnp.sum(hit_rates) < jnp.inf, num_tokens, 0)
    return State(text_index.append(state.seen, tokens, num_tokens), hit_rates, recycled)


def _expand(tables: dict[str, Any], state: State, context: Context, before: Level, **settings: Any) -> tuple[Level, jax.Array]:
    """`candidates.expand`, on an NVIDIA GPU by the kernel wherever the network alone estimates."""
    by_operations = functools.partial(candidates.expand, **settings)
    if "weights" not in tables or "r" in settings["sources"]:
        return by_operations(tables, state, context, before)
    by_kernel = functools.partial(gpu_candidates.expand, **settings)
    return jax.lax.platform_dependent(tables, state, context, before, cuda=by_kernel, default=by_operations)


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
    parents = every["parents"][chosen]  # in the pool; in the tree 0, which is the root, or the number of the one that is it
    parents = jnp.sum(jnp.where((parents[:, None] == chosen) & is_used, jnp.arange(1, num_nodes), 0), axis=1)
    blank = draft_tree.root_only(root, num_nodes)
    fill = lambda values, empty: jnp.where(is_used, values, empty).astype(jnp.int32)  # noqa: E731
    return blank._replace(
        tokens=blank.tokens.at[1:].set(fill(every["tokens"][chosen], 0)),
        parents=blank.parents.at[1:].set(fill(parents, UNUSED)),
        sources=blank.sources.at[1:].set(fill(every["sources"][chosen], NO_SOURCE)),
        probabilities=blank.probabilities.at[1:].set(jnp.exp(every["scores"][chosen])),
    )
