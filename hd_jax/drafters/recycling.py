"""Token Recycling (Luo et al., ACL 2025, arXiv 2408.08696): what the model thought of drafting anyway, kept for later.

A matrix holds, for each token of the vocabulary, the k likeliest tokens after it, as the model last saw them: after every step
the logits of all verified nodes, the rejected ones among them, write its rows. Read from the newest token on, rank by rank, it
fills a tree of a fixed shape. Tokens that were never verified have no successors, so their nodes are unused; the matrix begins
empty, and a session keeps it from request to request unless told otherwise.

A node of the tree is a path of ranks: (0, 2) is the third successor of the root's first. Where the paper lists 80 nodes, here
is a rule for any number: those with the largest product of PROBABILITIES. So a smaller tree is part of a larger one. Nodes
stand level by level, and each level is read in one gather.
"""

from __future__ import annotations

import functools
import heapq
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax import draft_tree
from hd_jax.draft_tree import NO_PARENT, NO_SOURCE, NO_TOKEN, ROOT_INDEX, UNKNOWN, UNUSED, DraftTree
from hd_jax.drafters.base import Context, Drafter, Feedback

# How often the token at each rank is right, per mille. Measured on the embedded model: its answers to the first turns of the
# embedded questions at temperature 0.7, up to 128 tokens each, with one matrix for all. Of 2,200 tokens, 1,985 came after
# one that had been verified before; of these 724, 202, 98, 76, 58, 38, 33 and 34 stood at ranks 0 to 7, and 722 at none.
# (Its greedy answers repeat themselves more: 729, 65, 26, 16, ... per mille.)
PROBABILITIES = (365, 102, 49, 38, 29, 19, 17, 17)


class Template(NamedTuple):
    """The shape of a tree."""

    parents: np.ndarray  # int32[N], the root's is NO_PARENT
    ranks: np.ndarray  # int32[N], each node's among its parent's successors; the root's is 0
    level_starts: tuple[int, ...]  # index of the first node of each depth, and N


@functools.lru_cache
def template(num_nodes: int, num_successors: int, max_depth: int) -> Template:
    """The likeliest paths of ranks, if a rank is right as often as PROBABILITIES says, whatever was before.

    Args:
      num_nodes: N, the root included; fewer where there are not so many paths.
      num_successors: k, ranks of a node.
      max_depth: of the deepest node.
    """
    # Integers, so that equal products are equal: then the shorter path comes first, then the one of smaller ranks.
    scale = 1000**max_depth
    waiting: list[tuple[int, int, tuple[int, ...]]] = [(-scale, 0, ())]
    chosen: list[tuple[int, ...]] = []
    while waiting and len(chosen) < num_nodes:
        score, depth, path = heapq.heappop(waiting)
        chosen.append(path)
        if depth < max_depth:
            for rank in range(num_successors):
                heapq.heappush(waiting, (score * PROBABILITIES[rank] // 1000, depth + 1, (*path, rank)))
    chosen.sort(key=lambda path: (len(path), path))
    index = {path: place for place, path in enumerate(chosen)}
    depths = [len(path) for path in chosen]
    return Template(
        parents=np.array([index[path[:-1]] if path else NO_PARENT for path in chosen], np.int32),
        ranks=np.array([path[-1] if path else 0 for path in chosen], np.int32),
        level_starts=(*(depths.index(depth) for depth in range(depths[-1] + 1)), len(chosen)),
    )


@functools.lru_cache
def recycling(
    *, vocab_size: int, num_successors: int = 8, max_depth: int = 6, remember: bool = True, num_nodes: int = 81
) -> Drafter:
    """Token Recycling, with the paper's sizes as defaults.

    Args:
      vocab_size: V, of the model's logits; `decode.make_drafter` gives it.
      num_successors: k, that are kept of a token.
      max_depth: of the deepest node.
      remember: whether a session keeps the matrix from request to request, as in the paper; else each begins with an empty one.
      num_nodes: N, the root included; more than there are paths of ranks are not used.

    Raises:
      ValueError: an option is out of range.
    """
    least = {"vocab_size": (vocab_size, 2), "max_depth": (max_depth, 1), "num_nodes": (num_nodes, 2)}
    for name, (value, bound) in least.items():
        if value < bound:
            raise ValueError(f"recycling's {name} must be at least {bound}, not {value}")
    most = min(len(PROBABILITIES), vocab_size)
    if not 1 <= num_successors <= most:
        raise ValueError(f"recycling's num_successors must be from 1 to {most}, not {num_successors}")
    if remember not in (True, False):
        raise ValueError(f"recycling's remember is true or false (1 or 0), not {remember!r}")
    shape = template(num_nodes, num_successors, max_depth)

    def init(tables, context: Context) -> jax.Array:
        del tables, context
        return jnp.full((vocab_size, num_successors), NO_TOKEN, jnp.int32)

    def renew(tables, matrix: jax.Array, context: Context) -> jax.Array:
        del tables, context
        return matrix

    def draft(tables, matrix: jax.Array, context: Context) -> DraftTree:
        del tables
        return fill(shape, matrix, context.root)

    def update(tables, matrix: jax.Array, context: Context, feedback: Feedback) -> jax.Array:
        del tables, context
        return record(matrix, feedback)

    return Drafter(
        "recycling",
        num_nodes=len(shape.parents),
        max_depth=len(shape.level_starts) - 2,
        source_names=("recycled",),
        draft=draft,
        init=init,
        update=update,
        renew=renew if remember else None,
        num_top_logits=num_successors,
    )


def fill(shape: Template, matrix: jax.Array, root: jax.Array) -> DraftTree:
    """The template's tree under a root; nodes for which int32[V, k] `matrix` has no token are unused."""
    vocab_size = matrix.shape[0]
    tokens = root[None]
    for start, end in zip(shape.level_starts[1:-1], shape.level_starts[2:], strict=True):
        above = tokens[shape.parents[start:end]]
        above = jnp.where(above >= 0, above, vocab_size)  # a negative index would count from the end
        level = matrix.at[above, shape.ranks[start:end]].get(mode="fill", fill_value=NO_TOKEN)
        tokens = jnp.concatenate([tokens, level])
    is_node = tokens != NO_TOKEN
    return DraftTree(
        tokens=jnp.where(is_node, tokens, 0),
        parents=jnp.where(is_node, jnp.asarray(shape.parents), UNUSED),
        sources=jnp.where(is_node, 0, NO_SOURCE).at[ROOT_INDEX].set(NO_SOURCE),
        is_window=jnp.zeros(len(shape.parents), bool),
        probabilities=jnp.full(len(shape.parents), UNKNOWN),
    )


def record(matrix: jax.Array, feedback: Feedback) -> jax.Array:
    """The matrix int32[V, k] after a step. Of several nodes with one token, the last is recorded."""
    tokens = feedback.tree.tokens
    is_seen = draft_tree.is_node(feedback.tree) & (feedback.num_appended > 0)
    # A scatter has no order of its own, so each row is written once.
    is_later = ~np.tri(tokens.shape[0], dtype=bool)
    is_last = is_seen & ~jnp.any((tokens[:, None] == tokens) & is_seen & is_later, axis=1)
    return matrix.at[jnp.where(is_last, tokens, matrix.shape[0])].set(feedback.top_tokens, mode="drop")
