"""The transformer against transformers' torch implementations, on small random models in float32.

Both sides compute the same sums in another order (fused or not, blocks of attention, [out, in] products), so they differ by
rounding alone: about 1e-6 of the logits, whose standard deviation is about 5 here. TOLERANCE leaves ten times what was
seen over all variants, and is a thousandth of what the smallest deliberate mistake below changes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax.models import llama, weights

torch = pytest.importorskip("torch")
import transformers  # noqa: E402  (it wants torch first)

TOLERANCE = 1e-4

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,  # Large enough to be seen.
    "rope_theta": 100.0,  # So that all wavelengths turn within the few positions of a test.
    "tie_word_embeddings": False,
}
BANDS = {"factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "dynamic": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama3": ("Llama", {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | BANDS}),
    "yarn": ("Llama", {"rope_scaling": {"rope_type": "yarn", "beta_fast": 4.0} | BANDS}),
    "yarn-mscale": (
        "Llama",
        {"rope_scaling": {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False} | BANDS},
    ),
}

LENGTHS = (12, 9)  # Of two prompts in one batch.
NUM_SLOTS = 24
# A tree:   0 - 1 - 3
#           |   + - 4
#           + - 2 - 5 - 6
PARENTS = (-1, 0, 0, 1, 1, 2, 5)
PATHS = ((0,), (0, 1), (0, 2), (0, 1, 3), (0, 1, 4), (0, 2, 5), (0, 2, 5, 6))


@dataclasses.dataclass
class Pair:
    """The same weights on both sides, and a batch of prompts with their prefill."""

    hf: transformers.PreTrainedModel
    model: llama.Llama
    params: dict
    prompts: np.ndarray  # int32[2, 12]; the second ends at LENGTHS[1]
    logits: jax.Array  # float32[2, 12, V] of the prompts
    cache: llama.Cache  # [2, K, NUM_SLOTS, D] a layer

    def reference(self, tokens) -> np.ndarray:
        """float32[T, V], transformers' logits of one sequence."""
        with torch.no_grad():
            return self.hf(torch.tensor([[int(t) for t in tokens]])).logits[0].numpy()


def run(model: llama.Llama, params: dict, *args) -> tuple[jax.Array, llama.Cache]:
    # Not compiled as a whole: the single operations, once compiled, serve all variants.
    with jax.default_matmul_precision("highest"):
        return model.apply({"params": params}, *args)


def prefill(model: llama.Llama, params: dict, prompts: np.ndarray) -> tuple[jax.Array, llama.Cache]:
    num_tokens = prompts.shape[1]
    positions = np.broadcast_to(np.arange(num_tokens), prompts.shape)
    return run(model, params, prompts, positions, np.tril(np.ones((len(prompts), num_tokens, num_tokens), bool)))


def write(cache: llama.Cache, rows: llama.Cache, row: int, source: slice, slot: int) -> llama.Cache:
    """Copies the new tokens `source` of one row of the batch into its slots from `slot` on."""
    count = source.stop - source.start
    return tuple(
        tuple(old.at[row, :, slot : slot + count].set(new[row, :, source]) for old, new in zip(*layer, strict=True))
        for layer in zip(cache, rows, strict=True)
    )


def make_hf(kind: str, options: dict) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(**SMALL | options)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and "norm" in name
            parameter.copy_(1 + 0.2 * noise if is_norm else 0.5 * noise if parameter.ndim == 1 else 0.2 * noise)
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory) -> Pair:
    hf = make_hf(*VARIANTS[request.param])
    folder = tmp_path_factory.mktemp("model")
    hf.save_pretrained(folder)
    config, params = weights.load_hf(folder, "float32")
    model = llama.Llama(config)
    prompts = np.random.default_rng(0).integers(config.vocab_size, size=(2, max(LENGTHS)), dtype=np.int32)
    logits, rows = prefill(model, params, prompts)
    # Whatever stands in slots that are not committed must not be read.
    cache = jax.tree.map(lambda x: x + 100, llama.empty_cache(config, 2, NUM_SLOTS))
    for row, length in enumerate(LENGTHS):
        cache = write(cache, rows, row, slice(0, length), 0)
    return Pair(hf, model, params, prompts, logits, cache)


def tree_inputs(prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int32[2, N], positions int32[2, N] and ancestors bool[2, N, N] of the tree above behind each prompt."""
    tokens = (prompts[:, : len(PARENTS)] + 17) % SMALL["vocab_size"]
    depths = np.array([len(path) - 1 for path in PATHS])
    ancestors = np.zeros((2, len(PARENTS), len(PARENTS)), bool)
    for node, path in enumerate(PATHS):
        ancestors[:, node, path] = True
    return tokens, np.array(LENGTHS)[:, None] + depths[None], ancestors


def test_prefill_equals_transformers(pair):
    for row, length in enumerate(LENGTHS):
        expected = pair.reference(pair.prompts[row, :length])
        assert np.std(expected) > 1  # Logits that TOLERANCE can tell apart.
        np.testing.assert_allclose(pair.logits[row, :length], expected, rtol=0, atol=TOLERANCE)


def test_cached_steps_equal_transformers(pair):
    generated = np.random.default_rng(1).integers(SMALL["vocab_size"], size=(2, 3), dtype=np.int32)
    expected = [
        pair.reference([*pair.prompts[row, :length], *generated[row]])[length:] for row, length in enumerate(LENGTHS)
    ]
    cache = pair.cache
    for step in range(generated.shape[1]):
        lengths = np.array(LENGTHS, np.int32) + step
        token = generated[:, step : step + 1]
        logits, rows = run(pair.model, pair.params, token, lengths[:, None], np.ones((2, 1, 1), bool), cache, lengths)
        for row in range(2):
            np.testing.assert_allclose(logits[row, 0], expected[row][step], rtol=0, atol=TOLERANCE)
            cache = write(cache, rows, row, slice(0, 1), int(lengths[row]))


def test_tree_equals_its_paths_run_alone(pair):
    tokens, positions, ancestors = tree_inputs(pair.prompts)
    lengths = np.array(LENGTHS, np.int32)
    logits, _ = run(pair.model, pair.params, tokens, positions, ancestors, pair.cache, lengths)
    for row, length in enumerate(LENGTHS):
        for node, path in enumerate(PATHS):
            expected = pair.reference([*pair.prompts[row, :length], *tokens[row, list(path)]])[-1]
            np.testing.assert_allclose(logits[row, node], expected, rtol=0, atol=TOLERANCE, err_msg=f"row {row}, node {node}")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[llama.Llama, dict, np.ndarray]:
    folder = tmp_path_factory.mktemp("model")
    make_hf("Llama", {}).save_pretrained(folder)
    config, params = weights.load_hf(folder, "float32")
    return llama.Llama(config), params, np.random.default_rng(0).integers(config.vocab_size, size=(2, 12), dtype=np.int32)


@pytest.mark.parametrize("mistake", ["theta", "kind", "eps"])
def test_a_mistake_is_beyond_the_tolerance(plain, mistake):
    model, params, prompts = plain
    config = model.config
    changed = {
        "theta": dataclasses.replace(config, rope=dataclasses.replace(config.rope, theta=config.rope.theta * 1.1)),
        "kind": dataclasses.replace(config, rope=dataclasses.replace(config.rope, kind="linear", factor=1.1)),
        "eps": dataclasses.replace(config, rms_norm_eps=config.rms_norm_eps * 1.1),
    }[mistake]
    right, _ = prefill(model, params, prompts)
    wrong, _ = prefill(llama.Llama(changed), params, prompts)
    assert np.max(np.abs(right - wrong)) > 100 * TOLERANCE


def test_a_causal_mask_over_a_tree_is_beyond_the_tolerance(plain):
    model, params, prompts = plain
    tokens, positions, ancestors = tree_inputs(prompts)
    right, _ = run(model, params, tokens, positions, ancestors)
    wrong, _ = run(model, params, tokens, positions, np.tril(np.ones_like(ancestors)))
    np.testing.assert_allclose(right[:, :2], wrong[:, :2], rtol=0, atol=TOLERANCE)  # Nodes 0 and 1 are in a line.
    assert np.min(np.max(np.abs(right - wrong)[:, 2:], axis=-1)) > 100 * TOLERANCE


def test_float64_sums_leave_the_logits_within_the_tolerance(plain):
    model, params, prompts = plain
    right, _ = prefill(model, params, prompts)
    positions, mask = np.broadcast_to(np.arange(12), (2, 12)), np.tril(np.ones((2, 12, 12), bool))
    with jax.enable_x64(True):
        wide, _ = model.apply({"params": params}, prompts, positions, mask, accumulate_dtype=jnp.float64)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(right, wide, rtol=0, atol=TOLERANCE)
