"""The decoding step, and the `lax.while_loop` around it. There is one step; plain decoding is its tree of one node.

A worked step, with the text "a b c" committed, the root c at position 2, and nothing else of c in the cache:

    cache slots  [a b . . . .]                    length 3, cached 2
    tree         c -> d -> e , c -> x             N = 4 nodes, drafted from the text
    model        one pass: logits and 4 new rows of keys and values; the cache is only read
    targets      after c: d    after d: e    after e: f    after x: ?
    path         c d e                            2 drafts accepted
    appended     d e f                            the targets along the path; f is the bonus
    cache slots  [a b c d e .]                    the path's rows, written once, next to each other; length 6, cached 5

The root of the next step is f. The prompt's last token is the root of the first step: so prefill needs no logits.

The targets may stand in a record instead (`Request.recorded`): then the same step replays a text that is known already, with
the model or without one. Of a node that the record does not reach, here x, the target is unknown: NO_TOKEN.

With an adaptive budget (budget.py) a step verifies the first n of the N nodes. The values of n are branches of one
`lax.switch`, which reads the cache and returns the path's rows, never a cache. A step with n = 1, because nothing is to be
drafted or the draft is not worth it, is plain decoding's, but for what drafter and budget learn from it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax import budget, compilation, draft_tree, ranking, sampling, sharding, verify
from hd_jax.draft_tree import NO_NODE, NO_SOURCE, NO_TOKEN, UNUSED, DraftTree
from hd_jax.drafters.base import Context, Drafter, Feedback
from hd_jax.models import llama
from hd_jax.models.llama import Cache, Llama
from hd_jax.sampling import Sampling, SamplingMode


class StepSettings(NamedTuple):
    """Static settings of a compiled step."""

    mode: SamplingMode = SamplingMode()
    num_logprobs: int = 0  # of the likeliest tokens, kept for every appended token
    is_exact: bool = False  # attention sums in float64, and nothing fused across the model's edge
    width: int = 0  # exact mode: nodes of every pass, whatever the drafter's own number; 0 for the drafter's
    sizes: tuple[int, ...] = ()  # adaptive budget: nodes that a pass may have, ascending from 1; () for the drafter's


class Request(NamedTuple):
    """What a batch of rows asks for; does not change while decoding."""

    sampling: Sampling
    prompt_lengths: jax.Array  # int32[B]
    limits: jax.Array  # int32[B], the length at which a row ends: prompt + max_new_tokens, or the cache's end
    stop_tokens: jax.Array  # int32[B, any], ids that end a text
    recorded: jax.Array | None = None  # int32[B, any], the whole texts, prompts included, then NO_TOKEN: replaces drawn targets


class Logprobs(NamedTuple):
    """Of every committed token that was generated, under temperature 1 and no limits."""

    chosen: jax.Array  # float32[B, S]
    top: jax.Array  # float32[B, S, num_logprobs], best first
    top_tokens: jax.Array  # int32[B, S, num_logprobs]


class State(NamedTuple):
    """All that a step reads and writes."""

    cache: Cache
    tokens: jax.Array  # int32[B, S], committed up to `lengths`
    lengths: jax.Array  # int32[B], the root included
    is_finished: jax.Array  # bool[B]
    sources: jax.Array  # int8[B, S], of every generated token; NO_SOURCE for what the model added
    drafter: Any  # the drafter's state, with a leading axis B
    counts: jax.Array  # int32[B, 2, sources, max_depth + 1], nodes proposed and accepted, by source and depth
    logprobs: Logprobs | None
    budget: budget.State | None = None  # where the settings have sizes


class Record(NamedTuple):
    """What the steps of one dispatch did; a place that no step reached holds 0."""

    num_appended: jax.Array  # int32[B, sync_every], the bonus included
    num_nodes: jax.Array  # int32[B, sync_every], verified, the root not included
    pass_sizes: jax.Array  # int32[sync_every], nodes of the pass, the root and unused places included


class _Verified(NamedTuple):
    """What a pass found; of nodes that it did not run, NO_TOKEN and zeros."""

    targets: jax.Array  # int32[B, N], as the next three a drafter's feedback
    argmax: jax.Array  # int32[B, N]
    top_tokens: jax.Array  # int32[B, N, k]
    top_logits: jax.Array  # float32[B, N, k]
    nodes: jax.Array  # int32[B, P], the accepted path, root first, then NO_NODE; P at most max_depth + 1
    num_accepted: jax.Array  # int32[B], of them, the root not counted
    appended: jax.Array  # int32[B, P], the targets along the path
    rows: Cache  # [B, K, places of the tree, D] a layer
    logprobs: Logprobs | None  # [B, P], of the appended tokens


def apply(model: Llama, params: Any, inputs: tuple, is_exact: bool, method: str | None = None) -> Any:
    """A pass of the model; in exact mode with attention sums in float64, and nothing fused across its edge."""
    if not is_exact:
        return model.apply({"params": params}, *inputs, method=method)
    inputs = jax.lax.optimization_barrier(inputs)
    with jax.enable_x64(True):
        out = model.apply({"params": params}, *inputs, accumulate_dtype=jnp.float64, method=method)
    return jax.lax.optimization_barrier(out)


def _contexts(request: Request, state: State, host: Any) -> Context:
    return Context(state.tokens, state.lengths, request.prompt_lengths, host)


def verification_pass(model: Llama, params: Any, tree, ancestors, depths, state: State, is_exact: bool):
    """Logits float32[B, N, V] of the nodes of every row's tree, and their keys and values; the cache is read only.

    In exact mode one row of each part of the mesh runs at a time, so that a row's bits do not depend on the batch's size.
    """
    inputs = (tree.tokens, state.lengths[:, None] - 1 + depths, ancestors, state.cache, state.lengths - 1)
    if not is_exact:
        return apply(model, params, inputs, is_exact)
    num_rows, num_parts = state.lengths.size, sharding.num_row_parts(model.mesh)

    def one_a_part(index: jax.Array):
        rows = jax.tree.map(lambda x: x.reshape(num_parts, -1, *x.shape[1:])[:, index], inputs)
        return apply(model, params, rows, is_exact)

    out = jax.lax.map(one_a_part, jnp.arange(num_rows // num_parts))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(num_rows, *x.shape[2:]), out)


def refresh(drafter: Drafter, request: Request, state: State) -> Any:
    """What the drafter looks up on the host before a dispatch of steps, of all rows: numpy arrays."""
    if drafter.refresh is None:
        return ()
    fetched = tuple(sharding.fetch(x) for x in (state.tokens, state.lengths, request.prompt_lengths))
    found = [drafter.refresh(Context(*row)) for row in zip(*fetched, strict=True)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


def _put(buffer: jax.Array, values: jax.Array, slots: jax.Array) -> jax.Array:
    """Writes [B, P, ...] values into [B, S, ...] at each row's slot."""
    put = lambda b, v, slot: jax.lax.dynamic_update_slice(b, v, (slot,) + (0,) * (b.ndim - 1))  # noqa: E731
    return jax.vmap(put)(buffer, values, slots)


def _count(counts: jax.Array, kind: int, sources: jax.Array, depths: jax.Array, is_counted: jax.Array) -> jax.Array:
    """Adds one for each of [B, any] nodes that is counted; `kind` 0 is proposed, 1 accepted."""
    add = lambda c, s, d, is_one: c.at[kind, s, d].add(is_one.astype(jnp.int32), mode="drop")  # noqa: E731
    return jax.vmap(add)(counts, jnp.maximum(sources, 0), depths, is_counted)


def _top_k(logits: jax.Array, num_top: int, mesh: sharding.AnyMesh) -> tuple[jax.Array, jax.Array]:
    """The largest of [B, any, V] and their indices, [B, any, num_top]. The compiler itself would gather the batch."""
    return sharding.over_rows(lambda _, row: jax.lax.top_k(row, num_top), mesh)((), logits)


def _logprobs(logits: jax.Array, tokens: jax.Array, num_top: int, mesh: sharding.AnyMesh) -> Logprobs:
    """Of int32[B, P] tokens after nodes with float32[B, P, V] logits."""
    found = jax.nn.log_softmax(logits, axis=-1)
    top, top_tokens = _top_k(found, num_top, mesh)
    return Logprobs(jnp.take_along_axis(found, tokens[:, :, None], axis=-1)[..., 0], top, top_tokens)


def _fit(x: jax.Array, size: int, axis: int, filler: int = 0) -> jax.Array:
    """Cuts or pads an axis to a size."""
    x = jax.lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis)
    padding = [(0, size - x.shape[axis] if index == axis else 0) for index in range(x.ndim)]
    return jnp.pad(x, padding, constant_values=filler)


@jax.named_scope("draft")
def _draft(
    model: Llama | None, drafter: Drafter, request: Request, host: Any, width: int, state: State
) -> tuple[DraftTree, jax.Array]:
    """Every row's tree with places up to `width`, and bool[B, width, width] ancestors."""
    contexts = _contexts(request, state, host)
    mesh = None if model is None else model.mesh
    tree = sharding.over_rows(drafter.checked_draft, mesh)(drafter.tables, state.drafter, contexts)
    if model is not None:
        tree = draft_tree.without_foreign_tokens(tree, model.config.vocab_size)
    tree = jax.vmap(draft_tree.padded, in_axes=(0, None))(tree, width)
    return tree, jax.vmap(draft_tree.ancestor_mask)(tree)


def _root_only(request: Request, state: State, width: int = 1) -> tuple[DraftTree, jax.Array]:
    """As `_draft`, of a step that drafts nothing."""
    roots = jax.vmap(lambda context: context.root)(_contexts(request, state, ()))
    tree = jax.vmap(draft_tree.root_only, in_axes=(0, None))(roots, width)
    return tree, jnp.broadcast_to(jnp.eye(width, dtype=bool), (*roots.shape, width, width))


def _verify(
    model: Llama | None,
    settings: StepSettings,
    params: Any,
    drafter: Drafter,
    request: Request,
    state: State,
    tree: DraftTree,
    ancestors: jax.Array,
    size: int,
    max_size: int,
) -> _Verified:
    """Runs the first `size` of each row's `max_size` places; what it returns has room for all. The cache is read only."""
    mesh = None if model is None else model.mesh
    tree, ancestors = jax.tree.map(lambda x: x[:, :size], tree), ancestors[:, :size, :size]
    depths = draft_tree.depths(ancestors)
    max_depth = min(drafter.max_depth, size - 1)
    known = None
    if request.recorded is not None:
        known = jax.vmap(verify.recorded_targets)(request.recorded, tree, ancestors, depths, state.lengths)
    if model is not None:
        logits, new_rows = verification_pass(model, params, tree, ancestors, depths, state, settings.is_exact)
        targets = sampling.draw(logits, state.lengths, depths, max_depth, settings.mode, request.sampling)
        if known is not None:  # A drawn token is never negative. Asking keeps the model at all of its work, for timing.
            targets = jnp.where(targets >= 0, known, targets)
    elif known is not None:
        logits, new_rows, targets = jnp.zeros((*tree.tokens.shape, 0)), (), known
    else:
        raise ValueError("a step needs a model, or a record of the text")

    path = jax.vmap(verify.walk, in_axes=(0, 0, 0, None))(tree, ancestors, targets, max_depth)
    nodes = jnp.maximum(path.nodes, 0)
    appended = jnp.take_along_axis(targets, nodes, axis=1)  # an accepted child is its parent's target
    logprobs = None
    if state.logprobs is not None:
        logprobs = _logprobs(jnp.take_along_axis(logits, nodes[:, :, None], axis=1), appended, settings.num_logprobs, mesh)
    top_logits, top_tokens = _top_k(logits, drafter.num_top_logits, mesh)
    length, width = min(drafter.max_depth + 1, max_size), min(drafter.num_nodes, max_size)
    return _Verified(
        targets=_fit(targets, width, 1, NO_TOKEN),
        argmax=_fit(targets if known is not None else ranking.argmax(logits), width, 1, NO_TOKEN),
        top_tokens=_fit(top_tokens, width, 1, NO_TOKEN),
        top_logits=_fit(top_logits, width, 1),
        nodes=_fit(path.nodes, length, 1, NO_NODE),
        num_accepted=path.num_accepted,
        appended=_fit(appended, length, 1),
        rows=jax.tree.map(lambda x: _fit(x, max_size, 2), new_rows),
        logprobs=jax.tree.map(lambda x: _fit(x, length, 1), logprobs),
    )


def step(
    model: Llama | None,
    settings: StepSettings,
    params: Any,
    drafter: Drafter,
    request: Request,
    state: State,
    tree: DraftTree,
    ancestors: jax.Array,
    choice: jax.Array | None = None,
) -> tuple[State, jax.Array, jax.Array, jax.Array]:
    """One step of every row with its tree: verify, commit, update. Rows that have ended stay as they are.

    Without a model the request's record says all targets, the cache is empty, and there are no logits.

    Args:
      model: None, or of which `params` are.
      settings: of the step.
      params: of the model.
      drafter: whose state is updated.
      request: of all rows.
      state: whose trees are watched where it has a budget and they were drafted.
      tree: of as many places as the drafter has nodes (or settings.width), or of one.
      ancestors: bool[B, places, places] of the tree.
      choice: int32[], index of the settings' size whose first places are verified, not 0; None for all places.

    Returns:
      The state, the number of tokens appended and that of draft nodes verified, int32[B] each, and the pass's size, int32[].
    """
    num_places = tree.tokens.shape[1]
    run = functools.partial(_verify, model, settings, params, drafter, request, state, max_size=num_places)
    if choice is None:
        size = jnp.int32(num_places)
        verified = run(tree, ancestors, num_places)
    else:
        branches = [functools.partial(run, size=size) for size in settings.sizes[1:]]
        size = jnp.asarray(settings.sizes)[choice]
        verified = jax.lax.switch(choice - 1, branches, tree, ancestors)
    depths = draft_tree.depths(ancestors)
    tree = tree._replace(parents=jnp.where(jnp.arange(tree.parents.shape[1]) < size, tree.parents, UNUSED))

    place = jnp.arange(verified.appended.shape[1])
    is_stop = jnp.any(verified.appended[:, :, None] == request.stop_tokens[:, None, :], axis=-1)
    first_stop = jnp.min(jnp.where(is_stop, place, place.size), axis=1)
    num_appended = jnp.minimum(jnp.minimum(verified.num_accepted, first_stop) + 1, request.limits - state.lengths)
    num_appended = jnp.where(state.is_finished, 0, num_appended)

    lengths = state.lengths + num_appended
    is_stopped = first_stop < num_appended

    is_draft = place < verified.num_accepted[:, None]
    children = jnp.maximum(jnp.roll(verified.nodes, -1, axis=1), 0)  # the node of each token
    sources = jnp.where(is_draft, jnp.take_along_axis(tree.sources, children, axis=1), NO_SOURCE)
    is_verified = (tree.parents >= 0) & ~state.is_finished[:, None]
    counts = _count(state.counts, 0, tree.sources, depths, is_verified & ~tree.is_window)
    counts = _count(counts, 1, sources, jnp.broadcast_to(place + 1, sources.shape), is_draft & (place < num_appended[:, None]))
    logprobs = state.logprobs
    if logprobs is not None:
        logprobs = jax.tree.map(lambda buffer, values: _put(buffer, values, state.lengths), logprobs, verified.logprobs)
    tokens = _put(state.tokens, verified.appended, state.lengths)
    # The only write to the cache in a step. Where it goes depends on the logits (num_appended is never negative), and so it is
    # known to follow every layer's reading: else a pass of one node, whose row is there earlier, would copy the whole cache.
    slots = state.lengths - 1 + jnp.minimum(num_appended, 0)
    order = jnp.maximum(verified.nodes, 0)
    state = state._replace(
        cache=() if model is None else llama.write_rows(state.cache, verified.rows, slots, model.config, order, model.mesh),
        tokens=tokens,
        lengths=lengths,
        is_finished=state.is_finished | is_stopped | (lengths >= request.limits),
        sources=_put(state.sources, sources.astype(jnp.int8), state.lengths),
        counts=counts,
        logprobs=logprobs,
        budget=None if state.budget is None else budget.advance(state.budget, settings.sizes, tokens, lengths),
    )

    feedback = Feedback(
        tree=jax.tree.map(lambda x: x[:, : drafter.num_nodes], tree),  # without the places that exact mode adds
        targets=verified.targets,
        argmax=verified.argmax,
        top_tokens=verified.top_tokens,
        top_logits=verified.top_logits,
        path=verified.nodes,
        num_appended=num_appended,
    )
    update = jax.named_scope("learn")(sharding.over_rows(drafter.update, None if model is None else model.mesh))
    drafter_state = update(drafter.tables, state.drafter, _contexts(request, state, ()), feedback)
    return state._replace(drafter=drafter_state), num_appended, jnp.sum(is_verified, axis=1), size


def pinned(model: Llama, state: State) -> State:
    """The state as it lies on the model's mesh: so the next dispatch finds what it was compiled for."""
    rows = sharding.constrain(state._replace(cache=()), sharding.by_rows(model.mesh))
    return rows._replace(cache=sharding.constrain(state.cache, llama.cache_sharding(model.config, model.mesh)))


@compilation.jit(static_argnames=("model", "settings", "sync_every"), donate_argnames="state")
def run_steps(
    model: Llama | None,
    settings: StepSettings,
    params: Any,
    drafter: Drafter,
    request: Request,
    host: Any,
    state: State,
    max_steps: jax.Array,
    min_rows: jax.Array,
    *,
    sync_every: int,
) -> tuple[State, Record]:
    """Up to `max_steps` steps (at most `sync_every`, static) with no host in between, while `min_rows` rows have not ended.

    With an adaptive budget it ends as well before a draft for which the host must be asked again.

    The state is donated. `max_steps` 0 compiles and does nothing. `min_rows` 1 goes on until all rows have ended; B, until one
    has, whose place another text can take (admission.py).
    """
    shape = (state.tokens.shape[0], sync_every)
    record = Record(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32), jnp.zeros(sync_every, jnp.int32))

    def is_going_on(carry) -> jax.Array:
        index, state, _ = carry
        is_left = (index < jnp.minimum(max_steps, sync_every)) & (jnp.sum(~state.is_finished) >= min_rows)
        if drafter.refresh is not None and state.budget is not None:
            is_left &= (index == 0) | ~state.budget.is_drafting
        return is_left

    def take(carry, tree: DraftTree, ancestors: jax.Array, choice: jax.Array | None = None):
        index, state, record = carry
        arguments = (model, settings, params, drafter, request, state, tree, ancestors, choice)
        state, num_appended, num_nodes, size = step(*arguments)
        if model is not None:
            state = pinned(model, state)
        record = Record(
            num_appended=record.num_appended.at[:, index].set(num_appended),
            num_nodes=record.num_nodes.at[:, index].set(num_nodes),
            pass_sizes=record.pass_sizes.at[index].set(size),
        )
        return index + 1, state, record

    width = max(settings.width, drafter.num_nodes)
    draft = functools.partial(_draft, model, drafter, request, host, width)

    def budgeted(carry):
        """A draft and its step, or steps without drafts. They are loops, since a `lax.cond` would copy the cache."""
        first, state, record = carry

        def drafted():
            tree, ancestors = draft(state)
            known = state.budget, settings.sizes, tree, ancestors, state.lengths, state.is_finished
            return tree, ancestors, *budget.choose(*known)

        def undrafted():
            return *_root_only(request, state, width), jnp.int32(0), state.budget

        tree, ancestors, choice, watching = jax.lax.cond(state.budget.is_drafting, drafted, undrafted)

        def is_plain(carry) -> jax.Array:
            return is_going_on(carry) & jnp.where(carry[0] == first, choice == 0, ~carry[1].budget.is_drafting)

        carry = (first, state._replace(budget=watching), record)
        carry = jax.lax.while_loop(is_plain, lambda carry: take(carry, *_root_only(request, carry[1])), carry)
        is_left = lambda carry: (carry[0] == first) & (choice > 0)  # noqa: E731
        return jax.lax.while_loop(is_left, lambda carry: take(carry, tree, ancestors, choice), carry)

    unbudgeted = lambda carry: take(carry, *draft(carry[1]))  # noqa: E731
    body = unbudgeted if state.budget is None else budgeted
    _, state, record = jax.lax.while_loop(is_going_on, body, (jnp.int32(0), state, record))
    return state, record
