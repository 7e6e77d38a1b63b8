import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from hd_jax.models import gpu_attention, llama


def inputs(num_rows, num_tokens, num_heads, num_groups, head_dim, num_slots, lengths):
    keys = jax.random.split(jax.random.key(0), 6)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)  # noqa: E731
    q = normal(keys[0], num_rows, num_tokens, num_heads, head_dim) * head_dim**-0.5
    new = tuple(normal(key, num_rows, num_groups, num_tokens, head_dim) for key in keys[1:3])
    cached = tuple(normal(key, num_rows, num_groups, num_slots, head_dim) for key in keys[3:5])
    mask = jax.random.bernoulli(keys[5], 0.5, (num_rows, num_tokens, num_tokens)) | jnp.eye(num_tokens, dtype=bool)
    return q, new, mask, cached, jnp.asarray(lengths, jnp.int32)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 4, 4, 32, 256, [77]),  # plain decoding
        (2, 5, 4, 2, 64, 256, [256, 1]),  # rows at their own lengths; grouped heads
        (1, 40, 4, 2, 32, 512, [0]),  # nothing cached; more queries than a program has rows
        (1, 70, 2, 2, 32, 320, [129]),  # a number of slots that the programs share unevenly
    ],
)
def test_the_kernel_computes_what_attention_is(sizes):
    q, new, mask, cached, lengths = inputs(*sizes)
    found = gpu_attention.attend(q, new, mask, cached, lengths, interpret=True)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (q, new, cached))
    expected = llama._attend(wide[0], wide[1], mask, wide[2], lengths, accumulate_dtype=jnp.float32, is_feature_major=False)
    assert found.dtype == jnp.float32
    # Weights are rounded to bfloat16, which keeps 8 bits.
    np.testing.assert_allclose(found, expected, atol=2**-8 * float(jnp.max(jnp.abs(expected))))


def test_slots_beyond_the_committed_ones_are_not_read():
    q, new, mask, cached, lengths = inputs(1, 3, 2, 1, 32, 256, [100])
    poisoned = tuple(x.at[:, :, 128:].set(jnp.nan) for x in cached)
    found = gpu_attention.attend(q, new, mask, poisoned, lengths, interpret=True)
    np.testing.assert_array_equal(found, gpu_attention.attend(q, new, mask, cached, lengths, interpret=True))


def test_the_model_takes_the_kernel_on_cuda_alone(random_bfloat16_lm):
    lm = random_bfloat16_lm
    cache = llama.empty_cache(lm.config, 1, 256)
    arguments = (jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4, 4), bool), cache, jnp.array([9]))
    call = jax.jit(lambda params: lm.model.apply({"params": params}, *arguments))
    checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    lowered = {p: export.export(call, platforms=[p], disabled_checks=checks)(lm.params).mlir_module() for p in ("cuda", "cpu")}
    assert "tree_attention" in lowered["cuda"] and "tree_attention" not in lowered["cpu"]
