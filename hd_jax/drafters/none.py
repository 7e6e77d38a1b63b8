"""Plain decoding: a tree of one node."""

from __future__ import annotations

import functools

from hd_jax import draft_tree
from hd_jax.drafters.base import Drafter


def _draft(tables, state, context):
    del tables, state
    return draft_tree.root_only(context.root)


@functools.lru_cache
def none() -> Drafter:
    """Drafts nothing."""
    return Drafter("none", num_nodes=1, max_depth=0, source_names=("context",), draft=_draft)
