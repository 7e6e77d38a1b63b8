"""The kernel that normalises one token: what it makes, and where it is taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from hd_jax.models import gpu_norm, llama


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [64, 80])  # one that is a power of two, and one that is not
def test_the_kernel_makes_what_the_operations_make(size, dtype):
    rng = np.random.default_rng(size)
    x, added = (jnp.asarray(rng.normal(size=(1, 1, size)), dtype) for _ in range(2))
    weight = jnp.asarray(rng.normal(size=size), dtype)
    norm = llama.ResidualNorm(1e-5, dtype, -1, is_fused=True)
    total, expected = norm.apply({"params": {"weight": weight}}, x, added)
    found_total, found = gpu_norm.add_and_normalize(x, added, weight, eps=1e-5, interpret=True)
    np.testing.assert_array_equal(found_total, total)
    tolerance = float(jnp.finfo(dtype).eps)  # sums in another order: at most the last bit
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=tolerance, atol=tolerance)


def test_it_is_taken_on_cuda_alone_and_for_one_token_alone(random_bfloat16_lm):
    lm = random_bfloat16_lm
    checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]

    def num_kernels(platform: str, shape: tuple[int, int], is_fused: bool = True) -> int:
        model = llama.Llama(dataclasses.replace(lm.config, is_fused=is_fused))
        arguments = (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32), jnp.ones((*shape, shape[1]), bool))
        params = jax.eval_shape(model.init, jax.random.key(0), *arguments)
        call = jax.jit(lambda params: model.apply(params, *arguments))
        made = export.export(call, platforms=[platform], disabled_checks=checks)(params)
        return made.mlir_module().count('name = "add_and_normalize"')

    assert num_kernels("cuda", (1, 1)) == 2 * lm.config.num_layers + 1
    assert num_kernels("cuda", (1, 2)) == num_kernels("cuda", (2, 1)) == 0
    assert num_kernels("cpu", (1, 1)) == num_kernels("cuda", (1, 1), is_fused=False) == 0
