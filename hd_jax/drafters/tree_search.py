"""Searches for a draft tree in a matrix of successors: Monte Carlo tree search, and its limit without exploration.

Both ask a function for the successors of token pairs, and so do not know where these come from. A tree of tokens below the
root comes out, the best nodes first, a parent always before its children.

    mcts        the paper's draft maker (ADED; Liu et al., AAAI 2025, arXiv 2407.12021): visit after visit, each one looking
                at a single pair or a few. What is visited most is drafted.
    best_first  the nodes with the largest product of probabilities from the root on, which is what the share of visits
                tends to where exploration is strong and roll-outs say nothing new. Level by level: each is one look-up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hd_jax import draft_tree
from hd_jax.draft_tree import NO_TOKEN, ROOT_INDEX, DraftTree

NO_CHILD = -1  # of a search node, at a rank that was not visited


class Rows(NamedTuple):
    """The successors of Q pairs, the likeliest first."""

    tokens: jax.Array  # int32[Q, k], NO_TOKEN where there are fewer
    probabilities: jax.Array  # float32[Q, k], 0 there
    sources: jax.Array  # int32[Q], where a row comes from


RowsFn = Callable[[jax.Array], Rows]  # of int32[Q, 2] pairs


class Puct(NamedTuple):
    """Constants of the Monte Carlo search, the paper's code's by default."""

    iterations: int = 150
    depth: int = 4  # of the deepest visited node
    c1: float = 32.0
    c2: float = 8.0
    is_unvisited_first: bool = True  # else a child that was not visited has a mean value of 0
    num_paths: int = 24  # most visited, that are drafted


def best_first(rows_fn: RowsFn, pair: jax.Array, *, depth: int, width: int, num_nodes: int) -> DraftTree:
    """The nodes with the largest product of probabilities.

    Args:
      rows_fn: gives the successors.
      pair: int32[2], the newest two tokens; the second is the root.
      depth: levels of the tree.
      width: nodes of a level that are expanded, the best ones.
      num_nodes: N, the root included.
    """
    pairs, base, above = pair[None], jnp.ones(1), jnp.zeros(1, jnp.int32)
    levels: list[tuple[jax.Array, ...]] = []
    num_found = 0
    for level in range(depth):
        rows = rows_fn(pairs)
        scores = base[:, None] * rows.probabilities
        fill = lambda values, shape=scores.shape: jnp.broadcast_to(values[:, None], shape).reshape(-1)  # noqa: E731
        levels.append((rows.tokens.reshape(-1), scores.reshape(-1), fill(above), fill(rows.sources)))
        if level < depth - 1:
            base, chosen = jax.lax.top_k(scores.reshape(-1), min(width, scores.size))
            newest = rows.tokens.reshape(-1)[chosen]
            pairs = jnp.stack([pairs[chosen // scores.shape[1], 1], newest], axis=1)
            above = 1 + num_found + chosen  # numbers of nodes, the root's is 0
            num_found += scores.size
    tokens, scores, parents, sources = (jnp.concatenate(parts) for parts in zip(*levels, strict=True))
    # A child has at most its parent's score, and top_k takes the earlier of equals: a parent is chosen before its children.
    best, chosen = jax.lax.top_k(scores, min(num_nodes - 1, scores.size))
    return _tree(pair[1], tokens[chosen], chosen + 1, parents[chosen], sources[chosen], best > 0, scores.size, num_nodes)


def mcts(rows_fn: RowsFn, pair: jax.Array, noise: jax.Array, *, settings: Puct, num_nodes: int) -> DraftTree:
    """The paper's draft maker (section 3): the most visited paths, each extended by its likeliest next token.

    A visit goes down from the root by `puct_scores` until it meets a child that was not visited, which becomes a node; from
    there a roll-out draws successors by their probabilities down to the same depth. Its value is 1 and the sum of the
    probabilities along the way, and is added to all nodes that it went through.

    Args:
      rows_fn: gives the successors.
      pair: int32[2], the newest two tokens; the second is the root.
      noise: float32[iterations, depth], uniform in [0, 1): of the roll-outs, the draw from a node at depth d in column d.
      settings: static.
      num_nodes: N, the root included; of more paths and extensions, the last are left out.
    """
    search = run_puct(rows_fn, pair, noise, settings)
    return most_visited(pair[1], search, settings.num_paths, num_nodes)


class Search(NamedTuple):
    """M nodes in the order of their first visits, the root first; places that no node took have no visits."""

    visits: jax.Array  # int32[M]
    values: jax.Array  # float32[M], summed over the visits
    parents: jax.Array  # int32[M], the root's is 0
    tokens: jax.Array  # int32[M]
    sums: jax.Array  # float32[M], probabilities from the root to the node
    children: jax.Array  # int32[M, k], or NO_CHILD
    pairs: jax.Array  # int32[M, 2], the node's token and the one before it
    rows: Rows  # of M pairs


def run_puct(rows_fn: RowsFn, pair: jax.Array, noise: jax.Array, settings: Puct) -> Search:
    """The search itself; see `mcts`."""
    first = rows_fn(pair[None])
    size, k = settings.iterations + 1, first.tokens.shape[1]
    blank = lambda row: jnp.zeros((size, *row.shape[1:]), row.dtype).at[ROOT_INDEX].set(row[0])  # noqa: E731
    search = Search(
        visits=jnp.zeros(size, jnp.int32),
        values=jnp.zeros(size),
        parents=jnp.zeros(size, jnp.int32),
        tokens=jnp.full(size, NO_TOKEN, jnp.int32),
        sums=jnp.zeros(size),
        children=jnp.full((size, k), NO_CHILD, jnp.int32),
        pairs=blank(pair[None]),
        rows=Rows(*(blank(row) for row in first)),
    )

    def visit(index: jax.Array, search: Search) -> Search:
        fresh = index + 1  # the place of the node that this visit may make
        node, rank, is_new, is_at_end = jnp.int32(ROOT_INDEX), jnp.int32(0), jnp.bool_(False), jnp.bool_(False)
        path, depth = [node], jnp.int32(0)
        for _ in range(settings.depth):
            is_open = ~is_new & ~is_at_end
            scores = puct_scores(search, node, settings)
            best = jnp.argmax(scores).astype(jnp.int32)
            is_open, is_at_end = is_open & (scores[best] > -jnp.inf), is_at_end | (is_open & (scores[best] == -jnp.inf))
            rank = jnp.where(is_open, best, rank)
            child = search.children[node, best]
            is_new = is_new | (is_open & (child == NO_CHILD))
            node = jnp.where(is_open & (child != NO_CHILD), child, node)
            depth += is_open
            path.append(jnp.where(is_open, jnp.where(is_new, fresh, node), size))  # out of range: dropped
        # The new node, below the last one; without one, what is looked up here has no place.
        token = search.rows.tokens[node, rank]
        pair = jnp.where(is_new, jnp.stack([search.pairs[node, 1], token]), search.pairs[node])
        total = search.sums[node] + jnp.where(is_new, search.rows.probabilities[node, rank], 0.0)
        rows = rows_fn(pair[None])
        place = jnp.where(is_new, fresh, size)
        put = lambda array, value: array.at[place].set(value, mode="drop")  # noqa: E731
        search = search._replace(
            parents=put(search.parents, node),
            tokens=put(search.tokens, token),
            sums=put(search.sums, total),
            children=search.children.at[jnp.where(is_new, node, size), rank].set(fresh, mode="drop"),
            pairs=put(search.pairs, pair),
            rows=Rows(*(put(old, new[0]) for old, new in zip(search.rows, rows, strict=True))),
        )
        # The draw from depth d is in column d, so the first roll-out step of a deep node takes a later one.
        for step in range(1, settings.depth):
            drawn = _drawn(rows.probabilities[0], noise[index, jnp.minimum(depth, settings.depth - 1)])
            probability = rows.probabilities[0, drawn]
            goes_on = (depth < settings.depth) & (probability > 0)
            total += jnp.where(goes_on, probability, 0.0)
            depth = jnp.where(goes_on, depth + 1, settings.depth)
            if step < settings.depth - 1:
                pair = jnp.stack([pair[1], rows.tokens[0, drawn]])
                rows = rows_fn(pair[None])
        places = jnp.stack(path)
        return search._replace(
            visits=search.visits.at[places].add(1, mode="drop"), values=search.values.at[places].add(1 + total, mode="drop")
        )

    return jax.lax.fori_loop(0, settings.iterations, visit, search)


def puct_scores(search: Search, node: jax.Array, settings: Puct) -> jax.Array:
    """How much each child of a node is worth a visit, float32[k]; -inf where there is no successor.

    Q / n + (c1 + ln((n_parent + c2 + 1) / c2)) * p * sqrt(n_parent) / (1 + n)
    """
    children, probabilities = search.children[node], search.rows.probabilities[node]
    is_visited = children != NO_CHILD
    visits = jnp.where(is_visited, search.visits[children], 0)
    mean = jnp.where(is_visited, search.values[children] / jnp.maximum(visits, 1), 0.0)
    parent_visits = search.visits[node].astype(jnp.float32)
    exploration = settings.c1 + jnp.log((parent_visits + settings.c2 + 1) / settings.c2)
    scores = mean + exploration * probabilities * jnp.sqrt(parent_visits) / (1 + visits)
    if settings.is_unvisited_first:
        scores = jnp.where(is_visited, scores, jnp.inf)  # argmax takes the first, the likeliest
    return jnp.where(probabilities > 0, scores, -jnp.inf)


def _drawn(probabilities: jax.Array, uniform: jax.Array) -> jax.Array:
    """A rank drawn by float32[k] probabilities, which need not add up to 1, with a number uniform in [0, 1)."""
    below = jnp.cumsum(probabilities)
    return jnp.minimum(jnp.sum(below <= uniform * below[-1]), probabilities.shape[0] - 1)


def most_visited(root: jax.Array, search: Search, num_paths: int, num_nodes: int) -> DraftTree:
    """The nodes with the most visits, earlier ones first among equals, and then the likeliest token after each of them."""
    num_paths = min(num_paths, search.visits.shape[0] - 1)
    visits, chosen = jax.lax.top_k(search.visits[1:], num_paths)
    chosen = chosen + 1
    rows, children = search.rows, search.children
    size = search.visits.shape[0]
    is_chosen = jnp.zeros(size, bool).at[chosen].set(visits > 0)
    likeliest = children[chosen, 0]
    is_known = (likeliest != NO_CHILD) & is_chosen[likeliest]
    is_extended = (visits > 0) & (rows.probabilities[chosen, 0] > 0) & ~is_known
    return _tree(
        root,
        jnp.concatenate([search.tokens[chosen], rows.tokens[chosen, 0]]),
        jnp.concatenate([chosen, size + jnp.arange(num_paths)]),
        jnp.concatenate([search.parents[chosen], chosen]),
        jnp.concatenate([rows.sources[search.parents[chosen]], rows.sources[chosen]]),
        jnp.concatenate([visits > 0, is_extended]),
        size + num_paths,
        num_nodes,
    )


def _tree(
    root: jax.Array,
    tokens: jax.Array,
    numbers: jax.Array,
    parents: jax.Array,
    sources: jax.Array,
    is_used: jax.Array,
    max_number: int,
    num_nodes: int,
) -> DraftTree:
    """A draft tree of nodes int32[I] in the order given, those of them that are used, as far as they fit.

    Args:
      root: int32[].
      tokens: int32[I].
      numbers: int32[I], by which a node is known; from 1 up to max_number.
      parents: int32[I], the parent's number, 0 for the root; a parent stands before its children.
      sources: int32[I].
      is_used: bool[I].
      max_number: static.
      num_nodes: N.
    """
    index = jnp.cumsum(is_used)  # the root is 0
    place = jnp.where(is_used, index, num_nodes)  # out of range: dropped
    index_of = jnp.zeros(max_number + 1, jnp.int32).at[numbers].set(index.astype(jnp.int32)).at[ROOT_INDEX].set(ROOT_INDEX)
    tree = draft_tree.root_only(root, num_nodes)
    put = lambda array, values: array.at[place].set(values.astype(array.dtype), mode="drop")  # noqa: E731
    return tree._replace(
        tokens=put(tree.tokens, tokens), parents=put(tree.parents, index_of[parents]), sources=put(tree.sources, sources)
    )
