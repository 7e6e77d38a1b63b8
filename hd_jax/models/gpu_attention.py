"""Attention of a few new tokens to a long cache on a GPU: one Pallas kernel that reads the committed slots once, and no others.

The slots are split among programs, each of which keeps a running maximum and sum (Dao et al. 2022, FlashAttention), so that
few heads fill a device (flash-decoding); what they found is joined under one maximum. Operands are bfloat16, as matrix units
take them; scores, softmax and sums are float32.

A program's rows are the queries of the heads of one key/value head, row r that of head r // T and new token r % T:

              cache slots, split among programs      new tokens, by the first program
    row r     0 .. 319 | 320 .. 639 | .. length-1    those that self_mask allows
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

SLOTS = 64  # of a cache, that a program takes at a time
MIN_SIDE = 16  # of a matrix product
MAX_ROWS = 64  # of a program
MAX_UNROLLED = 8  # splits whose sums are joined by so many operations in place of reductions
NUM_PROGRAMS = 256  # about so many where they have 16 rows, and half as many where they have more, which are longer to join


def is_possible(head_dim: int, num_slots: int, dtype: Any) -> bool:
    """Whether the kernel has a form for these sizes."""
    return dtype == jnp.bfloat16 and head_dim in (32, 64, 128, 256) and num_slots % SLOTS == 0


def attend(
    q: jax.Array,  # [B, T, H, D], scaled
    new: tuple[jax.Array, jax.Array],  # [B, K, T, D] twice
    self_mask: jax.Array,  # bool[B, T, T]
    cached: tuple[jax.Array, jax.Array],  # [B, K, S, D] twice
    cache_lengths: jax.Array,  # int32[B]
    *,
    interpret: bool = False,
) -> jax.Array:  # float32[B, T, H, D]
    """Softmax attention over the committed slots and the new tokens."""
    num_rows, num_tokens, num_heads, head_dim = q.shape
    num_groups, num_slots = cached[0].shape[1:3]
    group_size = num_heads // num_groups
    block = min(max(pl.next_power_of_2(group_size * num_tokens), MIN_SIDE), MAX_ROWS)
    num_blocks = pl.cdiv(group_size * num_tokens, block)
    wanted = NUM_PROGRAMS if block == MIN_SIDE else NUM_PROGRAMS // 2
    num_splits = min(max(wanted // (num_rows * num_groups * num_blocks), 1), num_slots // SLOTS)
    per_split = pl.cdiv(num_slots // SLOTS, num_splits) * SLOTS
    num_splits = pl.cdiv(num_slots, per_split)

    # New keys and values are taken as [B, T, K, D], as products leave them: so XLA turns none, and makes all in one kernel.
    new = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), new)
    of_new = pl.BlockSpec((None, num_tokens, None, head_dim), lambda b, k, i, s: (b, 0, k, 0))
    of_cached = pl.BlockSpec((None, None, num_slots, head_dim), lambda b, k, i, s: (b, k, 0, 0))

    shape = (num_splits, num_rows, num_tokens, num_groups, group_size)
    by_row = pl.BlockSpec((None, None, num_tokens, None, group_size), lambda b, k, i, s: (s, b, 0, k, 0))
    sums, peaks, totals = pl.pallas_call(
        functools.partial(_kernel, block, per_split),
        grid=(num_rows, num_groups, num_blocks, num_splits),
        in_specs=[
            pl.BlockSpec((None, num_tokens, None, group_size, head_dim), lambda b, k, i, s: (b, 0, k, 0, 0)),
            of_new,
            of_new,
            pl.BlockSpec((None, num_tokens, num_tokens), lambda b, k, i, s: (b, 0, 0)),
            of_cached,
            of_cached,
            pl.BlockSpec((None,), lambda b, k, i, s: (b,)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, num_tokens, None, group_size, head_dim), lambda b, k, i, s: (s, b, 0, k, 0, 0)),
            by_row,
            by_row,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="tree_attention",
    )(q.reshape(num_rows, num_tokens, num_groups, group_size, head_dim), *new, self_mask, *cached, cache_lengths)
    if num_splits <= MAX_UNROLLED:  # one by one: of one token, XLA makes one kernel of it all
        highest, added = functools.reduce(jnp.maximum, peaks), functools.partial(functools.reduce, jnp.add)
    else:
        highest, added = jnp.max(peaks, axis=0), functools.partial(jnp.sum, axis=0)
    scales = jnp.exp(peaks - highest)
    out = added(sums * scales[..., None]) / added(totals * scales)[..., None]
    return out.reshape(num_rows, num_tokens, num_heads, head_dim)


def _kernel(
    block: int,
    per_split: int,
    q_ref,  # [T, G, D]
    new_keys_ref,  # [T, D]
    new_values_ref,  # [T, D]
    mask_ref,  # [T, T]
    keys_ref,  # [S, D]
    values_ref,  # [S, D]
    length_ref,  # []
    sums_ref,  # [T, G, D]
    peaks_ref,  # [T, G]
    totals_ref,  # [T, G]
):
    num_tokens, group_size, head_dim = q_ref.shape
    lowest = float(jnp.finfo(jnp.float32).min)
    split = pl.program_id(3)
    width = min(max(pl.next_power_of_2(num_tokens), MIN_SIDE), SLOTS)  # new tokens that it takes at a time
    # Rows beyond the last query repeat one, and write the same again.
    rows = jnp.minimum(pl.program_id(2) * block + jnp.arange(block), group_size * num_tokens - 1)
    tokens, heads = rows % num_tokens, rows // num_tokens
    q = q_ref[tokens, heads, :]

    def take(carry, keys, values, is_allowed):
        sums, peak, total = carry
        scores = jnp.where(is_allowed, jnp.dot(q, keys.T, preferred_element_type=jnp.float32), lowest)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        weights = jnp.exp(scores - new_peak[:, None])
        kept = jnp.exp(peak - new_peak)
        found = jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return kept[:, None] * sums + found, new_peak, kept * total + jnp.sum(weights, axis=1)

    def take_cached(index, carry):
        start = split * per_split + index * SLOTS
        slots = pl.ds(start, SLOTS)
        is_committed = start + jnp.arange(SLOTS) < length
        return take(carry, keys_ref[slots, :], values_ref[slots, :], is_committed[None, :])

    def take_new(index, carry):
        numbers = index * width + jnp.arange(width)
        columns = jnp.minimum(numbers, num_tokens - 1)
        is_allowed = mask_ref[tokens[:, None], columns[None, :]] & (numbers < num_tokens)[None, :]
        return take(carry, new_keys_ref[columns, :], new_values_ref[columns, :], is_allowed)

    length = jnp.minimum(length_ref[...], keys_ref.shape[0])
    nothing = (jnp.zeros((block, head_dim), jnp.float32), jnp.full(block, lowest), jnp.zeros(block, jnp.float32))
    num_left = jnp.clip(length - split * per_split, 0, per_split)
    carry = jax.lax.fori_loop(0, pl.cdiv(num_left, SLOTS), take_cached, nothing)
    take_all = lambda carry: jax.lax.fori_loop(0, pl.cdiv(num_tokens, width), take_new, carry)  # noqa: E731
    sums, peak, total = jax.lax.cond(split == 0, take_all, lambda carry: carry, carry)
    sums_ref[tokens, heads, :] = sums
    peaks_ref[tokens, heads] = peak
    totals_ref[tokens, heads] = total
