"""Prefill: how the tokens of a prompt, all but the last, come into the cache."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hd_jax import compilation, loop, sharding
from hd_jax.models import llama
from hd_jax.models.llama import Cache, Llama

# Tokens of a prompt that a pass may read, the largest first: so many that its products are fast, or so few that little of a
# short prompt's pass is in vain.
CHUNK_SIZES = {"cpu": (256, 64), "default": (256,)}

_has_run: set[Hashable] = set()  # programs that have read chunks in this process


def chunk_sizes() -> tuple[int, ...]:
    """CHUNK_SIZES of this process's devices."""
    return CHUNK_SIZES.get(jax.default_backend(), CHUNK_SIZES["default"])


def chunks_of(num_tokens: int, is_exact: bool = False) -> list[tuple[int, int]]:
    """The passes that read so many tokens of a prompt, (size, how often) in their order; less than the smallest size in vain.

    Exact mode has the smallest size alone: bits depend on the size, and it would depend on the rows that are read together.
    """
    sizes = chunk_sizes()
    smallest, chunks = sizes[-1], []
    for size in (smallest,) if is_exact else sizes:
        count = (num_tokens + smallest - 1) // size
        num_tokens = max(num_tokens - count * size, 0)
        chunks += [(size, count)] if count else []
    return chunks


def read(
    model: Llama,
    params: Any,
    cache: Cache,
    tokens: jax.Array,
    first: int,
    chunks: Sequence[tuple[int, int]],
    is_exact: bool = False,
) -> Cache:
    """Fills the cache (donated) with chunks of tokens from slot `first` on, all rows alike.

    Args:
      model: of which `params` are.
      params: of the model.
      cache: S slots, of which those below `first` are filled.
      tokens: int32[B, S].
      first: slot to fill first.
      chunks: as `chunks_of` gives them; they must end within S. A size that comes 0 times is made ready: its program is
        compiled, and where this process has not run it before, it reads a chunk in vain, since a first run is slow.
      is_exact: attention sums in float64, so that they do not depend on S.

    Returns:
      The cache. Slots of a chunk beyond a row's prompt hold garbage that decoding overwrites before it reads it.
    """
    for size, count in chunks:
        program = (model, tokens.shape, size, is_exact)
        span = jnp.int32(first), jnp.int32(count or program not in _has_run)
        _has_run.add(program)
        cache = compilation.here(read_alike)(model, params, cache, tokens, *span, chunk_size=size, is_exact=is_exact)
        first += size * count
    return cache


@compilation.jit(static_argnames=("model", "chunk_size", "is_exact"), donate_argnames="cache")
def read_alike(
    model: Llama,
    params: Any,
    cache: Cache,
    tokens: jax.Array,
    first: jax.Array,
    num_chunks: jax.Array,
    *,
    chunk_size: int,
    is_exact: bool = False,
) -> Cache:
    """As `read`, with `num_chunks` chunks of one static size."""
    mask = jnp.tril(jnp.ones((1, chunk_size, chunk_size), bool))
    num_rows = tokens.shape[0]

    def body(index: jax.Array, cache: Cache) -> Cache:
        start = first + index * chunk_size
        piece = jax.lax.dynamic_slice(tokens, (0, start), (num_rows, chunk_size))
        positions = jnp.broadcast_to(start + jnp.arange(chunk_size), piece.shape)
        starts = jnp.broadcast_to(start, num_rows)
        hidden, rows = loop.apply(model, params, (piece, positions, mask, cache, starts), is_exact, method="hidden")
        # No number is above infinity; but so the writing follows the last layer's reading, and the cache is not copied.
        slots = jnp.where(jnp.max(hidden) > jnp.inf, 0, starts)
        written = llama.write_rows(cache, rows, slots, model.config)
        return sharding.constrain(written, llama.cache_sharding(model.config, model.mesh))

    return jax.lax.fori_loop(0, num_chunks, body, cache)
