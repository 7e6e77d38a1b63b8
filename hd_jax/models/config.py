"""The static description of a Llama-family model, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# Architectures whose block is Llama's, and the settings each of them fixes in code rather than in config.json.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"attention_bias": False, "mlp_bias": False},
    "Qwen2ForCausalLM": {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    "Qwen3ForCausalLM": {"use_qk_norm": True, "mlp_bias": False},
}
# The supported kinds of `rope_type`, and the fields of RopeConfig that each of them uses.
ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_context", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_context", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim", "is_truncated"),
    ),
}
# Where config.json calls a field otherwise.
_ROPE_KEYS = {"original_context": "original_max_position_embeddings", "is_truncated": "truncate"}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; `kind` is config.json's `rope_type`. Fields that a kind does not use keep their defaults."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    is_truncated: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-family transformer. Hashable, so that it can be a static argument of jit."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    is_head_tied: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    use_qk_norm: bool = False
    is_feature_major: bool = False  # activations [E, B, T], cached keys [B, K, D, S]: `llama.for_devices` says where
    is_fused: bool = False  # one matrix for queries, keys and values, and one for gate and up: `weights.fused` makes them
    dtype: str = "float32"  # of the parameters, the activations and the cache; norms, softmax and logits are float32

    @property
    def feature_axis(self) -> int:
        """Of activations."""
        return 0 if self.is_feature_major else -1


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Reads a parsed `config.json`.

    Raises:
      ValueError: the architecture, activation, position scaling or attention window is not supported; the message
        names what was found and what is supported.
    """
    names = config.get("architectures") or ["(none named)"]
    architecture = names[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}")
    missing = [
        key
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if not isinstance(config.get(key), int)
    ]
    if missing:
        raise ValueError(f"config.json lacks a whole number for {', '.join(missing)}")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported; supported: 'silu'")
    num_heads = config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise ValueError(f"quantized weights ({method}) are not supported; use float32, bfloat16 or float16 weights")
    max_context = config.get("max_position_embeddings", 2048)
    rope = _rope(config, max_context)
    window = config.get("sliding_window") if config.get("use_sliding_window", architecture.startswith("Mistral")) else None
    if window and window < max_context:
        max_context = window  # Within its window, sliding attention is full attention; beyond it we do not go.
    bias = bool(config.get("attention_bias", False))
    varying: dict[str, Any] = {
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
    }
    return ModelConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        max_context=max_context,
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=rope,
        is_head_tied=bool(config.get("tie_word_embeddings", False)),
        **varying | ARCHITECTURES[architecture],
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` from which `from_hf` reads this config, under the supported architecture that has its biases and norms.

    Raises:
      ValueError: no supported architecture combines biases and norms as `config` does.
    """
    if config.use_qk_norm:
        architecture, model_type = "Qwen3ForCausalLM", "qwen3"
    elif config.attention_bias and not config.attention_out_bias:
        architecture, model_type = "Qwen2ForCausalLM", "qwen2"
    else:
        architecture, model_type = "LlamaForCausalLM", "llama"
    out: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.is_head_tied,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "torch_dtype": config.dtype,
    }
    if config.rope.kind != "default":
        fields = {name: getattr(config.rope, name) for name in ROPE_KINDS[config.rope.kind]}
        out["rope_scaling"] = {"rope_type": config.rope.kind} | {
            _ROPE_KEYS.get(name, name): value for name, value in fields.items() if value is not None
        }
    if dataclasses.replace(from_hf(out), dtype=config.dtype) != config:
        raise ValueError(f"no supported architecture ({', '.join(ARCHITECTURES)}) has the biases and norms of {config}")
    return out


def _rope(config: Mapping[str, Any], max_positions: int) -> RopeConfig:
    # transformers 5 writes `rope_parameters`; earlier versions `rope_theta` and `rope_scaling` (with `type` in the oldest).
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope_type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    for place in (config, scaling):
        if place.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor other than 1 is not supported")
    found = {name: scaling.get(_ROPE_KEYS.get(name, name)) for name in ROPE_KINDS[kind]}
    fields = {name: value for name, value in found.items() if value is not None}
    if "original_context" in found:
        fields.setdefault("original_context", max_positions)
    if "factor" in found and "factor" not in fields:
        if kind != "yarn":
            raise ValueError(f"rope_type {kind!r} needs a factor")
        fields["factor"] = max_positions / fields["original_context"]
    return RopeConfig(kind=kind, theta=float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0), **fields)
