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
import numpy as np

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
    wave: int = 1  # W, visits that are made at once; divides iterations


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

    A visit goes down from the root by `puct_choices` until it meets a child that was not visited, which becomes a node; from
    there a roll-out draws successors by their probabilities down to the same depth. Its value is 1 and the sum of the
    probabilities along the way, and is added to all nodes that it went through.

    With waves, several visits go down and roll out as one vector, for the price of almost one: on an accelerator, where a
    kernel's launch costs more than its work. What they find is known to the next wave; those that meet in a new node each
    roll out from it.

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

    def wave(index: jax.Array, search: Search) -> Search:
        walkers = index * settings.wave + jnp.arange(settings.wave)  # numbers of the visits
        node, depth = jnp.zeros(settings.wave, jnp.int32), jnp.zeros(settings.wave, jnp.int32)
        rank, is_new, is_at_end = node, jnp.zeros(settings.wave, bool), jnp.zeros(settings.wave, bool)
        path = [node]
        for _ in range(settings.depth):
            is_open = ~is_new & ~is_at_end
            best, has_any = puct_choices(search, node, is_open, settings)
            is_open, is_at_end = is_open & has_any, is_at_end | (is_open & ~has_any)
            rank = jnp.where(is_open, best, rank)
            child = search.children[node, best]
            is_new = is_new | (is_open & (child == NO_CHILD))
            node = jnp.where(is_open & (child != NO_CHILD), child, node)
            depth += is_open
            path.append(jnp.where(is_open & ~is_new, node, size))  # out of range: dropped
        # The new nodes, below the last ones; of several visits to one of them, the first makes it.
        is_equal = (node[:, None] == node) & (rank[:, None] == rank) & is_new
        fresh = jnp.where(is_new, walkers[jnp.argmax(is_equal, axis=1)] + 1, size).astype(jnp.int32)
        path.append(fresh)
        token = search.rows.tokens[node, rank]
        pairs = jnp.where(is_new[:, None], jnp.stack([search.pairs[node, 1], token], axis=1), search.pairs[node])
        total = search.sums[node] + jnp.where(is_new, search.rows.probabilities[node, rank], 0.0)
        rows = rows_fn(pairs)
        put = lambda array, values: array.at[fresh].set(values, mode="drop")  # noqa: E731
        search = search._replace(
            parents=put(search.parents, node),
            tokens=put(search.tokens, token),
            sums=put(search.sums, total),
            children=search.children.at[jnp.where(is_new, node, size), rank].set(fresh, mode="drop"),
            pairs=put(search.pairs, pairs),
            rows=Rows(*(put(old, new) for old, new in zip(search.rows, rows, strict=True))),
        )
        # The draw from depth d is in column d, so the first roll-out step of a deep node takes a later one.
        for step in range(1, settings.depth):
            drawn = _drawn(rows.probabilities, noise[walkers, jnp.minimum(depth, settings.depth - 1)])[:, None]
            probability = jnp.take_along_axis(rows.probabilities, drawn, axis=1)[:, 0]
            goes_on = (depth < settings.depth) & (probability > 0)
            total += jnp.where(goes_on, probability, 0.0)
            depth = jnp.where(goes_on, depth + 1, settings.depth)
            if step < settings.depth - 1:
                pairs = jnp.concatenate([pairs[:, 1:], jnp.take_along_axis(rows.tokens, drawn, axis=1)], axis=1)
                rows = rows_fn(pairs)
        places = jnp.concatenate(path)
        added = jnp.tile(1 + total, len(path))
        # Floats that a scatter adds up have no order on a GPU: so each place's sum is taken first, and set.
        sums = jnp.sum(jnp.where(places[:, None] == places, added, 0.0), axis=1)
        return search._replace(
            visits=search.visits.at[places].add(1, mode="drop"),
            values=search.values.at[places].set(search.values[places] + sums, mode="drop"),
        )

    return jax.lax.fori_loop(0, settings.iterations // settings.wave, wave, search)


def puct_choices(search: Search, nodes: jax.Array, is_open: jax.Array, settings: Puct) -> tuple[jax.Array, jax.Array]:
    """Which child each of the wave's visits goes to: ranks int32[W], and bool[W], whether the node has a successor.

    A child is worth  Q / n + (c1 + ln((n_parent + c2 + 1) / c2)) * p * sqrt(n_parent) / (1 + n).  Visits that stand at one
    node choose one after the other, and each sees those before it in n, not in Q; in n_parent all of them but one are counted.
    With t visits before it a child's worth falls, so the choices are the greatest of all (child, t) in descending order.

    Args:
      search: before the wave.
      nodes: int32[W], where the visits are.
      is_open: bool[W], whether they go on from there.
      settings: static.
    """
    children, probabilities = search.children[nodes], search.rows.probabilities[nodes]  # [W, k]
    is_here = (nodes[:, None] == nodes) & is_open
    place_in_line = jnp.sum(is_here & np.tri(len(nodes), k=-1, dtype=bool), axis=1)
    parent_visits = search.visits[nodes] + jnp.maximum(jnp.sum(is_here, axis=1) - 1, 0)
    parent_visits = parent_visits.astype(jnp.float32)[:, None, None]
    is_visited = (children != NO_CHILD)[:, :, None]
    visits = jnp.where(is_visited, search.visits[children][:, :, None], 0)
    mean = jnp.where(is_visited, search.values[children][:, :, None] / jnp.maximum(visits, 1), 0.0)
    before = jnp.arange(settings.wave)  # t
    exploration = settings.c1 + jnp.log((parent_visits + settings.c2 + 1) / settings.c2)
    scores = mean + exploration * probabilities[:, :, None] * jnp.sqrt(parent_visits) / (1 + visits + before)
    if settings.is_unvisited_first:
        scores = jnp.where(is_visited | (before > 0), scores, jnp.inf)  # the first of equals is taken, the likeliest
    scores = jnp.where(probabilities[:, :, None] > 0, scores, -jnp.inf).reshape(len(nodes), -1)
    _, best = jax.lax.top_k(scores, settings.wave)
    chosen = jnp.take_along_axis(best, place_in_line[:, None], axis=1)[:, 0]
    return (chosen // settings.wave).astype(jnp.int32), probabilities[:, 0] > 0


def _drawn(probabilities: jax.Array, uniform: jax.Array) -> jax.Array:
    """Ranks int32[W] drawn by float32[W, k] probabilities, which need not add up to 1, with numbers uniform in [0, 1)."""
    below = jnp.cumsum(probabilities, axis=1)
    return jnp.minimum(jnp.sum(below <= (uniform * below[:, -1])[:, None], axis=1), probabilities.shape[1] - 1)


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
