"""The Jacobi window: nodes of the draft tree with which the model makes n-grams of its own (Fu et al. 2024, arXiv 2402.02057).

Its nodes are run for their likeliest next tokens alone and never accepted. Row 0 is a line of guesses from the root on, and
every column continues downwards (here width 4, n-gram 4):

    root -> a1 -> a2 -> a3        a node's ancestors are its column above and row 0 to its left
     |      |     |     |
     b0     b1    b2    b3        after a step, the likeliest tokens after the last row are the next row; each
     |      |     |     |         column and its new token are an n-gram; row 0 is dropped
     c0     c1    c2    c3

A window is int32[n - 1, W]; what stands at [0, 0] has no meaning: the root is there. Its other cells are the last nodes of a
tree, in their order: an adaptive budget cuts the window before the drafts, and a window that was cut stays as it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax import draft_tree
from hd_jax.draft_tree import NO_SOURCE, NO_TOKEN, DraftTree
from hd_jax.drafters.base import Context, Feedback


def num_nodes(ngram: int, width: int) -> int:
    """Of a window, the root not counted."""
    return max((ngram - 1) * width - 1, 0)


def max_depth(ngram: int, width: int) -> int:
    """Of the last column's end."""
    return ngram - 3 + width


def guesses(context: Context, ngram: int, width: int) -> jax.Array:
    """A request's first window: scattered tokens of the prompt, always the same."""
    cells = jnp.arange((ngram - 1) * width).reshape(ngram - 1, width)
    return context.tokens[(7919 * (cells + 1)) % context.length]


def tree(window: jax.Array, root: jax.Array) -> DraftTree:
    """The root and the window's nodes, row by row."""
    cells = np.arange(window.size).reshape(window.shape)  # node index of each cell; [0, 0] is the root
    parents = np.empty_like(cells)
    parents[0] = cells[0] - 1
    parents[1:] = cells[:-1]
    return DraftTree(
        tokens=window.at[0, 0].set(root).reshape(-1),
        parents=jnp.asarray(parents.reshape(-1), jnp.int32).at[0].set(draft_tree.NO_PARENT),
        sources=jnp.full(cells.size, NO_SOURCE, jnp.int32),
        is_window=jnp.arange(cells.size) > 0,
        probabilities=jnp.full(cells.size, draft_tree.UNKNOWN),
    )


def advance(window: jax.Array, feedback: Feedback) -> tuple[jax.Array, jax.Array, jax.Array]:
    """After a step whose tree ended with the window's nodes: what they made.

    Returns:
      The next window, the n-grams int32[W, n] of this one, and bool[], whether its nodes were verified. If they were not, the
      n-grams have no meaning, and the next window is this one.
    """
    if feedback.tree.tokens.shape[0] < window.size:  # the root alone
        rows, width = window.shape
        return window, jnp.full((width, rows + 1), NO_TOKEN), jnp.bool_(False)
    cells = np.concatenate([[draft_tree.ROOT_INDEX], np.arange(-(window.size - 1), 0)]).reshape(window.shape)  # node of each
    bottom = feedback.argmax[cells[-1]]  # after the window's last row
    columns = window.at[0, 0].set(feedback.tree.tokens[draft_tree.ROOT_INDEX])
    columns = jnp.concatenate([columns, bottom[None]])  # [n, W]
    is_verified = jnp.all(draft_tree.is_node(feedback.tree)[cells[-1]])
    return jnp.where(is_verified, columns[1:], window), columns.T, is_verified
