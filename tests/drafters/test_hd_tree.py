"""hd_tree against plain Python: how it merges sources, what it learns, which nodes it keeps."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hd_tree_rows import OUT_OF_TEXT, Row, context_of, databases, kind_of, random_tokens, scan

from hd_jax import decode, drafters, exactness
from hd_jax.databases.collection import Databases
from hd_jax.databases.successor_table import lookup
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.draft_tree import NO_PARENT, NO_SOURCE, NO_TOKEN, UNUSED, DraftTree
from hd_jax.drafters.base import Drafter
from hd_jax.drafters.candidates import MATCH_LENGTHS, NUM_SUCCESSORS, SOURCE_NAMES, SUBSETS, log_probabilities, weights
from hd_jax.drafters.hd_tree import (
    HIT_RATE_STEP,
    START_HIT_RATES,
    TAIL_LENGTH,
    TAIL_STARTS,
    WIDTH_RATIO,
    _functions,
    blank_state,
    hd_tree,
    read,
)
from hd_jax.drafters.text_index import MAX_MATCH

HISTORY = 8192  # by default
_read = jax.jit(lambda size, context: read(blank_state(size), context), static_argnums=0)
_log_probabilities = jax.jit(log_probabilities)


@pytest.mark.parametrize("sources", SUBSETS)
def test_the_sources_answers_are_merged_by_token(sources):
    rng = np.random.default_rng(1)
    row = Row(hd_tree(databases(), sources=sources), random_tokens(rng, 5))
    seen = set()
    for _ in range(6):
        row.append(random_tokens(rng, 3))
        suffixes = [row.text[-MAX_MATCH:], row.text[-MAX_MATCH:] + random_tokens(rng, 2), [9] * MAX_MATCH]
        found = row.asked(suffixes, sources)
        for index, suffix in enumerate(suffixes):
            matches = scan(row.text, HISTORY, suffix) if "c" in sources else []
            answers = {letter: _answer(row.drafter, letter, suffix) for letter in "ms" if letter in sources}
            expected = {match.token for match in matches}.union(*answers.values())
            places = np.flatnonzero(found.is_candidate[index])
            assert sorted(found.tokens[index, places].tolist()) == sorted(expected)
            for place in places:
                token = found.tokens[index, place]
                own = [match.length for match in matches if match.token == token]
                first = next((letter for letter, answer in answers.items() if token in answer), None)
                table = {"m": SOURCE_NAMES.index("model"), "s": SOURCE_NAMES.index("statistics"), None: -1}[first]
                assert found.sources[index, place] == (kind_of(max(own)) if own else table)
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
    row = Row(hd_tree(databases(), sources=sources), random_tokens(rng, 30))
    rates, num_asked = list(START_HIT_RATES), np.zeros(len(START_HIT_RATES), int)
    for _ in range(15):
        before, new = list(row.text), random_tokens(rng, rng.integers(1, 8))
        if rng.random() < 0.3:
            new = before[5:12]  # a long match now and then
        for place, token in enumerate(new):
            suffix = (before + new[:place])[-MAX_MATCH:]  # what was asked knew the text before the step
            favorites: dict[int, int] = {}
            matches = scan(before, HISTORY, suffix) if "c" in sources else []
            if matches:
                best = max(matches, key=lambda match: (match.length, match.place))
                favorites[kind_of(best.length)] = best.token
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
    row = Row(hd_tree(databases()), random_tokens(rng, 40))
    before = row.state
    row.append([])
    jax.tree.map(np.testing.assert_array_equal, row.state, before)
    row.append([1])
    assert int(row.state.seen.num_seen) == 41


def test_the_shipped_weights_are_log_probabilities_for_every_choice_of_sources():
    rng = np.random.default_rng(5)
    for sources in SUBSETS:
        text = random_tokens(rng, 80)
        row = Row(hd_tree(databases(), sources=sources), text, _read(HISTORY, context_of(text, 80)))
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
    num_successors = vars(sys.modules[hd_tree.__module__])["NUM_LATER_SUCCESSORS"] if path else NUM_SUCCESSORS
    found = row.asked([[*row.text[-MAX_MATCH:], *path]], sources, max_match, num_successors)
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
            likeliest = sorted(level, key=lambda path: -pool[path].score)
            chosen = likeliest[: max(round(width * WIDTH_RATIO**index), 1)]
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


@pytest.fixture
def few_later_successors(monkeypatch):
    """Texts of three tokens have no more successors."""
    monkeypatch.setattr(sys.modules[hd_tree.__module__], "NUM_LATER_SUCCESSORS", 2)
    _functions.cache_clear()
    yield
    _functions.cache_clear()


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
def test_the_tree_is_the_likeliest_nodes_of_the_pool(options, few_later_successors):
    rng = np.random.default_rng(6)
    options = {"num_nodes": 17, "sources": "cms", "min_probability": 0.0, "max_match": MAX_MATCH, **options}
    drafter = hd_tree(databases(), **options)
    settings = {name: options[name] for name in ("rounds", "width", "max_match")}
    num_drafted = 0
    for length in (200, 30, 3):
        text = random_tokens(rng, length)
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
        row = Row(drafter, text, _read(HISTORY, context_of(text, len(text))))
    return row, jax.jit(drafter.draft)(drafter.tables, row.state, row.context)


@pytest.mark.parametrize("estimates", ["learned", "fixed"])
def test_with_rounds_and_width_enough_the_tree_is_that_of_a_best_first_search(estimates):
    num_nodes = 6
    drafter = hd_tree(databases(), estimates=estimates, rounds=num_nodes, width=num_nodes, num_nodes=num_nodes)
    row, tree = _drafted(drafter, random_tokens(np.random.default_rng(8), 60))
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
    drafter = hd_tree(databases(), sources="c", estimates=estimates, rounds=2, width=2, num_nodes=33)
    paths = _paths(_drafted(drafter, [*copied, 7, *copied[:20]])[1], drafter)
    assert drafter.max_depth == 2 + TAIL_LENGTH
    assert paths[-1] == tuple(copied[20 : 20 + drafter.max_depth])
    text = [*copied, *copied[:37]]  # three tokens of the copy are left, then it begins again
    assert _paths(_drafted(drafter, text)[1], drafter)[-1] == tuple(text[37 : 37 + drafter.max_depth])


def test_a_copy_ends_where_the_text_ends():
    drafter = hd_tree(databases(), sources="c", rounds=1, width=1, num_nodes=33)
    assert _paths(_drafted(drafter, [5, 6, 7, 5, 6])[1], drafter) == [(7,), (7, 5), (7, 5, 6)]


def test_a_smaller_budget_keeps_the_likeliest_of_a_larger_one():
    text = random_tokens(np.random.default_rng(9), 70)
    small, large = (_drafted(hd_tree(databases(), rounds=2, width=3, num_nodes=n), text)[1] for n in (6, 17))
    for name in ("tokens", "parents", "sources"):
        np.testing.assert_array_equal(getattr(small, name), getattr(large, name)[:6])


def test_of_an_unknown_text_nothing_is_drafted():
    drafter = hd_tree(databases(), rounds=2, width=3, num_nodes=17)
    assert _paths(_drafted(drafter, [17])[1], drafter) == []


def test_a_new_request_keeps_the_hit_rates_and_not_the_text():
    rng = np.random.default_rng(10)
    row = Row(hd_tree(databases(), remember=0), random_tokens(rng, 40))
    row.append(random_tokens(rng, 7))
    learned = row.state.hit_rates
    assert not np.allclose(learned, START_HIT_RATES)
    new = row.renewed(random_tokens(rng, 12))
    fresh = Row(row.drafter, new.text)
    np.testing.assert_array_equal(new.state.hit_rates, learned)
    jax.tree.map(np.testing.assert_array_equal, new.state, fresh.state._replace(hit_rates=learned))


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
        hd_tree(**{"databases": databases(), **options})


def test_the_order_of_the_letters_does_not_matter_and_the_context_needs_no_database():
    assert hd_tree(databases(), sources="smc").draft is hd_tree(databases(), sources="cms").draft
    assert drafters.make("hd_tree", Databases(), {"sources": "c"}).name == "hd_tree"


def test_the_same_options_compile_nothing_anew():
    first, second = hd_tree(databases(), num_nodes=9), hd_tree(databases(), num_nodes=9)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert second.tables["successors"] is first.tables["successors"]
    assert jax.tree.structure(first) != jax.tree.structure(hd_tree(databases(), num_nodes=10))


def test_the_turns_of_a_session_are_plain_decodings(lm):
    drafter = hd_tree(databases(48), rounds=2, width=2, history=64, remember=64, num_nodes=5)
    plain, session = decode.Session(lm), decode.Session(lm, drafter=drafter)
    for message in ("hello", "againhello", "hello"):
        expected, found = (each.generate(message, max_new_tokens=24) for each in (plain, session))
        verdict = exactness.check(lm, drafter, expected, found)
        assert verdict.is_equal or verdict.is_explained, verdict.message
        assert sum(found.accept_lengths) == len(found.tokens)
        if not verdict.is_equal:
            return
    assert not np.allclose(session._drafter_state.hit_rates, START_HIT_RATES)
