"""Models of a known model's shape with random weights: what a step costs depends on the shape alone, not on the weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from hd_jax import sharding
from hd_jax.models import config as configs
from hd_jax.models import llama
from hd_jax.models.config import ModelConfig
from hd_jax.models.llama import Llama
from hd_jax.models.tokenizer import Tokenizer
from hd_jax.runner import LM

_LLAMA = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def _llama(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **others: Any) -> ModelConfig:
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return configs.from_hf({**_LLAMA, **sizes, **others})


SHAPES: dict[str, ModelConfig] = {
    "llama-68m": _llama(32000, 768, 3072, 2, 12, 12),
    "llama-160m": _llama(32000, 768, 3072, 12, 12, 12),
    "tinyllama-1.1b": _llama(32000, 2048, 5632, 22, 32, 4),
    "llama-2-7b": _llama(32000, 4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama(32000, 5120, 13824, 40, 40, 40),
    "llama-3-8b": _llama(128256, 4096, 14336, 32, 32, 8, max_position_embeddings=8192, rope_theta=500000.0),
}


def config_of(name: str, tokenizer: Tokenizer, dtype: str | None = None) -> ModelConfig:
    """Of a shape; arguments and errors are those of `random_model`."""
    if name not in SHAPES:
        raise ValueError(f"there is no shape {name!r}; there are: {', '.join(SHAPES)}")
    if tokenizer.vocab_size > SHAPES[name].vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but shape {name} has a vocabulary of {SHAPES[name].vocab_size}"
        )
    return dataclasses.replace(SHAPES[name], dtype=dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))


def random_model(name: str, tokenizer: Tokenizer, *, dtype: str | None = None, mesh: sharding.AnyMesh = None) -> LM:
    """A model of a shape, made on the devices.

    Args:
      name: one of SHAPES.
      tokenizer: whose ids the texts are of.
      dtype: of weights and cache; by default float32 on a CPU, bfloat16 elsewhere.
      mesh: as `decode.load` makes it.

    Raises:
      ValueError: there is no such shape, the tokenizer has more ids than its vocabulary, or the mesh does not divide it.
    """
    config = dataclasses.replace(llama.for_devices(config_of(name, tokenizer, dtype), mesh), is_fused=mesh is None)
    sharding.check(config, mesh)
    model = Llama(config, mesh=mesh)
    params = {}
    for index, (path, leaf) in enumerate(sorted(traverse_util.flatten_dict(parameters(model)).items())):
        params[path] = _maker(leaf.shape, leaf.dtype, sharding.parameter(mesh, config, path))(index)
    return LM(config, model, traverse_util.unflatten_dict(params), tokenizer, name, config.max_context)


def parameters(model: Llama) -> Any:
    """Those of a model as `jax.ShapeDtypeStruct`s."""
    one = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), one, one, jnp.ones((1, 1, 1), bool))["params"]


@functools.cache
def _maker(shape: tuple[int, ...], dtype: Any, where: jax.sharding.Sharding) -> Callable[[int], jax.Array]:
    """Makes a parameter on the devices: ones for a norm's weights, normal values for a matrix, others for each number."""

    def make(number: jax.Array) -> jax.Array:
        if len(shape) == 1:
            return jnp.ones(shape, dtype)
        return jax.random.normal(jax.random.key(number), shape, dtype) * jnp.asarray(shape[-1] ** -0.5, dtype)

    return jax.jit(make, out_shardings=where)
