import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax import ranking


@pytest.mark.parametrize("num_values, k", [(1, 1), (40, 12), (300, 300)])
def test_both_ways_find_the_same(num_values, k):
    # Rounded, so that many are equal; some are minus infinity, as places without a candidate are.
    values = jnp.round(jax.random.normal(jax.random.key(num_values), (3, num_values)), 1)
    values = jnp.where(values < -1, -jnp.inf, jnp.where(values == 0, 0.0, values))  # and no zero is negative
    found, indices = jax.vmap(lambda v: ranking.by_rank(v, k))(values)
    expected, expected_indices = jax.lax.top_k(values, k)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(indices, expected_indices)


@pytest.mark.parametrize("num_values", [1, 128, 129, 1000])
def test_argmax_is_the_first_of_the_largest(num_values):
    values = jnp.round(jax.random.normal(jax.random.key(0), (5, 3, num_values)), 1)
    values = values.at[0].set(-jnp.inf).at[1].set(2.0).at[2, :, -1].set(9.0)
    np.testing.assert_array_equal(ranking.argmax(values), jnp.argmax(values, axis=-1))
