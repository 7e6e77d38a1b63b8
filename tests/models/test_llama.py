"""The transformer against transformers' torch implementations, on small random models in float32.

Both sides compute the same sums in another order (threads, vector widths, attention in two blocks), so they differ by
float32 rounding alone: by at most 8e-6 over all variants, in logits whose standard deviation is 1.7. TOLERANCE is ten times
that, and a two-thousandth of what the smallest of the deliberate mistakes at the end changes (0.28).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax.models import llama, weights

torch = pytest.importorskip("torch")
import transformers  # noqa: E402  (it wants torch first)

torch.set_num_threads(1)  # The models are too small to share out.

TOLERANCE = 1e-4

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,  # Large enough to be seen.
    "rope_theta": 100.0,  # So that all wavelengths turn within the few positions of a test.
    "tie_word_embeddings": False,
}
BANDS = {"factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {  # those that end in "features" are laid out feature-major
    "llama": ("Llama", {}),
    "llama-features": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-biases-features": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3-features": ("Qwen3", {}),
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
# A tree of as many nodes as the longer prompt has tokens, so that both run the same operations.
#   0 - 1 - 3 - 7 - 9
#   |   + - 4   + - 10
#   + - 2 - 5 - 8
#       + - 6 - 11
PARENTS = (-1, 0, 0, 1, 1, 2, 2, 3, 5, 7, 7, 6)
LEAVES = (4, 8, 9, 10, 11)


def path_to(node: int) -> list[int]:
    return [] if node < 0 else [*path_to(PARENTS[node]), node]


@dataclasses.dataclass
class Pair:
    """The same weights on both sides, and a batch of prompts with their prefill."""

    hf: transformers.PreTrainedModel
    model: llama.Llama
    params: dict
    prompts: np.ndarray  # int32[2, 12]; the second ends at LENGTHS[1]
    logits: jax.Array  # float32[2, 12, V] of the prompts
    cache: llama.Cache  # of NUM_SLOTS slots; numpy arrays

    def reference(self, tokens) -> np.ndarray:
        """float32[T, V], transformers' logits of one sequence."""
        with torch.no_grad():
            return self.hf(torch.tensor([[int(t) for t in tokens]])).logits[0].numpy()


def run(model: llama.Llama, params: dict, *args) -> tuple[jax.Array, llama.Cache]:
    # Not compiled as a whole: the single operations, once compiled, serve all variants.
    return model.apply({"params": params}, *args)


def prefill(model: llama.Llama, params: dict, prompts: np.ndarray) -> tuple[jax.Array, llama.Cache]:
    """Logits of the prompts, and a cache with their rows."""
    # Whatever stands in slots that are not committed must not be read.
    cache = jax.tree.map(lambda x: np.full(x.shape, 100, x.dtype), llama.empty_cache(model.config, 2, NUM_SLOTS))
    num_tokens = prompts.shape[1]
    positions = np.broadcast_to(np.arange(num_tokens), prompts.shape)
    mask = np.tril(np.ones((2, num_tokens, num_tokens), bool))
    logits, rows = run(model, params, prompts, positions, mask, cache, np.zeros(2, np.int32))
    for row, length in enumerate(LENGTHS):
        write(cache, rows, row, length, 0, model.config.is_feature_major)
    return logits, cache


def write(cache: llama.Cache, rows: llama.Cache, row: int, count: int, slot: int, is_feature_major: bool) -> None:
    """Copies the first `count` new tokens of one row of the batch into its slots from `slot` on."""
    for (keys, values), (new_keys, new_values) in zip(cache, rows, strict=True):
        keys = np.swapaxes(keys, 2, 3) if is_feature_major else keys
        keys[row, :, slot : slot + count] = new_keys[row, :, :count]
        values[row, :, slot : slot + count] = new_values[row, :, :count]


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
    config = dataclasses.replace(config, is_feature_major=request.param.endswith("features"))
    model = llama.Llama(config)
    prompts = np.random.default_rng(0).integers(config.vocab_size, size=(2, max(LENGTHS)), dtype=np.int32)
    logits, cache = prefill(model, params, prompts)
    return Pair(hf, model, params, prompts, logits, cache)


def tree_inputs(prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int32[2, N], positions int32[2, N] and ancestors bool[2, N, N] of the tree above behind each prompt."""
    depths = np.array([len(path_to(node)) - 1 for node in range(len(PARENTS))])
    ancestors = np.zeros((2, len(PARENTS), len(PARENTS)), bool)
    for node in range(len(PARENTS)):
        ancestors[:, node, path_to(node)] = True
    return (prompts + 17) % SMALL["vocab_size"], np.array(LENGTHS)[:, None] + depths, ancestors


def test_prefill_equals_transformers(pair):
    for row, length in enumerate(LENGTHS):
        expected = pair.reference(pair.prompts[row, :length])
        assert np.std(expected) > 1  # Logits that TOLERANCE can tell apart.
        np.testing.assert_allclose(pair.logits[row, :length], expected, rtol=0, atol=TOLERANCE)


def test_cached_steps_equal_transformers(pair):
    generated = np.random.default_rng(1).integers(SMALL["vocab_size"], size=(2, 3), dtype=np.int32)
    expected = [pair.reference([*pair.prompts[row, :length], *generated[row]])[length:] for row, length in enumerate(LENGTHS)]
    cache = jax.tree.map(np.copy, pair.cache)
    for step in range(generated.shape[1]):
        lengths = np.array(LENGTHS, np.int32) + step
        token = generated[:, step : step + 1]
        logits, rows = run(pair.model, pair.params, token, lengths[:, None], np.ones((2, 1, 1), bool), cache, lengths)
        for row in range(2):
            np.testing.assert_allclose(logits[row, 0], expected[row][step], rtol=0, atol=TOLERANCE)
            write(cache, rows, row, 1, int(lengths[row]), pair.model.config.is_feature_major)


def test_tree_equals_its_paths_run_alone(pair):
    tokens, positions, ancestors = tree_inputs(pair.prompts)
    lengths = np.array(LENGTHS, np.int32)
    logits, _ = run(pair.model, pair.params, tokens, positions, ancestors, pair.cache, lengths)
    for row, length in enumerate(LENGTHS):
        for path in map(path_to, LEAVES):
            alone = pair.reference([*pair.prompts[row, :length], *tokens[row, path]])[length:]
            np.testing.assert_allclose(logits[row, path], alone, rtol=0, atol=TOLERANCE, err_msg=f"row {row}, path {path}")


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
@pytest.mark.parametrize("mistake", ["theta", "kind", "eps"])
def test_a_mistake_is_beyond_the_tolerance(pair, mistake):
    config = pair.model.config
    changed = {
        "theta": dataclasses.replace(config, rope=dataclasses.replace(config.rope, theta=config.rope.theta * 1.1)),
        "kind": dataclasses.replace(config, rope=dataclasses.replace(config.rope, kind="linear", factor=1.1)),
        "eps": dataclasses.replace(config, rms_norm_eps=config.rms_norm_eps * 1.1),
    }[mistake]
    wrong, _ = prefill(llama.Llama(changed), pair.params, pair.prompts)
    assert np.max(np.abs(wrong[0] - pair.reference(pair.prompts[0]))) > 100 * TOLERANCE


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_a_causal_mask_over_a_tree_is_beyond_the_tolerance(pair):
    tokens, positions, ancestors = tree_inputs(pair.prompts)
    lengths = np.array(LENGTHS, np.int32)
    causal = np.tril(np.ones_like(ancestors))
    logits, _ = run(pair.model, pair.params, tokens, positions, causal, pair.cache, lengths)
    alone = pair.reference([*pair.prompts[0], *tokens[0, path_to(8)]])[-1]
    assert np.max(np.abs(logits[0, 8] - alone)) > 100 * TOLERANCE


@pytest.mark.parametrize("num_slots", [96, 256, 320])  # one part, two, and three of which the last overlaps the one before
def test_attention_of_many_tokens_reads_no_slots_in_vain(num_slots, monkeypatch):
    """In parts as in one piece; and what stands behind the parts that are committed is not seen."""
    rng = np.random.default_rng(num_slots)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    num_rows, num_tokens = 3, llama.MANY_TOKENS
    q, new = array(num_rows, num_tokens, 4, 8), (array(num_rows, 2, num_tokens, 8), array(num_rows, 2, num_tokens, 8))
    keys, values = array(num_rows, 2, num_slots, 8), array(num_rows, 2, num_slots, 8)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((num_tokens, num_tokens), bool)), (num_rows, num_tokens, num_tokens))
    turned = lambda k: jnp.swapaxes(k, 2, 3)  # noqa: E731
    attend = functools.partial(llama._attend, accumulate_dtype=jnp.float32, is_feature_major=True)
    longest = [0, 1, 90, *(length for length in (128, 129, 256, 300, 320) if length <= num_slots)]
    for length in longest:
        lengths = jnp.asarray([length, length // 2, 0])
        parts = attend(q, new, mask, (turned(keys), values), lengths)
        end = -(-length // llama.SLOTS_AT_ONCE) * llama.SLOTS_AT_ONCE
        unseen = jnp.arange(num_slots)[:, None] >= end
        poisoned = (turned(jnp.where(unseen, jnp.nan, keys)), jnp.where(unseen, jnp.nan, values))
        if num_slots % llama.SLOTS_AT_ONCE == 0:
            np.testing.assert_array_equal(attend(q, new, mask, poisoned, lengths), parts)
        with monkeypatch.context() as patch:
            patch.setattr(llama, "MANY_TOKENS", num_tokens + 1)
            whole = attend(q, new, mask, (turned(keys), values), lengths)
        np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_heads_are_turned_in_the_type_that_is_asked_for():
    """Where float64 is enabled as well."""
    with jax.enable_x64(True):
        x, angles = jnp.ones((1, 2, 3, 8), jnp.float32), jnp.ones((1, 2, 1, 4), jnp.float32)
        assert "f64" not in str(jax.make_jaxpr(lambda *arrays: llama._rotate(*arrays, 3, jnp.float32))(x, angles, angles))
