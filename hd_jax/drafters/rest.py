"""Retrieval-based speculative decoding (REST; He et al., NAACL 2024, arXiv 2311.08252): what a corpus continues the text with.

The longest suffix of the text that occurs in the corpus is looked up (section 3.2 of the paper). Its continuations form a
trie whose nodes are weighted by their occurrences, and the heaviest nodes are the draft (section 3.3). Defaults are the
paper's settings: suffixes from 16 tokens down to 2, continuations of at most 10 tokens, 64 nodes.
"""

from __future__ import annotations

import functools

import numpy as np

from hd_jax.databases.collection import Databases
from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.draft_tree import NO_PARENT, ROOT_INDEX, UNUSED
from hd_jax.drafters.base import Context, Drafter, HostTree, draft_from_host


def rest(
    databases: Databases | None = None,
    *,
    max_suffix: int = 16,
    min_suffix: int = 2,
    max_depth: int = 10,
    num_nodes: int = 64,
) -> Drafter:
    """REST, asking the statistics database D_s.

    The lookup is on the host, before each step. The paper's database is a suffix array; an n-gram trie answers as well,
    within its order: suffix and continuation together have at most so many tokens.

    Args:
      databases: with D_s.
      max_suffix: longest suffix that is looked up, in tokens.
      min_suffix: shortest.
      max_depth: of the deepest node: tokens of a continuation.
      num_nodes: N, the root included.

    Raises:
      ValueError: an option is out of range, or there is no D_s.
    """
    if not 1 <= min_suffix <= max_suffix:
        raise ValueError(f"rest needs 1 <= min_suffix <= max_suffix, not min_suffix {min_suffix} and max_suffix {max_suffix}")
    if max_depth < 1 or num_nodes < 2:
        raise ValueError(f"rest needs max_depth of at least 1 and num_nodes of at least 2, not {max_depth} and {num_nodes}")
    databases = databases or Databases()
    options = (max_suffix, min_suffix, max_depth, num_nodes)
    retrieve = functools.partial(_retrieve, databases.statistics, *options)
    return Drafter(
        "rest",
        num_nodes=num_nodes,
        max_depth=min(max_depth, num_nodes - 1),
        source_names=("statistics",),
        draft=draft_from_host,
        refresh=databases.once(("rest", *options), lambda: retrieve),
    )


def _retrieve(
    database: NgramTrie | SuffixArray, max_suffix: int, min_suffix: int, max_depth: int, num_nodes: int, context: Context
) -> HostTree:
    end = int(context.length)
    newest = np.asarray(context.tokens[max(end - max_suffix, 0) : end])
    tokens, parents = np.zeros(num_nodes, np.int32), np.full(num_nodes, UNUSED, np.int32)
    parents[ROOT_INDEX] = NO_PARENT
    probabilities = np.zeros(num_nodes, np.float32)
    length, num_found = database.longest_suffix(newest, max_suffix, min_suffix)
    if length:
        found, found_parents, counts = database.frequent_prefixes(newest[len(newest) - length :], num_nodes - 1, max_depth)
        tokens[1 : len(found) + 1] = found
        parents[1 : len(found) + 1] = found_parents + 1  # the suffix itself, -1 there, is the root
        probabilities[1 : len(found) + 1] = counts / (num_found + 1)
    return HostTree(tokens, parents, np.int32(end), probabilities)
