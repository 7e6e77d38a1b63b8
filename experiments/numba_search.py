"""ADED's tree search compiled for the host with numba (`pip install numba`), on a matrix that is not adapted.

The same search as `hd_jax.drafters.tree_search.mcts`, with other random numbers: one call a step, from plain arrays to a tree.
"""

from __future__ import annotations

from typing import Any

import numba  # pyright: ignore[reportMissingImports]
import numpy as np

from hd_jax.databases.successor_table import SuccessorTable
from hd_jax.draft_tree import NO_PARENT, NO_TOKEN, ROOT_INDEX, UNUSED
from hd_jax.drafters.base import Context, Drafter, HostTree, draft_from_host
from hd_jax.drafters.tree_search import NO_CHILD, Puct

MASK = 0xFFFFFFFF


@numba.njit(cache=True)
def _mixed(value, token, factor):
    """One step of the hash that `successor_table` finds contexts by."""
    value = ((value ^ (token & MASK)) * factor) & MASK
    value = ((value ^ (value >> 15)) * 0xC2B2AE35) & MASK
    return value ^ (value >> 13)


@numba.njit(cache=True)
def _row(bucket_starts, fingerprints, entry_starts, first, second):
    """The entries of the pair's successors, or of those of its second token, as (start, end); (0, 0) for none."""
    hash_1, check_1 = _mixed(0x9E3779B1, second, 0x85EBCA6B), _mixed(0x7FEB352D, second, 0x846CA68B)
    hash_2, check_2 = _mixed(hash_1, first, 0x85EBCA6B), _mixed(check_1, first, 0x846CA68B)
    for value, check in ((hash_2, check_2), (hash_1, check_1)):
        bucket = value & (len(bucket_starts) - 2)
        for place in range(bucket_starts[bucket], bucket_starts[bucket + 1]):
            if fingerprints[place] == check:
                return entry_starts[place], entry_starts[place + 1]
    return 0, 0


@numba.njit(cache=True)
def _search(
    bucket_starts,
    fingerprints,
    entry_starts,
    table_tokens,
    table_probabilities,
    num_successors,
    first,
    second,
    noise,
    c1,
    c2,
    is_unvisited_first,
    num_paths,
    num_nodes,
):
    """Tokens and parents int32[N] of the draft tree; see `tree_search.mcts`."""
    iterations, max_depth = noise.shape
    size = iterations + 1
    visits, values, sums = np.zeros(size, np.int64), np.zeros(size), np.zeros(size)
    parents, tokens = np.zeros(size, np.int64), np.zeros(size, np.int64)
    children = np.full((size, num_successors), NO_CHILD, np.int64)
    starts, ends = np.zeros(size, np.int64), np.zeros(size, np.int64)
    tokens[0] = second
    starts[0], ends[0] = _row(bucket_starts, fingerprints, entry_starts, first, second)
    path = np.zeros(max_depth + 1, np.int64)
    count = 1
    for iteration in range(iterations):
        node, depth = 0, 0
        path[0] = 0
        while depth < max_depth and ends[node] > starts[node]:
            best, best_score = 0, -1.0
            root_visits = np.sqrt(visits[node])
            exploration = c1 + np.log((visits[node] + c2 + 1) / c2)
            for rank in range(ends[node] - starts[node]):
                child = children[node, rank]
                if child == NO_CHILD and is_unvisited_first:
                    best = rank
                    break
                num_visits = 0 if child == NO_CHILD else visits[child]
                score = 0.0 if child == NO_CHILD else values[child] / num_visits
                score += exploration * table_probabilities[starts[node] + rank] * root_visits / (1 + num_visits)
                if score > best_score:
                    best, best_score = rank, score
            child = children[node, best]
            depth += 1
            if child == NO_CHILD:
                children[node, best] = count
                entry = starts[node] + best
                parents[count], tokens[count] = node, table_tokens[entry]
                sums[count] = sums[node] + table_probabilities[entry]
                starts[count], ends[count] = _row(bucket_starts, fingerprints, entry_starts, tokens[node], table_tokens[entry])
                path[depth] = node = count
                count += 1
                break
            path[depth] = node = child
        num_on_path = depth + 1
        total, before, start, end = sums[node], tokens[node], starts[node], ends[node]
        while depth < max_depth and end > start:
            left = noise[iteration, depth] * table_probabilities[start:end].sum()
            drawn = start
            while drawn < end - 1 and left >= table_probabilities[drawn]:
                left -= table_probabilities[drawn]
                drawn += 1
            total += table_probabilities[drawn]
            start, end = _row(bucket_starts, fingerprints, entry_starts, before, table_tokens[drawn])
            before = table_tokens[drawn]
            depth += 1
        for place in range(num_on_path):
            visits[path[place]] += 1
            values[path[place]] += 1 + total
    out_tokens, out_parents = np.zeros(num_nodes, np.int32), np.full(num_nodes, UNUSED, np.int32)
    out_parents[ROOT_INDEX] = NO_PARENT
    order = np.argsort(-visits[1:count], kind="mergesort")[:num_paths] + 1
    index_of = np.full(size, UNUSED, np.int64)
    index_of[ROOT_INDEX] = ROOT_INDEX
    place = 1
    for node in order:
        if place < num_nodes:
            out_tokens[place], out_parents[place], index_of[node] = tokens[node], index_of[parents[node]], place
            place += 1
    for node in order:
        likeliest = children[node, 0]
        is_known = likeliest != NO_CHILD and index_of[likeliest] != UNUSED
        if place < num_nodes and ends[node] > starts[node] and not is_known:
            out_tokens[place], out_parents[place] = table_tokens[starts[node]], index_of[node]
            place += 1
    return out_tokens, out_parents


def drafter(table: SuccessorTable, settings: Puct, num_nodes: int) -> Drafter:
    """Like `hd_jax.drafters.aded` with adapt="none" and search="mcts", but the search is on the host, before each step."""
    arrays = [
        np.asarray(array)
        for array in (table.bucket_starts, table.fingerprints, table.entry_starts, table.tokens, table.probabilities)
    ]
    search: Any = _search

    def refresh(context: Context) -> HostTree:
        length = int(context.length)
        noise = np.random.default_rng(length).random((settings.iterations, settings.depth))
        tokens, parents = search(
            *arrays,
            table.num_successors,
            int(context.tokens[length - 2]) if length > 1 else NO_TOKEN,
            int(context.tokens[length - 1]),
            noise,
            settings.c1,
            settings.c2,
            settings.is_unvisited_first,
            settings.num_paths,
            num_nodes,
        )
        return HostTree(tokens, parents, np.int32(length))

    return Drafter("numba", num_nodes, settings.depth + 1, source_names=("corpus",), draft=draft_from_host, refresh=refresh)
