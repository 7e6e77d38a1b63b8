"""The commit of a step on a GPU: one Pallas kernel that writes the rows of an accepted path into the caches of all layers.

As operations of XLA, each layer's keys and values are written by a kernel of their own: 64 in a step of a 7B model, which take
the time of being started. A program here writes one key/value head of one text in all layers, one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton


def is_possible(head_dim: int) -> bool:
    """Whether the kernel has a form for heads of this size."""
    return head_dim == pl.next_power_of_2(head_dim)


def write(
    cached: Sequence[jax.Array],  # [B, K, S, D] each, written in place
    new: Sequence[jax.Array],  # [B, K, T, D] each
    order: jax.Array,  # int32[B, P], which of the T rows are written
    slots: jax.Array,  # int32[B], where the first goes, the others behind it; those above S - P are taken for it
    *,
    interpret: bool = False,
) -> list[jax.Array]:
    """The arrays with rows `order` of `new` at `slots`."""
    num_rows, num_heads, num_slots, head_dim = cached[0].shape
    new = [jnp.swapaxes(array, 1, 2) for array in new]  # as the products leave them, so that XLA turns none
    of_new = [pl.BlockSpec((None, array.shape[1], None, head_dim), lambda b, k: (b, 0, k, 0)) for array in new]
    of_cached = [pl.BlockSpec((None, None, num_slots, head_dim), lambda b, k: (b, k, 0, 0))] * len(cached)

    return pl.pallas_call(
        functools.partial(_kernel, len(cached)),
        grid=(num_rows, num_heads),
        in_specs=[
            pl.BlockSpec((None, order.shape[1]), lambda b, k: (b, 0)),
            pl.BlockSpec((None,), lambda b, k: (b,)),
            *of_new,
            *of_cached,
        ],
        out_specs=of_cached,
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in cached],
        input_output_aliases={2 + len(new) + index: index for index in range(len(cached))},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="commit",
    )(order, slots, *new, *cached)


def _kernel(num_arrays: int, order_ref, slot_ref, *refs):
    new_refs, cached_refs = refs[:num_arrays], refs[2 * num_arrays :]
    num_written = order_ref.shape[0]
    # A block has a power of two rows: those beyond the last one repeat it, and write the same again.
    numbers = jnp.minimum(jnp.arange(pl.next_power_of_2(num_written)), num_written - 1)
    num_slots = cached_refs[0].shape[0]
    order, slots = order_ref[numbers], jnp.minimum(slot_ref[...], num_slots - num_written) + numbers
    for new_ref, cached_ref in zip(new_refs, cached_refs, strict=True):
        cached_ref[slots, :] = new_ref[order, :]
