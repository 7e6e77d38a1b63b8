"""A residual sum and its normalisation, of one token on a GPU: one Pallas kernel.

XLA makes one kernel of the norm of several tokens, but two of a single one's: some 60 more in a plain step of a 7B model.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton


def add_and_normalize(
    x: jax.Array, added: jax.Array, weight: jax.Array, *, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As `llama.ResidualNorm`, of [1, 1, E] twice and [E] weights."""
    size = x.shape[-1]
    total, normalized = pl.pallas_call(
        functools.partial(_kernel, eps),
        out_shape=[jax.ShapeDtypeStruct((size,), x.dtype)] * 2,
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="add_and_normalize",
    )(x.reshape(size), added.reshape(size), weight)
    return total.reshape(x.shape), normalized.reshape(x.shape)


def _kernel(eps: float, x_ref, added_ref, weight_ref, total_ref, normalized_ref):
    size = x_ref.shape[0]
    numbers = jnp.arange(pl.next_power_of_2(size))
    places = jnp.minimum(numbers, size - 1)  # those beyond the last one repeat it, and write the same again
    total = x_ref[places] + added_ref[places]
    wide = total.astype(jnp.float32)
    mean = jnp.sum(jnp.where(numbers < size, wide * wide, 0.0)) / size
    total_ref[places] = total
    normalized_ref[places] = weight_ref[places] * (wide * jax.lax.rsqrt(mean + eps)).astype(total.dtype)
