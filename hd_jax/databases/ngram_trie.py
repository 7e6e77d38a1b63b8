"""N-gram statistics of a corpus as a trie in flat arrays: what follows what, and how often, without the running text.

Level m holds the kept m-grams in ascending order, so the extensions of one (m-1)-gram stand together:

    documents 4 5 6 | 4 5 7 | 4 5 7 | 4 5 8      level  tokens   counts   child_starts
    (kept: in at least two documents)            1      4 5 7    4 4 2    0 1 2 2
                                                 2      5 7      4 2      0 1 1
                                                 3      7        2

An n-gram is kept if it occurs in at least `min_documents` documents. Hence its beginnings are kept too.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import os
from collections.abc import Sequence

import numpy as np

from hd_jax.databases import SEPARATOR, continuation_table, files, join_documents
from hd_jax.databases.continuation_table import ContinuationTable
from hd_jax.draft_tree import NO_TOKEN

KIND = "ngram_trie"


@dataclasses.dataclass(frozen=True)
class NgramTrie:
    """See the module. `tokens[m - 1]`, `counts[m - 1]` and `child_starts[m - 1]` are level m's."""

    tokens: tuple[np.ndarray, ...]  # int32[K_m], the last token of each m-gram
    counts: tuple[np.ndarray, ...]  # int32[K_m], occurrences in the corpus
    child_starts: tuple[np.ndarray, ...]  # int32[K_m + 1], into level m + 1; none for the last level

    @property
    def max_order(self) -> int:
        return len(self.tokens)

    @property
    def num_ngrams(self) -> int:
        """Of all orders together."""
        return sum(len(level) for level in self.tokens)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in (*self.tokens, *self.counts, *self.child_starts))

    @staticmethod
    def build(
        documents: Sequence[np.ndarray], *, max_order: int = 6, min_documents: int = 3, max_bytes: int | None = None
    ) -> NgramTrie:
        """Counts the n-grams of a corpus.

        Args:
          documents: int32[n] each.
          max_order: n-grams of 1 to so many tokens.
          min_documents: an n-gram is kept if it occurs in so many documents.
          max_bytes: of the trie; the least frequent n-grams are left out, all of a count or none, until it fits.

        Raises:
          ValueError: max_order or min_documents is less than 1, or not even an empty trie fits in max_bytes.
        """
        if max_order < 1 or min_documents < 1:
            raise ValueError(f"max_order and min_documents must be at least 1, not {max_order} and {min_documents}")
        text, ends = join_documents(documents)
        document_of = np.repeat(np.arange(len(ends), dtype=np.int32), np.diff(ends, prepend=-1))
        stride = int(text.max(initial=0)) + 1
        # Where the kept n-grams of the last level begin, in text order, and which of them stands at each place.
        places = np.flatnonzero(text != SEPARATOR).astype(np.int32)
        parents = np.zeros(len(places), np.int32)
        levels: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # parents, tokens, counts
        for order in range(1, max_order + 1):
            # A separator closes the text, so the next token of a place that is none itself is within it.
            following = text[places + (order - 1)]
            is_within = following != SEPARATOR
            places, parents, following = places[is_within], parents[is_within], following[is_within]
            ids = parents.astype(np.int64) * stride + following
            by_id = np.argsort(ids, kind="stable")
            ids = ids[by_id]
            is_new = np.ones(len(ids), bool)
            is_new[1:] = ids[1:] != ids[:-1]
            # Stable sorting left the places of one n-gram in text order: a document counts where it first comes up.
            from_document = document_of[places[by_id]]
            is_new_document = is_new.copy()
            is_new_document[1:] |= from_document[1:] != from_document[:-1]
            starts = np.flatnonzero(is_new)
            counts = np.diff(starts, append=len(ids))
            is_kept = np.add.reduceat(is_new_document, starts, dtype=np.int64) >= min_documents if len(starts) else is_new
            kept_ids = ids[starts[is_kept]]
            levels.append(((kept_ids // stride).astype(np.int32), (kept_ids % stride).astype(np.int32), counts[is_kept]))
            numbers = np.where(is_kept, np.cumsum(is_kept) - 1, -1).astype(np.int32)
            parents = np.empty(len(ids), np.int32)
            parents[by_id] = np.repeat(numbers, counts)
            places, parents = places[parents >= 0], parents[parents >= 0]
        return _trie(levels if max_bytes is None else _pruned(levels, max_bytes))

    def ngrams(self, order: int) -> tuple[np.ndarray, np.ndarray]:
        """All n-grams of one order in ascending order, int32[K, order], and their counts int32[K]."""
        rows = np.empty((len(self.tokens[order - 1]), order), np.int32)
        nodes = np.arange(len(rows))
        for level in reversed(range(order)):
            rows[:, level] = self.tokens[level][nodes]
            if level:
                nodes = np.searchsorted(self.child_starts[level - 1], nodes, "right") - 1  # their parents
        return rows, np.asarray(self.counts[order - 1])

    def continuations(
        self, suffix: np.ndarray | Sequence[int], max_candidates: int, length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best continuations of a suffix, as `continuation_table.best_continuations` chooses and ranks them.

        Args:
          suffix: int32[k], k at least 1; nothing is found for k of max_order and more.
          max_candidates: G.
          length: C, of a continuation; it is shorter where no longer n-gram was kept.

        Returns:
          int32[g, C] padded with NO_TOKEN, lengths int32[g], counts int32[g], g <= G.
        """
        nodes = np.zeros(1 if len(suffix) else 0, np.int64)
        first, last = 0, len(self.tokens[0])
        for level, token in enumerate(suffix[: self.max_order]):
            node = first + int(np.searchsorted(self.tokens[level][first:last], token))
            if node == last or self.tokens[level][node] != token or level + 1 == self.max_order:
                nodes = nodes[:0]
                break
            nodes = np.array([node])
            first, last = (int(start) for start in self.child_starts[level][node : node + 2])
        origins, found, lengths, counts = self._expand(min(len(suffix), self.max_order), nodes, length)
        ascending = np.lexsort(found.T[::-1])
        origins, found, lengths, counts = origins[ascending], found[ascending], lengths[ascending], counts[ascending]
        kept = continuation_table.best_continuations(origins, found, lengths, counts, max_candidates)
        return found[kept], lengths[kept], counts[kept]

    def frequent_prefixes(
        self, suffix: np.ndarray | Sequence[int], max_nodes: int, max_depth: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What follows a suffix, as a trie of the most frequent prefixes of its continuations.

        Args:
          suffix: int32[k]; an empty one is followed by every kept token, one of max_order tokens and more by nothing.
          max_nodes: of the trie.
          max_depth: of its deepest node; a prefix of one token is at depth 1.

        Returns:
          Tokens, parents and counts, int32[n] each, n <= max_nodes: the nodes with the highest counts, in descending order,
          ties by depth and then by ascending tokens, so that a parent precedes its children. Parents index nodes; -1 is
          the suffix itself.
        """
        level, first, last, _ = self._find(suffix)
        nodes, parents = np.arange(first, last), np.full(last - first, -1)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # tokens, parents, counts of each depth
        num_found = 0
        for depth in range(max_depth):
            counts = self.counts[level][nodes]
            # None but the most frequent of a depth can be among the most frequent of all, or lead to such.
            kept = np.sort(np.argsort(-counts, kind="stable")[:max_nodes])
            nodes, parents, counts = nodes[kept], parents[kept], counts[kept]
            found.append((self.tokens[level][nodes], parents, counts))
            if level + 1 == self.max_order or depth + 1 == max_depth:
                break
            firsts = self.child_starts[level][nodes].astype(np.int64)
            sizes = self.child_starts[level][nodes + 1] - firsts
            parents = np.repeat(num_found + np.arange(len(nodes)), sizes)
            num_found += len(nodes)
            nodes = np.repeat(firsts - (np.cumsum(sizes) - sizes), sizes) + np.arange(len(parents))
            level += 1
        if not found:
            return np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int32)
        tokens, parents, counts = (np.concatenate(parts) for parts in zip(*found, strict=True))
        best = np.argsort(-counts, kind="stable")[:max_nodes]
        index_of = np.full(len(tokens) + 1, -1, np.int32)  # the last for the suffix itself
        index_of[best] = np.arange(len(best))
        return tokens[best], index_of[parents[best]], counts[best]

    def longest_suffix(self, tokens: np.ndarray | Sequence[int], max_length: int, min_length: int) -> tuple[int, int]:
        """The longest suffix of int32[n] `tokens`, of min_length to max_length tokens, that a kept n-gram extends.

        Returns:
          Its length, less than max_order, and its occurrences in the corpus; 0 and 0 if there is none.
        """
        for length in range(min(max_length, self.max_order - 1, len(tokens)), max(min_length, 1) - 1, -1):
            _, first, last, count = self._find(tokens[len(tokens) - length :])
            if first < last:
                return length, count
        return 0, 0

    def _find(self, suffix: np.ndarray | Sequence[int]) -> tuple[int, int, int, int]:
        """The n-grams that extend a suffix by a token: their level, counted from 0, the first, and one past the last.

        Then the suffix's own count, 0 for the empty one. Where there are none, first and last are equal.
        """
        if len(suffix) >= self.max_order:
            return 0, 0, 0, 0
        first, last, count = 0, len(self.tokens[0]), 0
        for level, token in enumerate(suffix):
            token = int(token)
            node = bisect.bisect_left(self.tokens[level].data, token, first, last)
            if node == last or self.tokens[level][node] != token:
                return 0, 0, 0, 0
            count = int(self.counts[level][node])
            first, last = (int(start) for start in self.child_starts[level][node : node + 2])
        return len(suffix), first, last, count

    def to_table(self, key_length: int, max_entries: int, length: int, max_bytes: int | None = None) -> ContinuationTable:
        """The device form: of every kept n-gram of `key_length` tokens its continuations, as `continuations` gives them.

        Raises:
          ValueError: key_length is not 1 to max_order - 1; or as `continuation_table.build`.
        """
        if not 1 <= key_length < self.max_order:
            raise ValueError(f"a trie of order {self.max_order} has keys of 1 to {self.max_order - 1} tokens, not {key_length}")
        keys, _ = self.ngrams(key_length)
        origins, found, lengths, counts = self._expand(key_length, np.arange(len(keys)), length)
        return continuation_table.build(keys[origins], found, lengths, counts, max_entries=max_entries, max_bytes=max_bytes)

    def _expand(self, level: int, nodes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The paths of 1 to `length` tokens that lead down from some nodes, each as far as the trie and `length` go.

        Args:
          level: 1 for 1-grams.
          nodes: of that level, int64[Q].
          length: C.

        Returns:
          For each path the index in `nodes` it starts from, int64[P]; its tokens int32[P, C], padded with NO_TOKEN; its
          length and its last node's count, int32[P] each.
        """
        origins = np.arange(len(nodes))
        paths = np.full((len(nodes), length), NO_TOKEN, np.int32)
        ended: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        for depth in range(length + 1):
            firsts = sizes = np.zeros(len(nodes), np.int64)
            if depth < length and level < self.max_order:
                firsts = self.child_starts[level - 1][nodes].astype(np.int64)
                sizes = self.child_starts[level - 1][nodes + 1] - firsts
            is_end = (sizes == 0) & (depth > 0)
            num_ended = int(np.sum(is_end))
            counts = self.counts[level - 1][nodes[is_end]]
            ended.append((origins[is_end], paths[is_end], np.full(num_ended, depth, np.int32), counts))
            if not sizes.any():
                break
            within = np.arange(np.sum(sizes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            nodes = np.repeat(firsts, sizes) + within
            origins, paths = np.repeat(origins, sizes), np.repeat(paths, sizes, axis=0)
            level += 1
            paths[:, depth] = self.tokens[level - 1][nodes]
        origins, paths, lengths, counts = (np.concatenate(parts) for parts in zip(*ended, strict=True))
        return origins, paths, lengths, counts

    def save(self, path: str | os.PathLike[str], *, fingerprint: str, settings: dict | None = None) -> None:
        """Writes the database; `settings` is whatever describes its corpus."""
        names = ("tokens", "counts", "child_starts")
        arrays = {f"{name}_{m}": level for name in names for m, level in enumerate(getattr(self, name), start=1)}
        counts = {f"ngrams_{m}": len(level) for m, level in enumerate(self.tokens, start=1)}
        settings = {**(settings or {}), "max_order": self.max_order}
        files.save(path, KIND, fingerprint=fingerprint, settings=settings, counts=counts, arrays=arrays)

    @staticmethod
    def open(path: str | os.PathLike[str], fingerprint: str | None, *, verify: bool = False) -> NgramTrie:
        """Maps a database; see `files.open`."""
        file = files.open(path, KIND, fingerprint, verify=verify)
        max_order = file.settings["max_order"]
        level = lambda name, top: tuple(file.arrays[f"{name}_{m}"] for m in range(1, top + 1))  # noqa: E731
        return NgramTrie(level("tokens", max_order), level("counts", max_order), level("child_starts", max_order - 1))


def _trie(levels: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> NgramTrie:
    child_starts = [
        np.searchsorted(below[0], np.arange(len(level[0]) + 1)).astype(np.int32) for level, below in itertools.pairwise(levels)
    ]
    return NgramTrie(
        tokens=tuple(tokens for _, tokens, _ in levels),
        counts=tuple(counts.astype(np.int32) for _, _, counts in levels),
        child_starts=tuple(child_starts),
    )


def _pruned(
    levels: list[tuple[np.ndarray, np.ndarray, np.ndarray]], max_bytes: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Keeps the n-grams from the lowest count on that fits. An n-gram's beginning counts no less: it is kept too."""
    # A node has a token, a count and, except in the last level, a child start; those have one more each.
    inner = np.concatenate([counts for _, _, counts in levels[:-1]] or [np.zeros(0, np.int64)])
    all_counts = np.concatenate([inner, levels[-1][2]])
    node_bytes = np.concatenate([np.full(len(inner), 12), np.full(len(levels[-1][2]), 8)])
    room = max_bytes - 4 * (len(levels) - 1)
    if room < 0:
        raise ValueError(f"max_bytes {max_bytes} is less than the {4 * (len(levels) - 1)} bytes of an empty trie")
    by_count = np.argsort(-all_counts, kind="stable")
    num_fitting = int(np.searchsorted(np.cumsum(node_bytes[by_count]), room, "right"))
    if num_fitting == len(all_counts):
        return levels
    threshold = all_counts[by_count[num_fitting]] + 1
    pruned = []
    numbers = np.zeros(1, np.int64)  # of the nodes kept in the level above, by their number before
    for parents, tokens, counts in levels:
        is_kept = counts >= threshold
        pruned.append((numbers[parents[is_kept]].astype(np.int32), tokens[is_kept], counts[is_kept]))
        numbers = np.cumsum(is_kept) - 1
    return pruned
