"""What the model itself said would come next, kept by what stood before: at every node that it verified, rejected or not.

The likeliest tokens after a node, with the model's probabilities, are written under the node's token and the one before it,
and under its token alone, as in ADED's matrix and in Token Recycling's; a look-up takes the pair's row if there is one. The
newest is what stays. Such a row is the model's own word, on another text; how much it says beside another estimate is a share
that is learned from what came, by the kind of row and by how well the text itself is known.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax.databases import pair_overlay
from hd_jax.databases.pair_overlay import PairOverlay
from hd_jax.draft_tree import NO_TOKEN, is_node
from hd_jax.drafters.base import Context, Feedback

NUM_SUCCESSORS = 8  # k, of a row
MAX_ROWS = 1 << 15
NO_ROW, OF_TOKEN, OF_PAIR = range(3)  # kinds of rows
START_SHARES = (0.0, 0.1, 0.4)  # of each kind
SHARE_STEP = 0.02  # weight of the newest outcome


class RecycledRows(NamedTuple):
    """What one row of a batch has recycled."""

    rows: PairOverlay  # a token alone stands under (NO_TOKEN, token)
    shares: jax.Array  # float32[3, M], by kind of row and class of match


class Recycled(NamedTuple):
    """The rows of Q texts."""

    tokens: jax.Array  # int32[Q, k], the likeliest first, or NO_TOKEN
    probabilities: jax.Array  # float32[Q, k], 0 there
    kinds: jax.Array  # int32[Q]


def empty(num_classes: int) -> RecycledRows:
    """Nothing was verified yet; shares are kept for so many classes of matches."""
    shares = np.repeat(np.array(START_SHARES, np.float32)[:, None], num_classes, axis=1)
    return RecycledRows(pair_overlay.empty(MAX_ROWS, NUM_SUCCESSORS), jnp.asarray(shares))


def lookup(recycled: RecycledRows, pairs: jax.Array) -> Recycled:
    """The rows for texts that end with int32[Q, 2] pairs."""
    both = jnp.concatenate([pairs, _alone(pairs)])
    tokens, probabilities, is_found = (x.reshape(2, len(pairs), *x.shape[1:]) for x in pair_overlay.lookup(recycled.rows, both))
    of_pair, of_token = is_found
    choose = lambda x, empty: jnp.where(of_pair[:, None], x[0], jnp.where(of_token[:, None], x[1], empty))  # noqa: E731
    kinds = jnp.where(of_pair, OF_PAIR, jnp.where(of_token, OF_TOKEN, NO_ROW))
    return Recycled(choose(tokens, NO_TOKEN), choose(probabilities, 0.0), kinds)


def write(recycled: RecycledRows, context: Context, feedback: Feedback) -> RecycledRows:
    """After a step, the rows of all verified nodes; of several with one key, the last stays."""
    pairs = feedback.pairs(context)
    is_seen = is_node(feedback.tree) & (feedback.num_appended > 0)
    is_seen &= jnp.sum(recycled.shares) < jnp.inf  # always; but the rows were read for the shares, and are not copied then
    rows = pair_overlay.write(
        recycled.rows,
        jnp.concatenate([_alone(pairs), pairs]),
        jnp.tile(feedback.top_tokens, (2, 1)),
        jnp.tile(jax.nn.softmax(feedback.top_logits, axis=-1), (2, 1)),
        jnp.tile(is_seen, 2),
    )
    return recycled._replace(rows=rows)


def mixed(recycled: RecycledRows, found: Recycled, classes: jax.Array, others: jax.Array, sums: jax.Array) -> jax.Array:
    """Log-probabilities of a mixture.

    Args:
      recycled: whose shares count.
      found: the texts' rows.
      classes: int32[Q], of the texts' matches.
      others: float32[Q, I], log-probabilities of another estimate.
      sums: float32[Q, I], the rows' probabilities of the same tokens.
    """
    share = recycled.shares[found.kinds, classes][:, None]
    return jnp.log((1 - share) * jnp.exp(others) + share * sums)


def learn_shares(
    recycled: RecycledRows, found: Recycled, classes: jax.Array, others: jax.Array, own: jax.Array, is_counted: jax.Array
) -> RecycledRows:
    """Moves each share towards that of the outcomes which the rows, rather than the other estimate, told.

    Args:
      recycled: before.
      found: rows of Q texts.
      classes: int32[Q], of the texts' matches.
      others: float32[Q], the other estimate's probability of what came.
      own: float32[Q], the row's.
      is_counted: bool[Q].
    """
    share = recycled.shares[found.kinds, classes]
    told = share * own / jnp.maximum(share * own + (1 - share) * others, 1e-9)
    is_of = (found.kinds[:, None] == np.arange(3))[:, :, None] & (classes[:, None] == np.arange(recycled.shares.shape[1]))[
        :, None
    ]
    is_of = is_of & (is_counted & (found.kinds != NO_ROW) & (others + own > 0))[:, None, None]  # [Q, 3, M]
    count = jnp.sum(is_of, axis=0)
    mean = jnp.sum(jnp.where(is_of, told[:, None, None], 0.0), axis=0) / jnp.maximum(count, 1)
    kept = (1 - SHARE_STEP) ** count
    return recycled._replace(shares=jnp.clip(recycled.shares * kept + mean * (1 - kept), 0.0, 0.95))


def _alone(pairs: jax.Array) -> jax.Array:
    return pairs.at[:, 0].set(NO_TOKEN)
