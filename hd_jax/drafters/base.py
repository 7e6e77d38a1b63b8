"""What a drafter is: `(init, draft, update)`, pure functions over pytrees.

A drafter is written for one row; the loop maps it over a batch. Shapes are fixed: S is that of the context's tokens; a
drafter that needs the size of the vocabulary takes it as its option `vocab_size`, which `decode.make_drafter` fills in.
The smallest useful one repeats what followed the last occurrence of the newest token:

    import functools
    import jax
    import jax.numpy as jnp
    from hd_jax import decode, draft_tree
    from hd_jax.drafters.base import Drafter

    @functools.lru_cache  # the same options give the same functions, so nothing is compiled twice
    def echo(num_tokens: int = 4) -> Drafter:
        def draft(tables, state, context):
            del tables, state
            slots = jnp.arange(context.tokens.shape[0])
            is_hit = (context.tokens == context.root) & (slots < context.length - 1)
            start = jnp.max(jnp.where(is_hit, slots, -1)) + 1  # 0: no occurrence
            window = context.tokens[(start + jnp.arange(num_tokens)) % slots.size]
            length = jnp.where(start > 0, jnp.minimum(num_tokens, context.length - start), 0)
            return draft_tree.from_chain(context.root, window, length)

        return Drafter("echo", num_nodes=num_tokens + 1, max_depth=num_tokens, source_names=("context",), draft=draft)

    decode.generate(lm, prompt, drafter=echo(num_tokens=6))

With state, here a table int32[V] of what last followed each token, the same costs no search: `init` reads the prompt, `update`
what each step appended.

    @functools.lru_cache
    def successor(vocab_size: int) -> Drafter:
        def read(table, context, first):
            # One after the other, so that of two writes to a place the later one counts.
            write = lambda slot, table: table.at[context.tokens[slot - 1]].set(context.tokens[slot])
            return jax.lax.fori_loop(jnp.maximum(first, 1), context.length, write, table)

        def init(tables, context):
            return read(jnp.full(vocab_size, draft_tree.NO_TOKEN, jnp.int32), context, 1)

        def draft(tables, table, context):
            token = table[context.root]
            return draft_tree.from_chain(context.root, token[None], (token != draft_tree.NO_TOKEN).astype(jnp.int32))

        def update(tables, table, context, feedback):
            return read(table, context, context.length - feedback.num_appended)

        return Drafter(
            "successor", num_nodes=2, max_depth=1, source_names=("successors",), draft=draft, init=init, update=update
        )

`hd_jax/drafters/hd.py` is one that also drafts from databases, and learns from the model's targets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from hd_jax import draft_tree
from hd_jax.draft_tree import NO_TOKEN, ROOT_INDEX, DraftTree

State = Any  # one row's pytree of fixed shapes
Tables = Any  # a pytree of read-only arrays, one for all rows


class Context(NamedTuple):
    """One row's committed text, as a drafter sees it."""

    tokens: jax.Array  # int32[S]; what stands at `length` and beyond has no meaning, and need not be a token
    length: jax.Array  # int32[], prompt included; the root is tokens[length - 1]
    prompt_length: jax.Array  # int32[]
    host: Any = ()  # what `Drafter.refresh` last returned for this row; only `draft` sees it

    @property
    def root(self) -> jax.Array:
        """int32[]: the newest committed token, node 0 of the next tree."""
        return self.tokens[self.length - 1]


class Feedback(NamedTuple):
    """What one step told a row. The context that comes with it is the one after the step.

    N is the drafter's num_nodes, and P at most its max_depth + 1. An adaptive budget takes steps that verify the root alone: of
    these both are 1. So loop over `path.shape[0]` tokens and `targets.shape[0]` nodes: JAX clamps a constant that is too large
    to the last place, and says nothing. Of the step's tokens the first follows the old root, context.tokens[length -
    num_appended - 1].

    What is not known is NO_TOKEN, in `targets`, `argmax` and `top_tokens`: at places beyond an adaptive budget's pass, and in a
    replay off the recorded text. What unused places of the tree hold has no meaning. To write a table from several nodes or
    tokens, let each index be written once, or write one after the other: of equal indices a scatter takes any.
    """

    tree: DraftTree  # that was verified; with an adaptive budget, places beyond the pass's size are unused
    targets: jax.Array  # int32[N], the token drawn after every node
    argmax: jax.Array  # int32[N], the likeliest token after every node; equal to targets when decoding is greedy
    top_tokens: jax.Array  # int32[N, k], k = Drafter.num_top_logits, best first
    top_logits: jax.Array  # float32[N, k], before temperature
    path: jax.Array  # int32[P], accepted nodes by depth, root first, then NO_NODE
    num_appended: jax.Array  # int32[], tokens the step appended, at most P; 0 for a row that had ended before

    def pairs(self, context: Context) -> jax.Array:
        """int32[N, 2]: the token before each node, NO_TOKEN where the text begins with the root, and the node's own."""
        tree = self.tree
        slot = context.length - self.num_appended - 2  # of the token before the root
        before = jnp.where(slot >= 0, context.tokens[jnp.maximum(slot, 0)], NO_TOKEN)
        is_root = jnp.arange(tree.tokens.shape[0]) == ROOT_INDEX
        above = jnp.where(is_root, before, tree.tokens[jnp.maximum(tree.parents, 0)])
        return jnp.stack([above, tree.tokens], axis=1)


class HostTree(NamedTuple):
    """A tree that `Drafter.refresh` found for one context, N places."""

    tokens: Any  # int32[N]; the root's is not filled in
    parents: Any  # int32[N], as in a DraftTree
    at_length: Any  # int32[], the length of the context that it continues
    probabilities: Any = None  # float32[N], as in a DraftTree; None where there is no estimate


def draft_from_host(tables: Tables, state: State, context: Context) -> DraftTree:
    """A `draft` that hands on the HostTree of this step; of an earlier one, the root alone. Nodes are of source 0."""
    del tables, state
    found: HostTree = context.host
    blank = draft_tree.root_only(context.root, found.tokens.shape[0])
    is_node = (found.parents >= ROOT_INDEX) & (found.at_length == context.length)
    return blank._replace(
        tokens=jnp.where(is_node, found.tokens, blank.tokens),
        parents=jnp.where(is_node, found.parents, blank.parents),
        sources=jnp.where(is_node, 0, blank.sources),
        probabilities=blank.probabilities if found.probabilities is None else found.probabilities,
    )


def _no_state(tables: Tables, context: Context) -> State:
    del tables, context
    return ()


def _keep(tables: Tables, state: State, context: Context, feedback: Feedback) -> State:
    del tables, context, feedback
    return state


@flax.struct.dataclass
class Drafter:
    """A drafting method with its databases.

    Attributes:
      name: of the method.
      num_nodes: N, the size of every tree it drafts, the root included. Makers take it as an option of this name where
        it can be chosen.
      max_depth: of the deepest node of any tree; a chain of C tokens has C. Deeper nodes would not be accepted.
      source_names: what the trees' `sources` index, at least one.
      draft: (tables, state, context) -> DraftTree of N nodes whose node 0 is `context.root`. The likeliest nodes come first: an
        adaptive budget verifies the first n, and goes by the tree's `probabilities`. A drafter that estimates none leaves
        them UNKNOWN, as `draft_tree`'s functions do; one that does: `tree._replace(probabilities=...)`, of which the root's
        and those of unused places do not count. They steer the budget alone.
      init: (tables, context) -> state, when a request starts; the context is the prompt, whose last token is the first root.
      update: (tables, state, context, feedback) -> state, after every step; after one that verified no draft, the feedback's
        tree and path are the root alone, so rates of what was verified stand still. The step's tokens are the last
        `feedback.num_appended` of the context: context.tokens[length - num_appended : length]. It is compiled twice where
        a budget is adaptive, with the Feedback of either kind of step.
      renew: (tables, state, context) -> state, in place of `init` when a session passes on the state of its last
        request; its shapes must not depend on S. None for a method that starts every request afresh.
      refresh: context -> pytree of fixed shapes, on the host with numpy arrays of one row, before each step that drafts;
        `draft` finds the result in `context.host`. For databases that are too large for the device, or to draft in plain
        Python: return a HostTree here, with `draft_from_host` as `draft`. A dispatch is one step then, whatever `loop` is;
        with an adaptive budget, a draft at most and the steps without one behind it. None for a method that needs no host.
      num_top_logits: k of the feedback's top logits; 0 for none.
      tables: read-only arrays for the device.

    The functions are static under jit: make them once for the same options, as with `functools.lru_cache`.
    """

    name: str = flax.struct.field(pytree_node=False)
    num_nodes: int = flax.struct.field(pytree_node=False)
    max_depth: int = flax.struct.field(pytree_node=False)
    source_names: tuple[str, ...] = flax.struct.field(pytree_node=False)
    draft: Callable[[Tables, State, Context], DraftTree] = flax.struct.field(pytree_node=False)
    init: Callable[[Tables, Context], State] = flax.struct.field(pytree_node=False, default=_no_state)
    update: Callable[[Tables, State, Context, Feedback], State] = flax.struct.field(pytree_node=False, default=_keep)
    renew: Callable[[Tables, State, Context], State] | None = flax.struct.field(pytree_node=False, default=None)
    refresh: Callable[[Context], Any] | None = flax.struct.field(pytree_node=False, default=None)
    num_top_logits: int = flax.struct.field(pytree_node=False, default=0)
    tables: Tables = ()

    def checked_draft(self, tables: Tables, state: State, context: Context) -> DraftTree:
        """What `draft` gives, with the context's root in node 0: of another root, the model's answers would not be the text's.

        Raises:
          ValueError: it is no tree of this drafter's size.
        """
        tree = self.draft(tables, state, context)
        blank = draft_tree.root_only(context.root, self.num_nodes)
        if not isinstance(tree, DraftTree):
            raise ValueError(f"drafter {self.name}: draft must return a DraftTree, not {type(tree).__name__}")
        for name, found, due in zip(DraftTree._fields, tree, blank, strict=True):
            shape, dtype = jnp.shape(found), jnp.result_type(found)
            if (shape, dtype) != (due.shape, due.dtype):
                raise ValueError(
                    f"drafter {self.name}: the tree's {name} are {dtype}{list(shape)}, not {due.dtype}{list(due.shape)}; its "
                    f"num_nodes is {self.num_nodes}, the root included"
                )
        is_root = jnp.arange(self.num_nodes) == ROOT_INDEX
        return tree._replace(
            tokens=jnp.where(is_root, blank.tokens, tree.tokens), parents=jnp.where(is_root, blank.parents, tree.parents)
        )
