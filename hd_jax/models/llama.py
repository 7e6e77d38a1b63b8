"""The Llama-family transformer in Flax, in one form for training, prefill and the verification of a tree.

Dimension letters, here and in the whole package:

    B rows of a batch          L layers               V vocabulary
    N nodes of a draft tree    H query heads          G candidate continuations of a drafter
    T tokens of a call         K key/value heads      C tokens of a continuation
    S cache slots              D head width           E hidden width

A call sees T new tokens a row: a chunk of a prompt (T tokens in a line), or the nodes of a draft tree (T = N). Each of
them attends to the committed slots of the cache and to those new tokens that `self_mask` allows:

                 cache slots               new tokens            a tree: 0 - 1 - 2
               0 1 2 .. length-1           0 1 2 3                    |
        0      x x x .. x      |           x                          3
        1      x x x .. x      |           x x
        2      x x x .. x      |           x x x
        3      x x x .. x      |           x     x

The cache is read only. The keys and values of the T tokens are returned, and the caller writes those it keeps: a cache
that a compiled step both reads and rewrites whole would be copied.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hd_jax import sharding
from hd_jax.models import gpu_attention, gpu_cache, gpu_norm
from hd_jax.models.config import ModelConfig, RopeConfig

# Accelerators would otherwise round float32 operands to TF32 or bfloat16; bfloat16 operands are not affected.
PRECISION = jax.lax.Precision.HIGHEST
MANY_TOKENS = 64  # of a call, from which on a CPU's attention reads no slots of the cache in vain
SLOTS_AT_ONCE = 128  # of the cache, for so many tokens

# One (keys, values) pair a layer, each of the model's dtype: [B, K, S, D] in a cache, [B, K, T, D] for new tokens. The keys
# of a cache may be turned, [B, K, D, S]: `ModelConfig.is_feature_major`.
Cache = tuple[tuple[jax.Array, jax.Array], ...]


def empty_cache(config: ModelConfig, num_rows: int, num_slots: int, mesh: sharding.AnyMesh = None) -> Cache:
    """Zeroed keys and values, bound to their devices as the cache that a program returns is."""
    cache = _zeros(config, num_rows, num_slots, mesh)
    return sharding.put(cache, None) if mesh is None else cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _zeros(config: ModelConfig, num_rows: int, num_slots: int, mesh: sharding.AnyMesh) -> Cache:
    shape = (num_rows, config.num_kv_heads, num_slots, config.head_dim)
    key_shape = (*shape[:2], *reversed(shape[2:])) if config.is_feature_major else shape
    cache = tuple((jnp.zeros(key_shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in range(config.num_layers))
    return sharding.constrain(cache, cache_sharding(config, mesh))


def with_slots(cache: Cache, num_slots: int, config: ModelConfig) -> Cache:
    """The cache with empty slots added behind its own, up to `num_slots`."""
    if num_slots == cache[0][1].shape[2]:
        return cache

    def widen(array: jax.Array, axis: int) -> jax.Array:
        padding = [(0, num_slots - size if index == axis else 0) for index, size in enumerate(array.shape)]
        return jnp.pad(array, padding)

    return tuple((widen(k, 3 if config.is_feature_major else 2), widen(v, 2)) for k, v in cache)


@jax.named_scope("commit")
def write_rows(
    cache: Cache,
    rows: Cache,
    slots: jax.Array,
    config: ModelConfig,
    order: jax.Array | None = None,
    mesh: sharding.AnyMesh = None,
) -> Cache:
    """The cache with rows written at each text's slot, next to each other.

    The caller keeps slots free for all that are written: writes are clamped. Picked rows are written by a kernel of their own
    on one GPU (gpu_cache.py).

    Args:
      cache: S slots.
      rows: [B, K, T, D] a layer.
      slots: int32[B].
      config: of the model.
      order: int32[B, P], which of the T rows are written; None for all.
      mesh: over which the cache is split.
    """

    def write(array: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        if array.shape[0] == 1:
            return jax.lax.dynamic_update_slice_in_dim(array, new, slots[0], axis)
        one = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
        return jax.vmap(one)(array, new, slots)

    def write_keys(keys: jax.Array, new: jax.Array) -> jax.Array:
        return write(keys, jnp.swapaxes(new, 2, 3), 3) if config.is_feature_major else write(keys, new, 2)

    def by_layer(cache: Cache, rows: Cache) -> Cache:
        return tuple((write_keys(k, nk), write(v, nv, 2)) for (k, v), (nk, nv) in zip(cache, rows, strict=True))

    def picked_by_layer(cache: Cache, rows: Cache, order: jax.Array) -> Cache:
        return by_layer(cache, jax.tree.map(lambda x: jnp.take_along_axis(x, order[:, None, :, None], axis=2), rows))

    def at_once(cache: Cache, rows: Cache, order: jax.Array) -> Cache:
        cached, structure = jax.tree.flatten(cache)
        return jax.tree.unflatten(structure, gpu_cache.write(cached, jax.tree.leaves(rows), order, slots))

    if order is None:
        return by_layer(cache, rows)
    if mesh is not None or config.is_feature_major or not gpu_cache.is_possible(config.head_dim):
        return picked_by_layer(cache, rows, order)
    return jax.lax.platform_dependent(cache, rows, order, cuda=at_once, default=picked_by_layer)


def for_devices(config: ModelConfig, mesh: sharding.AnyMesh) -> ModelConfig:
    """The config with the layout that is fastest on this process's devices.

    On a CPU that is the feature-major one. A product with few tokens is fastest there with the weight [out, in] as the left
    operand, and activations that lie as it takes and leaves them; a cache's keys are rearranged in every step unless they are
    [B, K, D, S]. A mesh splits the rows of [B, T, E].
    """
    return dataclasses.replace(config, is_feature_major=jax.default_backend() == "cpu" and mesh is None)


def cache_sharding(config: ModelConfig, mesh: sharding.AnyMesh) -> jax.sharding.NamedSharding | None:
    """Of every array of a cache and of new keys and values."""
    return sharding.named(mesh, config, "rows", "kv_heads")


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[jax.Array, float]:
    """The angular frequencies, float32[D / 2] in radians per position, and the factor on cosines and sines.

    Kinds: `linear` (Chen et al. 2023), `llama3` (Llama 3.1's wavelength bands), `yarn` (Peng et al. 2023, section 3),
    and `dynamic`, which below its original context, where this package stays, is the default.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / jnp.power(jnp.float32(rope.theta), exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor, 1.0
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        smooth = (rope.original_context / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = jnp.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * frequencies / rope.factor + smooth * frequencies, 1.0
    if rope.kind == "yarn":

        def dimension_of(rotations: float) -> float:
            turns = rope.original_context / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(rope.theta))

        low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
        if rope.is_truncated:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3)
        keep = 1.0 - jnp.clip(ramp, 0.0, 1.0)

        def magnitude(mscale: float) -> float:
            return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

        scale = rope.attention_factor
        if scale is None:
            both = rope.mscale and rope.mscale_all_dim
            scale = magnitude(rope.mscale) / magnitude(rope.mscale_all_dim) if both else magnitude(1.0)
        return frequencies / rope.factor * (1 - keep) + frequencies * keep, float(scale)
    return frequencies, 1.0


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """Rotates heads by float32 angles, of half their width, pairing dimension i with i + D / 2 as Hugging Face does.

    `dtype` is that of the sums; float64 makes them independent of how they are compiled.
    """
    halves = x.astype(dtype).reshape(*x.shape[:axis], 2, -1, *x.shape[axis + 1 :])
    cos, sin = (jnp.expand_dims(turn.astype(dtype), axis) for turn in (cos, sin))
    sign = jnp.asarray([-1.0, 1.0], dtype).reshape(2, *[1] * (x.ndim - axis))
    # Number by number, and no joining of halves: so XLA makes queries, keys and values of like shapes in one kernel.
    return (halves * cos + jnp.flip(halves, axis) * (sin * sign)).astype(x.dtype).reshape(x.shape)


def attend(
    q: jax.Array,  # [B, T, H, D]
    new: tuple[jax.Array, jax.Array],  # [B, K, T, D] twice
    self_mask: jax.Array,  # bool[B, T, T]
    cached: tuple[jax.Array, jax.Array] | None,  # [B, K, S, D] twice, or turned keys [B, K, D, S]
    cache_lengths: jax.Array | None,  # int32[B]
    accumulate_dtype: Any,
    *,
    is_feature_major: bool = False,
    mesh: sharding.AnyMesh = None,
) -> jax.Array:  # [B, T, H * D]
    """Softmax attention over cached and new keys, with scores and sums of `accumulate_dtype`.

    On a GPU a kernel of its own reads the cache (gpu_attention.py); on a mesh, whose splits the compiler cannot carry into
    it, and elsewhere, `_attend`.
    """
    q = q * (q.shape[-1] ** -0.5)
    blockwise = functools.partial(_attend, accumulate_dtype=accumulate_dtype, is_feature_major=is_feature_major)
    is_plain = mesh is None and accumulate_dtype == jnp.float32 and not is_feature_major
    if is_plain and cached is not None and gpu_attention.is_possible(q.shape[-1], cached[0].shape[2], q.dtype):
        out = jax.lax.platform_dependent(q, new, self_mask, cached, cache_lengths, cuda=gpu_attention.attend, default=blockwise)
    else:
        out = blockwise(q, new, self_mask, cached, cache_lengths)
    return out.astype(new[0].dtype).reshape(*q.shape[:2], -1)


def _attend(q, new, self_mask, cached, cache_lengths, *, accumulate_dtype, is_feature_major) -> jax.Array:  # [B, T, H, D]
    """Of scaled queries: cached and new keys under one softmax, so that the cache is never concatenated.

    Few tokens take the cache whole. On a CPU many, as a prompt's, take the part that is committed: the loop over it has as many
    rounds as the rows' lengths say, for which an accelerator would wait, and a mesh would ask all its parts.
    """
    num_rows, num_tokens, num_heads, head_dim = q.shape
    num_groups = new[0].shape[1]
    q = q.reshape(num_rows, num_tokens, num_groups, num_heads // num_groups, head_dim)
    q = jnp.transpose(q, (0, 2, 3, 1, 4))  # [B, K, H / K, T, D]
    # bfloat16 operands go into a product as they are: so matrix units take them, and no copy of the cache is made.
    is_narrow = new[0].dtype == jnp.bfloat16 and accumulate_dtype == jnp.float32
    operand_dtype = jnp.bfloat16 if is_narrow else accumulate_dtype
    axes, slot_axis = ("bkds", 3) if is_feature_major else ("bksd", 2)  # of cached keys

    def product(subscripts: str, *operands: jax.Array) -> jax.Array:
        operands = tuple(x.astype(operand_dtype) for x in operands)
        return jnp.einsum(subscripts, *operands, precision=PRECISION, preferred_element_type=accumulate_dtype)

    def score(axes: str, keys: jax.Array, mask: jax.Array) -> jax.Array:  # [B, K, H / K, T, slots]
        return jnp.where(mask, product(f"bkgtd,{axes}->bkgts", q, keys), jnp.finfo(accumulate_dtype).min)

    def weigh(scores: jax.Array, peak: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jnp.exp(scores - peak)
        return jnp.sum(weights, axis=-1, keepdims=True), product("bkgts,bksd->bkgtd", weights, values)

    def largest(scores: jax.Array) -> jax.Array:
        return jnp.max(scores, axis=-1, keepdims=True)

    def score_cached(keys: jax.Array, start: jax.Array | int, first: jax.Array | int) -> jax.Array:
        """Of keys whose slots begin with `start`, and count from `first` on."""
        slots = start + jnp.arange(keys.shape[slot_axis])
        is_committed = (slots >= first) & (slots < cache_lengths[:, None])
        return score(axes, keys, is_committed[:, None, None, None, :])

    own = score("bksd", new[0], self_mask[:, None, None, :, :])
    if cached is None:
        total, values = weigh(own, largest(own), new[1])
    elif not is_feature_major or num_tokens < MANY_TOKENS:
        scores = score_cached(cached[0], 0, 0)
        peak = jnp.maximum(largest(own), largest(scores))
        total, values = jax.tree.map(jnp.add, weigh(own, peak, new[1]), weigh(scores, peak, cached[1]))
    else:
        num_slots = cached[1].shape[2]
        width = min(SLOTS_AT_ONCE, num_slots)

        def add_slots(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            first = index * width
            start = jnp.minimum(first, num_slots - width)
            cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=width)
            scores = score_cached(cut(cached[0], axis=slot_axis), start, first)
            before, total, values = sums
            peak = jnp.maximum(before, largest(scores))
            kept = jnp.exp(before - peak)
            more, more_values = weigh(scores, peak, cut(cached[1], axis=2))
            return peak, total * kept + more, values * kept + more_values

        peak = largest(own)
        num_steps = (jnp.max(cache_lengths) + width - 1) // width
        _, total, values = jax.lax.fori_loop(0, num_steps, add_slots, (peak, *weigh(own, peak, new[1])))
    out = jnp.transpose(jnp.divide(values, total), (0, 3, 1, 2, 4))
    return out.reshape(num_rows, num_tokens, num_heads, head_dim)


def multiply(x: jax.Array, weight: jax.Array, axis: int = -1) -> jax.Array:
    """The product with a weight [out, in], summed in float32 over an axis of x, the last or the first, that `out` replaces."""
    dot = functools.partial(jax.lax.dot_general, precision=PRECISION, preferred_element_type=jnp.float32)
    if axis == -1:
        return dot(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
    return dot(weight, x, (((1,), (0,)), ((), ())))


def _along(vector: jax.Array, axis: int, num_axes: int) -> jax.Array:
    """The vector with axes of size one, so that it multiplies an array along one axis."""
    return jnp.expand_dims(vector, [index for index in range(num_axes) if index != axis % num_axes])


class Linear(nn.Module):
    """`W x + b` along an axis of x, with the weight stored [out, in], as Hugging Face stores it."""

    features: int
    use_bias: bool = False
    dtype: Any = jnp.float32
    axis: int = -1
    multiply_fn: Callable[..., jax.Array] = multiply

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
        weight = self.param("weight", init, (self.features, x.shape[self.axis]), self.dtype)
        out = self.multiply_fn(x, weight, self.axis)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.dtype)
            out = out + _along(bias.astype(jnp.float32), self.axis, out.ndim)
        return out.astype(self.dtype)


class RMSNorm(nn.Module):
    eps: float
    dtype: Any = jnp.float32
    axis: int = -1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("weight", nn.initializers.ones, (x.shape[self.axis],), self.dtype)
        return _normalized(x, weight, self.eps, self.axis)


class ResidualNorm(nn.Module):
    """What a block adds to hidden states x, taken in: the sum, and that normalised."""

    eps: float
    dtype: Any
    axis: int
    is_fused: bool  # as in the config; so it is on one device

    @nn.compact
    def __call__(self, x: jax.Array, added: jax.Array) -> tuple[jax.Array, jax.Array]:
        def by_operations(x, added, weight):
            total = x + added
            return total, _normalized(total, weight, self.eps, self.axis)

        weight = self.param("weight", nn.initializers.ones, (x.shape[self.axis],), self.dtype)
        if not self.is_fused or x.size > x.shape[-1]:  # several tokens, or feature-major
            return by_operations(x, added, weight)
        by_kernel = functools.partial(gpu_norm.add_and_normalize, eps=self.eps)
        return jax.lax.platform_dependent(x, added, weight, cuda=by_kernel, default=by_operations)


def _normalized(x: jax.Array, weight: jax.Array, eps: float, axis: int) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=axis, keepdims=True) + eps)
    return _along(weight, axis, x.ndim) * wide.astype(x.dtype)


class Attention(nn.Module):
    config: ModelConfig
    multiply_fn: Callable[..., jax.Array] = multiply
    attend_fn: Callable[..., jax.Array] = attend

    @nn.compact
    def __call__(self, x, cos, sin, self_mask, cached, cache_lengths, accumulate_dtype):
        c = self.config
        # Heads lie beside each other in the features: [B, T, heads, D], or [heads, D, B, T].
        head_axis, width_axis = (0, 1) if c.is_feature_major else (2, 3)

        def project(name: str, num_heads: int) -> jax.Array:
            out = Linear(num_heads * c.head_dim, c.attention_bias, c.dtype, c.feature_axis, self.multiply_fn, name=name)(x)
            heads = (num_heads, c.head_dim)
            return out.reshape(*heads, *x.shape[1:]) if c.is_feature_major else out.reshape(*x.shape[:2], *heads)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(c.rms_norm_eps, c.dtype, width_axis, name=name)

        if c.is_fused:
            joined = project("qkv_proj", c.num_heads + 2 * c.num_kv_heads)
            q, k, v = jnp.split(joined, (c.num_heads, c.num_heads + c.num_kv_heads), axis=head_axis)
        else:
            q, k, v = project("q_proj", c.num_heads), project("k_proj", c.num_kv_heads), project("v_proj", c.num_kv_heads)
        if c.use_qk_norm:
            q, k = norm("q_norm")(q), norm("k_norm")(k)
        q, k = (_rotate(array, cos, sin, width_axis, accumulate_dtype) for array in (q, k))
        if c.is_feature_major:
            q, k, v = (jnp.transpose(array, (2, 3, 0, 1)) for array in (q, k, v))
        new = (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
        out = jnp.moveaxis(self.attend_fn(q, new, self_mask, cached, cache_lengths, accumulate_dtype), -1, c.feature_axis)
        return Linear(c.hidden_size, c.attention_out_bias, c.dtype, c.feature_axis, self.multiply_fn, name="o_proj")(out), new


class MLP(nn.Module):
    config: ModelConfig
    multiply_fn: Callable[..., jax.Array] = multiply

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config

        def linear(name: str, width: int) -> Linear:
            return Linear(width, c.mlp_bias, c.dtype, c.feature_axis, self.multiply_fn, name=name)

        if c.is_fused:
            gate, up = jnp.split(linear("gate_up_proj", 2 * c.intermediate_size)(x), 2, axis=c.feature_axis)
        else:
            gate, up = linear("gate_proj", c.intermediate_size)(x), linear("up_proj", c.intermediate_size)(x)
        return linear("down_proj", c.hidden_size)(nn.silu(gate) * up)


class Layer(nn.Module):
    config: ModelConfig
    multiply_fn: Callable[..., jax.Array] = multiply
    attend_fn: Callable[..., jax.Array] = attend

    @nn.compact
    def __call__(self, x, added, *attention_args):
        """The hidden states with `added` and the attention's output, what the MLP adds to these, and new keys and values."""
        c = self.config

        def norm(name: str) -> ResidualNorm:
            return ResidualNorm(c.rms_norm_eps, c.dtype, c.feature_axis, c.is_fused, name=name)

        x, normalized = norm("input_layernorm")(x, added)
        attended, new = Attention(c, self.multiply_fn, self.attend_fn, name="self_attn")(normalized, *attention_args)
        x, normalized = norm("post_attention_layernorm")(x, attended)
        return x, MLP(c, self.multiply_fn, name="mlp")(normalized), new


class Llama(nn.Module):
    """Llama, Mistral, Qwen2 and Qwen3; parameter names are Hugging Face's, nested (see `models.weights`).

    `multiply_fn` replaces `multiply`, every product with a weight, and `attend_fn` replaces `attend`: training passes its own.
    `mesh` is the one that parameters and cache are split over.
    """

    config: ModelConfig
    multiply_fn: Callable[..., jax.Array] = multiply
    attend_fn: Callable[..., jax.Array] = attend
    mesh: sharding.AnyMesh = None

    def setup(self):
        c = self.config
        init = nn.initializers.normal(0.02)
        shape = (c.vocab_size, c.hidden_size)
        self.embed_tokens = self.param("embed_tokens", init, shape, c.dtype)
        attend_fn = self.attend_fn
        if attend_fn is attend:
            attend_fn = functools.partial(attend, is_feature_major=c.is_feature_major, mesh=self.mesh)
        self.layers = [Layer(c, self.multiply_fn, attend_fn) for _ in range(c.num_layers)]
        self.norm = ResidualNorm(c.rms_norm_eps, c.dtype, c.feature_axis, c.is_fused)
        self.lm_head = self.embed_tokens if c.is_head_tied else self.param("lm_head", init, shape, c.dtype)

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        self_mask: jax.Array,
        cache: Cache | None = None,
        cache_lengths: jax.Array | None = None,
        accumulate_dtype: Any = jnp.float32,
    ) -> tuple[jax.Array, Cache]:
        """Runs the layers.

        Args:
          tokens: int32[B, T].
          positions: int32[B, T], of each token in its text.
          self_mask: bool[B, T, T], whether new token t attends to new token u (true on the diagonal).
          cache: keys and values of the committed tokens, read only; None for none.
          cache_lengths: int32[B], how many slots of each row are committed.
          accumulate_dtype: of rotations, scores, softmax and weighted sums; float64 makes them independent of the slots' order.

        Returns:
          The normalised last hidden states, [B, T, E] or, feature-major, [E, B, T], and the new tokens' keys and values.
        """
        c = self.config
        frequencies, scale = rope_frequencies(c.rope, c.head_dim)
        turn = lambda angles: (jnp.cos(angles) * scale, jnp.sin(angles) * scale)  # noqa: E731
        if c.is_feature_major:
            angles = frequencies[None, :, None, None] * positions.astype(jnp.float32)
            # A branch's results are kept. Otherwise, on a CPU, every layer computes its own, barriers or not.
            cos, sin = jax.lax.cond(positions[0, 0] >= 0, turn, lambda angles: (angles, angles), angles)
        else:
            cos, sin = turn(positions[:, :, None, None].astype(jnp.float32) * frequencies)
        by_rows, by_heads = sharding.by_rows(self.mesh), cache_sharding(c, self.mesh)
        embedded = sharding.constrain(jnp.take(self.embed_tokens, tokens, axis=0), by_rows)
        x = jnp.moveaxis(embedded, -1, c.feature_axis)
        added = jnp.zeros_like(x)
        rows = []
        for index, layer in enumerate(self.layers):
            cached = None if cache is None else sharding.constrain(cache[index], by_heads)
            x, added, new = layer(x, added, cos, sin, self_mask, cached, cache_lengths, accumulate_dtype)
            x, added = sharding.constrain((x, added), by_rows)
            rows.append(sharding.constrain(new, by_heads))
        return self.norm(x, added)[1], tuple(rows)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits, float32[B, T, V], of what `hidden` returns."""
        logits = jnp.moveaxis(self.multiply_fn(hidden, self.lm_head, self.config.feature_axis), self.config.feature_axis, -1)
        # In two steps: in one, the compiler may gather the head's weights rather than the logits.
        is_split = sharding.named(self.mesh, self.config, "rows", *[None] * (hidden.ndim - 2), "vocab")
        return sharding.constrain(sharding.constrain(logits, is_split), sharding.by_rows(self.mesh))

    def __call__(self, *args, **kwargs) -> tuple[jax.Array, Cache]:
        """Logits float32[B, T, V] and the new tokens' keys and values; see `hidden` for the arguments."""
        hidden, rows = self.hidden(*args, **kwargs)
        return self.head(hidden), rows
