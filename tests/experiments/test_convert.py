"""From a folder in Hugging Face format to an Orbax checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from experiments import convert
from hd_jax.models import llama, tokenizer, weights
from hd_jax.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_context=32,
)


@pytest.fixture
def folder(tmp_path):
    one = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(llama.Llama(CONFIG).init, jax.random.key(0), one, one, jnp.ones((1, 1, 1), bool))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)
    vocab = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 10)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w2"))
    out = tmp_path / "vicuna-tiny"
    weights.export_hf(out, CONFIG, params, words, chat_template="", bos="<s>", eos="</s>")
    described = json.loads((out / "tokenizer_config.json").read_text())
    del described["chat_template"]  # So that the name alone says which it is.
    (out / "tokenizer_config.json").write_text(json.dumps(described))
    (out / "model.safetensors.index.json").write_text("{}")
    return out


@pytest.mark.parametrize(("dtype", "stored"), [(None, "bfloat16"), ("float32", "float32")])
def test_the_checkpoint_holds_the_same_model(folder, tmp_path, dtype, stored):
    output = tmp_path / "output" / "orbax"
    assert convert.convert(str(folder), output, dtype) == 2 * 80 + 8 + 2 * 64 + 2 * 32 + 3 * 96 + 2 * 8
    before, after = weights.load(folder, "float32"), weights.load(output, "float32")
    assert after[0] == before[0]
    jax.tree.map(np.testing.assert_array_equal, after[1], before[1])
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        leaves = jax.tree.leaves(checkpointer.metadata(output / "params").item_metadata.tree)
    assert {str(leaf.dtype) for leaf in leaves} == {stored}

    assert (output / "config.json").read_text() == (folder / "config.json").read_text()
    assert not list(output.glob("*.safetensors*"))
    words, words_before = tokenizer.load(output), tokenizer.load(folder)
    assert words.fingerprint == words_before.fingerprint
    assert words.chat_template == words_before.chat_template == tokenizer.TEMPLATES["vicuna"]

    with pytest.raises(ValueError, match=r"holds a checkpoint \(params/\) already"):
        convert.convert(str(folder), output, dtype)
    with pytest.raises(ValueError, match="is the model's own folder"):
        convert.convert(str(folder), folder, dtype)


def test_bad_input_is_one_line_and_status_2(tmp_path):
    arguments = ["--model", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "experiments.convert", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "there is no folder" in done.stderr
    assert not (tmp_path / "out").exists()
