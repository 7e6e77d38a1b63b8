"""What a mesh must not change. `test_sharding` runs this file in a process with eight virtual CPU devices."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_weights import assert_equal, export, random_params, shard
from test_decode import DRAFTERS, MANY, PROMPTS
from test_loop import _arguments, lower_for_gpus_and_tpus

from hd_jax import admission, compilation, decode, drafters, exactness, loop, sharding
from hd_jax.models import llama, weights
from hd_jax.models.config import ModelConfig
from hd_jax.runner import LM

NUM_NEW = 24


def on_mesh(lm: LM, mesh: str) -> LM:
    """The model on a mesh, as `decode.load` would put it there."""
    made = sharding.make_mesh(mesh)
    names = lambda path: tuple(key.key for key in path)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: sharding.put(x, sharding.parameter(made, lm.config, names(path))), lm.params
    )
    config = llama.for_devices(lm.config, made)
    return dataclasses.replace(lm, config=config, params=params, model=llama.Llama(config, mesh=made))


# Two key/value heads: on model=4 every device holds both of them.
CASES = [
    ("data=2,model=4", "hd", {}),
    ("data=2,model=4", None, {"temperature": 0.9, "top_p": 0.9}),
    ("data=2,model=4", "recycling", {}),  # asks for the top logits
    ("data=4", "python", {}),  # asks the host between steps
]


@pytest.mark.parametrize(("mesh", "name", "options"), CASES)
def test_the_tokens_are_those_of_one_device(lm, mesh, name, options):
    drafter = DRAFTERS[name] if name else drafters.none()
    options = {"max_new_tokens": NUM_NEW, **options}
    options |= {"seed": range(len(MANY)), "batch_size": 4}  # of five rows
    reference = decode.generate(lm, MANY, **options)
    split = on_mesh(lm, mesh)
    out = decode.generate(split, MANY, drafter=drafter, **options)
    options = {key: options[key] for key in options if key in ("temperature", "top_p")}
    for seed, (a, b) in enumerate(zip(reference, out, strict=True)):
        verdict = exactness.check(split, drafter, a, b, seed=seed, num_rows=4, reference_lm=lm, **options)
        assert verdict.is_explained, verdict.message


def test_exact_mode_is_bit_equal_on_a_mesh(lm):
    """Whatever the batch's size."""
    split = on_mesh(lm, "data=2,model=2")
    options = {"max_new_tokens": NUM_NEW, "exact": True, "logprobs": 2, "temperature": 0.7}
    reference = decode.generate(split, PROMPTS, batch_size=2, **options)
    out = decode.generate(split, PROMPTS, drafter=DRAFTERS["pld"], batch_size=4, **options)  # one place stays free
    assert [r.tokens for r in out] == [r.tokens for r in reference]
    assert [r.logprobs for r in out] == [r.logprobs for r in reference]


def test_a_session_and_a_stop_string_on_a_mesh(lm):
    """And the checker sees a wrong token."""
    split = on_mesh(lm, "model=2")
    sessions = [decode.Session(each, drafter=DRAFTERS["pld"]) for each in (lm, split)]
    for message in ("hello", "again"):
        one, other = (session.generate(message, max_new_tokens=NUM_NEW) for session in sessions)
        assert exactness.check(split, DRAFTERS["pld"], one, other, reference_lm=lm).is_explained
    changed = dataclasses.replace(other, tokens=[*one.tokens[:5], (one.tokens[5] + 1) % 48])
    verdict = exactness.check(split, DRAFTERS["pld"], one, changed, reference_lm=lm)
    assert not verdict.is_explained and verdict.gap > verdict.tolerance > 0
    whole = decode.generate(split, PROMPTS[0], max_new_tokens=NUM_NEW).text
    out = decode.generate(split, PROMPTS[0], max_new_tokens=NUM_NEW, stop=whole[3:6])
    assert out.text == whole[: whole.index(whole[3:6])]


def test_a_batch_that_the_mesh_does_not_divide_is_refused(lm):
    split = on_mesh(lm, "data=2")
    for prompt in (PROMPTS[0], PROMPTS):
        with pytest.raises(ValueError, match=r"data=2 does not divide a batch of [13]: .* must be a multiple of 2"):
            decode.generate(split, prompt)
    with pytest.raises(ValueError, match="data=2 does not divide a batch of 3"):
        decode.generate(split, MANY[:4], batch_size=3)


@pytest.mark.parametrize(("mesh", "name"), [("data=2,model=2", "hd"), ("data=2,model=4", "recycling")])
def test_the_loop_moves_sums_and_logits_and_nothing_else(lm, mesh, name):
    """One sum for the embedding, two a layer; the logits; and how many rows have not ended. No weight, no cache, no draft."""
    split = on_mesh(lm, mesh)
    arguments, slots = _arguments(split, DRAFTERS[name], 4)
    text = compilation.here(loop.run_steps).lower(*arguments, sync_every=4).compile().as_text()
    pattern = r"= (\w+)\[([\d,]*)\]\S* (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\("
    found = collections.Counter((kind, dtype, shape) for dtype, shape, kind in re.findall(pattern, text))
    num_nodes = DRAFTERS[name].num_nodes
    assert found == {
        ("all-reduce", "f32", f"2,{num_nodes},32"): 1 + 2 * lm.config.num_layers,
        ("all-gather", "f32", f"2,{num_nodes},48"): 1,
        ("all-reduce", "s32", ""): 1,
    }
    num_heads = 1 if mesh == "data=2,model=2" else 2
    cache = rf"f32\[2,{num_heads},{slots},8\]"
    assert re.search(cache, text), "the pattern finds no cache"
    assert not re.search(rf"\n.*= {cache}\S* copy\(", text[: text.index("ENTRY")])
    new, _ = _arguments(split, DRAFTERS[name], 2)
    places = sharding.put(jnp.zeros(2, jnp.int32), sharding.by_rows(split.model.mesh))
    text = admission.admit.lower(split.model, arguments[6], new[6], places).compile().as_text()
    assert re.search(cache, text) and not re.findall(pattern, text)  # a new row is where it belongs


@pytest.mark.parametrize("exact", [False, True])
def test_the_split_loop_lowers_for_gpus_and_tpus(lm, exact):
    exported = lower_for_gpus_and_tpus(on_mesh(lm, "data=2,model=4"), DRAFTERS["hd"], exact)
    assert [program.nr_devices for program in exported] == [8, 8]
    assert "xla.gpu.triton" not in exported[0].mlir_module()  # kernels of ours are for one GPU


def test_a_second_request_on_a_mesh_compiles_nothing(lm, caplog):
    split = on_mesh(lm, "data=2,model=2")
    compiled = lambda: [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]  # noqa: E731
    with jax.log_compiles():
        decode.generate(split, PROMPTS, drafter="pld", max_new_tokens=20, batch_size=2)
        assert len([m for m in compiled() if "run_steps" in m]) == 1
        caplog.clear()
        decode.generate(split, [[4, 5, 6, 7], [9, 3], *PROMPTS], drafter="pld", max_new_tokens=30, seed=3, batch_size=2)
        assert not compiled()


CONFIG = ModelConfig(
    vocab_size=12,
    hidden_size=8,
    intermediate_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    max_context=32,
    attention_bias=True,
)


def _check_parts(params: dict, mesh) -> None:
    """Every matrix of the model is held in fourths."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert leaf.sharding == sharding.parameter(mesh, CONFIG, tuple(key.key for key in path))
        parts = {part.data.size for part in leaf.addressable_shards}
        assert parts == {leaf.size // 4} or leaf.ndim == 1, path


def test_safetensors_are_read_part_by_part(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, attention_bias=False)
    export(tmp_path, config)
    shard(tmp_path)
    _, whole = weights.load(tmp_path)
    read = []  # (size of what was read, size of the tensor)
    opened = weights._open

    class Recorded:
        def __init__(self, file: pathlib.Path):
            self.file = opened(file)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def keys(self):
            return self.file.keys()

        def get_slice(self, name: str):
            found = self.file.get_slice(name)

            class Slice:
                get_shape = staticmethod(found.get_shape)

                def __getitem__(self, index):
                    out = found[index]
                    read.append((out.size, int(np.prod(found.get_shape())), out.ndim))
                    return out

            return Slice()

    monkeypatch.setattr(weights, "_open", Recorded)
    mesh = sharding.make_mesh("data=2,model=4")
    _, split = weights.load(tmp_path, mesh=mesh)
    assert_equal(split, whole)
    _check_parts(split, mesh)
    assert all(size == total // 4 for size, total, ndim in read if ndim == 2)


def test_orbax_checkpoints_are_read_part_by_part(tmp_path):
    params = random_params(CONFIG)
    weights.save_orbax(tmp_path, CONFIG, params)
    mesh = sharding.make_mesh("data=2,model=4")
    _, split = weights.load(tmp_path, mesh=mesh)
    assert_equal(split, params)
    _check_parts(split, mesh)


def test_the_door_loads_onto_a_mesh_and_refuses_one_that_does_not_fit():
    lm = decode.load(mesh="data=2,model=4")
    assert lm.params["embed_tokens"].addressable_shards[0].data.shape == (2048, 256)
    with pytest.raises(ValueError, match=r"model=8 does not divide the model's num_attention_heads of 4; .* model=4"):
        decode.load(mesh={"model": 8})
    with pytest.raises(ValueError, match="mesh data=2,model=8 needs 16 devices; there are 8"):
        decode.load(mesh="data=2,model=8")
    assert jnp.zeros(3).sharding.device_set == {jax.devices()[0]}
