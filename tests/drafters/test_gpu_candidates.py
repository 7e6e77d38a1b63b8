"""The kernel that expands a level of `hd_tree`: against the operations that it stands for, and where it is taken."""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hd_tree_rows import Row, databases, random_tokens
from jax import export

from hd_jax.drafters import candidates, gpu_candidates
from hd_jax.drafters.candidates import SUBSETS, Level
from hd_jax.drafters.hd_tree import hd_tree


def _rows(sources: str, history: int = 8192, lengths: tuple[int, int] = (3, 40)) -> list[Row]:
    """Two texts, by default one that has just begun and a longer one."""
    rng = np.random.default_rng(1)
    drafter = hd_tree(databases(), sources=sources, history=history)
    rows = [Row(drafter, random_tokens(rng, length)) for length in lengths]
    for row in rows:
        for size in (5, 4):
            row.append(random_tokens(rng, size))
    return rows


@pytest.mark.parametrize(
    ("sources", "max_match", "texts"),
    [
        *((sources, 16, ()) for sources in SUBSETS),
        ("cms", 2, ()),
        ("c", 16, (64, (61, 200))),  # the ring is full, and has gone round twice
    ],
)
def test_the_kernel_finds_what_the_operations_find(sources, max_match, texts):
    rows = _rows(sources, *texts)
    state, context = (
        jax.tree.map(lambda *x: jnp.stack(x), *parts) for parts in zip(*[(r.state, r.context) for r in rows], strict=True)
    )

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def expanded(expand, before: Level, settings) -> tuple[Level, jax.Array]:
        one = lambda state, context, before: expand(rows[0].drafter.tables, state, context, before, *settings)  # noqa: E731
        return jax.vmap(one)(state, context, before)

    by_kernel = functools.partial(gpu_candidates.expand, interpret=True)
    level = jax.vmap(candidates.root_level)(state.seen)
    num_left = 0
    for width, num_successors in ((1, 24), (5, 12), (3, 2)):
        settings = (width, sources, max_match, num_successors)
        found, found_left = expanded(by_kernel, level, settings)
        was_possible = level.scores.reshape(len(rows), -1) > -jnp.inf
        level, is_left = expanded(candidates.expand, level, settings)
        num_left += np.sum(is_left & was_possible)
        np.testing.assert_array_equal(is_left & was_possible, found_left & was_possible)
        is_one = level.scores > -jnp.inf
        assert np.all(np.any(is_one, axis=(1, 2))), "a level without candidates tells nothing"
        np.testing.assert_array_equal(is_one, found.scores > -jnp.inf)
        np.testing.assert_allclose(found.scores[is_one], level.scores[is_one], atol=1e-4)
        np.testing.assert_array_equal(found.chosen, level.chosen)
        np.testing.assert_array_equal(found.suffixes, level.suffixes)
        for name in ("tokens", "matches", "places", "sources"):
            np.testing.assert_array_equal(getattr(found, name)[is_one], getattr(level, name)[is_one], name)
    assert num_left


def test_of_equals_the_first_is_expanded_and_the_others_are_left():
    row, _ = _rows("c")
    places = jnp.zeros((1, 3), jnp.int32)
    root = candidates.root_level(row.state.seen)
    before = Level(root.chosen, root.suffixes, jnp.arange(3)[None], jnp.array([[-1.0, -1.0, -2.0]]), places, places, places)
    for expand in (candidates.expand, functools.partial(gpu_candidates.expand, interpret=True)):
        level, is_left = expand(row.drafter.tables, row.state, row.context, before, 1, "c", 16, 2)
        assert (level.chosen.tolist(), level.suffixes[0, -1]) == ([0], 0)
        assert is_left.tolist() == [False, True, True]


@pytest.mark.parametrize("sources", ["cms", "ms"])
def test_the_kernels_levels_make_the_same_tree(sources, monkeypatch):
    _, row = _rows(sources)
    drawn = lambda: jax.jit(lambda *x: row.drafter.draft(*x))(row.drafter.tables, row.state, row.context)  # noqa: E731
    expected = drawn()
    calls = []

    def expand(*args, **settings):
        calls.append(args)
        return gpu_candidates.expand(*args, **settings, interpret=True)

    monkeypatch.setattr(sys.modules[hd_tree.__module__], "_expand", expand)
    found = drawn()
    assert calls
    assert np.sum(expected.parents >= 0) > 10
    for name in ("tokens", "parents", "sources"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=1e-3)


@pytest.mark.parametrize(("options", "is_taken"), [({}, True), ({"sources": "cmsr"}, False), ({"estimates": "fixed"}, False)])
def test_it_is_taken_on_cuda_wherever_the_network_alone_estimates(options, is_taken):
    drafter = hd_tree(databases(), rounds=3, num_nodes=16, **options)
    row = Row(drafter, [0, 1, 2, 0, 1])
    checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]

    def num_kernels(platform: str) -> int:
        made = export.export(jax.jit(drafter.draft), platforms=[platform], disabled_checks=checks)
        return made(drafter.tables, row.state, row.context).mlir_module().count("xla.gpu.triton")

    assert num_kernels("cuda") == 3 * is_taken
    assert num_kernels("cpu") == num_kernels("tpu") == 0
