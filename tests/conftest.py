"""Small models for the tests, and a compiler that takes less than half of its time."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import pytest

from hd_jax.models import llama
from hd_jax.models.config import ModelConfig
from hd_jax.runner import LM

# Nearly all of a test's time is XLA's, and programs for small models need not be fast. Unknown flags stop the process, so the
# second is given only to releases that are known to have it. `XLA_FLAGS= pytest` tests with the compiler as users have it.
QUICK_COMPILATION = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):
    QUICK_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK_COMPILATION))


class LetterTokenizer:
    """Token t is the letter chr(97 + t % 26); id 1 ends a text."""

    eos_ids = (1,)
    bos_id = 0
    fingerprint = "letters"
    has_chat_template = True

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 97 for c in text]

    def decode(self, ids) -> str:
        return "".join(chr(97 + t % 26) for t in ids)

    def chat(self, messages, add_generation_prompt: bool = True) -> list[int]:
        return [t for m in messages for t in [0 if m["role"] == "user" else 2, *self.encode(m["content"])]] + [2]


def random_lm(
    vocab_size: int = 48,
    seed: int = 0,
    max_context: int = 512,
    dtype: str = "float32",
    head_dim: int = 8,
    is_feature_major: bool = True,
) -> LM:
    """A random two-layer model with grouped heads, whose greedy texts repeat themselves now and then."""
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        max_context=max_context,
        is_head_tied=True,
        dtype=dtype,
        is_feature_major=is_feature_major,
    )
    model = llama.Llama(config)
    one = jnp.zeros((1, 1), jnp.int32)
    params = model.init(jax.random.key(seed), one, one, jnp.ones((1, 1, 1), bool))["params"]
    params = jax.tree.map(lambda x: x * 3 if x.ndim == 2 else x, params)
    return LM(config, model, params, LetterTokenizer(), "random", max_context)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_freed():
    """Each compiled program keeps memory maps; a process may hold 65,530 (Linux), and dies at the next one."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def lm() -> LM:
    return random_lm()


@pytest.fixture(scope="session")
def random_bfloat16_lm():
    """Laid out as on an accelerator."""
    return random_lm(dtype="bfloat16", head_dim=32, is_feature_major=False)
