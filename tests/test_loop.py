"""The compiled loop itself: what stands in it, how often it is compiled, and that it lowers for other platforms."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from hd_jax import admission, compilation, drafters, loop, prefill, runner, sharding
from hd_jax.databases.collection import Databases
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.databases.trigrams import TrigramCounts
from hd_jax.draft_tree import NO_TOKEN
from hd_jax.drafters import Drafter
from hd_jax.models.llama import SLOTS_AT_ONCE, Llama, empty_cache
from hd_jax.runner import LM, Options, Row

MAX_COPIED = 1 << 15  # bytes


def _arguments(lm: LM, drafter: Drafter, num_rows: int, exact: bool = False, sizes: tuple[int, ...] = ()):
    """What `run_steps` takes, for rows with a prompt of nine tokens."""
    options = Options(max_new_tokens=20, exact=exact)
    rows = [Row([3, 4, 5] * 3, seed) for seed in range(num_rows)]
    mesh = lm.model.mesh
    request = sharding.put(runner.request_of(lm, rows, options), sharding.by_rows(mesh))
    slots = runner.num_slots(29, drafter.max_depth)
    tokens = jnp.zeros((num_rows, slots), jnp.int32).at[:, :9].set(jnp.asarray([3, 4, 5] * 3))
    tokens = sharding.put(tokens, sharding.by_rows(mesh))
    cache = empty_cache(lm.config, num_rows, slots, mesh)
    drafter_state = admission.init_drafter(drafter, request, tokens, None, mesh=mesh)
    settings = loop.StepSettings(is_exact=exact, width=runner.EXACT_WIDTH if exact else 0, sizes=sizes)
    state = admission.start(drafter, request, cache, tokens, drafter_state, settings, mesh=mesh)
    state = admission.with_budget(state, settings, jnp.arange(1.0, len(sizes) + 2) if sizes else None, drafter.num_nodes)
    return (lm.model, settings, lm.params, drafter, request, (), state, jnp.int32(4), jnp.int32(1)), slots


def _cache_shapes(lm: LM, num_rows: int, slots: int) -> str:
    """A pattern of the shapes of a cache's values and keys in a compiled program."""
    width = lm.config.head_dim
    return rf"f32\[{num_rows},{lm.config.num_kv_heads},(?:{slots},{width}|{width},{slots})\]"


@pytest.mark.parametrize(
    ("make", "num_rows", "exact", "sizes"),
    [
        (drafters.none, 1, False, ()),
        (drafters.none, 3, False, ()),
        *((functools.partial(drafters.hd, order="c"), n, is_exact, ()) for n, is_exact in ((1, False), (3, False), (1, True))),
        *((functools.partial(drafters.hd, order="c"), n, False, (1, 4, 16)) for n in (1, 3)),
    ],
)
def test_no_cache_shaped_copy_stands_in_the_compiled_loop(lm, make, num_rows, exact, sizes):
    arguments, slots = _arguments(lm, make(), num_rows, exact, sizes)
    text = compilation.here(loop.run_steps).lower(*arguments, sync_every=4).compile().as_text()
    shape = _cache_shapes(lm, num_rows, slots)
    body = text[: text.index("ENTRY")]  # every computation but the entry, so the loop's body among them
    assert re.search(rf"{shape}\S* dynamic-update-slice|{shape}\S* scatter|{shape}\S* fusion", body), (
        "the pattern finds no cache"
    )
    copies = re.findall(rf"\n.*= {shape}\S* copy\(.*", body)
    assert not copies, copies


@pytest.mark.parametrize(("num_rows", "size"), [(1, 64), (1, 256), (3, 64)])
def test_no_cache_shaped_copy_stands_in_the_compiled_prefill(lm, num_rows, size):
    slots = 3 * SLOTS_AT_ONCE
    cache, tokens = empty_cache(lm.config, num_rows, slots), jnp.zeros((num_rows, slots), jnp.int32)
    arguments = (lm.model, lm.params, cache, tokens, jnp.int32(0), jnp.int32(2))
    text = compilation.here(prefill.read_alike).lower(*arguments, chunk_size=size).compile().as_text()
    shape = _cache_shapes(lm, num_rows, slots)
    assert re.search(shape, text), "the pattern finds no cache"
    assert not re.findall(rf"\n.*= {shape}\S* copy\(.*", text[: text.index("ENTRY")])


def test_a_cache_has_room_behind_every_text():
    """For the path of the deepest draft and for a chunk of the prompt, wherever the text ends."""
    for num_tokens in range(1, 1200, 7):
        for max_depth in (0, 10, 139, 600):
            slots = runner.num_slots(num_tokens, max_depth)
            assert slots >= num_tokens + max(max_depth + 1, prefill.chunk_sizes()[-1])
            assert slots % 128 == 0
            assert slots == 256 or slots <= 2 * (num_tokens + max(max_depth, 255))


def test_a_draft_may_be_deeper_than_a_chunk(lm):
    prompt = [3, 4, 5, 6] * 40
    recorded = (prompt * 2)[:210]
    *_, last = runner.run(lm, drafters.pld(num_nodes=140), [Row(prompt, 0, recorded=recorded)], Options())
    assert last.results[0].tokens == recorded
    assert max(last.results[0].accept_lengths) > prefill.chunk_sizes()[-1]


def test_a_row_is_admitted_without_a_copy_of_the_batch(lm):
    (arguments, slots), (alone, _) = (_arguments(lm, drafters.hd(order="c"), num_rows) for num_rows in (3, 1))
    text = admission.admit.lower(lm.model, arguments[6], alone[6], jnp.zeros(1, jnp.int32)).compile().as_text()
    shape = _cache_shapes(lm, 3, slots)
    assert re.search(shape, text), "the pattern finds no cache"
    assert not re.findall(rf"\n.*= {shape}\S* copy\(.*", text)


@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_row_is_admitted_in_its_place(lm, place):
    """And a place that there is not leaves all rows as they are. Other rows' budgets go on."""
    drafter = drafters.pld(num_nodes=5)
    (arguments, _), (alone, _) = (_arguments(lm, drafter, num_rows, sizes=(1, 5)) for num_rows in (3, 1))
    mark = lambda x: x + jnp.arange(1, 4, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731
    state = arguments[6]
    state = state._replace(cache=jax.tree.map(mark, state.cache), tokens=mark(state.tokens), lengths=mark(state.lengths))
    watched = state.budget.watched._replace(lengths=jnp.asarray([4, 5, 6]))
    state = state._replace(budget=state.budget._replace(earned=state.budget.earned + 1, watched=watched))
    before, new = jax.tree.map(np.asarray, state), alone[6]._replace(budget=None)
    after = admission.admit(lm.model, state, new, jnp.asarray([place], jnp.int32))
    row_of = lambda state, row: jax.tree.map(lambda x: x[row], state._replace(budget=None))  # noqa: E731
    for row in range(3):
        expected = row_of(new, 0) if row == place else row_of(before, row)
        jax.tree.map(np.testing.assert_array_equal, row_of(after, row), expected)
    assert after.budget.watched.lengths.tolist() == [0 if row == place else row + 4 for row in range(3)]
    np.testing.assert_array_equal(after.budget.earned, before.budget.earned)


@pytest.mark.parametrize(
    "make",
    [
        lambda: drafters.hd(order="c"),
        lambda: drafters.lookahead(),
        lambda: drafters.recycling(vocab_size=48),
        lambda: drafters.aded(_databases(), num_nodes=9),
        lambda: drafters.aded(_databases(), adapt="from_text", num_nodes=9),
        lambda: drafters.hd_tree(_databases(), rounds=2, width=2, num_nodes=9),
        lambda: drafters.hd_tree(_databases(), sources="cmsr", rounds=2, width=2, num_nodes=9),
    ],
    ids=["hd", "lookahead", "recycling", "aded", "aded from text", "hd_tree", "hd_tree recycling"],
)
def test_no_large_state_of_a_drafter_is_copied_in_the_compiled_loop(lm, make):
    """Of arrays of more than MAX_COPIED bytes: what a step writes to, it must not have to read afterwards."""
    arguments, _ = _arguments(lm, make(), 1, False)
    large = [leaf for leaf in jax.tree.leaves(arguments[6].drafter) if leaf.nbytes > MAX_COPIED]
    text = compilation.here(loop.run_steps).lower(*arguments, sync_every=4).compile().as_text()
    body = text[: text.index("ENTRY")]
    shapes = {",".join(map(str, leaf.shape)) for leaf in large}
    assert not [line for shape in shapes for line in re.findall(rf"\n.*= \w+\[{shape}\]\S* copy\(.*", body)]
    assert all(f"[{shape}]" in body for shape in shapes)


def test_the_copy_test_sees_a_copy():
    """The same pattern on a loop that rearranges a whole cache."""

    def body(_, cache):
        return jnp.take(cache, jnp.arange(8)[::-1], axis=2) + cache

    cache = jnp.zeros((1, 2, 8, 4))
    text = (
        jax.jit(lambda c: jax.lax.fori_loop(0, 5, lambda i, c: (body(i, c[0]), c[0]), (c, c))).lower(cache).compile().as_text()
    )
    assert re.findall(r"\n.*= f32\[1,2,8,4\]\S* copy\(.*", text)


def _databases() -> Databases:
    documents = [np.arange(2, 40, dtype=np.int32)] * 2
    text = SuffixArray.build(documents)
    return Databases(model_text=text, statistics=text, trigrams=TrigramCounts.build(documents))


def _hd_tree() -> Drafter:
    return drafters.hd_tree(_databases(), rounds=2, width=2, num_nodes=9)


@pytest.mark.parametrize(
    ("make", "exact", "sizes"),
    [
        (lambda: drafters.hd(order="c"), False, ()),
        (lambda: drafters.hd(order="c"), True, ()),
        (_hd_tree, False, ()),
        (_hd_tree, False, (1, 4, 9)),
        (lambda: drafters.lookahead(window=3, pool_from_prompt=False), False, ()),
        (lambda: drafters.recycling(vocab_size=48), False, ()),
    ],
    ids=["hd", "hd-exact", "hd_tree", "hd_tree-budget", "lookahead", "recycling"],
)
def test_the_device_loop_lowers_for_gpus_and_tpus(lm, make, exact, sizes):
    """No callback, no host: the whole loop is one program on every platform."""
    config = dataclasses.replace(lm.config, is_feature_major=False)
    lower_for_gpus_and_tpus(dataclasses.replace(lm, config=config, model=Llama(config)), make(), exact, sizes)


def lower_for_gpus_and_tpus(lm: LM, drafter: Drafter, exact: bool, sizes: tuple[int, ...] = ()) -> list[export.Exported]:
    """One after the other, since the kernels for GPUs (gpu_attention.py, gpu_cache.py) are in programs for them alone."""
    (model, settings, params, drafter, request, host, state, *limits), _ = _arguments(lm, drafter, 2, exact, sizes)
    run = jax.jit(lambda p, r, s, *n: loop.run_steps(model, settings, p, drafter, r, host, s, *n, sync_every=4))
    checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    exported = [
        export.export(run, platforms=[platform], disabled_checks=checks)(params, request, state, *limits)
        for platform in ("cuda", "tpu")
    ]
    for program in exported:
        assert "stablehlo.while" in program.mlir_module()
        assert "callback" not in program.mlir_module()
    return exported


def test_finished_rows_stay_as_they_are(lm):
    arguments, _ = _arguments(lm, drafters.pld(), 2)
    request = arguments[4]._replace(limits=jnp.asarray([12, 29]))
    arguments = (*arguments[:4], request, *arguments[5:7], jnp.int32(20), jnp.int32(1))
    state, record = loop.run_steps(*arguments, sync_every=20)
    assert state.lengths.tolist() == [12, 29]
    assert np.asarray(record.num_appended).sum(axis=1).tolist() == [3, 20]
    assert int(state.counts[0].sum()) <= int(state.counts[1].sum())


def _recorded(arguments, texts):
    """The arguments with a record in the drawn targets' place."""
    request, state = arguments[4], arguments[6]
    recorded = np.full(state.tokens.shape, NO_TOKEN, np.int32)
    for row, text in zip(recorded, texts, strict=True):
        row[: len(text)] = text
    return (*arguments[:4], request._replace(recorded=jnp.asarray(recorded)), *arguments[5:])


def test_a_record_stands_in_for_what_the_model_would_have_said(lm):
    text = [3, 4, 5] * 8 + [7, 9, 3, 11, 2]
    arguments, _ = _arguments(lm, drafters.pld(num_nodes=5), 1)
    decoded, _ = loop.run_steps(*arguments[:7], jnp.int32(20), jnp.int32(1), sync_every=20)
    assert decoded.tokens[0, :29].tolist() != text, "the model itself says this text: the test would show nothing"
    arguments, _ = _arguments(lm, drafters.pld(num_nodes=5), 1)
    replayed, record = loop.run_steps(*_recorded(arguments, [text])[:7], jnp.int32(20), jnp.int32(1), sync_every=20)
    assert replayed.tokens[0, :29].tolist() == text
    assert record.num_appended[0, :2].max() > 1


def test_a_replay_without_a_model_takes_the_steps_of_one_with_it(lm):
    text = [3, 4, 5] * 8 + [7, 9, 3, 11, 2]
    drafter = drafters.pld(num_nodes=5)
    arguments, slots = _arguments(lm, drafter, 1)
    with_model = _recorded(arguments, [text])
    request = with_model[4]
    state, record = loop.run_steps(*with_model[:7], jnp.int32(20), jnp.int32(1), sync_every=20)
    tokens = jnp.zeros((1, slots), jnp.int32).at[0, :9].set(jnp.asarray(text[:9]))
    drafter_state = admission.init_drafter(drafter, request, tokens, None)
    alone = admission.start(drafter, request, (), tokens, drafter_state, loop.StepSettings())
    alone, record_alone = loop.run_steps(
        None, loop.StepSettings(), None, drafter, request, (), alone, jnp.int32(20), jnp.int32(1), sync_every=20
    )
    assert record_alone.num_appended.tolist() == record.num_appended.tolist()
    assert record_alone.num_nodes.tolist() == record.num_nodes.tolist()
    assert alone.counts.tolist() == state.counts.tolist()
    assert alone.tokens[0, :29].tolist() == text


def test_a_model_does_all_of_its_work_in_a_replay(lm):
    """Its head too, although nothing is drawn from it: what a timed replay measures is what decoding does."""
    arguments, _ = _arguments(lm, drafters.pld(), 1)
    pattern = rf"= f32\[(?:{lm.config.vocab_size},\d+|[\d,]+,{lm.config.vocab_size})\]\S* (?:dot|fusion|custom-call)\("
    num_products = []  # of the vocabulary's width, or of the equally wide layers within
    for each in (arguments, _recorded(arguments, [[3] * 29])):
        text = compilation.here(loop.run_steps).lower(*each, sync_every=4).compile().as_text()
        num_products.append(len(re.findall(pattern, text)))
    assert num_products[0] > 0, "the pattern finds nothing"
    assert num_products[0] == num_products[1]


def test_a_step_needs_a_model_or_a_record(lm):
    arguments, _ = _arguments(lm, drafters.pld(), 1)
    with pytest.raises(ValueError, match="needs a model, or a record"):
        loop.run_steps(None, *arguments[1:], sync_every=4)
