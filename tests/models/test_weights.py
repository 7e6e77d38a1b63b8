"""Model folders: Hugging Face safetensors and Orbax checkpoints, in and out, and what is wrong with a broken one."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from hd_jax.models import llama, weights
from hd_jax.models.config import ModelConfig, RopeConfig, from_hf, to_hf

CONFIG = ModelConfig(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_context=32,
)


def random_params(config: ModelConfig, dtype: str = "float32") -> dict:
    one = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(llama.Llama(config).init, jax.random.key(0), one, one, jnp.ones((1, 1, 1), bool))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), shapes)


def words(count: int = 10) -> tokenizers.Tokenizer:
    vocab = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, count)}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w2"))


def export(folder: pathlib.Path, config: ModelConfig = CONFIG) -> dict:
    params = random_params(config)
    weights.export_hf(folder, config, params, words(), chat_template="{{ bos_token }}", bos="<s>", eos="</s>")
    return params


def assert_equal(left: dict, right: dict) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for path, leaf in jax.tree_util.tree_leaves_with_path(left):
        other = dict(jax.tree_util.tree_leaves_with_path(right))[path]
        assert leaf.dtype == other.dtype, path
        np.testing.assert_array_equal(leaf, other, err_msg=str(path))


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def change_config(folder: pathlib.Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: pathlib.Path) -> None:
    tensors = tensors_of(folder)
    weight_map = {name: f"model-{1 + index % 2:05}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        safetensors.numpy.save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("is_head_tied", [False, True])
def test_export_and_load_keep_bfloat16_exactly(tmp_path, is_head_tied):
    config = dataclasses.replace(CONFIG, is_head_tied=is_head_tied, rms_norm_eps=1e-5)
    params = export(tmp_path, config)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert {str(t.dtype) for t in tensors_of(tmp_path).values()} == {"bfloat16"}
    assert ("lm_head.weight" in tensors_of(tmp_path)) != is_head_tied
    for dtype in weights.DTYPES:
        loaded_config, loaded = weights.load(tmp_path, dtype)
        assert loaded_config == dataclasses.replace(config, dtype=dtype)
        assert_equal(loaded, jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), rounded))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_table_of_names_is_the_one_of_the_docstring(tmp_path):
    params = export(tmp_path)
    stored = tensors_of(tmp_path)
    for name, leaf in {
        "model.embed_tokens.weight": params["embed_tokens"],
        "model.layers.1.self_attn.q_proj.weight": params["layers_1"]["self_attn"]["q_proj"]["weight"],
        "model.layers.0.mlp.down_proj.weight": params["layers_0"]["mlp"]["down_proj"]["weight"],
        "model.layers.0.input_layernorm.weight": params["layers_0"]["input_layernorm"]["weight"],
        "model.norm.weight": params["norm"]["weight"],
        "lm_head.weight": params["lm_head"],
    }.items():
        np.testing.assert_array_equal(stored[name], leaf.astype(jnp.bfloat16), err_msg=name)
    assert len(stored) == len(jax.tree.leaves(params))


def test_the_default_dtype_is_float32_on_cpus_and_follows_the_folder_elsewhere(tmp_path, monkeypatch):
    export(tmp_path)
    found = {}
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        for stored in ("float32", "bfloat16", "float16"):
            change_config(tmp_path, torch_dtype=stored)
            found[backend, stored] = weights.load(tmp_path)[0].dtype
    assert [dtype for (backend, _), dtype in found.items() if backend == "cpu"] == ["float32"] * 3
    assert [dtype for (backend, _), dtype in found.items() if backend == "gpu"] == ["float32", "bfloat16", "bfloat16"]


def test_a_sharded_folder_equals_a_whole_one(tmp_path):
    export(tmp_path)
    _, whole = weights.load(tmp_path)
    shard(tmp_path)
    _, sharded = weights.load(tmp_path)
    assert_equal(sharded, whole)


def test_a_missing_shard_is_named(tmp_path):
    export(tmp_path)
    shard(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002\.safetensors"):
        weights.load(tmp_path)


def test_all_problems_are_told_at_once(tmp_path):
    export(tmp_path)
    stored = tensors_of(tmp_path)
    del stored["model.norm.weight"], stored["model.layers.1.mlp.up_proj.weight"]
    stored["model.layers.0.self_attn.q_proj.bias"] = np.zeros(8, np.float32)
    stored["lm_head.weight"] = np.zeros((11, 8), np.float32)
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        weights.load(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "unknown: model.layers.0.self_attn.q_proj.bias" in message
    assert "wrong shape: lm_head.weight (11, 8), not (10, 8)" in message


def test_tensors_that_follow_from_others_are_passed_over(tmp_path):
    config = dataclasses.replace(CONFIG, is_head_tied=True)
    export(tmp_path, config)
    _, before = weights.load(tmp_path)
    stored = tensors_of(tmp_path)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].copy()
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    assert_equal(weights.load(tmp_path)[1], before)


@pytest.mark.parametrize("dtype", weights.DTYPES)
def test_orbax_round_trip_is_bit_equal(tmp_path, dtype):
    config = dataclasses.replace(CONFIG, attention_bias=True, dtype=dtype)
    params = random_params(config, dtype)
    weights.save_orbax(tmp_path, config, params)
    loaded_config, loaded = weights.load(tmp_path, dtype)
    assert loaded_config == config
    assert_equal(loaded, params)
    assert_equal(weights.load(tmp_path, "bfloat16")[1], jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_an_orbax_checkpoint_of_another_model_is_told_in_full(tmp_path):
    weights.save_orbax(tmp_path, CONFIG, random_params(CONFIG))
    change_config(tmp_path, num_hidden_layers=1, vocab_size=11, attention_bias=True)
    with pytest.raises(
        ValueError, match=r"missing: layers_0/self_attn/k_proj/bias.*unknown: layers_1/.*wrong shape: embed"
    ) as caught:
        weights.load(tmp_path)
    assert "lm_head (10, 8), not (11, 8)" in str(caught.value)


def test_a_params_folder_of_something_else_is_refused(tmp_path):
    weights.save_orbax(tmp_path, CONFIG, random_params(CONFIG))
    shutil.rmtree(tmp_path / "params")
    (tmp_path / "params").mkdir()
    with pytest.raises(ValueError, match="params is not an Orbax checkpoint"):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel is not supported; supported: LlamaForCausalLM, Mistral"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"hidden_size": None}, "lacks a whole number for hidden_size"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported; supported: default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs a factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized weights \(gptq\)"),
    ],
)
def test_an_unsupported_config_is_named(tmp_path, changes, expected):
    export(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=expected) as caught:
        weights.load(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_folders_without_a_model_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        weights.load(tmp_path)
    export(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        weights.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights: neither"):
        weights.load(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="convert them to safetensors"):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        weights.load(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is a file"):
        weights.load(tmp_path / "config.json")


def test_an_unknown_dtype_is_refused(tmp_path):
    export(tmp_path)
    with pytest.raises(ValueError, match="dtype 'float16' is not supported; supported: float32, bfloat16"):
        weights.load(tmp_path, "float16")


def test_names_are_resolved_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, "*.safetensors" in allow_patterns, "tokenizer.model" in ignore_patterns))
        if name == "org/none":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection,\nand not in the cache")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert weights.resolve("org/model") == tmp_path
    assert weights.resolve("org/model", has_weights=False) == tmp_path
    assert asked == [("org/model", True, False), ("org/model", False, False)]
    with pytest.raises(ValueError) as caught:
        weights.resolve("org/none")
    assert "'org/none'" in str(caught.value) and "no connection, and not in the cache" in str(caught.value)
    for impossible in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c", "two words", ""):
        with pytest.raises(ValueError, match=r"there is no folder|is a file"):
            weights.load(impossible)
    assert len(asked) == 3


ROPES = [
    RopeConfig(),
    RopeConfig("linear", theta=5e5, factor=2.0),
    RopeConfig("dynamic", factor=2.0),
    RopeConfig("llama3", theta=5e5, factor=8.0, original_context=16, low_freq_factor=1.5, high_freq_factor=5.0),
    RopeConfig("yarn", factor=4.0, original_context=8, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5, is_truncated=False),
    RopeConfig("yarn", factor=4.0, original_context=8, mscale=1.0, mscale_all_dim=0.5),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.kind)
def test_config_round_trip(rope):
    for changes in (
        {},
        {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
        {"attention_bias": True},
        {"use_qk_norm": True, "is_head_tied": True},
    ):
        config = dataclasses.replace(CONFIG, rope=rope, rms_norm_eps=1e-5, **changes)
        assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


def test_a_config_that_no_architecture_has_cannot_be_written():
    with pytest.raises(ValueError, match="no supported architecture"):
        to_hf(dataclasses.replace(CONFIG, attention_bias=True, mlp_bias=True))


def test_both_forms_of_rope_settings_are_read():
    old = to_hf(dataclasses.replace(CONFIG, rope=ROPES[3]))
    new = {key: value for key, value in old.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    assert from_hf(new) == from_hf(old)
    assert from_hf(new).rope == ROPES[3]


def test_a_window_bounds_the_context_and_not_the_position_scaling():
    yarn = to_hf(dataclasses.replace(CONFIG, rope=ROPES[5])) | {"architectures": ["MistralForCausalLM"], "sliding_window": 20}
    del yarn["rope_scaling"]["original_max_position_embeddings"]
    config = from_hf(yarn)
    assert (config.max_context, config.rope.original_context) == (20, 32)


def test_transformers_reads_an_export(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    params = export(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.bfloat16
    theirs = model.state_dict()["model.layers.1.self_attn.o_proj.weight"].float().numpy()
    ours = params["layers_1"]["self_attn"]["o_proj"]["weight"].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(theirs, ours)
    assert model.generation_config.eos_token_id == 1
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).bos_token == "<s>"
