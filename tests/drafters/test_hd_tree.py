"""hd_tree against plain Python: what it finds in the text, how it merges sources, what it learns, which nodes it keeps."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax import decode, draft_tree, drafters, exactness
from hd_jax.databases.collection import Databases
from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.databases.successor_table import lookup
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.draft_tree import NO_NODE, NO_PARENT, NO_SOURCE, NO_TOKEN, UNUSED, DraftTree
from hd_jax.drafters.base import Context, Drafter, Feedback
from hd_jax.drafters.hd_tree import (
    HIT_BOUNDS,
    HIT_RATE_STEP,
    MATCH_LENGTHS,
    NUM_OWN_FEATURES,
    SOURCE_NAMES,
    START_HIT_RATES,
    SUBSETS,
    TAIL_LENGTH,
    TAIL_STARTS,
    Candidates,
    State,
    blank_state,
    candidates,
    hd_tree,
    log_probabilities,
    read,
    weights,
)
from hd_jax.drafters.text_index import LONG_KEY, MAX_MATCH, RING, recent
from hd_jax.models.tokenizer import TOKEN_CLASSES

SLOTS = 512
HISTORY = 8192  # by default
NUM_ASKED = 5
OUT_OF_TEXT = 50  # tokens from here on are in no text and no database
NUM_TOKENS = 3  # of random texts: few, so that keys repeat and none of their hashes meet
_candidates = jax.jit(candidates, static_argnames=("sources", "max_match"))
_read = jax.jit(lambda size, context: read(blank_state(size), context), static_argnums=0)
_log_probabilities = jax.jit(log_probabilities)


@functools.cache
def _databases(num_tokens: int = NUM_TOKENS) -> Databases:
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


def _scan(text: Sequence[int], size: int, suffix: Sequence[int], max_match: int = MAX_MATCH) -> list[Match]:
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


def _context(text: list[int], prompt_length: int) -> Context:
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
        state = jax.jit(self.drafter.renew)(self.drafter.tables, self.state, _context(prompt, len(prompt)))
        return Row(self.drafter, prompt, state)

    @property
    def context(self) -> Context:
        return _context(self.text, self.prompt_length)

    def append(self, tokens: Sequence[int]) -> None:
        assert len(tokens) <= self.drafter.max_depth + 1, "no step appends more"
        self.text += [int(token) for token in tokens]
        tree = draft_tree.root_only(jnp.int32(0), self.drafter.num_nodes)
        path, top = jnp.full(self.drafter.max_depth + 1, NO_NODE), (self.drafter.num_nodes, self.drafter.num_top_logits)
        said = jnp.broadcast_to(OUT_OF_TEXT + jnp.arange(top[1]), top)  # by the model
        logits = -jnp.broadcast_to(jnp.arange(top[1], dtype=jnp.float32), top)
        feedback = Feedback(tree, tree.tokens, tree.tokens, said, logits, path, jnp.int32(len(tokens)))
        self.state = self._update(self.drafter.tables, self.state, self.context, feedback)

    def asked(self, suffixes: Sequence[Sequence[int]], sources: str, max_match: int = MAX_MATCH) -> Candidates:
        suffixes = [*suffixes, *[()] * (NUM_ASKED - len(suffixes))]  # one program for any number of them
        ends = [[NO_TOKEN] * (MAX_MATCH - len(suffix)) + list(suffix[-MAX_MATCH:]) for suffix in suffixes]
        found = _candidates(
            self.drafter.tables, self.state, self.context, jnp.asarray(ends, jnp.int32), sources=sources, max_match=max_match
        )
        return jax.tree.map(np.asarray, found)


def _random(rng: np.random.Generator, length: int | np.integer) -> list[int]:
    return rng.integers(0, NUM_TOKENS, int(length)).tolist()


def _kind(length: int) -> int:
    """The class of a match, as SOURCE_NAMES."""
    return max(kind for kind, bound in enumerate(HIT_BOUNDS) if length >= bound)


def _assert_matches(found: Candidates, row: int, expected: list[Match], num_unread: int = 0) -> None:
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
        assert found.sources[row, place] == _kind(longest)
        counts = np.array([sum(match.length >= bound for match in own) for bound in MATCH_LENGTHS])
        shares = np.where(totals > 0, np.log((counts + 0.1) / (totals + 1)), 0)
        np.testing.assert_allclose(found.features[row, place, : len(MATCH_LENGTHS)], shares, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("history", "prompt_length", "max_match"),
    [(512, 1, 16), (512, 300, 16), (64, 64, 16), (64, 200, 16), (512, 300, 5), (512, 300, 2), (512, 300, 1)],
)
def test_the_index_finds_the_matches_that_a_scan_finds(history, prompt_length, max_match):
    rng = np.random.default_rng(prompt_length)
    row = Row(hd_tree(_databases(), sources="c", history=history, remember=0, max_match=max_match), _random(rng, prompt_length))
    num_long = num_full = 0
    for _ in range(12):
        # The text's own end, texts that go on from it, and one that begins only now.
        suffixes = [
            row.text[-MAX_MATCH:],
            *(row.text[-MAX_MATCH:] + _random(rng, ahead) for ahead in (1, 2, 5)),
            _random(rng, 2),
        ]
        found = row.asked(suffixes, "c", max_match)
        for index, suffix in enumerate(suffixes):
            expected = _scan(row.text, history, suffix, max_match)
            _assert_matches(found, index, expected, max(prompt_length - history, 0))
            num_long += sum(match.length > LONG_KEY for match in expected)
            num_full += len(expected) >= RING
        row.append(_random(rng, rng.integers(1, 8)))
    assert max_match <= LONG_KEY or num_long > 5
    assert history < 512 or prompt_length < 300 or num_full > 30


def test_a_long_copy_is_told_by_its_length():
    copied = list(range(100, 130))
    row = Row(hd_tree(_databases(), sources="c"), [*copied, 7, *copied[:25]])
    found = row.asked([row.text], "c")
    (place,) = np.flatnonzero(found.is_candidate[0])
    assert (found.tokens[0, place], found.matches[0, place], found.places[0, place]) == (125, MAX_MATCH, 24)
    assert found.sources[0, place] == SOURCE_NAMES.index("context 10+")


def test_newest_tokens():
    rng = np.random.default_rng(0)
    row = Row(hd_tree(_databases(), sources="c", history=64, remember=0), [2, 1])
    assert recent(row.state.seen).tolist() == [NO_TOKEN] * (MAX_MATCH - 2) + [2, 1]
    for _ in range(12):
        row.append(_random(rng, 9))
        assert recent(row.state.seen).tolist() == ([NO_TOKEN] * MAX_MATCH + row.text)[-MAX_MATCH:]


@pytest.mark.parametrize("sources", SUBSETS)
def test_the_sources_answers_are_merged_by_token(sources):
    rng = np.random.default_rng(1)
    row = Row(hd_tree(_databases(), sources=sources), _random(rng, 5))
    seen = set()
    for _ in range(6):
        row.append(_random(rng, 3))
        suffixes = [row.text[-MAX_MATCH:], row.text[-MAX_MATCH:] + _random(rng, 2), [9] * MAX_MATCH]
        found = row.asked(suffixes, sources)
        for index, suffix in enumerate(suffixes):
            matches = _scan(row.text, HISTORY, suffix) if "c" in sources else []
            answers = {letter: _answer(row.drafter, letter, suffix) for letter in "ms" if letter in sources}
            expected = {match.token for match in matches}.union(*answers.values())
            places = np.flatnonzero(found.is_candidate[index])
            assert sorted(found.tokens[index, places].tolist()) == sorted(expected)
            for place in places:
                token = found.tokens[index, place]
                own = [match.length for match in matches if match.token == token]
                first = next((letter for letter, answer in answers.items() if token in answer), None)
                table = {"m": SOURCE_NAMES.index("model"), "s": SOURCE_NAMES.index("statistics"), None: -1}[first]
                assert found.sources[index, place] == (_kind(max(own)) if own else table)
                assert found.matches[index, place] == max(own, default=0)
                seen.add(int(found.sources[index, place]))
                for number, letter in enumerate("ms"):
                    probability = answers.get(letter, {}).get(int(token), 0)
                    feature = found.features[index, place, len(MATCH_LENGTHS) + number]
                    np.testing.assert_allclose(feature, 0.5 * math.log(probability + 1e-3), rtol=1e-4)
    assert {SOURCE_NAMES[source] for source in seen} >= {
        "c": {"context 1-2", "context 3-5"},
        "m": {"model"},
        "s": {"statistics"},
    }[sources[0]]


def _answer(drafter: Drafter, letter: str, suffix: Sequence[int]) -> dict[int, float]:
    """A table's successors, the likeliest first."""
    ends = jnp.asarray([([NO_TOKEN] * MAX_MATCH + list(suffix))[-MAX_MATCH:]], jnp.int32)
    found = jax.jit(lookup)(drafter.tables["successors"], ends)
    number = 0 if letter == "m" else found.tokens.shape[1] - 1  # of the joined tables
    pairs = zip(found.tokens[0, number].tolist(), found.probabilities[0, number].tolist(), strict=True)
    return {token: probability for token, probability in pairs if token != NO_TOKEN}


@pytest.mark.parametrize("sources", ["cms", "c", "ms"])
def test_hit_rates_are_moving_averages_over_the_tokens_in_their_order(sources):
    rng = np.random.default_rng(3)
    row = Row(hd_tree(_databases(), sources=sources), _random(rng, 30))
    rates, num_asked = list(START_HIT_RATES), np.zeros(len(START_HIT_RATES), int)
    for _ in range(15):
        before, new = list(row.text), _random(rng, rng.integers(1, 8))
        if rng.random() < 0.3:
            new = before[5:12]  # a long match now and then
        for place, token in enumerate(new):
            suffix = (before + new[:place])[-MAX_MATCH:]  # what was asked knew the text before the step
            favorites: dict[int, int] = {}
            matches = _scan(before, HISTORY, suffix) if "c" in sources else []
            if matches:
                best = max(matches, key=lambda match: (match.length, match.place))
                favorites[_kind(best.length)] = best.token
            for letter, name in (("m", "model"), ("s", "statistics")):
                if letter in sources:
                    favorites[SOURCE_NAMES.index(name)] = next(iter(_answer(row.drafter, letter, suffix)))
            for source, favorite in favorites.items():
                rates[source] += HIT_RATE_STEP * ((favorite == token) - rates[source])
                num_asked[source] += 1
        row.append(new)
        np.testing.assert_allclose(row.state.hit_rates, rates, rtol=1e-4)
    letters = ("c", "c", "c", "c", "m", "s")  # "r" has no hit rate
    assert all((asked > 0) == (letter in sources) for asked, letter in zip(num_asked, letters, strict=True))


def test_a_finished_row_teaches_nothing():
    rng = np.random.default_rng(4)
    row = Row(hd_tree(_databases()), _random(rng, 40))
    before = row.state
    row.append([])
    jax.tree.map(np.testing.assert_array_equal, row.state, before)
    row.append([1])
    assert int(row.state.seen.num_seen) == 41


def test_the_shipped_weights_are_log_probabilities_for_every_choice_of_sources():
    rng = np.random.default_rng(5)
    for sources in SUBSETS:
        text = _random(rng, 80)
        row = Row(hd_tree(_databases(), sources=sources), text, _read(HISTORY, _context(text, 80)))
        found = row.asked([text[-MAX_MATCH:], [9] * MAX_MATCH, text[:MAX_MATCH]], sources)
        probabilities = np.exp(_log_probabilities({"weights": weights(sources)}, found))
        assert not found.is_candidate[:, -1].any()
        of_none, probabilities, is_candidate = probabilities[:, -1], probabilities[:, :-1], found.is_candidate[:, :-1]
        assert np.all(probabilities[is_candidate] > 0) and np.all(probabilities[~is_candidate] == 0)
        np.testing.assert_allclose(probabilities.sum(axis=1) + of_none, 1, rtol=1e-5)
        assert probabilities[0].sum() > 0.1
        prolonged = np.asarray(weights(sources)["prolonged"])
        assert prolonged.shape == (MAX_MATCH + 1,) and np.all(prolonged < 0)


class Node(NamedTuple):
    score: float
    match: int
    place: int
    source: int


Path = tuple[int, ...]


def _children(row: Row, path: Path, sources: str, max_match: int) -> dict[Path, Node]:
    found = row.asked([[*row.text[-MAX_MATCH:], *path]], sources, max_match)
    scores = np.asarray(_log_probabilities(row.drafter.tables, found))[0]
    if found.recycled is not None:
        share = row.state.recycled.shares[found.recycled.kinds[0], found.classes[0]]
        told = dict(zip(found.recycled.tokens[0].tolist(), found.recycled.probabilities[0].tolist(), strict=True))
        own = np.array([told.get(token, 0.0) if token != NO_TOKEN else 0.0 for token in found.tokens[0].tolist()])
        with np.errstate(divide="ignore"):
            scores = np.log((1 - share) * np.exp(scores) + share * own)
    return {
        (*path, int(found.tokens[0, i])): Node(
            float(scores[i]), int(found.matches[0, i]), int(found.places[0, i]), int(found.sources[0, i])
        )
        for i in np.flatnonzero(found.is_candidate[0] & np.isfinite(scores))
    }


def _pool(row: Row, sources: str, *, rounds: int, width: int, max_match: int = MAX_MATCH):
    """All that a draft looks at, dict[Path, Node], one node after the other."""
    pool: dict[Path, Node] = {}
    expanded: set[Path] = set()
    chosen: list[Path] = [()]
    for index in range(rounds):
        level: list[Path] = []
        for path in chosen:
            base = pool[path].score if path else 0.0
            for child, node in _children(row, path, sources, max_match).items():
                pool[child] = node._replace(score=base + node.score)
                level.append(child)
        if index < rounds - 1:
            chosen = sorted(level, key=lambda path: -pool[path].score)[:width]
            expanded.update(chosen)
    if "c" not in sources:
        return pool
    lengths = np.arange(MAX_MATCH + 1)
    fixed = np.log(lengths / (lengths + 1), where=lengths > 0, out=np.full(len(lengths), -np.inf))
    prolonged = fixed if "weights" not in row.drafter.tables else np.asarray(row.drafter.tables["weights"]["prolonged"])
    is_open = [path for path in pool if path not in expanded and pool[path].match]
    for start in sorted(is_open, key=lambda path: -pool[path].score)[:TAIL_STARTS]:
        score, match, place, source = pool[start]
        following = row.text[place + 2 :][:TAIL_LENGTH]
        for ahead in range(1, len(following) + 1):
            score += float(prolonged[min(match + ahead, MAX_MATCH)])
            pool[(*start, *following[:ahead])] = Node(score, 0, 0, source)
    return pool


def _paths(tree: DraftTree, drafter: Drafter) -> list[Path]:
    """The token path of every node but the root, in order; checks that the tree is well formed."""
    tokens, parents, sources = (np.asarray(a).tolist() for a in (tree.tokens, tree.parents, tree.sources))
    assert len(tokens) == drafter.num_nodes and not np.any(tree.is_window)
    num_nodes = parents.index(UNUSED) if UNUSED in parents else len(parents)
    assert parents[0] == NO_PARENT and sources[0] == NO_SOURCE
    assert all(parent == UNUSED for parent in parents[num_nodes:])
    paths: list[Path] = [()]
    for node in range(1, num_nodes):
        assert 0 <= parents[node] < node and 0 <= sources[node] < len(drafter.source_names)
        paths.append((*paths[parents[node]], tokens[node]))
    assert len(set(paths)) == len(paths)
    assert max(map(len, paths)) <= drafter.max_depth
    return paths[1:]


CASES: list[dict[str, Any]] = [
    *({"sources": sources, "rounds": 2, "width": 3} for sources in ("cms", "ms")),
    {"rounds": 3, "width": 2},
    {"rounds": 3, "width": 4, "sources": "cmsr"},
    {"rounds": 2, "width": 4, "sources": "csr", "estimates": "fixed"},
    {"estimates": "fixed", "rounds": 2, "width": 2, "max_match": 5},
    {"min_probability": 0.2, "rounds": 2, "width": 2},
    {"rounds": 1, "width": 1, "num_nodes": 2},
    {"rounds": 1, "width": 1, "num_nodes": 300},  # more than there are
]


@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))
def test_the_tree_is_the_likeliest_nodes_of_the_pool(options):
    rng = np.random.default_rng(6)
    options = {"num_nodes": 17, "sources": "cms", "min_probability": 0.0, "max_match": MAX_MATCH, **options}
    drafter = hd_tree(_databases(), **options)
    settings = {name: options[name] for name in ("rounds", "width", "max_match")}
    num_drafted = 0
    for length in (200, 30, 3):
        text = _random(rng, length)
        text += text[3:20]  # the longer ones end with a long copy
        row, tree = _drafted(drafter, text)
        assert int(tree.tokens[0]) == text[-1]
        paths = _paths(tree, drafter)
        pool = _pool(row, options["sources"], **settings)
        ranked = {path: node.score - 1e-4 * len(path) for path, node in pool.items()}
        is_likely = {path for path, node in pool.items() if math.exp(node.score) > options["min_probability"]}
        best = sorted((ranked[path] for path in is_likely), reverse=True)[: options["num_nodes"] - 1]
        np.testing.assert_allclose([ranked[path] for path in paths], best, rtol=1e-3, atol=1e-4)
        assert tree.sources[1 : len(paths) + 1].tolist() == [pool[path].source for path in paths]
        num_drafted += len(paths)
        if "r" in options["sources"] and length == 30:
            assert SOURCE_NAMES.index("recycled") in tree.sources and np.any(tree.tokens >= OUT_OF_TEXT)
    assert num_drafted >= min(options["num_nodes"] - 1, 6)
    assert num_drafted < 3 * 16 or not options["min_probability"]


def _drafted(drafter: Drafter, text: list[int]) -> tuple[Row, DraftTree]:
    """What is drafted after a text, with the hit rates of the start unless the drafter recycles: then after one step."""
    if drafter.num_top_logits:
        row = Row(drafter, text[:-1])
        row.append(text[-1:])
    else:
        row = Row(drafter, text, _read(HISTORY, _context(text, len(text))))
    return row, jax.jit(drafter.draft)(drafter.tables, row.state, row.context)


@pytest.mark.parametrize("estimates", ["learned", "fixed"])
def test_with_rounds_and_width_enough_the_tree_is_that_of_a_best_first_search(estimates):
    num_nodes = 6
    drafter = hd_tree(_databases(), estimates=estimates, rounds=num_nodes, width=num_nodes, num_nodes=num_nodes)
    row, tree = _drafted(drafter, _random(np.random.default_rng(8), 60))
    paths = _paths(tree, drafter)
    open_nodes: dict[Path, float] = {(): 0.0}
    expected: list[Path] = []
    while len(expected) < num_nodes:
        path = max(open_nodes, key=lambda path: open_nodes[path] - 1e-4 * len(path))
        score = open_nodes.pop(path)
        expected.append(path)
        for child, node in _children(row, path, "cms", MAX_MATCH).items():
            open_nodes[child] = score + node.score
    assert paths == expected[1:]
    assert max(map(len, paths)) > 1


@pytest.mark.parametrize("estimates", ["learned", "fixed"])
def test_a_long_copy_is_drafted_beyond_the_rounds(estimates):
    copied = list(range(10, 50))
    drafter = hd_tree(_databases(), sources="c", estimates=estimates, rounds=2, width=2, num_nodes=33)
    paths = _paths(_drafted(drafter, [*copied, 7, *copied[:20]])[1], drafter)
    assert drafter.max_depth == 2 + TAIL_LENGTH
    assert paths[-1] == tuple(copied[20 : 20 + drafter.max_depth])
    text = [*copied, *copied[:37]]  # three tokens of the copy are left, then it begins again
    assert _paths(_drafted(drafter, text)[1], drafter)[-1] == tuple(text[37 : 37 + drafter.max_depth])


def test_a_copy_ends_where_the_text_ends():
    drafter = hd_tree(_databases(), sources="c", rounds=1, width=1, num_nodes=33)
    assert _paths(_drafted(drafter, [5, 6, 7, 5, 6])[1], drafter) == [(7,), (7, 5), (7, 5, 6)]


def test_a_smaller_budget_keeps_the_likeliest_of_a_larger_one():
    text = _random(np.random.default_rng(9), 70)
    small, large = (_drafted(hd_tree(_databases(), rounds=2, width=3, num_nodes=n), text)[1] for n in (6, 17))
    for name in ("tokens", "parents", "sources"):
        np.testing.assert_array_equal(getattr(small, name), getattr(large, name)[:6])


def test_of_an_unknown_text_nothing_is_drafted():
    drafter = hd_tree(_databases(), rounds=2, width=3, num_nodes=17)
    assert _paths(_drafted(drafter, [17])[1], drafter) == []


def test_a_new_request_keeps_the_hit_rates_and_not_the_text():
    rng = np.random.default_rng(10)
    row = Row(hd_tree(_databases(), remember=0), _random(rng, 40))
    row.append(_random(rng, 7))
    learned = row.state.hit_rates
    assert not np.allclose(learned, START_HIT_RATES)
    new = row.renewed(_random(rng, 12))
    fresh = Row(row.drafter, new.text)
    np.testing.assert_array_equal(new.state.hit_rates, learned)
    jax.tree.map(np.testing.assert_array_equal, new.state, fresh.state._replace(hit_rates=learned))


def test_a_session_remembers_earlier_text_if_asked_to():
    rng = np.random.default_rng(11)
    drafter = hd_tree(_databases(), sources="c", history=64, remember=64)
    row = Row(drafter, _random(rng, 40))
    row.append(_random(rng, 9))
    new = row.renewed([*_random(rng, 30), *row.text[5:10]])
    np.testing.assert_array_equal(new.state.hit_rates, row.state.hit_rates)
    whole = row.text + new.text
    assert int(new.state.seen.num_seen) == len(whole)
    found = new.asked([new.text[-MAX_MATCH:]], "c")
    _assert_matches(found, 0, _scan(whole, 128, new.text[-MAX_MATCH:]))
    assert found.places[0][found.is_candidate[0]].min() < len(row.text)
    for _ in range(8):  # around the ring
        new.append(_random(rng, 10))
    whole = row.text + new.text
    _assert_matches(new.asked([new.text[-MAX_MATCH:]], "c"), 0, _scan(whole, 128, new.text[-MAX_MATCH:]))
    assert jax.tree.map(jnp.shape, new.state) == jax.tree.map(jnp.shape, row.state)


def test_a_chat_that_goes_on_is_not_read_twice():
    rng = np.random.default_rng(12)
    drafter = hd_tree(_databases(), sources="c", history=64, remember=64)
    row = Row(drafter, _random(rng, 30))
    row.append(_random(rng, 8))
    new = row.renewed(row.text + _random(rng, 9))
    assert int(new.state.seen.num_seen) == len(new.text) and int(new.state.seen.start) == 0
    _assert_matches(new.asked([new.text[-MAX_MATCH:]], "c"), 0, _scan(new.text, 128, new.text[-MAX_MATCH:]))
    other = new.renewed([2, 1, 0, 2, 1, 0, 0, 1])
    assert int(other.state.seen.start) == len(new.text) and int(np.sum(other.state.seen.occurrences)) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ""}, "sources are one of c, cm, cs, ms, cms, or with r after it, not ''"),
        ({"sources": "cx"}, "not 'cx'"),
        ({"sources": "r"}, "or with r after it, not 'r'"),
        ({"sources": "cc"}, "not 'cc'"),
        ({"estimates": "guessed"}, "'learned' or 'fixed', not 'guessed'"),
        ({"max_match": 0}, "max_match must be at least 1, not 0"),
        ({"max_match": MAX_MATCH + 1}, f"max_match is at most {MAX_MATCH}"),
        ({"rounds": 0}, "rounds must be at least 1, not 0"),
        ({"width": 0}, "width must be at least 1, not 0"),
        ({"min_probability": 1.0}, r"min_probability in \[0, 1\)"),
        ({"min_probability": -0.1}, r"min_probability in \[0, 1\)"),
        ({"min_probability": float("nan")}, r"min_probability in \[0, 1\)"),
        ({"history": 31, "rounds": 6}, "history must be at least 32, not 31"),
        ({"remember": -1}, "remember must be at least 0, not -1"),
        ({"num_nodes": 1}, "num_nodes must be at least 2, not 1"),
        ({"databases": None}, "the model_text database is missing"),
        ({"databases": Databases(model_text=SuffixArray.build([]))}, "the statistics database is missing"),
        ({"databases": None, "sources": "cs"}, "the statistics database is missing"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        hd_tree(**{"databases": _databases(), **options})


def test_the_order_of_the_letters_does_not_matter_and_the_context_needs_no_database():
    assert hd_tree(_databases(), sources="smc").draft is hd_tree(_databases(), sources="cms").draft
    assert drafters.make("hd_tree", Databases(), {"sources": "c"}).name == "hd_tree"


def test_the_same_options_compile_nothing_anew():
    first, second = hd_tree(_databases(), num_nodes=9), hd_tree(_databases(), num_nodes=9)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert second.tables["successors"] is first.tables["successors"]
    assert jax.tree.structure(first) != jax.tree.structure(hd_tree(_databases(), num_nodes=10))


def test_the_turns_of_a_session_are_plain_decodings(lm):
    drafter = hd_tree(_databases(48), rounds=2, width=2, history=64, remember=64, num_nodes=5)
    plain, session = decode.Session(lm), decode.Session(lm, drafter=drafter)
    for message in ("hello", "againhello", "hello"):
        expected, found = (each.generate(message, max_new_tokens=24) for each in (plain, session))
        verdict = exactness.check(lm, drafter, expected, found)
        assert verdict.is_equal or verdict.is_explained, verdict.message
        assert sum(found.accept_lengths) == len(found.tokens)
        if not verdict.is_equal:
            return
    assert not np.allclose(session._drafter_state.hit_rates, START_HIT_RATES)
