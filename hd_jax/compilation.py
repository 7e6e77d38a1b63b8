"""How the programs that decode are compiled: on a CPU, by other settings of XLA's than its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax

# LLVM's third level unrolls a loop over the 12, 16 or 24 columns of a small tree's activations, and then computes number by
# number; the second also takes 0.3 to 0.7 of the time to compile. Vectors of 512 bits are for plain decoding's products; a CPU
# that has none ignores them.
CPU_OPTIONS = {"xla_backend_optimization_level": 2, "xla_cpu_prefer_vector_width": 512}

_on_cpu: dict[Any, Callable[..., Any]] = {}


def jit(**settings: Any) -> Callable[[Callable[..., Any]], Any]:
    """`jax.jit` with these settings, as a decorator, and a twin for `here`: only on its first call are the devices known."""

    def decorate(function: Callable[..., Any]) -> Any:
        program = jax.jit(function, **settings)
        _on_cpu[program] = jax.jit(function, compiler_options=CPU_OPTIONS, **settings)
        return program

    return decorate


def options() -> dict[str, Any]:
    """What programs are compiled with here, besides `XLA_FLAGS`; nothing, where these name one of the CPU's options."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {} if jax.default_backend() != "cpu" or any(name in flags for name in CPU_OPTIONS) else CPU_OPTIONS


def here(program: Any) -> Any:
    """Of what `jit` made, the twin with the CPU's options where this process runs on one. Not for calls inside a jitted one."""
    return _on_cpu.get(program, program) if options() else program
