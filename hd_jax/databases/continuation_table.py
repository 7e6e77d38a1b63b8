"""The device form of a database: a hash table from the last k tokens to their best continuations.

Keys are grouped by hash bucket, and the entries of a key stand together, the best first (`best_continuations`):

    bucket_starts   0     2  2        5      bucket b holds keys bucket_starts[b] : bucket_starts[b + 1]
    keys            k0 k1    k2 k3 k4        key i owns entries entry_starts[i] : entry_starts[i + 1]
    entry_starts    0  7     9  10 17 20
    continuations   c0 c1 c2 ...             int32[C] each, padded with NO_TOKEN

A lookup hashes, cuts the bucket out, compares, and cuts the key's entries out: a few kernels, whatever the table's size.
`dynamic_slice` moves a slice that would cross an array's end, so keys and entries end with padding as wide as a slice.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hd_jax.draft_tree import NO_TOKEN


@flax.struct.dataclass
class ContinuationTable:
    """See the module. K keys of k tokens, M entries of C tokens, at most G of them a key, W keys in the fullest bucket."""

    keys: jax.Array  # int32[K + W, k]
    bucket_starts: jax.Array  # int32[num_buckets + 1], num_buckets a power of two
    entry_starts: jax.Array  # int32[K + 1]
    continuations: jax.Array  # int32[M + G, C]
    lengths: jax.Array  # int32[M + G]
    counts: jax.Array  # int32[M + G]
    max_entries: int = flax.struct.field(pytree_node=False)  # G
    bucket_width: int = flax.struct.field(pytree_node=False)  # W

    @property
    def key_length(self) -> int:
        """k, tokens of a key."""
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        """C, tokens of a continuation."""
        return self.continuations.shape[1]

    @property
    def num_keys(self) -> int:
        """K."""
        return self.keys.shape[0] - self.bucket_width

    @property
    def num_entries(self) -> int:
        """M."""
        return self.lengths.shape[0] - self.max_entries

    @property
    def num_bytes(self) -> int:
        """Of all arrays, padding included."""
        return sum(array.size * 4 for array in jax.tree.leaves(self))


def lookup(table: ContinuationTable, suffix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The continuations of a suffix, in the order of `best_continuations`.

    Args:
      table: to look in.
      suffix: int32[k].

    Returns:
      Continuations int32[G, C] padded with NO_TOKEN, their lengths int32[G] (0 for an empty place), their counts int32[G].
    """
    num_buckets = table.bucket_starts.shape[0] - 1
    bucket = (_hash(suffix[None, :])[0] & np.uint32(num_buckets - 1)).astype(jnp.int32)
    first, last = jax.lax.dynamic_slice_in_dim(table.bucket_starts, bucket, 2)
    rows = jax.lax.dynamic_slice_in_dim(table.keys, first, table.bucket_width)  # [W, k]
    places = jnp.arange(table.bucket_width, dtype=jnp.int32)
    is_key = jnp.all(rows == suffix[None, :], axis=1) & (places < last - first)
    key = jnp.max(jnp.where(is_key, first + places, -1))  # -1 for a suffix that is no key
    start, end = jax.lax.dynamic_slice_in_dim(table.entry_starts, jnp.maximum(key, 0), 2)
    is_entry = (jnp.arange(table.max_entries, dtype=jnp.int32) < end - start) & (key >= 0)
    cut = lambda array: jax.lax.dynamic_slice_in_dim(array, start, table.max_entries)  # noqa: E731
    return (
        jnp.where(is_entry[:, None], cut(table.continuations), NO_TOKEN),
        jnp.where(is_entry, cut(table.lengths), 0),
        jnp.where(is_entry, cut(table.counts), 0),
    )


def build(
    keys: np.ndarray,
    continuations: np.ndarray,
    lengths: np.ndarray,
    counts: np.ndarray,
    *,
    max_entries: int,
    max_bytes: int | None = None,
    is_ranked: bool = False,
) -> ContinuationTable:
    """Builds a table from (key, continuation) pairs, each pair once, in any order.

    Args:
      keys: int32[M, k].
      continuations: int32[M, C]; tokens beyond a continuation's length do not matter.
      lengths: int32[M], 1 to C.
      counts: int32[M], how often each pair was seen.
      max_entries: G; of each key its G best continuations are kept, see `best_continuations`.
      max_bytes: of the table. Keys of lowest total count (of their kept entries) are left out until it fits.
      is_ranked: the pairs are what `best_continuations` kept, in its order.

    Raises:
      ValueError: the shapes do not fit together, a length or count is out of range, a pair comes twice, or max_bytes is
        less than an empty table takes.
    """
    num_pairs, key_length = keys.shape
    length = continuations.shape[1]
    if continuations.shape[0] != num_pairs or lengths.shape != (num_pairs,) or counts.shape != (num_pairs,):
        shapes = [list(array.shape) for array in (keys, continuations, lengths, counts)]
        raise ValueError(f"keys, continuations, lengths and counts must be [M, k], [M, C], [M] and [M], not {shapes}")
    if key_length < 1 or length < 1 or max_entries < 1:
        raise ValueError(f"key length, length and max_entries must be positive, not {key_length}, {length}, {max_entries}")
    if num_pairs and (lengths.min() < 1 or lengths.max() > length or counts.min() < 1):
        raise ValueError(f"lengths must be 1 to {length}, counts at least 1")
    smallest = empty(key_length, max_entries, length)
    if max_bytes is not None and max_bytes < smallest.num_bytes:
        raise ValueError(f"max_bytes {max_bytes} is less than the {smallest.num_bytes} bytes of an empty table")

    continuations = np.where(np.arange(length) < lengths[:, None], continuations, NO_TOKEN).astype(np.int32)
    if not is_ranked:
        order = np.lexsort([*continuations.T[::-1], *keys.T[::-1]])
        keys, continuations, lengths, counts = keys[order], continuations[order], lengths[order], counts[order]
    is_new_key = np.ones(num_pairs, bool)
    is_new_key[1:] = np.any(keys[1:] != keys[:-1], axis=1)
    is_new_pair = is_new_key.copy()
    is_new_pair[1:] |= np.any(continuations[1:] != continuations[:-1], axis=1)
    if not is_new_pair.all():
        twice = int(np.argmin(is_new_pair))
        raise ValueError(f"key {keys[twice].tolist()} comes twice with continuation {continuations[twice].tolist()}")
    groups = np.cumsum(is_new_key) - 1
    kept = np.arange(num_pairs)
    if not is_ranked:
        kept = best_continuations(groups, continuations, lengths, counts, max_entries)
    groups = groups[kept]
    sizes = np.bincount(groups)
    totals = np.bincount(groups, counts[kept])
    starts = np.cumsum(sizes) - sizes
    by_total = np.argsort(-totals, kind="stable")  # ties by lower key
    num_keys = len(by_total)
    hashes = _hash(keys[kept[starts]])[by_total]
    # Of the first keys: the keys, their entries, and the buckets; then what every table has.
    bytes_of = np.cumsum(4 * (sizes[by_total] * (length + 2) + key_length + 1)) + 4 * _power_of_two(np.arange(num_keys) + 1)
    fixed_bytes = 4 * (2 + max_entries * (length + 2))
    while True:
        num_buckets = int(_power_of_two(np.array(num_keys)))
        buckets = (hashes[:num_keys] & np.uint32(num_buckets - 1)).astype(np.int64)
        width = int(np.bincount(buckets, minlength=1).max())
        rest = fixed_bytes + 4 * width * key_length
        if max_bytes is None or num_keys == 0 or bytes_of[num_keys - 1] + rest <= max_bytes:
            break
        num_keys = min(int(np.searchsorted(bytes_of, max_bytes - rest, "right")), num_keys - 1)
    if num_keys == 0:
        return smallest

    chosen = by_total[:num_keys][np.argsort(buckets, kind="stable")]  # keys in the order of the table
    sizes = sizes[chosen]
    entry_starts = np.concatenate([[0], np.cumsum(sizes)])
    entries = kept[np.repeat(starts[chosen] - entry_starts[:-1], sizes) + np.arange(entry_starts[-1])]

    def padded(array: np.ndarray, num_rows: int, value: int) -> jax.Array:
        return _int32(np.pad(array, [(0, num_rows), *[(0, 0)] * (array.ndim - 1)], constant_values=value))

    return ContinuationTable(
        keys=padded(keys[kept[starts[chosen]]], width, NO_TOKEN),
        bucket_starts=_int32(np.concatenate([[0], np.cumsum(np.bincount(buckets, minlength=num_buckets))])),
        entry_starts=_int32(entry_starts),
        continuations=padded(continuations[entries], max_entries, NO_TOKEN),
        lengths=padded(lengths[entries], max_entries, 0),
        counts=padded(counts[entries], max_entries, 0),
        max_entries=max_entries,
        bucket_width=width,
    )


def empty(key_length: int, max_entries: int, length: int) -> ContinuationTable:
    """A table in which nothing is found."""
    return ContinuationTable(
        keys=_int32(np.full((1, key_length), NO_TOKEN)),
        bucket_starts=_int32(np.zeros(2)),
        entry_starts=_int32(np.zeros(2)),  # of the key that a miss reads
        continuations=_int32(np.full((max_entries, length), NO_TOKEN)),
        lengths=_int32(np.zeros(max_entries)),
        counts=_int32(np.zeros(max_entries)),
        max_entries=max_entries,
        bucket_width=1,
    )


def best_continuations(
    groups: np.ndarray, continuations: np.ndarray, lengths: np.ndarray, counts: np.ndarray, max_entries: int
) -> np.ndarray:
    """Which continuations to keep of each group: those that, merged into a trie, have the most tokens accepted.

    A node of the trie is accepted as often as its prefix was seen, so the counts of all prefixes are summed, each once (REST
    ranks prefixes by the same counts; He et al., NAACL 2024). Ranking whole continuations would put 4 4 4 first here, and
    fill the places with its like where a text goes on in many ways:

        continuation   seen   adds, when taken in this order
        5 6 7             3   9 + 9 + 3
        4 4 4             4   4 + 4 + 4
        5 6 8             3   3
        5 6 9             3   3

    One that only begins another adds nothing to it, and is never kept.

    Args:
      groups: [M], ascending.
      continuations: int32[M, C], distinct and ascending (token by token) within a group; NO_TOKEN beyond their lengths.
      lengths: int32[M].
      counts: int32[M].
      max_entries: of a group.

    Returns:
      Indices of the kept rows, by group, and then each the one that adds the most to the trie of those before it, ties by
      lower tokens.
    """
    # From the leaves up, every node of the trie of all rows is credited to one of the rows through it: the one with the
    # most credit so far. A row's credit is then what it adds to all rows with more, for a node's own row has at least as
    # much as any other row through it. No other choice of so many rows has a heavier trie.
    num_rows, max_length = continuations.shape
    is_first = np.ones(num_rows, bool)  # of its group
    is_first[1:] = groups[1:] != groups[:-1]
    is_new = np.repeat(is_first[None], max_length, axis=0)  # [depth, row]: the first row with its prefix
    is_new[:, 1:] |= np.logical_or.accumulate((continuations[1:] != continuations[:-1]).T, axis=0)
    gains = np.zeros(num_rows, np.int64)
    for depth in reversed(range(max_length)):
        starts = np.flatnonzero(is_new[depth])
        if not len(starts):
            break
        totals = np.add.reduceat(np.where(lengths > depth, counts, 0), starts, dtype=np.int64)
        sizes = np.diff(starts, append=num_rows)
        highest = np.flatnonzero(gains == np.repeat(np.maximum.reduceat(gains, starts), sizes))
        owners = highest[np.searchsorted(highest, starts)]
        gains[owners] += totals
    ranked = np.lexsort([-gains, groups])
    place = np.arange(num_rows)
    rank = place - np.maximum.accumulate(np.where(is_first, place, 0))
    return ranked[(rank < max_entries) & (gains[ranked] > 0)]


def _hash(keys: Any) -> Any:
    """uint32[...] of int32[..., k], the same for numpy and JAX arrays."""
    value = keys[..., 0].astype(np.uint32) * np.uint32(0x9E3779B1)
    for column in range(1, keys.shape[-1]):
        value = ((value ^ (value >> np.uint32(15))) + keys[..., column].astype(np.uint32)) * np.uint32(0x85EBCA6B)
    value = (value ^ (value >> np.uint32(16))) * np.uint32(0xC2B2AE35)
    return value ^ (value >> np.uint32(13))


def _power_of_two(number: np.ndarray) -> np.ndarray:
    """The lowest power of two that is at least `number`, and at least 1."""
    return np.left_shift(1, np.frexp(np.maximum(number - 1, 0))[1].astype(np.int64))


def _int32(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array.astype(np.int32))
