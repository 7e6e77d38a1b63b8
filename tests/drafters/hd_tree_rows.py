"""Texts that `hd_tree` reads step by step, and what plain Python finds in them; for the tests of it and of its index."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax import draft_tree
from hd_jax.databases.collection import Databases
from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.draft_tree import NO_NODE, NO_TOKEN
from hd_jax.drafters.base import Context, Drafter, Feedback
from hd_jax.drafters.candidates import (
    HIT_BOUNDS,
    MATCH_LENGTHS,
    NUM_OWN_FEATURES,
    NUM_SUCCESSORS,
    Candidates,
    State,
    candidates,
)
from hd_jax.drafters.text_index import LONG_KEY, MAX_MATCH, RING
from hd_jax.models.tokenizer import TOKEN_CLASSES

SLOTS = 512
NUM_ASKED = 5
OUT_OF_TEXT = 50  # tokens from here on are in no text and no database
NUM_TOKENS = 3  # of random texts: few, so that keys repeat and none of their hashes meet
_candidates = jax.jit(candidates, static_argnames=("sources", "max_match", "num_successors"))


@functools.cache
def databases(num_tokens: int = NUM_TOKENS) -> Databases:
    rng = np.random.default_rng(7)
    documents = lambda: [rng.integers(0, num_tokens, 60).astype(np.int32) for _ in range(6)]  # noqa: E731
    return Databases(
        model_text=SuffixArray.build(documents()),
        statistics=NgramTrie.build(documents(), max_order=4, min_documents=1),
        token_classes=(np.arange(num_tokens) % len(TOKEN_CLASSES)).astype(np.int32),
    )


class Match(NamedTuple):
    place: int
    length: int
    token: int  # that followed


def scan(text: Sequence[int], size: int, suffix: Sequence[int], max_match: int = MAX_MATCH) -> list[Match]:
    """Where the end of a suffix stood among the last `size` tokens of a text: the latest RING places by the last token, of
    which those that match in LONG_KEY tokens or more count as the latest RING of these."""
    start = max(len(text) - size, 0)
    found = []
    for place in range(start, len(text) - 1):
        length = 0
        while length < min(len(suffix), MAX_MATCH) and place - length >= start:
            if text[place - length] != suffix[-1 - length]:
                break
            length += 1
        if length:
            found.append(Match(place, length, text[place + 1]))
    latest = [match for match in found[-RING:] if match.length < LONG_KEY]
    latest += [match for match in found if match.length >= LONG_KEY][-RING:]
    return [match._replace(length=min(match.length, max_match)) for match in latest]


def context_of(text: list[int], prompt_length: int) -> Context:
    garbage = [1] * (SLOTS - len(text))
    return Context(jnp.asarray(text + garbage, jnp.int32), jnp.int32(len(text)), jnp.int32(prompt_length))


class Row:
    """A text that grows step by step, as the drafter reads it."""

    def __init__(self, drafter: Drafter, prompt: list[int], state: State | None = None):
        self.drafter, self.text, self.prompt_length = drafter, list(prompt), len(prompt)
        self.state = jax.jit(drafter.init)(drafter.tables, self.context) if state is None else state
        self._update = jax.jit(drafter.update)

    def renewed(self, prompt: list[int]) -> Row:
        """The next request of a session."""
        assert self.drafter.renew is not None
        state = jax.jit(self.drafter.renew)(self.drafter.tables, self.state, context_of(prompt, len(prompt)))
        return Row(self.drafter, prompt, state)

    @property
    def context(self) -> Context:
        return context_of(self.text, self.prompt_length)

    def append(self, tokens: Sequence[int]) -> None:
        assert len(tokens) <= self.drafter.max_depth + 1, "no step appends more"
        self.text += [int(token) for token in tokens]
        tree = draft_tree.root_only(jnp.int32(0), self.drafter.num_nodes)
        path, top = jnp.full(self.drafter.max_depth + 1, NO_NODE), (self.drafter.num_nodes, self.drafter.num_top_logits)
        said = jnp.broadcast_to(OUT_OF_TEXT + jnp.arange(top[1]), top)  # by the model
        logits = -jnp.broadcast_to(jnp.arange(top[1], dtype=jnp.float32), top)
        feedback = Feedback(tree, tree.tokens, tree.tokens, said, logits, path, jnp.int32(len(tokens)))
        self.state = self._update(self.drafter.tables, self.state, self.context, feedback)

    def asked(
        self,
        suffixes: Sequence[Sequence[int]],
        sources: str,
        max_match: int = MAX_MATCH,
        num_successors: int = NUM_SUCCESSORS,
    ) -> Candidates:
        suffixes = [*suffixes, *[()] * (NUM_ASKED - len(suffixes))]  # one program for any number of them
        ends = [[NO_TOKEN] * (MAX_MATCH - len(suffix)) + list(suffix[-MAX_MATCH:]) for suffix in suffixes]
        settings = {"sources": sources, "max_match": max_match, "num_successors": num_successors}
        found = _candidates(self.drafter.tables, self.state, self.context, jnp.asarray(ends, jnp.int32), **settings)
        return jax.tree.map(np.asarray, found)


def random_tokens(rng: np.random.Generator, length: int | np.integer) -> list[int]:
    return rng.integers(0, NUM_TOKENS, int(length)).tolist()


def kind_of(length: int) -> int:
    """The class of a match, as SOURCE_NAMES."""
    return max(kind for kind, bound in enumerate(HIT_BOUNDS) if length >= bound)


def assert_matches(found: Candidates, row: int, expected: list[Match], num_unread: int = 0) -> None:
    """That a row's candidates are what followed the expected matches, each token once; places count what was read."""
    tokens = found.tokens[row]
    assert sorted(tokens[tokens != NO_TOKEN].tolist()) == sorted(match.token for match in expected)
    kept = tokens[found.is_candidate[row]].tolist()
    assert sorted(kept) == sorted({match.token for match in expected})
    totals = np.array([sum(match.length >= bound for match in expected) for bound in MATCH_LENGTHS])
    end = NUM_OWN_FEATURES + len(MATCH_LENGTHS)
    shared = found.features[row, :, NUM_OWN_FEATURES:end]  # of the text, whatever the candidate
    np.testing.assert_allclose(shared, np.broadcast_to(np.log1p(totals) * 0.5, shared.shape), rtol=1e-5)
    for place in np.flatnonzero(found.is_candidate[row]):
        own = [match for match in expected if match.token == tokens[place]]
        longest = max(match.length for match in own)
        assert found.matches[row, place] == longest
        assert found.places[row, place] == max(match.place for match in own if match.length == longest) - num_unread
        assert found.sources[row, place] == kind_of(longest)
        counts = np.array([sum(match.length >= bound for match in own) for bound in MATCH_LENGTHS])
        shares = np.where(totals > 0, np.log((counts + 0.1) / (totals + 1)), 0)
        np.testing.assert_allclose(found.features[row, place, : len(MATCH_LENGTHS)], shares, rtol=1e-4, atol=1e-6)
