"""The compiled loop itself: what stands in it, how often it is compiled, and that it lowers for other platforms."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from hd_jax import drafters, loop, runner
from hd_jax.drafters import Drafter
from hd_jax.models.llama import empty_cache
from hd_jax.runner import LM, Options, Row


def _arguments(lm: LM, drafter: Drafter, num_rows: int, exact: bool = False):
    """What `run_steps` takes, for rows with a prompt of nine tokens."""
    options = Options(max_new_tokens=20, exact=exact)
    rows = [Row([3, 4, 5] * 3, seed) for seed in range(num_rows)]
    request = runner.request_of(lm, rows, options)
    slots = runner.num_slots(29)
    tokens = jnp.zeros((num_rows, slots), jnp.int32).at[:, :9].set(jnp.asarray([3, 4, 5] * 3))
    cache = empty_cache(lm.config, num_rows, slots)
    state = loop.start(drafter, request, cache, tokens, loop.init_drafter(drafter, request, tokens, None), 0)
    settings = loop.StepSettings(is_exact=exact, width=runner.EXACT_WIDTH if exact else 0)
    return (lm.model, settings, lm.params, drafter, request, (), state, jnp.int32(4)), slots


@pytest.mark.parametrize(("num_rows", "exact"), [(1, False), (3, False), (1, True)])
def test_no_cache_shaped_copy_stands_in_the_compiled_loop(lm, num_rows, exact):
    arguments, slots = _arguments(lm, drafters.hd(order="c"), num_rows, exact)
    text = loop.run_steps.lower(*arguments, sync_every=4).compile().as_text()
    shape = f"f32\\[{num_rows},{lm.config.num_kv_heads},{slots},{lm.config.head_dim}\\]"
    body = text[: text.index("ENTRY")]  # every computation but the entry, so the loop's body among them
    assert re.search(rf"{shape}\S* dynamic-update-slice|{shape}\S* scatter|{shape}\S* fusion", body), (
        "the pattern finds no cache"
    )
    copies = re.findall(rf"\n.*= {shape}\S* copy\(.*", body)
    assert not copies, copies


def test_the_copy_test_sees_a_copy():
    """The same pattern on a loop that rearranges a whole cache."""

    def body(_, cache):
        return jnp.take(cache, jnp.arange(8)[::-1], axis=2) + cache

    cache = jnp.zeros((1, 2, 8, 4))
    text = (
        jax.jit(lambda c: jax.lax.fori_loop(0, 5, lambda i, c: (body(i, c[0]), c[0]), (c, c))).lower(cache).compile().as_text()
    )
    assert re.findall(r"\n.*= f32\[1,2,8,4\]\S* copy\(.*", text)


@pytest.mark.parametrize("exact", [False, True])
def test_the_device_loop_lowers_for_gpus_and_tpus(lm, exact):
    """No callback, no host: the whole loop is one program on every platform."""
    (model, settings, params, drafter, request, host, state, steps), _ = _arguments(lm, drafters.hd(order="c"), 2, exact)
    run = jax.jit(lambda p, r, s, n: loop.run_steps(model, settings, p, drafter, r, host, s, n, sync_every=4))
    exported = export.export(run, platforms=["cuda", "tpu"])(params, request, state, steps)
    assert "stablehlo.while" in exported.mlir_module()
    assert "callback" not in exported.mlir_module()


def test_finished_rows_stay_as_they_are(lm):
    arguments, _ = _arguments(lm, drafters.pld(), 2)
    request = arguments[4]._replace(limits=jnp.asarray([12, 29]))
    arguments = (*arguments[:4], request, *arguments[5:7], jnp.int32(20))
    state, record = loop.run_steps(*arguments, sync_every=20)
    assert state.lengths.tolist() == [12, 29]
    assert np.asarray(record.num_appended).sum(axis=1).tolist() == [3, 20]
    assert int(state.counts[0].sum()) <= int(state.counts[1].sum())
