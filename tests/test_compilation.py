"""What programs are compiled with."""

import jax
import jax.numpy as jnp
import pytest

from hd_jax import compilation, decode, step_costs


@compilation.jit(static_argnames="size")
def doubled(x, *, size: int):
    return 2 * x[:size]


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")


def test_a_cpu_has_options_of_its_own(on_a_cpu):
    assert compilation.options() == compilation.CPU_OPTIONS
    program = compilation.here(doubled)
    assert program is not doubled
    assert program(jnp.arange(4), size=3).tolist() == doubled(jnp.arange(4), size=3).tolist() == [0, 2, 4]


def test_they_reach_the_compiler(on_a_cpu, monkeypatch):
    monkeypatch.setattr(compilation, "CPU_OPTIONS", {"no_such_option": 1})
    program = compilation.jit()(lambda x: x + 1)
    assert program(jnp.ones(2)).tolist() == [2, 2]
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        compilation.here(program)(jnp.ones(2))


def test_flags_that_name_an_option_rule(on_a_cpu, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert compilation.options() == {} and compilation.here(doubled) is doubled


def test_an_accelerator_has_none(on_a_cpu, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compilation.options() == {} and compilation.here(doubled) is doubled


def test_an_unknown_function_is_left_as_it_is(on_a_cpu):
    plain = jax.jit(lambda x: x + 1)
    assert compilation.here(plain) is plain


def test_what_decodes_is_compiled_so(lm, monkeypatch):
    asked = []
    monkeypatch.setattr(compilation, "here", lambda program: asked.append(program.__name__) or program)
    decode.generate(lm, [3, 4, 5], max_new_tokens=4)
    assert set(asked) == {"read_alike", "run_steps"}


def test_costs_belong_to_what_a_program_is_compiled_with(on_a_cpu, monkeypatch, tmp_path):
    before = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 - it is not in the type stubs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    paths = [step_costs.path_of("a program")]
    monkeypatch.setattr(compilation, "CPU_OPTIONS", {})
    paths.append(step_costs.path_of("a program"))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=256")
    paths.append(step_costs.path_of("a program"))
    jax.config.update("jax_compilation_cache_dir", before)
    assert None not in paths and len(set(paths)) == 3
