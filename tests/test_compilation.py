"""What programs are compiled with."""

import jax
import jax.numpy as jnp

from hd_jax import compilation


@compilation.jit(static_argnames="size")
def doubled(x, *, size: int):
    return 2 * x[:size]


def test_a_cpu_has_options_of_its_own(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert compilation.options() == compilation.CPU_OPTIONS
    program = compilation.here(doubled)
    assert program is not doubled
    assert program(jnp.arange(4), size=3).tolist() == doubled(jnp.arange(4), size=3).tolist() == [0, 2, 4]


def test_flags_that_name_an_option_rule(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert compilation.options() == {} and compilation.here(doubled) is doubled


def test_an_accelerator_has_none(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compilation.options() == {} and compilation.here(doubled) is doubled


def test_an_unknown_function_is_left_as_it_is(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    plain = jax.jit(lambda x: x + 1)
    assert compilation.here(plain) is plain
