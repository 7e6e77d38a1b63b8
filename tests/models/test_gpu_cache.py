"""The kernel that commits a path to the caches: what it writes, and where it is taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from hd_jax.models import gpu_cache, llama


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("num_rows", "num_new", "order", "slots"),
    [
        (1, 1, [[0]], [7]),  # plain decoding
        (1, 9, [[0, 4, 5]], [0]),  # a number of rows that is no power of two
        (2, 5, [[0, 2, 4, 0], [0, 0, 0, 0]], [5, 60]),  # to each text's own slot, the last one there is; places without a node
        (1, 5, [[0, 1, 3]], [63]),  # more than there are slots: clamped
    ],
)
def test_the_kernel_writes_what_the_layers_write(lm, num_rows, num_new, order, slots, dtype):
    config = lm.config
    rng = np.random.default_rng(0)
    shape = (num_rows, config.num_kv_heads, 64, config.head_dim)
    made = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    config = dataclasses.replace(config, is_feature_major=False)
    cache = tuple((made(*shape), made(*shape)) for _ in range(config.num_layers))
    rows = tuple(tuple(made(*shape[:2], num_new, shape[3]) for _ in pair) for pair in cache)
    order, slots = jnp.asarray(order), jnp.asarray(slots)
    expected = llama.write_rows(cache, rows, slots, config, order)
    assert not np.array_equal(expected[0][0], cache[0][0])
    found = gpu_cache.write(jax.tree.leaves(cache), jax.tree.leaves(rows), order, slots, interpret=True)
    for one, other in zip(found, jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_order_picks_rows(lm):
    """By the layers: the rows picked first are the same as those picked while they are written."""
    config = lm.config
    cache = llama.empty_cache(config, 2, 32)
    rng = np.random.default_rng(0)
    made = lambda: jnp.asarray(rng.normal(size=(2, config.num_kv_heads, 5, config.head_dim)), jnp.float32)  # noqa: E731
    rows = tuple((made(), made()) for _ in range(config.num_layers))
    order, slots = np.asarray([[0, 3], [4, 1]]), jnp.asarray([3, 9])
    picked = jax.tree.map(lambda x: jnp.stack([x[row][:, order[row]] for row in range(2)]), rows)
    expected = llama.write_rows(cache, picked, slots, config)
    found = llama.write_rows(cache, rows, slots, config, jnp.asarray(order))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_path_is_written_by_the_kernel_on_cuda_alone(random_bfloat16_lm):
    config = random_bfloat16_lm.config
    cache = llama.empty_cache(config, 1, 256)
    rows = jax.tree.map(lambda x: x[:, :, :4], cache)
    order, slots = jnp.zeros((1, 3), jnp.int32), jnp.zeros(1, jnp.int32)
    checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]

    def lowered(platform: str, order) -> str:
        call = jax.jit(lambda cache, rows: llama.write_rows(cache, rows, slots, config, order))
        return export.export(call, platforms=[platform], disabled_checks=checks)(cache, rows).mlir_module()

    assert lowered("cuda", order).count("xla.gpu.triton") == 1
    assert "xla.gpu.triton" not in lowered("cpu", order)
    assert "xla.gpu.triton" not in lowered("cuda", None)  # a prompt's chunk


def test_heads_of_any_size_are_written(random_bfloat16_lm):
    """The kernel takes powers of two; others are left to XLA."""
    config = dataclasses.replace(random_bfloat16_lm.config, head_dim=48)
    cache = llama.empty_cache(config, 1, 256)
    order, slots = jnp.zeros((1, 3), jnp.int32), jnp.zeros(1, jnp.int32)
    call = jax.jit(lambda cache: llama.write_rows(cache, jax.tree.map(lambda x: x[:, :, :4], cache), slots, config, order))
    assert "xla.gpu.triton" not in export.export(call, platforms=["cuda"])(cache).mlir_module()
