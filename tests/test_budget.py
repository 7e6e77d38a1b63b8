"""The adaptive budget: what is learned in hindsight, what is chosen, and when it is tried again."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax import budget, compilation, decode, draft_tree, exactness, loop, step_costs
from hd_jax.draft_tree import NO_PARENT, UNKNOWN, UNUSED, DraftTree
from hd_jax.drafters.base import Context, Drafter

SIZES = (1, 2, 4, 6)


def _tree(*nodes: tuple[int, int], probability: float = UNKNOWN) -> DraftTree:
    """A tree of (token, parent) nodes."""
    tokens, parents = (jnp.asarray(column, jnp.int32) for column in zip(*nodes, strict=True))
    return DraftTree(
        tokens, parents, jnp.zeros_like(tokens), jnp.zeros(len(nodes), bool), jnp.full(len(nodes), probability, jnp.float32)
    )


# root 3; 4 5 6 below each other, then 9 under the root and 7 below 6
TREE = _tree((3, NO_PARENT), (4, 0), (5, 1), (6, 2), (9, 0), (7, 3))


@pytest.mark.parametrize("sizes", [(1, 9), (1, 4, 9), (1, 4, 8, 16, 28), (1, 4, 8, 16, 32, 64), (1, 4, 8, 16, 32, 64, 120)])
def test_sizes_are_one_and_a_drafters_own_and_few_between(sizes):
    if sizes == (1, 9):
        assert budget.sizes_of(2) == (1, 2)
        assert budget.sizes_of(1) == (1,)
    else:
        assert budget.sizes_of(sizes[-1]) == sizes


@pytest.mark.parametrize(
    ("text", "depths", "is_final"),
    [
        ([8, 3], [0, 0, 0, 0], False),
        ([8, 3, 4], [0, 1, 1, 1], False),
        ([8, 3, 2], [0, 0, 0, 0], True),
        ([8, 3, 9, 1], [0, 0, 0, 1], True),
        ([8, 3, 4, 5, 6, 7], [0, 1, 3, 4], False),
        ([8, 3, 4, 5, 6, 7, 7], [0, 1, 3, 4], True),
    ],
)
def test_how_deep_the_text_got_in_each_prefix(text, depths, is_final):
    watched = budget.Watched(TREE, draft_tree.ancestor_mask(TREE), jnp.zeros(3), jnp.int32(2))
    tokens = jnp.asarray([*text, 4, 5, 6, 7, 7])  # what stands behind the text is no part of it
    found, final = budget.reached(watched, SIZES, tokens, jnp.int32(len(text)))
    assert (found.tolist(), bool(final)) == (depths, is_final)
    _, final = budget.reached(watched._replace(lengths=jnp.int32(0)), SIZES, tokens, jnp.int32(len(text)))
    assert not final


def test_window_nodes_earn_and_promise_nothing():
    tree = TREE._replace(is_window=jnp.asarray([False] + [True] * 5))
    watched = budget.Watched(tree, draft_tree.ancestor_mask(tree), jnp.zeros(3), jnp.int32(1))
    found, final = budget.reached(watched, SIZES, jnp.asarray([3, 4, 5, 6]), jnp.int32(4))
    assert (found.tolist(), bool(final)) == ([0, 0, 0, 0], True)
    assert budget.promises(tree, SIZES).tolist() == [0, 0, 0]


def test_a_size_promises_the_probabilities_of_its_nodes():
    tree = TREE._replace(probabilities=jnp.asarray([1.0, 0.5, 0.25, 0.125, 0.5, 0.0625]))
    assert budget.promises(tree, SIZES).tolist() == [0.5, 0.375, 0.5625]
    cut = tree._replace(parents=tree.parents.at[3:].set(UNUSED))
    assert budget.promises(cut, SIZES).tolist() == [0.5, 0.25, 0]
    first = budget.FIRST_GAIN * budget.GAIN_RATIO ** np.arange(3)
    odd = TREE._replace(probabilities=jnp.asarray([0, jnp.nan, *[UNKNOWN] * 4]))
    np.testing.assert_allclose(budget.promises(odd, SIZES), first)
    np.testing.assert_allclose(budget.promises(TREE, SIZES), first)  # a full tree without estimates promises what is taken
    np.testing.assert_allclose(budget.promises(TREE._replace(parents=cut.parents), SIZES), first * [1, 0.5, 0])


def _batch(tree: DraftTree) -> DraftTree:
    return jax.tree.map(lambda x: x[None], tree)


def _choose(state: budget.State, tree: DraftTree, length: int = 1) -> tuple[int, budget.State]:
    size, state = _chosen(state, _batch(tree), jnp.asarray([length]))
    return SIZES[int(size)], state


@jax.jit
def _chosen(state: budget.State, trees: DraftTree, lengths: jax.Array) -> tuple[jax.Array, budget.State]:
    ancestors = jax.vmap(draft_tree.ancestor_mask)(trees)
    return budget.choose(state, SIZES, trees, ancestors, lengths, jnp.zeros(1, bool))


@pytest.mark.parametrize(
    ("probability", "num_nodes", "costs", "expected"),
    [
        (0.9, 6, [1, 1, 1.1, 1.2, 1.3], 6),
        (0.9, 3, [1, 1, 1.1, 1.2, 1.3], 4),  # no more places than nodes ask for
        (0.9, 3, [1, 1, 1.1, 9, 1.3], 6),  # of sizes that hold as many, the cheapest
        (0.9, 1, [1, 1, 1.1, 1.2, 1.3], 1),
        (0.01, 6, [1, 1, 1.1, 1.2, 1.3], 1),
        (0.2, 6, [1, 1, 1.1, 9, 9], 2),
    ],
)
def test_a_pass_is_as_wide_as_the_tree_promises_to_pay(probability, num_nodes, costs, expected):
    tree = TREE._replace(probabilities=jnp.full(6, probability), parents=TREE.parents.at[num_nodes:].set(UNUSED))
    assert _choose(budget.start(SIZES, jnp.asarray(costs, jnp.float32), 1, 6), tree)[0] == expected


def test_rows_that_have_ended_do_not_count():
    likely, unlikely = (TREE._replace(probabilities=jnp.full(6, p)) for p in (0.9, 0.01))
    trees = jax.tree.map(lambda *leaves: jnp.stack(leaves), likely, unlikely)
    ancestors = jax.vmap(draft_tree.ancestor_mask)(trees)
    state = budget.start(SIZES, jnp.asarray([1, 1, 1.1, 1.2, 1.3], jnp.float32), 2, 6)
    for ended, expected in (((False, True), 6), ((True, False), 1)):
        size, _ = budget.choose(state, SIZES, trees, ancestors, jnp.ones(2, int), jnp.asarray(ended))
        assert SIZES[int(size)] == expected


def _simulate(costs, texts_go_on, num_steps: int, tree: DraftTree = TREE) -> list[int]:
    """The sizes of steps with a tree, 0 for one without; at step i the text goes on as TREE says if `texts_go_on(i)`."""
    state, text, out = budget.start(SIZES, jnp.asarray(costs, jnp.float32), 1, 6), [3], []
    for step in range(num_steps):
        out.append(0)
        if state.is_drafting:
            out[-1], state = _choose(state, tree, len(text))
        text += [4, 5, 6, 3] if texts_go_on(step) else [3]  # whatever was verified
        tokens = np.zeros((1, 600), np.int32)
        tokens[0, : len(text)] = text
        state = _advanced(state, tokens, jnp.asarray([len(text)]))
    return out


@jax.jit
def _advanced(state: budget.State, tokens: jax.Array, lengths: jax.Array) -> budget.State:
    return budget.advance(state, SIZES, tokens, lengths)


def test_sizes_follow_what_drafts_earn():
    costs = [1.0, 1.0, 1.1, 1.4, 2.0]
    assert _simulate(costs, lambda step: True, 40)[-10:] == [4] * 10  # four tokens for 1.4; six nodes would give no more
    changing = _simulate([1.0, 1.2, 1.3, 1.6, 2.2], lambda step: step >= 40, 120)
    assert changing[20:40].count(0) > 15
    assert set(changing[-10:]) == {4}


def test_estimates_are_corrected_by_what_drafts_earn():
    costs = [1.0, 1.05, 1.3, 1.6, 2.2]
    boastful = TREE._replace(probabilities=jnp.full(6, 0.99))
    sizes = _simulate(costs, lambda step: False, 120, boastful)
    assert sizes[0] == 6
    assert set(sizes[-60:]) <= {0, 1}
    modest = TREE._replace(probabilities=jnp.full(6, 0.05))
    assert set(_simulate(costs, lambda step: True, 120, modest)[-10:]) == {4}


def test_a_try_that_promises_much_is_verified_at_once():
    costs = [1.0, 1.5, 2.6, 3.0, 3.5]
    sizes = _simulate(costs, lambda step: False, 30)
    first = next(step for step, size in enumerate(sizes) if size)
    assert sizes[first] == 1  # of a draft without estimates the root alone is verified
    sure = TREE._replace(probabilities=jnp.asarray([1, 0.9, 0.9, 0.9, 0.05, 0.9], jnp.float32))
    sizes = _simulate(costs, lambda step: step >= first, 30, sure)
    assert sizes[first] == 6
    assert min(sizes[-10:]) > 1


def test_waits_grow_with_failures_and_with_what_drafting_costs():
    for extra in (1, 2):  # of a draft that is not verified, over plain decoding
        sizes = _simulate([1.0, 1.0 + extra, 3.0 + extra, 4.0 + extra, 5.0 + extra], lambda step: False, 450)
        tries = [step for step, size in enumerate(sizes) if size]
        waits = [tries[0], *(np.diff(tries) - 1).tolist()]
        assert waits[:6] == [extra * wait for wait in (16, 16, 32, 64, 128, 128)][: len(waits)]
        assert len(waits) >= 6 // extra


def test_a_wait_ends_when_a_try_turns_out_to_have_been_right():
    costs = [1.0, 1.5, 2.6, 3.0, 3.5]
    failing = _simulate(costs, lambda step: False, 120)
    tries = [step for step, size in enumerate(failing) if size]
    late = tries[2]  # after which nothing would be tried for long
    sizes = _simulate(costs, lambda step: step >= late, 120)
    assert sizes[late] == 1  # not verified
    assert failing[late + 1 : late + 30] == [0] * 29
    assert 0 not in sizes[late + 2 :]
    assert set(sizes[late + 3 :]) == {4}


@pytest.mark.parametrize(("num_right", "is_drafting"), [(1, False), (4, True)])
def test_a_wait_does_not_end_for_one_lucky_row(num_right, is_drafting):
    """Wrong trees are final at once, right ones later: alone, they must not speak for all."""
    state = budget.start(SIZES, jnp.asarray([1.0, 1.5, 2.6, 3.0, 3.5], jnp.float32), 4, 6)
    trees = jax.tree.map(lambda x: jnp.stack([x] * 4), TREE)
    ancestors = jnp.stack([draft_tree.ancestor_mask(TREE)] * 4)
    _, state = budget.choose(state, SIZES, trees, ancestors, jnp.ones(4, int), jnp.zeros(4, bool))
    state = state._replace(is_drafting=jnp.bool_(True))
    tokens = np.zeros((4, 600), np.int32)
    tokens[:, :6] = [3, 9, 9, 9, 9, 9]
    tokens[:num_right, :6] = [3, 4, 5, 6, 3, 9]
    for length in range(2, 7):
        state = _advanced(state, tokens, jnp.full(4, length))
        if state.is_drafting:
            break
    assert bool(state.is_drafting) == is_drafting


def test_a_draft_that_costs_nothing_is_made_in_every_step():
    sizes = _simulate([1.0, 1.0, 3.0, 4.0, 5.0], lambda step: step >= 20, 60)
    assert 0 not in sizes
    assert set(sizes[5:20]) == {1}


def test_without_a_chance_nothing_is_drafted_but_in_tries():
    sizes = _simulate([1.0, 50.0, 60.0, 70.0, 80.0], lambda step: True, 60)
    assert sum(size > 0 for size in sizes) <= 5


@functools.lru_cache
def right_then_wrong(num_right: int, num_wrong: int) -> Drafter:
    """Drafts eight tokens of a known text, of which those are wrong whose place is in the second part of each period."""

    def draft(tables, state, context: Context) -> DraftTree:
        del state
        piece = jax.lax.dynamic_slice(tables, (context.length,), (8,))
        places = context.length + jnp.arange(8)
        is_wrong = places % (num_right + num_wrong) >= num_right
        return draft_tree.from_chain(context.root, jnp.where(is_wrong, piece ^ 1, piece), jnp.int32(8))

    return Drafter("periodic", num_nodes=9, max_depth=8, source_names=("text",), draft=draft)


PROMPT = [3, 4, 5, 6, 7] * 5  # its answer has 239 tokens
COSTS = {1: 1.0, 2: 1.2, 5: 1.6, 9: 2.4}


@pytest.mark.parametrize("loop", ["device", "host"])
def test_fewer_nodes_where_drafts_are_wrong(lm, loop):
    reference = decode.generate(lm, PROMPT, max_new_tokens=300)
    text = jnp.asarray([*reference.prompt_tokens, *reference.tokens, *[0] * 9])
    drafter = right_then_wrong(130, 130).replace(tables=text)
    out = decode.generate(lm, PROMPT, drafter=drafter, max_new_tokens=300, budget=COSTS, loop=loop)
    assert exactness.check(lm, drafter, reference, out, budget=COSTS).is_explained
    assert len(out.pass_sizes) == out.num_steps
    assert {1, 9} <= set(out.pass_sizes) <= set(COSTS)
    ends = np.cumsum(out.accept_lengths) + len(PROMPT)
    sizes = np.asarray(out.pass_sizes)
    assert np.mean(sizes[(ends > 160) & (ends < 255)]) < 2 < 8 < np.mean(sizes[(ends > 80) & (ends < 125)])
    fixed = decode.generate(lm, PROMPT, drafter=drafter, max_new_tokens=300, loop=loop)
    assert set(fixed.pass_sizes) == {9}


@functools.lru_cache
def nothing() -> Drafter:
    """Drafts no node in its nine places."""

    def draft(tables, state, context: Context) -> DraftTree:
        del tables, state
        return draft_tree.root_only(context.root, 9)

    return Drafter("nothing", num_nodes=9, max_depth=8, source_names=("nothing",), draft=draft)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_the_step_of_an_empty_draft_is_plain(lm, num_rows):
    cheap = {1: 1.0, 2: 1.01, 5: 1.02, 9: 1.03}  # at such costs the first steps draft
    prompts = [PROMPT, PROMPT[1:]][:num_rows]
    outs = decode.generate(lm, prompts, drafter=nothing(), max_new_tokens=40, budget=cheap)
    for out, plain in zip(outs, decode.generate(lm, prompts, max_new_tokens=40), strict=True):
        assert out.tokens == plain.tokens
        assert set(out.pass_sizes) == {1}
        assert out.nodes_per_step == 0


def test_costs_are_measured_once_and_kept(lm, tmp_path, monkeypatch):
    calls = []
    measure = step_costs.measure

    def counted(*arguments):
        calls.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(step_costs, "measure", counted)
    monkeypatch.setattr(step_costs, "path_of", lambda program: tmp_path / "costs" / f"{len(program)}.json")
    monkeypatch.setattr(step_costs, "_known", {})
    run_steps = compilation.here(loop.run_steps)
    num_programs = run_steps._cache_size()
    first = decode.generate(lm, [3, 4, 5], drafter="pld", max_new_tokens=20, budget="adaptive")
    assert run_steps._cache_size() == num_programs + 1  # the one that is measured decodes
    (path,) = (tmp_path / "costs").iterdir()
    stored = step_costs.read(path, (1, 4, 8, 11))
    assert stored is not None and min(stored) > 0
    assert step_costs.read(path, (1, 5)) is None
    decode.generate(lm, [4, 5, 6, 7], drafter="pld", max_new_tokens=20, budget="adaptive")
    step_costs._known.clear()  # as in another process
    again = decode.generate(lm, [3, 4, 5], drafter="pld", max_new_tokens=20, budget="adaptive")
    assert len(calls) == 1
    assert (again.tokens, again.pass_sizes) == (first.tokens, first.pass_sizes)
    assert first.tokens == decode.generate(lm, [3, 4, 5], max_new_tokens=20).tokens


def test_every_kind_of_step_has_run_before_the_clock_starts(lm, tmp_path, monkeypatch):
    """Also where another process has measured what they cost."""
    monkeypatch.setattr(step_costs, "path_of", lambda program: tmp_path / "costs.json")
    monkeypatch.setattr(step_costs, "_known", {})
    decode.generate(lm, [3, 4, 5], drafter="pld", max_new_tokens=20, budget="adaptive")
    step_costs._known.clear()  # as in another process
    taken, run = [], step_costs._run

    def noted(dispatch, request, state, num_steps):
        def noting(*arguments):
            state, record = dispatch(*arguments)
            taken.append(max(record.pass_sizes.tolist()))
            return state, record

        return run(noting, request, state, num_steps)

    monkeypatch.setattr(step_costs, "_run", noted)
    decode.generate(lm, [3, 4, 5], drafter="pld", max_new_tokens=20, budget="adaptive")
    assert taken == [1, 1, 4, 8, 11]  # undrafted, and by what a draft's pass verifies


def test_a_broken_file_of_costs_is_as_none(tmp_path):
    for content in ("", "[1]", '{"1": null}', '{"1": 2.0'):
        (tmp_path / "costs.json").write_text(content)
        assert step_costs.read(tmp_path / "costs.json", (1,)) is None
