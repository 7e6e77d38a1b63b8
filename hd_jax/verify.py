"""Verification: from the target token of every node to the accepted path. Greedy and sampled decoding are one rule.

A child is accepted iff its token is the one that the model draws after its parent. So the text is the one that drawing
token by token would have given, whatever was drafted. The targets may stand in a record of the text instead.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hd_jax import draft_tree
from hd_jax.draft_tree import NO_NODE, NO_TOKEN, DraftTree


class Path(NamedTuple):
    """The accepted path of one row."""

    nodes: jax.Array  # int32[P], root first, then NO_NODE; P = max_depth + 1
    num_accepted: jax.Array  # int32[], accepted nodes, the root not counted


def recorded_targets(
    recorded: jax.Array, tree: DraftTree, ancestors: jax.Array, depths: jax.Array, length: jax.Array
) -> jax.Array:
    """The token after each node in one row's record, int32[N]; NO_TOKEN after a node that the record does not go through.

    Args:
      recorded: int32[any].
      tree: one row's; its root is recorded[length - 1].
      ancestors: bool[N, N] of the tree.
      depths: int32[N].
      length: int32[], the root included.
    """
    at = lambda slots: recorded.at[slots].get(mode="fill", fill_value=NO_TOKEN)  # noqa: E731
    is_said = draft_tree.is_node(tree) & ~tree.is_window & (tree.tokens == at(length - 1 + depths))
    return jnp.where(jnp.any(ancestors & ~is_said, axis=-1), NO_TOKEN, at(length + depths))


def walk(tree: DraftTree, ancestors: jax.Array, targets: jax.Array, max_depth: int) -> Path:
    """The longest path from the root on which every node's token is its parent's target.

    All nodes are judged at once: a node is on an accepted path iff it and all its ancestors match. Where drafts hold
    the same token twice under one parent, the deepest such path wins, then the lowest index.

    Args:
      tree: one row's, N nodes.
      ancestors: bool[N, N] of the tree.
      targets: int32[N], the token drawn after each node.
      max_depth: static bound of the path's depth; nodes below it are not accepted.

    Returns:
      The path. Window nodes and unused places are never on it.
    """
    num_nodes = tree.tokens.shape[0]
    is_root = jnp.arange(num_nodes) == draft_tree.ROOT_INDEX
    parent_target = targets[jnp.maximum(tree.parents, 0)]
    depths = draft_tree.depths(ancestors)
    is_match = draft_tree.is_node(tree) & ~tree.is_window & (depths <= max_depth) & (tree.tokens == parent_target)
    is_on_path = ~jnp.any(ancestors & ~(is_match | is_root)[None, :], axis=-1)
    last = jnp.argmax(jnp.where(is_on_path, depths, -1))
    is_taken = ancestors[last]
    at_depth = is_taken[None, :] & (depths[None, :] == jnp.arange(max_depth + 1)[:, None])  # [P, N]
    nodes = jnp.where(jnp.any(at_depth, axis=-1), jnp.argmax(at_depth, axis=-1), NO_NODE)
    return Path(nodes.astype(jnp.int32), depths[last])
