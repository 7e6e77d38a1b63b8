"""Drawing the target token of every node: greedily, or by keyed Gumbel-max after temperature, top-k and top-p.

`argmax(log p + gumbel)` is a draw from p (the Gumbel-max trick). The noise depends on nothing but (request seed, sample
index, position of the token to be drawn), so the drawn text is a function of these alone: drafts, batches and widths
cannot change it. It is drawn once a position, not once a node: all nodes of a depth share theirs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hd_jax import ranking


class SamplingMode(NamedTuple):
    """What the compiled program must be able to do (static)."""

    is_sampled: bool = False  # False: every row is greedy
    has_top_k: bool = False
    has_top_p: bool = False


class Sampling(NamedTuple):
    """What may change from row to row and call to call (traced)."""

    temperature: jax.Array  # float32[B]; 0 is greedy
    top_k: jax.Array  # int32[B]; 0 for no limit
    top_p: jax.Array  # float32[B], in (0, 1]
    seeds: jax.Array  # uint32[B], of the request
    samples: jax.Array  # uint32[B], index of the sample within the request


def position_noise(seed: jax.Array, sample: jax.Array, positions: jax.Array, vocab_size: int) -> jax.Array:
    """Standard Gumbel noise float32[P, V] for one row's int32[P] positions."""
    key = jax.random.fold_in(jax.random.key(seed), sample)
    draw = lambda position: jax.random.gumbel(jax.random.fold_in(key, position), (vocab_size,))  # noqa: E731
    return jax.vmap(draw)(positions)


def _kth_bound(values: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """The largest t such that the weights of all values >= t sum to at least `target`; [..., V] to [..., 1].

    Bisection over the bits of float32, whose order, for the non-negative values here, is that of the integers: 31
    reductions find the bound exactly, where a sort of the vocabulary costs several times as much.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    low = jnp.zeros((*values.shape[:-1], 1), jnp.int32)  # always reaches the target: all values are >= 0
    high = jnp.full_like(low, 0x7F800000)  # infinity: never does

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        is_reached = jnp.sum(jnp.where(bits >= middle, weights, 0), axis=-1, keepdims=True) >= target
        return jnp.where(is_reached, middle, low), jnp.where(is_reached, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def warp(logits: jax.Array, mode: SamplingMode, sampling: Sampling) -> jax.Array:
    """Temperature, then top-k, then top-p over what is left, as Hugging Face orders them: float32[B, N, V] log scores.

    Tokens that are cut are -inf. Tokens that tie with the last one kept are kept as well. A row at temperature 0 is
    returned as it is.
    """
    column = lambda x: x[:, None, None]  # noqa: E731
    is_greedy = column(sampling.temperature) <= 0
    scaled = logits / jnp.where(is_greedy, 1.0, column(sampling.temperature))
    relative = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))  # in (0, 1]: same order, non-negative
    is_kept = jnp.ones(logits.shape, bool)
    if mode.has_top_k:
        vocab_size = logits.shape[-1]
        top_k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab_size), vocab_size)
        ones = jnp.ones(relative.shape, jnp.int32)
        is_kept &= relative >= _kth_bound(relative, ones, column(top_k))
    if mode.has_top_p:
        mass = jnp.where(is_kept, relative, 0.0)
        target = column(sampling.top_p) * jnp.sum(mass, axis=-1, keepdims=True)
        is_kept &= (mass >= _kth_bound(mass, mass, target)) | (column(sampling.top_p) >= 1)
    return jnp.where(is_greedy, logits, jnp.where(is_kept, scaled, -jnp.inf))


def scores(
    logits: jax.Array, positions: jax.Array, depths: jax.Array, max_depth: int, mode: SamplingMode, sampling: Sampling
) -> jax.Array:
    """What the target token is the argmax of: logits, or warped logits plus noise.

    Args:
      logits: float32[B, N, V].
      positions: int32[B], position of the token that follows each row's root.
      depths: int32[B, N].
      max_depth: static bound of `depths`.
      mode: static.
      sampling: per row.

    Returns:
      float32[B, N, V].
    """
    if not mode.is_sampled:
        return logits
    row_positions = positions[:, None] + jnp.arange(max_depth + 1)
    row_noise = jax.vmap(position_noise, in_axes=(0, 0, 0, None))
    noise = row_noise(sampling.seeds, sampling.samples, row_positions, logits.shape[-1])  # [B, max_depth + 1, V]
    noise = jnp.where(sampling.temperature[:, None, None] > 0, noise, 0.0)
    return warp(logits, mode, sampling) + jnp.take_along_axis(noise, depths[:, :, None], axis=1)


def draw(*args, **kwargs) -> jax.Array:
    """int32[B, N]: the target token of every node; see `scores` for the arguments."""
    return ranking.argmax(scores(*args, **kwargs))
