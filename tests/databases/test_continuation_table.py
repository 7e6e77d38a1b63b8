"""Continuation tables against dictionaries of sorted lists."""

import itertools
from collections import Counter, defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax.databases import continuation_table
from hd_jax.draft_tree import NO_TOKEN


def prefixes(continuation):
    return {continuation[:end] for end in range(1, len(continuation) + 1)}


def weight(counted, covered):
    """How often all of some prefixes were seen, in all."""
    return sum(count for continuation, count in counted.items() for prefix in prefixes(continuation) if prefix in covered)


def naive_best(counted: dict[tuple[int, ...], int], max_entries: int) -> list[tuple[tuple[int, ...], int]]:
    """The rule in plain Python, for the continuations of one key: the next is always the one that adds the most."""
    kept, covered = [], set()
    while len(kept) < max_entries:
        added = {c: weight(counted, prefixes(c) - covered) for c in counted}
        best = min(added, key=lambda c: (-added[c], c), default=())
        if not best or not added[best]:
            break
        kept.append((best, counted[best]))
        covered |= prefixes(best)
    return kept


def random_pairs(seed: int, num_pairs: int, key_length: int, length: int, vocab: int):
    rng = np.random.default_rng(seed)
    counted: dict[tuple[int, ...], Counter] = defaultdict(Counter)
    for _ in range(num_pairs):
        key = tuple(rng.integers(0, vocab, key_length).tolist())
        counted[key][tuple(rng.integers(0, 3, rng.integers(1, length + 1)).tolist())] += int(rng.integers(1, 4))
    return counted


def build(counted, length, **kwargs):
    rows = [(key, c, count) for key, cs in counted.items() for c, count in cs.items()]
    order = np.random.default_rng(1).permutation(len(rows))
    rows = [rows[i] for i in order]
    padded = [[*c, *[99] * (length - len(c))] for _, c, _ in rows]  # whatever stands beyond the length
    return continuation_table.build(
        np.array([key for key, _, _ in rows], np.int32),
        np.array(padded, np.int32),
        np.array([len(c) for _, c, _ in rows], np.int32),
        np.array([count for _, _, count in rows], np.int32),
        **kwargs,
    )


def as_list(answer):
    continuations, lengths, counts = (np.asarray(x) for x in answer)
    size = int(np.sum(lengths > 0))
    assert np.all(lengths[size:] == 0) and np.all(counts[size:] == 0)
    for row, length in zip(continuations, lengths, strict=True):
        assert np.all(row[length:] == NO_TOKEN) and np.all(row[:length] != NO_TOKEN)
    return [
        (tuple(row[:length].tolist()), int(count))
        for row, length, count in zip(continuations[:size], lengths[:size], counts[:size], strict=True)
    ]


def lookup_all(table, suffixes):
    """The answers of one vmapped lookup of int32[m, k]."""
    answers = jax.jit(jax.vmap(continuation_table.lookup, in_axes=(None, 0)))(table, jnp.asarray(suffixes))
    return [as_list(answer) for answer in zip(*map(np.asarray, answers), strict=True)]


@pytest.mark.parametrize("key_length", [1, 2, 3])
@pytest.mark.parametrize("max_entries", [1, 7])
def test_lookup_in_jit_and_vmap_equals_a_dictionary(key_length, max_entries):
    vocab, length = {1: 60, 2: 9, 3: 5}[key_length], 4
    counted = random_pairs(key_length, 400, key_length, length, vocab)
    table = build(counted, length, max_entries=max_entries)
    assert table.num_keys == len(counted) and (table.key_length, table.max_length) == (key_length, length)
    suffixes = np.array(list(np.ndindex(*[vocab + 2] * key_length)), np.int32)  # every key, and missing ones
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        one = jax.jit(continuation_table.lookup)
        many = lookup_all(table, suffixes)
    for index, suffix in enumerate(suffixes):
        expected = naive_best(counted.get(tuple(suffix.tolist()), {}), max_entries)
        assert many[index] == expected
        if index % 37 == 0 or index == len(suffixes) - 1:
            assert as_list(one(table, jnp.asarray(suffix))) == expected


def test_the_last_key_and_entry_of_the_table_are_found():
    counted = random_pairs(4, 300, 1, 3, 80)
    table = build(counted, 3, max_entries=5)
    last = np.asarray(table.keys)[table.num_keys - 1]
    assert lookup_all(table, last[None]) == [naive_best(counted[tuple(last.tolist())], 5)]


def test_what_begins_like_many_comes_before_what_is_frequent_as_a_whole():
    counted = {(1,): Counter({(5, 6, 7): 3, (5, 6, 8): 3, (5, 6, 9): 3, (4, 4, 4): 4})}
    best = build(counted, 3, max_entries=1)
    assert lookup_all(best, np.array([[1]], np.int32)) == [[((5, 6, 7), 3)]]
    table = build(counted, 3, max_entries=4)
    assert [c for c, _ in lookup_all(table, np.array([[1]], np.int32))[0]] == [(5, 6, 7), (4, 4, 4), (5, 6, 8), (5, 6, 9)]


def test_a_beginning_gives_its_place_to_the_next():
    counted = {(1,): Counter({(5,): 9, (5, 6): 8, (7,): 7, (8,): 6})}
    table = build(counted, 2, max_entries=2)
    assert lookup_all(table, np.array([[1]], np.int32)) == [[((5, 6), 8), ((7,), 7)]]


@pytest.mark.parametrize("max_entries", [1, 2, 3])
def test_no_other_choice_covers_more(max_entries):
    for seed in range(20):
        (counted,) = random_pairs(seed, 12, 1, 4, 1).values()
        kept = [c for c, _ in lookup_all(build({(0,): counted}, 4, max_entries=max_entries), np.zeros((1, 1), np.int32))[0]]
        choices = itertools.combinations(counted, min(max_entries, len(counted)))
        most = max(weight(counted, set().union(*map(prefixes, choice))) for choice in choices)
        assert weight(counted, set().union(*map(prefixes, kept))) == most > 0


def test_padding_is_no_key():
    for table in (continuation_table.empty(2, 3, 4), build(random_pairs(0, 5, 2, 4, 5), 4, max_entries=3)):
        suffixes = np.array([[NO_TOKEN, NO_TOKEN], [0, NO_TOKEN], [2**31 - 1, -(2**31)]], np.int32)
        assert lookup_all(table, suffixes) == [[], [], []]


def test_host_and_device_hash_alike():
    keys = np.random.default_rng(0).integers(-(2**31), 2**31, (500, 3)).astype(np.int32)
    np.testing.assert_array_equal(continuation_table._hash(keys), continuation_table._hash(jnp.asarray(keys)))


def test_buckets_stay_narrow():
    keys = np.arange(20_000, dtype=np.int32)[:, None]
    ones = np.ones(len(keys), np.int32)
    table = continuation_table.build(keys, keys, ones, ones, max_entries=1)
    assert table.bucket_width <= 12


@pytest.mark.parametrize("share", [0.9, 0.5, 0.05])
def test_byte_bound_keeps_the_keys_of_highest_count(share):
    counted = random_pairs(7, 3000, 2, 3, 40)
    full = build(counted, 3, max_entries=4)
    bound = int(full.num_bytes * share)
    table = build(counted, 3, max_entries=4, max_bytes=bound)
    assert 0.5 * bound < table.num_bytes <= bound and 0 < table.num_keys < full.num_keys
    best = {key: naive_best(cs, 4) for key, cs in counted.items()}
    ranked = sorted(best, key=lambda key: (-sum(count for _, count in best[key]), key))
    assert lookup_all(table, np.array(ranked, np.int32)) == [best[key] for key in ranked[: table.num_keys]] + [[]] * (
        len(ranked) - table.num_keys
    )


def test_byte_bound_of_no_key_gives_an_empty_table():
    empty = continuation_table.empty(1, 2, 3)
    table = build(random_pairs(3, 50, 1, 3, 20), 3, max_entries=2, max_bytes=empty.num_bytes)
    assert table.num_keys == 0 and table.num_bytes == empty.num_bytes
    assert (
        continuation_table.build(
            np.empty((0, 1), np.int32), np.empty((0, 3), np.int32), np.empty(0, np.int32), np.empty(0, np.int32), max_entries=2
        ).num_keys
        == 0
    )


def test_bad_input_is_refused():
    def attempt(keys=((1,), (2,)), continuations=((1, 2), (3, 4)), lengths=(2, 2), counts=(1, 1), **kwargs):
        arrays = [np.array(x, np.int32) for x in (keys, continuations, lengths, counts)]
        continuation_table.build(*arrays, **{"max_entries": 2, **kwargs})

    attempt()
    with pytest.raises(ValueError, match="must be \\[M, k\\]"):
        attempt(lengths=(2,))
    with pytest.raises(ValueError, match="lengths must be 1 to 2"):
        attempt(lengths=(2, 3))
    with pytest.raises(ValueError, match=r"key \[1\] comes twice with continuation \[1, 2\]"):
        attempt(keys=((1,), (1,)), continuations=((1, 2), (1, 2)))
    with pytest.raises(ValueError, match="max_bytes 3 is less than"):
        attempt(max_bytes=3)
    with pytest.raises(ValueError, match="must be positive"):
        attempt(max_entries=0)
