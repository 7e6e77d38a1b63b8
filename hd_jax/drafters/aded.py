"""Adaptive drafting from a tri-gram matrix (ADED; Liu et al., AAAI 2025, arXiv 2407.12021).

The LLM representative is a matrix of P(w3 | w1, w2): the likeliest successors of every token pair of a corpus. A search in it
makes the draft tree (tree_search.py), and while decoding it is adapted. The corpus' matrix is read-only, and a row that is
adapted is copied into an overlay of fixed size (pair_overlay.py), which a session keeps from request to request.

    from_logits   the paper's rule: after every step, the model's own distribution after every verified node, the rejected ones
                  among them, moves the row of the node's pair towards it:  row := (1 - rate) * row + rate * p
    from_text     the authors' code's: after every step, each tri-gram of the last `num_recent` tokens gains `gain`, up to `cap`
    none          the matrix stays as it was built

Weights of a row that add up to more than 1, as from_text's may, are divided by their sum where a probability is needed. Of a
pair that the corpus does not know, the successors of its second token are taken, which the same tri-grams tell.

Two things are ours. The default search is the limit of the paper's without exploration: it drafts better, and in a few kernels.
And the prompt is read as well, its tri-grams gaining `prompt_gain` when a request starts; prompt_gain=0 and search="mcts" are
the paper's ways.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from hd_jax.databases import pair_overlay
from hd_jax.databases.collection import Databases
from hd_jax.databases.pair_overlay import PairOverlay
from hd_jax.databases.successor_table import SuccessorTable, lookup
from hd_jax.draft_tree import NO_TOKEN, DraftTree, is_node
from hd_jax.drafters import tree_search
from hd_jax.drafters.base import Context, Drafter, Feedback
from hd_jax.drafters.tree_search import Puct, Rows

ADAPTATIONS = ("from_logits", "from_text", "none")
SEARCHES = ("best_first", "mcts")
DEPTHS = {"best_first": 6, "mcts": 4}
SOURCE_NAMES = ("corpus", "adapted")
PROMPT_CHUNK = 64  # tri-grams of the prompt that are read at once


def aded(
    databases: Databases | None = None,
    *,
    adapt: str = "from_logits",
    search: str = "best_first",
    num_successors: int = 12,
    discount: float = 0.75,
    min_count: int = 2,
    max_pairs: int = 1 << 15,
    remember: bool = True,
    rate: float = 0.5,
    gain: float = 0.04,
    cap: float = 3.0,
    num_recent: int = 16,
    prompt_gain: float = 1.0,
    depth: int | None = None,
    width: int = 16,
    iterations: int = 150,
    wave: int = 1,
    c1: float = 32.0,
    c2: float = 8.0,
    unvisited_first: bool = True,
    num_paths: int = 24,
    seed: int = 0,
    num_nodes: int = 64,
) -> Drafter:
    """ADED; see the module.

    Args:
      databases: with tri-grams.
      adapt: one of ADAPTATIONS.
      search: "best_first", or the paper's "mcts".
      num_successors: k, of a pair that are kept.
      discount: of the corpus' counts, lent to the successors of the pair's second token; 0 for relative frequencies, as in
        the paper.
      min_count: a pair of the corpus is kept if it occurs so often.
      max_pairs: H, buckets for adapted rows, a power of two.
      remember: whether a session keeps them from request to request.
      rate: of from_logits.
      gain: of from_text, for each occurrence of a tri-gram.
      cap: of what text adds to, on the weight of a tri-gram.
      num_recent: of from_text, newest tokens whose tri-grams gain.
      prompt_gain: what each tri-gram of the prompt gains when a request starts; 0 to leave the prompt out, as in the paper.
      depth: of the search; by default that of DEPTHS.
      width: of best_first: nodes of a level that are expanded.
      iterations: of mcts.
      wave: of mcts: visits that are made at once, a divisor of iterations; the paper's are made one by one.
      c1: of mcts, weight of exploration.
      c2: of mcts.
      unvisited_first: of mcts: children that were not visited go before all others.
      num_paths: of mcts: the most visited ones are drafted, and the likeliest token after each.
      seed: of mcts, for its roll-outs; with the context's length it says all of them.
      num_nodes: N, the root included.

    Raises:
      ValueError: an option is out of range, or there is no database of tri-grams.
    """
    if adapt not in ADAPTATIONS:
        raise ValueError(f"aded's adapt is one of {', '.join(ADAPTATIONS)}, not {adapt!r}")
    if search not in SEARCHES:
        raise ValueError(f"aded's search is {' or '.join(SEARCHES)}, not {search!r}")
    depth = DEPTHS[search] if depth is None else depth
    least = {"num_successors": (num_successors, 1), "num_recent": (num_recent, 3), "depth": (depth, 1), "width": (width, 1)}
    least |= {"iterations": (iterations, 1), "wave": (wave, 1), "num_paths": (num_paths, 1)}
    least |= {"num_nodes": (num_nodes, 2), "seed": (seed, 0)}
    for name, (value, bound) in least.items():
        if value < bound:
            raise ValueError(f"aded's {name} must be at least {bound}, not {value}")
    if iterations % wave:
        raise ValueError(f"aded's wave must divide its {iterations} iterations, not be {wave}")
    if max_pairs < 1 or max_pairs & (max_pairs - 1):
        raise ValueError(f"aded's max_pairs must be a power of two, not {max_pairs}")
    for name, value in {"remember": remember, "unvisited_first": unvisited_first}.items():
        if value not in (True, False):
            raise ValueError(f"aded's {name} is true or false (1 or 0), not {value!r}")
    if not 0 < rate <= 1:
        raise ValueError(f"aded's rate must be greater than 0 and at most 1, not {rate}")
    for name, value in {"gain": gain, "cap": cap, "c2": c2}.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"aded's {name} must be positive and finite, not {value}")
    for name, value in {"prompt_gain": prompt_gain, "c1": c1}.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"aded's {name} must be at least 0 and finite, not {value}")
    databases = databases or Databases()
    table = databases.successors(
        "trigrams", max_order=2, num_successors=num_successors, min_count=min_count, discount=float(discount)
    )
    puct = Puct(iterations, depth, float(c1), float(c2), bool(unvisited_first), num_paths, wave)
    init, draft, update, renew = _functions(
        adapt, search, num_successors, max_pairs, float(rate), float(gain), float(cap), num_recent, float(prompt_gain), puct,
        width, seed, num_nodes,
    )  # fmt: skip
    return Drafter(
        "aded",
        num_nodes=num_nodes,
        max_depth=min(depth + (search == "mcts"), num_nodes - 1),
        source_names=SOURCE_NAMES,
        draft=draft,
        init=init,
        update=update,
        renew=renew if remember else None,
        num_top_logits=num_successors if adapt == "from_logits" else 0,
        tables=table,
    )


@functools.lru_cache
def _functions(
    adapt: str,
    search: str,
    num_successors: int,
    max_pairs: int,
    rate: float,
    gain: float,
    cap: float,
    num_recent: int,
    prompt_gain: float,
    puct: Puct,
    width: int,
    seed: int,
    num_nodes: int,
):
    def renew(table: SuccessorTable, overlay: PairOverlay, context: Context) -> PairOverlay:
        if adapt != "none" and prompt_gain > 0:
            return read_prompt(table, overlay, context, prompt_gain, cap)
        return overlay

    def init(table: SuccessorTable, context: Context) -> PairOverlay:
        return renew(table, pair_overlay.empty(1 if adapt == "none" else max_pairs, num_successors), context)

    def draft(table: SuccessorTable, overlay: PairOverlay, context: Context) -> DraftTree:
        before = jnp.where(context.length > 1, context.tokens[context.length - 2], NO_TOKEN)
        pair = jnp.stack([before, context.root])
        rows_fn = functools.partial(successors, table, overlay)
        if search == "best_first":
            return tree_search.best_first(rows_fn, pair, depth=puct.depth, width=width, num_nodes=num_nodes)
        key = jax.random.fold_in(jax.random.key(seed), context.length)
        noise = jax.random.uniform(key, (puct.iterations, puct.depth))
        return tree_search.mcts(rows_fn, pair, noise, settings=puct, num_nodes=num_nodes)

    def update(table: SuccessorTable, overlay: PairOverlay, context: Context, feedback: Feedback) -> PairOverlay:
        if adapt == "from_logits":
            return learn_logits(table, overlay, context, feedback, rate)
        if adapt == "from_text":
            starts = context.length - num_recent + jnp.arange(num_recent - 2)
            return learn_text(table, overlay, context, starts, feedback.num_appended > 0, gain, cap)
        return overlay

    return init, draft, update, renew


def weights(table: SuccessorTable, overlay: PairOverlay, pairs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rows of int32[Q, 2] pairs: tokens int32[Q, k], weights float32[Q, k], and bool[Q], whether they are adapted."""
    built = lookup(table, pairs)
    tokens, changed, is_adapted = pair_overlay.lookup(overlay, pairs)
    choose = lambda new, old: jnp.where(is_adapted[:, None], new, old)  # noqa: E731
    return choose(tokens, built.tokens[:, 0]), choose(changed, built.probabilities[:, 0]), is_adapted


def successors(table: SuccessorTable, overlay: PairOverlay, pairs: jax.Array) -> Rows:
    """What the searches ask for."""
    tokens, found, is_adapted = weights(table, overlay, pairs)
    return Rows(tokens, found / jnp.maximum(jnp.sum(found, axis=1, keepdims=True), 1.0), is_adapted.astype(jnp.int32))


def learn_logits(table: SuccessorTable, overlay: PairOverlay, context: Context, feedback: Feedback, rate: float) -> PairOverlay:
    """The overlay after a step, by the paper's rule. Of several nodes with one pair, the last counts.

    The model's distribution is that over its likeliest k tokens alone.
    """
    pairs = feedback.pairs(context)
    tokens, found, _ = successors(table, overlay, pairs)
    drawn = jax.nn.softmax(feedback.top_logits, axis=-1)
    tokens, found = pair_overlay.merge(
        jnp.concatenate([feedback.top_tokens, tokens], axis=1),
        jnp.concatenate([rate * drawn, (1 - rate) * found], axis=1),
        tokens.shape[1],
    )
    is_seen = is_node(feedback.tree) & (pairs[:, 0] != NO_TOKEN) & (feedback.num_appended > 0)
    return pair_overlay.write(overlay, pairs, tokens, found, is_seen)


def learn_text(
    table: SuccessorTable,
    overlay: PairOverlay,
    context: Context,
    starts: jax.Array,
    is_counted: jax.Array,
    gain: float,
    cap: float,
) -> PairOverlay:
    """The overlay after the tri-grams of the context that begin at int32[Q] slots gained a weight, for each occurrence.

    Args:
      table: the corpus' matrix.
      overlay: before.
      context: whose tri-grams they are; slots before its first token, or within two of its end, do not count.
      starts: int32[Q].
      is_counted: bool[] or bool[Q].
      gain: for each.
      cap: on a weight.
    """
    is_counted = is_counted & (starts >= 0) & (starts < context.length - 2)
    slots = jnp.maximum(starts, 0)[:, None] + jnp.arange(3)
    trigrams = context.tokens[jnp.minimum(slots, context.tokens.shape[0] - 1)]
    pairs, last = trigrams[:, :2], trigrams[:, 2]
    tokens, found, _ = weights(table, overlay, pairs)
    # A row takes what all tri-grams of its pair add, so that it does not matter which of them is written.
    is_added = jnp.all(pairs[:, None] == pairs[None], axis=-1) & is_counted
    added = jnp.where(is_added, last, NO_TOKEN)
    tokens, found = pair_overlay.merge(
        jnp.concatenate([tokens, added], axis=1),
        jnp.concatenate([found, jnp.where(is_added, gain, 0.0)], axis=1),
        tokens.shape[1],
    )
    return pair_overlay.write(overlay, pairs, tokens, jnp.minimum(found, cap), is_counted)


def read_prompt(table: SuccessorTable, overlay: PairOverlay, context: Context, gain: float, cap: float) -> PairOverlay:
    """The overlay after each tri-gram of a prompt gained a weight, PROMPT_CHUNK of them at a time."""

    def read(index: jax.Array, overlay: PairOverlay) -> PairOverlay:
        starts = index * PROMPT_CHUNK + jnp.arange(PROMPT_CHUNK)
        return learn_text(table, overlay, context, starts, jnp.bool_(True), gain, cap)

    num_chunks = (jnp.maximum(context.length - 2, 0) + PROMPT_CHUNK - 1) // PROMPT_CHUNK
    return jax.lax.fori_loop(0, num_chunks, read, overlay)
