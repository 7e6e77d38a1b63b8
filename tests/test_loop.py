"""The compiled loop itself: what stands in it, how often it is compiled, and that it lowers for other platforms."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from hd_jax import decode, drafters, loop, runner
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
