"""What a step cannot take less than on this device: its bare products, and the reading of what they multiply by."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hd_jax import compilation
from hd_jax.runner import LM

COPY_BYTES = 2**31  # of the array whose copy is timed, on an accelerator; a 32nd of it on a CPU
MATMUL_SIZE = 8192  # of the square matrices whose product is timed, on an accelerator; a 16th of it on a CPU


def copy_rate() -> float:
    """Bytes a second, read and written, at which this device copies a large array."""
    size = COPY_BYTES // (32 if jax.default_backend() == "cpu" else 1)
    copy = _compiled(lambda x: x + 1, donate_argnums=0)
    x = copy(jnp.zeros(size // 4, jnp.float32))
    return 2 * size / _seconds_each(copy, x)


def matmul_rate() -> float:
    """Floating-point operations a second of a large product of bfloat16 matrices, or of float32 ones on a CPU."""
    is_cpu = jax.default_backend() == "cpu"
    size = MATMUL_SIZE // (16 if is_cpu else 1)
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32 if is_cpu else jnp.bfloat16) / size**0.5
    multiply = _compiled(lambda x: x @ x)
    return 2 * size**3 / _seconds_each(multiply, multiply(x))


def _compiled(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Jitted as the programs are that decode."""
    return jax.jit(function, compiler_options=compilation.options(), **settings)


def _seconds_each(call: Callable[[jax.Array], jax.Array], x: jax.Array, num_calls: int = 10) -> float:
    """Seconds of one call of a chain of them, f(f(x)): the median of five chains."""
    times = []
    for _ in range(6):
        jax.block_until_ready(x)
        clock = time.perf_counter()
        for _ in range(num_calls):
            x = call(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - clock) / num_calls)
    return statistics.median(times[1:])


def keys_and_values(lm: LM, context: int) -> list[tuple[jax.Array, jax.Array]]:
    """Of every layer, ones in their place: keys [K, D, context] and values [K, context, D]."""
    c = lm.config
    ones = functools.partial(jnp.ones, dtype=c.dtype)
    keys, values = (c.num_kv_heads, c.head_dim, context), (c.num_kv_heads, context, c.head_dim)
    return [(ones(keys), ones(values)) for _ in range(c.num_layers)]


def bare_products(lm: LM, num_nodes: int, layers: Sequence[tuple[jax.Array, jax.Array]] = ()) -> Callable[[], float]:
    """A function that measures one round: milliseconds of a step's products with the weights, and of nothing else.

    With `keys_and_values` the products of attention are among them, of all queries with the keys and of their scores with the
    values. One after the other, each waits for the one before. Of the two orders of a weight and its operand the faster counts.
    """
    c = lm.config
    matrices = [x for x in _weights(lm) if x.ndim == 2]
    queries = jnp.ones((c.num_kv_heads, c.num_heads // c.num_kv_heads * num_nodes, c.head_dim), c.dtype)
    multiply = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    def chain(weights: list[jax.Array], layers: Any, x: dict[int, jax.Array], queries: jax.Array, is_weight_first: bool):
        carried = jnp.zeros((), c.dtype)
        for keys, values in layers:
            scores = multiply(queries + carried, keys).astype(c.dtype)
            carried = multiply(scores, values)[0, 0, 0].astype(c.dtype) * 0
        for weight in weights:
            rows = x[weight.shape[1]] + carried
            if is_weight_first:
                out = jax.lax.dot_general(weight, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            else:
                out = jax.lax.dot_general(rows, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            carried = out[0, 0].astype(c.dtype) * 0
        return carried

    inputs = {weight.shape[1]: jnp.ones((num_nodes, weight.shape[1]), c.dtype) for weight in matrices}
    compiled = [_compiled(functools.partial(chain, is_weight_first=order)) for order in (False, True)]

    def measure() -> float:
        times = []
        for call in compiled:
            clock = time.perf_counter()
            jax.block_until_ready([call(matrices, layers, inputs, queries) for _ in range(4)])
            times.append((time.perf_counter() - clock) * 1e3 / 4)
        return min(times)

    return measure


def _weights(lm: LM) -> list[jax.Array]:
    """What a step reads whole: all but an embedding that is not the head as well, which is only looked up in."""
    leaves = jax.tree_util.tree_leaves_with_path(lm.params)
    return [x for path, x in leaves if lm.config.is_head_tied or path[-1].key != "embed_tokens"]


def num_weights(lm: LM) -> int:
    """Of the matrices that a step multiplies by, and of the norms."""
    return sum(x.size for x in _weights(lm))


def bytes_read(lm: LM, context: int) -> int:
    """Bytes of weights and committed keys and values that a step must read."""
    c = lm.config
    cached = 2 * context * c.num_layers * c.num_kv_heads * c.head_dim * jnp.dtype(c.dtype).itemsize
    return sum(x.nbytes for x in _weights(lm)) + cached
