"""The draft buffer: a tree of drafted tokens in flat arrays of a fixed size, and the merging of drafts into it.

Node 0 is the root: the newest committed token, whose keys and values are not in the cache yet. A node's parent always
has a smaller index, so the first n nodes are a tree too. Two drafts with a common prefix share its nodes:

    root 7, drafts (4 5 6), (4 5 9), (8)         index    0   1   2   3   4   5
                                                 token    7   4   5   6   9   8
              7                                  parent  -1   0   1   2   2   0
            4   8                                depth    0   1   2   3   3   1
            5
           6 9
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

ROOT_INDEX = 0
NO_PARENT = -1  # the root's parent
UNUSED = -2  # the parent of a place that holds no node
NO_SOURCE = -3  # the source of a token that no drafter proposed
NO_TOKEN = -4  # padding of drafts and stop lists; equal to no token
NO_NODE = -5  # padding of a path
UNKNOWN = -6.0  # a probability that the drafter does not estimate


class DraftTree(NamedTuple):
    """A draft of one row, or with a leading axis B, of a batch."""

    tokens: jax.Array  # int32[N]
    parents: jax.Array  # int32[N]
    sources: jax.Array  # int32[N], index into the drafter's source_names, or NO_SOURCE
    is_window: jax.Array  # bool[N], run for its logits alone: never accepted
    probabilities: jax.Array  # float32[N], that the node and all above it are accepted, as the drafter estimates, or UNKNOWN


def root_only(root: jax.Array, num_nodes: int = 1) -> DraftTree:
    """The tree of plain decoding: the root, and num_nodes - 1 unused places."""
    is_root = jnp.arange(num_nodes) == ROOT_INDEX
    return DraftTree(
        tokens=jnp.where(is_root, root, 0).astype(jnp.int32),
        parents=jnp.where(is_root, NO_PARENT, UNUSED).astype(jnp.int32),
        sources=jnp.full(num_nodes, NO_SOURCE, jnp.int32),
        is_window=jnp.zeros(num_nodes, bool),
        probabilities=jnp.full(num_nodes, UNKNOWN, jnp.float32),
    )


def from_chain(root: jax.Array, tokens: jax.Array, length: jax.Array, source: int = 0) -> DraftTree:
    """A single draft: the first `length` of int32[C] `tokens`, one below the other. N = C + 1."""
    return merge(root, tokens[None], jnp.reshape(length, 1), jnp.full(1, source, jnp.int32), tokens.shape[0] + 1)


def merge(root: jax.Array, drafts: jax.Array, lengths: jax.Array, sources: jax.Array, num_nodes: int) -> DraftTree:
    """Merges drafts into a trie, best first.

    Nodes are numbered draft by draft, so that what does not fit in `num_nodes` is the end of the last drafts. A node that
    several drafts share is the first one's, and so is its source.

    Args:
      root: int32[], the newest committed token.
      drafts: int32[G, C], continuations of the root.
      lengths: int32[G], how many of the C tokens count, whatever the others are; 0 for an empty place.
      sources: int32[G], who proposed each.
      num_nodes: N, the root included.
    """
    num_drafts, max_length = drafts.shape
    is_used = jnp.arange(max_length) < lengths[:, None]  # [G, C]
    # owner[g, c]: the first draft that has the same c + 1 tokens; the node of (g, c) is that of (owner[g, c], c).
    is_same = (drafts[:, None, :] == drafts[None, :, :]) & is_used[:, None, :] & is_used[None, :, :]
    is_same_prefix = jnp.cumprod(is_same.astype(jnp.int32), axis=-1).astype(bool)  # [G, G, C]
    owner = jnp.argmax(is_same_prefix, axis=1)
    is_new = is_used & (owner == jnp.arange(num_drafts)[:, None])
    own_index = jnp.cumsum(is_new.reshape(-1)).reshape(num_drafts, max_length)  # the root is 0, so the first node is 1
    index = jnp.take_along_axis(own_index, owner, axis=0)
    parents = jnp.concatenate([jnp.zeros((num_drafts, 1), index.dtype), index[:, :-1]], axis=1)
    # Each node's place among the drafts' tokens, or -1: found by comparing all with all, one operation for three scatters.
    is_it = is_new.reshape(-1) & (index.reshape(-1) == jnp.arange(num_nodes)[:, None])
    place = jnp.max(jnp.where(is_it, jnp.arange(drafts.size), -1), axis=1)
    tree = root_only(root, num_nodes)
    sources = jnp.broadcast_to(sources[:, None], drafts.shape)
    put = lambda array, values: jnp.where(place >= 0, values.reshape(-1)[place], array)  # noqa: E731
    return tree._replace(
        tokens=put(tree.tokens, drafts), parents=put(tree.parents, parents), sources=put(tree.sources, sources)
    )


def padded(tree: DraftTree, num_nodes: int) -> DraftTree:
    """The tree with unused places added up to `num_nodes`."""
    blank = root_only(tree.tokens[ROOT_INDEX], num_nodes + 1)
    return DraftTree(*(jnp.concatenate([a, b[a.shape[0] + 1 :]]) for a, b in zip(tree, blank, strict=True)))


def without_foreign_tokens(tree: DraftTree, vocab_size: int) -> DraftTree:
    """Makes places of nodes with ids outside the vocabulary unused: such an id has no embedding."""
    is_foreign = (tree.tokens < 0) | (tree.tokens >= vocab_size)
    return tree._replace(tokens=jnp.where(is_foreign, 0, tree.tokens), parents=jnp.where(is_foreign, UNUSED, tree.parents))


def join(first: DraftTree, second: DraftTree) -> DraftTree:
    """One tree with the nodes of both under the first's root; N is the sum less one. Equal tokens are not merged."""
    shift = first.tokens.shape[0] - 1
    parents = jnp.where(second.parents > ROOT_INDEX, second.parents + shift, second.parents)
    second = second._replace(parents=parents)
    return DraftTree(*(jnp.concatenate([a, b[1:]]) for a, b in zip(first, second, strict=True)))


def ancestor_mask(tree: DraftTree) -> jax.Array:
    """bool[N, N]: whether node n has node m on its path to the root, itself included. An unused place has itself only."""
    num_nodes = tree.parents.shape[0]
    indices = jnp.arange(num_nodes)
    reach = indices[:, None] == indices
    above = jnp.where(tree.parents >= 0, tree.parents, indices)  # the ancestor that is `span` generations up, or the root
    span = 1
    while span < num_nodes:
        reach |= reach[above]
        above = above[above]
        span *= 2
    return reach


def depths(ancestors: jax.Array) -> jax.Array:
    """int32[N]: generations below the root, from bool[N, N] ancestors; 0 for the root and for unused places."""
    return jnp.sum(ancestors, axis=-1, dtype=jnp.int32) - 1


def is_node(tree: DraftTree) -> jax.Array:
    """bool[N]: which places hold a node, the root included."""
    return tree.parents != UNUSED
