"""ADED's tree search by the library mctx (DeepMind; `pip install mctx`), on a matrix that is not adapted.

mctx selects by the same rule as ADED, but scales the mean values of siblings to [0, 1], and it asks for the value of a new node
instead of rolling out: here 0, so that a node's value is the sum of the probabilities along its path.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import mctx  # pyright: ignore[reportMissingImports]

from hd_jax.databases.successor_table import SuccessorTable, lookup
from hd_jax.draft_tree import NO_TOKEN, DraftTree
from hd_jax.drafters.base import Context, Drafter
from hd_jax.drafters.tree_search import Puct, Rows, Search, most_visited

_mctx: Any = mctx  # its structures are made by chex, whose fields type checkers do not see
NO_PRIOR = -1e9  # logit of a rank without a successor


@functools.lru_cache
def _draft(settings: Puct, num_nodes: int):
    def step(table: SuccessorTable, key: jax.Array, action: jax.Array, embedding: Any):
        del key
        pair, rows = embedding
        token = jnp.take_along_axis(rows.tokens, action[:, None], axis=1)
        reward = jnp.take_along_axis(rows.probabilities, action[:, None], axis=1)[:, 0]
        pair = jnp.concatenate([pair[:, 1:], token], axis=1)
        rows = _rows(table, pair)
        one = jnp.ones_like(reward)
        out = _mctx.RecurrentFnOutput(reward=reward, discount=one, prior_logits=_logits(rows), value=0 * one)
        return out, (pair, rows)

    def draft(table: SuccessorTable, state: Any, context: Context) -> DraftTree:
        del state
        pair = jnp.stack([jnp.where(context.length > 1, context.tokens[context.length - 2], NO_TOKEN), context.root])[None]
        rows = _rows(table, pair)
        root = _mctx.RootFnOutput(prior_logits=_logits(rows), value=jnp.zeros(1), embedding=(pair, rows))
        found = _mctx.muzero_policy(
            table,
            jax.random.fold_in(jax.random.key(0), context.length),
            root,
            step,
            num_simulations=settings.iterations,
            max_depth=settings.depth,
            dirichlet_fraction=0.0,
            pb_c_init=settings.c1,
            pb_c_base=settings.c2,
        )
        tree: Any = jax.tree.map(lambda x: x[0], found.search_tree)
        pairs, rows = tree.embeddings
        is_node = (pairs[:, 1] != NO_TOKEN).at[0].set(True)  # of what was visited at a rank without a successor there is none
        search = Search(
            visits=jnp.where(is_node, tree.node_visits, 0),
            values=tree.node_values,
            parents=jnp.maximum(tree.parents, 0),
            tokens=pairs[:, 1],
            sums=jnp.zeros_like(tree.node_values),
            children=tree.children_index,
            pairs=pairs,
            rows=rows,
        )
        return most_visited(context.root, search, settings.num_paths, num_nodes)

    return draft


def _rows(table: SuccessorTable, pairs: jax.Array) -> Rows:
    found = lookup(table, pairs)
    return Rows(found.tokens[:, 0], found.probabilities[:, 0], jnp.zeros(pairs.shape[0], jnp.int32))


def _logits(rows: Rows) -> jax.Array:
    return jnp.where(rows.probabilities > 0, jnp.log(jnp.maximum(rows.probabilities, 1e-30)), NO_PRIOR)


def drafter(table: SuccessorTable, settings: Puct, num_nodes: int) -> Drafter:
    """Like `hd_jax.drafters.aded` with adapt="none" and search="mcts"."""
    draft = _draft(settings, num_nodes)
    return Drafter("mctx", num_nodes, settings.depth + 1, source_names=("corpus",), draft=draft, tables=table)
