"""Drafting from suffix matches with frequencies (SuffixDecoding; Oliaro et al. 2024, arXiv 2411.04975).

What followed the newest tokens where they stood before, and how often, is looked for in up to three texts:

    context          the request's own tokens
    earlier answers  what was generated in earlier requests, a ring of the last `remember` tokens
    corpus           a database, asked on the host

For every text and every match length L, the tokens that followed earlier occurrences of the last L tokens form a trie. The
estimate of a node is the share of the occurrences that went on so, which is the product of the conditional frequencies on
its path. With the text "x b c x b c y b d x b":

    L = 1 (b)      c 2/3, d 1/3                mean of both: c 5/6, d 1/6
    L = 2 (x b)    c 1

What is taken from whom:

  - SuffixDecoding (section 4): a per-request and a global structure; estimates by frequency; greedy growth by estimate, at
    most `factor` * L nodes; a tree's score is the sum of its estimates, and the best score over all match lengths and texts
    wins. That is combine="best", the default.
  - SAM-Decoding (Hu et al. 2024, arXiv 2411.10666): a static and a dynamic text are both followed at every step, and a
    longer match counts for more. combine="vote", which is ours, does so without a threshold between the two: all match
    lengths of all texts vote on every node, so that what follows a match of length 8 has eight votes, those of its suffixes
    included. The best nodes by their mean estimate are drafted. `decay` discounts an estimate for every token of depth. In
    the frequencies from outside the request one occurrence is added that nothing follows (for earlier answers at the match,
    for the corpus at every node), so that what was seen once is no certainty.
  - No suffix tree or automaton is kept for the request: comparing the text with itself shifted gives every position's match
    length in a few vector operations. The `num_positions` longest, latest matches are looked at; the number of occurrences
    counts all of them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax import draft_tree
from hd_jax.databases import SEPARATOR
from hd_jax.databases.collection import Databases
from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.draft_tree import NO_SOURCE, NO_TOKEN, UNUSED, DraftTree
from hd_jax.drafters.base import Context, Drafter, Feedback

CORPORA = {"statistics": "statistics", "model": "model_text"}  # the corpus' name, and that of its database
COMBINATIONS = ("best", "vote")
MIN_PROBABILITY = {"best": 0.02, "vote": 0.0}
MAX_CORPUS_MATCH = 6  # longest suffix that the corpus is asked for
MAX_CORPUS_DEPTH = 8  # of what it drafts


class _Memory(NamedTuple):
    """Answers, the oldest of which are overwritten."""

    ring: jax.Array  # int32[R], SEPARATOR between answers, and where nothing stands yet
    next_slot: jax.Array  # int32[], where the oldest token stands, and the next one will
    num_own: jax.Array  # int32[], of the newest tokens that are this request's


class _Growth(NamedTuple):
    """How a tree grows; the options of these names."""

    is_vote: bool
    factor: float
    min_probability: float
    decay: float
    num_nodes: int

    @property
    def smoothing(self) -> int:
        """Added to the counts that estimates from outside the request are divided by."""
        return 1 if self.is_vote else 0


class _Evidence(NamedTuple):
    """What one text says: drafts, and how each match length spreads its probability over them."""

    drafts: jax.Array  # int32[G, C]
    lengths: jax.Array  # int32[G], 0 for an empty place
    weights: jax.Array  # float32[K, G]; an estimate of a node is the sum over the drafts through it
    max_nodes: jax.Array  # int32[K], that combine="best" grants each estimate


def suffix(
    databases: Databases | None = None,
    *,
    corpus: str | None = "statistics",
    combine: str = "best",
    remember: int = 16384,
    factor: float = 8.0,
    min_probability: float | None = None,
    decay: float = 0.8,
    max_match: int = 16,
    max_depth: int = 24,
    num_positions: int = 32,
    num_nodes: int = 64,
) -> Drafter:
    """SuffixDecoding; see the module.

    The corpus is asked on the host before each step.

    Args:
      databases: with the database that `corpus` names.
      corpus: "statistics" (D_s), "model" (D_m, as text), or None or "none".
      combine: "vote" or "best".
      remember: R, tokens of a session's earlier answers that are kept; 0 for none.
      factor: nodes for each token of a match, with combine="best".
      min_probability: least estimate of a drafted node; by default that of MIN_PROBABILITY.
      decay: of an estimate for each token of depth, with combine="vote".
      max_match: longest match that is told apart from longer ones, in tokens.
      max_depth: C, of the tree.
      num_positions: of matches in the context, and of as many in the earlier answers, that are looked at.
      num_nodes: N, the root included.

    Raises:
      ValueError: an option is out of range, or the corpus is missing.
    """
    corpus = None if corpus == "none" else corpus
    if corpus is not None and corpus not in CORPORA:
        raise ValueError(f"suffix's corpus is {', '.join(map(repr, CORPORA))} or None, not {corpus!r}")
    if combine not in COMBINATIONS:
        raise ValueError(f"suffix's combine is {' or '.join(map(repr, COMBINATIONS))}, not {combine!r}")
    min_probability = MIN_PROBABILITY[combine] if min_probability is None else min_probability
    least = {"max_match": (max_match, 1), "max_depth": (max_depth, 1), "num_positions": (num_positions, 1)}
    least |= {"num_nodes": (num_nodes, 2), "remember": (remember, 0)}
    for name, (value, bound) in least.items():
        if value < bound:
            raise ValueError(f"suffix's {name} must be at least {bound}, not {value}")
    if 0 < remember <= max_depth:  # A step's tokens must fit.
        raise ValueError(f"suffix's remember must be 0 or more than max_depth, {max_depth}, not {remember}")
    if not 0 < factor < float("inf"):
        raise ValueError(f"suffix's factor must be positive and finite, not {factor}")
    if not 0 <= min_probability < 1:
        raise ValueError(f"suffix's min_probability must be at least 0 and less than 1, not {min_probability}")
    if not 0 < decay <= 1:
        raise ValueError(f"suffix's decay must be greater than 0 and at most 1, not {decay}")
    growth = _Growth(combine == "vote", float(factor), float(min_probability), float(decay), num_nodes)
    refresh = None
    if corpus is not None:
        databases = databases or Databases()
        database = getattr(databases, CORPORA[corpus])
        depth = min(MAX_CORPUS_DEPTH, max_depth)
        refresh = databases.once(("suffix", corpus, growth, depth), lambda: _corpus_lookup(database, growth, depth))
    init, draft, update, renew = _functions(growth, remember, max_match, max_depth, num_positions, refresh is not None)
    return Drafter(
        "suffix",
        num_nodes=num_nodes,
        max_depth=max_depth,
        source_names=("context", "earlier answers", *([corpus] if corpus else [])),
        draft=draft,
        init=init,
        update=update,
        renew=renew if remember else None,
        refresh=refresh,
    )


@functools.lru_cache
def _functions(growth: _Growth, remember: int, max_match: int, max_depth: int, num_positions: int, has_corpus: bool):
    sizes = (max_match, max_depth, num_positions, growth.factor)

    def init(tables, context: Context) -> _Memory:
        del tables, context
        return _Memory(jnp.full(remember, SEPARATOR, jnp.int32), jnp.int32(0), jnp.int32(0))

    def renew(tables, state: _Memory, context: Context) -> _Memory:
        del tables, context
        ring = state.ring.at[state.next_slot].set(SEPARATOR)
        return _Memory(ring, (state.next_slot + 1) % remember, jnp.int32(0))

    def draft(tables, state: _Memory, context: Context) -> DraftTree:
        del tables
        back = 1 + jnp.arange(max_match)
        newest = jnp.where(back <= context.length, context.tokens[jnp.maximum(context.length - back, 0)], NO_TOKEN)
        found = [_evidence(context.tokens, context.length, newest, 0, *sizes)]
        if remember:
            in_order = jnp.roll(state.ring, -state.next_slot)
            found.append(_evidence(in_order, remember - state.num_own, newest, growth.smoothing, *sizes))
        sources = np.repeat(np.arange(len(found)), [len(e.lengths) for e in found])
        if has_corpus:
            drafts, lengths, masses, at_length = context.host
            drafts = jnp.pad(drafts, ((0, 0), (0, max_depth - drafts.shape[1])), constant_values=NO_TOKEN)
            lengths = jnp.where(at_length == context.length, lengths, 0)
            masses = jnp.where(lengths > 0, masses, 0.0)
            found.append(_Evidence(drafts, lengths, masses[None], jnp.full(1, growth.num_nodes)))
            sources = np.concatenate([sources, np.full(drafts.shape[0], 2)])
        return _grow(context.root, found, jnp.asarray(sources, jnp.int32), growth)

    def update(tables, state: _Memory, context: Context, feedback: Feedback) -> _Memory:
        del tables
        if not remember:
            return state
        place = jnp.arange(feedback.path.shape[0])
        new = context.tokens[context.length - feedback.num_appended + place]
        slots = jnp.where(place < feedback.num_appended, (state.next_slot + place) % remember, remember)
        return _Memory(
            ring=state.ring.at[slots].set(new, mode="drop"),
            next_slot=(state.next_slot + feedback.num_appended) % remember,
            num_own=jnp.minimum(state.num_own + feedback.num_appended, remember),
        )

    return init, draft, update, renew


def _evidence(
    text: jax.Array,
    end: jax.Array,
    newest: jax.Array,
    smoothing: int,
    max_match: int,
    max_depth: int,
    num_positions: int,
    factor: float,
) -> _Evidence:
    """What followed the newest tokens in a text, for each match length; the longest first.

    Args:
      text: int32[S].
      end: int32[]; what stands there and beyond is not drafted.
      newest: int32[max_match], the last tokens, newest first; NO_TOKEN where there are none.
      smoothing: added to the number of occurrences.
      max_match: as the other three, an option of `suffix`.
      max_depth: C.
      num_positions: G.
      factor: nodes for each token of a match.
    """
    num_slots = text.shape[0]
    slots = jnp.arange(num_slots)
    before = jnp.concatenate([jnp.full(max_match, SEPARATOR), text])
    # match[i]: how many of the newest tokens stand just before slot i: those up to the first that does not.
    match = jnp.full(num_slots, max_match)
    for back in range(max_match, 0, -1):
        is_equal = before[max_match - back : max_match - back + num_slots] == newest[back - 1]
        match = jnp.where(is_equal, match, back - 1)
    match = jnp.where(slots < end, match, 0)
    match_lengths = jnp.arange(max_match, 0, -1)
    counts = jnp.sum(match >= match_lengths[:, None], axis=1)
    # By length, then by recency. As float32 (exact below 2^24), since XLA's top_k on CPU is fifty times slower on integers.
    rank = jnp.where(match > 0, match * num_slots + slots, -1).astype(jnp.float32)
    _, found = jax.lax.top_k(rank, min(num_positions, num_slots))
    places = found[:, None] + jnp.arange(max_depth)
    drafts = text[jnp.minimum(places, num_slots - 1)]
    is_within = jnp.cumprod((places < end) & (drafts != SEPARATOR), axis=1)
    is_counted = match[found] >= match_lengths[:, None]
    return _Evidence(
        drafts=drafts,
        lengths=jnp.where(match[found] > 0, jnp.sum(is_within, axis=1), 0),
        weights=is_counted / jnp.maximum(counts + smoothing, 1)[:, None].astype(jnp.float32),
        max_nodes=jnp.floor(factor * match_lengths).astype(jnp.int32),
    )


def _least_so_far(values: jax.Array) -> jax.Array:
    """The running minimum of [K, C, G] along C. Where `jax.lax.cummin` compares all C with all C, this takes log C steps."""
    span = 1
    while span < values.shape[1]:
        values = jnp.concatenate([values[:, :span], jnp.minimum(values[:, span:], values[:, :-span])], axis=1)
        span *= 2
    return values


def _grow(root: jax.Array, found: list[_Evidence], sources: jax.Array, growth: _Growth) -> DraftTree:
    """The tree of the best nodes; sources int32[G] of all drafts, in order."""
    drafts = jnp.concatenate([e.drafts for e in found])
    lengths = jnp.concatenate([e.lengths for e in found])
    (num_drafts, max_depth), num_places = drafts.shape, growth.num_nodes - 1
    if growth.is_vote:
        weights = jnp.concatenate([jnp.sum(e.weights, axis=0) for e in found])[None]
        weights = weights / jnp.maximum(jnp.sum(weights), 1e-9)
        max_nodes = jnp.full(1, num_places)
    else:
        weights = jax.scipy.linalg.block_diag(*(e.weights for e in found))
        max_nodes = jnp.concatenate([e.max_nodes for e in found])
    # shared[g, h]: how many first tokens drafts g and h have in common; the node of (c, h) is that of (c, owner[c, h]).
    depth = jnp.arange(max_depth)
    shared = jnp.min(jnp.where(drafts[:, None] == drafts[None], max_depth, depth), axis=-1)
    shared = jnp.minimum(shared, jnp.minimum(lengths[:, None], lengths[None]))
    is_shared = shared[:, None] > depth[:, None]  # [G, C, G]
    rows = jnp.arange(num_drafts)
    owner = jnp.min(jnp.where(is_shared, rows[:, None, None], num_drafts - 1), axis=0)  # faster than argmax
    is_node = (owner == rows) & (depth[:, None] < lengths)
    estimates = jnp.einsum("kg,gch->kch", weights, is_shared.astype(jnp.float32), precision="highest")
    # Rounding must not lift a node above its parent.
    estimates = _least_so_far(estimates[:, depth[:, None], owner])
    if growth.is_vote:
        estimates = estimates * growth.decay ** (depth[:, None] + 1.0)
    is_likely = is_node & (estimates > 0) & (estimates >= growth.min_probability)
    # By depth before draft: of equal estimates the first is taken, so parents come before their children.
    ranked = jnp.where(is_likely, estimates, 0.0).reshape(-1, max_depth * num_drafts)
    short = max(num_places - ranked.shape[1], 0)
    values, places = jax.lax.top_k(jnp.pad(ranked, ((0, 0), (0, short))), num_places)
    values = jnp.where(jnp.arange(num_places) < max_nodes[:, None], values, 0.0)
    best = jnp.argmax(jnp.sum(values, axis=1))
    is_taken, places = values[best] > 0, places[best]
    depths, rows = places // num_drafts, places % num_drafts
    index_of = jnp.zeros(max_depth * num_drafts, jnp.int32).at[places].set(1 + jnp.arange(num_places), mode="drop")
    above = index_of[(depths - 1) * num_drafts + owner[depths - 1, rows]]
    tree = draft_tree.root_only(root, growth.num_nodes)
    return tree._replace(
        tokens=tree.tokens.at[1:].set(jnp.where(is_taken, drafts[rows, depths], 0)),
        parents=tree.parents.at[1:].set(jnp.where(is_taken, jnp.where(depths > 0, above, draft_tree.ROOT_INDEX), UNUSED)),
        sources=tree.sources.at[1:].set(jnp.where(is_taken, sources[rows], NO_SOURCE)),
        probabilities=tree.probabilities.at[1:].set(values[best]),
    )


def _corpus_lookup(database: NgramTrie | SuffixArray, growth: _Growth, depth: int):
    """Asks a database for what follows a context's end.

    The function returns drafts int32[N - 1, C], their lengths int32[N - 1], the probability mass that ends with each,
    float32[N - 1], and the int32[] length that they hold at. A node's estimate is the sum over the drafts through it.
    """
    num_places = growth.num_nodes - 1

    def tree(newest: list[int], length: int) -> dict[tuple[int, ...], float]:
        """The estimates of the most frequent continuations of the last `length` tokens; parents first."""
        _, count = database.longest_suffix(newest, length, length)
        paths: list[tuple[int, ...]] = []
        counts: list[int] = []
        estimates: dict[tuple[int, ...], float] = {}
        answer = database.frequent_prefixes(newest[-length:], num_places, depth)
        for token, parent, node_count in zip(*(array.tolist() for array in answer), strict=True):
            above, above_count = (paths[parent], counts[parent]) if parent >= 0 else ((), count)
            paths.append((*above, token))
            counts.append(node_count)
            estimates[paths[-1]] = estimates.get(above, 1.0) * node_count / (above_count + growth.smoothing)
        return estimates

    def vote(trees: list[dict[tuple[int, ...], float]]) -> dict[tuple[int, ...], float]:
        votes: dict[tuple[int, ...], float] = {}
        for estimates in trees:
            for path, estimate in estimates.items():
                votes[path] = votes.get(path, 0.0) + estimate
        ranked = sorted(votes, key=lambda path: (-votes[path] * growth.decay ** len(path), len(path)))
        return {path: votes[path] for path in ranked[:num_places]}

    def best(trees: list[dict[tuple[int, ...], float]]) -> dict[tuple[int, ...], float]:
        cut = []
        for length, estimates in enumerate(trees, start=1):
            first = list(estimates.items())[: int(growth.factor * length)]
            cut.append({path: estimate for path, estimate in first if estimate >= growth.min_probability})
        return max(reversed(cut), key=lambda estimates: sum(estimates.values()), default={})

    def refresh(context: Context):
        end = int(context.length)
        newest = np.asarray(context.tokens[max(end - MAX_CORPUS_MATCH, 0) : end]).tolist()
        longest, _ = database.longest_suffix(newest, MAX_CORPUS_MATCH, 1)
        trees = [tree(newest, length) for length in range(1, longest + 1)]
        chosen = (vote if growth.is_vote else best)(trees)
        drafts = np.full((num_places, depth), NO_TOKEN, np.int32)
        lengths = np.zeros(num_places, np.int32)
        masses = np.zeros(num_places, np.float32)
        row_of = {path: row for row, path in enumerate(chosen)}
        for path, row in row_of.items():
            drafts[row, : len(path)] = path
            lengths[row] = len(path)
            masses[row] += chosen[path]
            if len(path) > 1:
                masses[row_of[path[:-1]]] -= chosen[path]
        return drafts, lengths, np.maximum(masses, 0), np.int32(end)

    return refresh
