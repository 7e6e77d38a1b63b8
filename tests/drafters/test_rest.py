"""REST against a search in plain Python."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax import decode, exactness
from hd_jax.databases.collection import Databases
from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.draft_tree import is_node
from hd_jax.drafters.base import Context
from hd_jax.drafters.rest import rest


@functools.cache
def _corpus() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 8, rng.integers(0, 120)).astype(np.int32) for _ in range(40)]


def _databases(form: str = "suffix_array", *more: np.ndarray) -> Databases:
    documents = [*_corpus(), *more]
    if form == "suffix_array":
        return Databases(statistics=SuffixArray.build(documents))
    return Databases(statistics=NgramTrie.build(documents, max_order=5, min_documents=1))


def _search(text: list[int], max_suffix: int, min_suffix: int, max_depth: int, num_nodes: int, max_order: int):
    """The suffix that REST finds and the paths of its tree, best first; n-grams have max_order tokens at most."""
    for length in range(min(max_suffix, len(text), max_order - 1), min_suffix - 1, -1):
        suffix, counts = text[-length:], Counter()
        for document in map(np.ndarray.tolist, _corpus()):
            for start in range(len(document) - length):
                if document[start : start + length] == suffix:
                    following = document[start + length : start + min(length + max_depth, max_order)]
                    counts.update(tuple(following[:end]) for end in range(1, len(following) + 1))
        if counts:
            ranked = sorted(counts, key=lambda path: (-counts[path], len(path), path))
            return suffix, ranked[: num_nodes - 1]
    return [], []


def _paths(tree) -> list[tuple[int, ...]]:
    """Of every node but the root, in the order of the nodes."""
    used = np.flatnonzero(is_node(tree))
    paths: dict[int, tuple[int, ...]] = {0: ()}
    for node in used[1:].tolist():
        paths[node] = (*paths[int(tree.parents[node])], int(tree.tokens[node]))
    return list(paths.values())[1:]


@pytest.mark.parametrize(
    "options",
    [{}, {"max_suffix": 3, "min_suffix": 3}, {"min_suffix": 1, "max_depth": 2, "num_nodes": 9}, {"num_nodes": 2}],
)
@pytest.mark.parametrize(("form", "max_order"), [("suffix_array", 1000), ("ngram_trie", 5)])
def test_drafts_the_most_frequent_prefixes_after_the_longest_suffix(form, max_order, options):
    drafter = rest(_databases(form), **options)
    draft = jax.jit(drafter.draft)
    settings = {"max_suffix": 16, "min_suffix": 2, "max_depth": 10, "num_nodes": 64} | options
    rng = np.random.default_rng(1)
    lengths = set()
    for _ in range(80):
        text = rng.integers(2, 9, rng.integers(1, 5)).tolist()
        document = _corpus()[rng.integers(40)].tolist()
        start = rng.integers(max(len(document), 1))
        text += document[start : start + rng.integers(0, 20)]
        buffer = np.asarray(text + rng.integers(2, 8, 32 - len(text)).tolist(), np.int32)  # garbage behind the text
        row: Any = (buffer, np.int32(len(text)), np.int32(1))  # numpy, as the loop's host hands it on
        context = Context(*row)
        assert drafter.refresh is not None
        host = drafter.refresh(context)
        tree = draft((), (), context._replace(host=host))
        suffix, expected = _search(text, max_order=max_order, **settings)
        assert _paths(tree) == expected
        assert tree.tokens[0] == text[-1] and tree.parents[0] == -1 and tree.tokens.shape == (drafter.num_nodes,)
        assert set(np.asarray(tree.sources)[np.asarray(is_node(tree))][1:].tolist()) <= {0}
        assert max(map(len, expected), default=0) <= drafter.max_depth
        lengths.add(len(suffix))
        # What was retrieved for another length is not drafted.
        stale = draft((), (), context._replace(length=jnp.int32(len(text) + 1), host=host))
        assert _paths(stale) == [] and stale.tokens[0] == buffer[len(text)]
    assert len(lengths) > 1


def test_the_same_options_give_the_same_functions():
    databases = _databases()
    first, second = rest(databases), rest(databases, num_nodes=64)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert jax.tree.structure(first) != jax.tree.structure(rest(databases, max_suffix=8))
    assert first.source_names == ("statistics",) and first.num_nodes == 64 and first.max_depth == 10


@pytest.mark.parametrize(
    ("form", "temperature", "loop"),
    [("suffix_array", 0.0, "host"), ("suffix_array", 0.0, "device"), ("ngram_trie", 1.0, "host")],
)
def test_writes_plain_decodings_tokens_in_fewer_steps(lm, form, temperature, loop):
    prompt = np.random.default_rng(3).integers(2, 8, 30).tolist()
    options = {"max_new_tokens": 24, "temperature": temperature, "loop": loop}
    reference = decode.generate(lm, prompt, **options)
    drafter = rest(_databases(form, np.asarray(prompt + reference.tokens)), min_suffix=1, num_nodes=17)
    out = decode.generate(lm, prompt, drafter=drafter, **options)
    assert exactness.check(lm, drafter, reference, out, temperature=temperature).is_explained
    assert sum(out.source_counts["statistics"]["accepted"]) > 0 and out.num_steps < reference.num_steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_suffix": 0}, "1 <= min_suffix <= max_suffix, not min_suffix 0"),
        ({"max_suffix": 1}, "min_suffix 2 and max_suffix 1"),
        ({"max_depth": 0}, "max_depth of at least 1"),
        ({"num_nodes": 1}, "num_nodes of at least 2"),
        ({}, "statistics database is missing"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        rest(**options)
