"""What drafters learn of steps that verify the root alone: the same from one place as from places that are not used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hd_tree_rows import databases

from hd_jax import draft_tree, drafters
from hd_jax.databases.collection import Databases
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.databases.trigrams import TrigramCounts
from hd_jax.draft_tree import NO_NODE, NO_TOKEN
from hd_jax.drafters.base import Context, Drafter, Feedback

PROMPT, VOCAB = [0, 1, 2, 0, 1], 48
TEXT = [np.array([0, 1, 2, 1] * 3, np.int32)]
STORED = Databases(statistics=SuffixArray.build(TEXT), trigrams=TrigramCounts.build(TEXT, max_successors=2))
LEARNING = {
    "hd": drafters.hd(order="c", window=3, num_drafts=3, history=64),
    "lookahead": drafters.lookahead(window=3, num_drafts=3, history=64),
    "recycling": drafters.recycling(vocab_size=VOCAB, num_nodes=17),
    "suffix": drafters.suffix(STORED, num_nodes=9),
    "aded": drafters.aded(STORED, num_successors=2, max_pairs=64, num_nodes=9),
    "aded from text": drafters.aded(STORED, adapt="from_text", max_pairs=64, num_nodes=9),
    "hd_tree": drafters.hd_tree(databases(), rounds=2, history=64, num_nodes=9),
    "hd_tree recycling": drafters.hd_tree(databases(), sources="cmsr", rounds=2, history=64, num_nodes=9),
}


def _told(drafter: Drafter, root: int, said: int, num_nodes: int, max_appended: int) -> Feedback:
    """Of a step that verified the root alone, after which the model said a token."""
    of_root = lambda value, *shape: jnp.full((num_nodes, *shape), NO_TOKEN).at[0].set(value)  # noqa: E731
    top = jnp.arange(drafter.num_top_logits, dtype=jnp.int32)
    return Feedback(
        tree=draft_tree.root_only(jnp.int32(root), num_nodes),
        targets=of_root(said),
        argmax=of_root(said),
        top_tokens=of_root((said + top) % VOCAB, *top.shape),
        top_logits=jnp.zeros((num_nodes, *top.shape)).at[0].set(-top.astype(jnp.float32)),
        path=jnp.full(max_appended, NO_NODE).at[0].set(0),
        num_appended=jnp.int32(1),
    )


@pytest.mark.parametrize("name", LEARNING)
def test_one_place_teaches_the_same(name):
    drafter = LEARNING[name]
    tokens = jnp.zeros(40, jnp.int32).at[: len(PROMPT)].set(jnp.asarray(PROMPT))
    context = Context(tokens, jnp.int32(len(PROMPT)), jnp.int32(len(PROMPT)))
    state = before = jax.jit(drafter.init)(drafter.tables, context)
    update = jax.jit(drafter.update)
    for said in (2, 0, 2):
        root, length = int(context.root), int(context.length)
        context = context._replace(tokens=context.tokens.at[length].set(said), length=jnp.int32(length + 1))
        whole = update(drafter.tables, state, context, _told(drafter, root, said, drafter.num_nodes, drafter.max_depth + 1))
        alone = update(drafter.tables, state, context, _told(drafter, root, said, 1, 1))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), alone, whole)
        state = alone
    same = jax.tree.map(np.array_equal, before, state)
    assert not all(jax.tree.leaves(same)), "nothing was learned, so the comparison tells nothing"
