"""The largest few of many values, in the way that is fast where the program runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 128  # values of which a CPU takes the maximum at once
MAX_VALUES = 8192  # that a GPU ranks by comparing all with all


def top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of float32[n] values, best first, and their int32[k] indices; of equal ones the first come first.

    On a GPU XLA's own top-k takes some 40 microseconds, however few the values are. Comparing all with all takes a few.
    """
    if values.shape[0] > MAX_VALUES:
        return jax.lax.top_k(values, k)
    found, indices = jax.lax.platform_dependent(
        values, cuda=lambda v: by_rank(v, k), default=lambda v: tuple(jax.lax.top_k(v, k))
    )
    return found, indices


def argmax(values: jax.Array) -> jax.Array:
    """The index of the first of the largest of [..., n] values, int32[...].

    A CPU's vector units take maxima, but not XLA's reduction to an index: so that runs over the maxima of blocks, and then over
    the values of one block.
    """

    def plain(values: jax.Array) -> jax.Array:
        return jnp.argmax(values, axis=-1).astype(jnp.int32)

    def by_block(values: jax.Array) -> jax.Array:
        *rest, num_values = values.shape
        padding = [(0, 0)] * len(rest) + [(0, -num_values % BLOCK)]
        blocks = jnp.pad(values, padding, constant_values=-jnp.inf).reshape(*rest, -1, BLOCK)
        best = plain(jnp.max(blocks, axis=-1))
        block = jnp.take_along_axis(blocks, best[..., None, None], axis=-2)[..., 0, :]
        return best * BLOCK + plain(block)

    return jax.lax.platform_dependent(values, cpu=by_block, default=plain)


def by_rank(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """As `top_k`, by the number of values that each one comes after."""
    places = jnp.arange(values.shape[0], dtype=jnp.int32)
    is_it = ranks(values)[None, :] == jnp.arange(k)[:, None]
    indices = jnp.sum(jnp.where(is_it, places[None, :], 0), axis=1, dtype=jnp.int32)
    return jnp.sum(jnp.where(is_it, values[None, :], 0), axis=1), indices


def ranks(values: jax.Array) -> jax.Array:
    """int32[n]: how many of float32[n] values come before each: the larger ones, and of equal ones those that stand first."""
    places = jnp.arange(values.shape[0], dtype=jnp.int32)
    is_before = (values[None, :] > values[:, None]) | (
        (values[None, :] == values[:, None]) & (places[None, :] < places[:, None])
    )
    return jnp.sum(is_before, axis=1, dtype=jnp.int32)
