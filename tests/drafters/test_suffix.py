"""The suffix drafter against counting in plain Python: what follows every match length, in all three texts, and the tree."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax import decode, draft_tree, exactness
from hd_jax.databases import SEPARATOR
from hd_jax.databases.collection import Databases
from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.draft_tree import NO_NODE, NO_PARENT, UNUSED, DraftTree
from hd_jax.drafters.base import Context, Feedback
from hd_jax.drafters.suffix import MAX_CORPUS_DEPTH, MAX_CORPUS_MATCH, suffix

Estimates = dict[tuple[int, ...], float]  # of paths; that of the empty one is the weight of the whole


def _shares(
    text: list[int], end: int, newest: list[int], max_match: int, max_depth: int, smoothing: int = 0
) -> dict[int, Estimates]:
    """By match length, the share of the occurrences in text[:end] that each path follows."""
    out = {}
    for length in range(1, min(max_match, len(newest)) + 1):
        counts: dict[tuple[int, ...], int] = {}
        places = [p for p in range(length, end) if text[p - length : p] == newest[len(newest) - length :]]
        for place in places:
            following = text[place : min(end, place + max_depth)]
            following = following[: following.index(SEPARATOR)] if SEPARATOR in following else following
            for depth in range(len(following) + 1):
                path = tuple(following[:depth])
                counts[path] = counts.get(path, 0) + 1
        if places:
            out[length] = {path: count / (len(places) + smoothing) for path, count in counts.items()}
    return out


def _smoothed(documents: list[np.ndarray], newest: list[int]) -> dict[int, Estimates]:
    """The corpus' estimates: products of count / (count above + 1)."""
    out = {}
    for length in range(1, MAX_CORPUS_MATCH + 1):
        wanted, counts = newest[-length:], {(): 0}
        for document in (d.tolist() for d in documents):
            for place in range(length, len(document)):
                if document[place - length : place] == wanted:
                    for end in range(place, min(place + MAX_CORPUS_DEPTH, len(document)) + 1):
                        path = tuple(document[place:end])
                        counts[path] = counts.get(path, 0) + 1
        if not counts[()]:
            break
        estimates: Estimates = {}
        for path in sorted((p for p in counts if p), key=len):
            estimates[path] = estimates.get(path[:-1], 1.0) * counts[path] / (counts[path[:-1]] + 1)
        estimates[()] = sum(estimate for path, estimate in estimates.items() if len(path) == 1)
        out[length] = estimates
    return out


def _mean(tries: list[Estimates], decay: float = 0.8) -> Estimates:
    out: Estimates = {}
    for path, estimate in (item for trie in tries for item in trie.items()):
        out[path] = out.get(path, 0.0) + estimate
    weight = out.pop((), 0.0)
    return {path: estimate / weight * decay ** len(path) for path, estimate in out.items()}


def _paths(tree: DraftTree) -> list[tuple[int, ...]]:
    """The token path of every node but the root, in order; checks that the tree is well formed."""
    tokens, parents, sources = (np.asarray(a).tolist() for a in (tree.tokens, tree.parents, tree.sources))
    num_nodes = parents.index(UNUSED) if UNUSED in parents else len(parents)
    assert parents[0] == NO_PARENT and not np.any(tree.is_window)
    assert all(parent == UNUSED for parent in parents[num_nodes:])
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, num_nodes):
        assert 0 <= parents[node] < node and sources[node] >= 0
        paths.append((*paths[parents[node]], tokens[node]))
    assert len(set(paths)) == len(paths)
    return paths[1:]


def _assert_best(paths: list[tuple[int, ...]], expected: Estimates, num_nodes: int) -> None:
    """The paths are the best of the expected ones, best first; which of equal ones is free."""
    best = sorted(expected.values(), reverse=True)[: num_nodes - 1]
    np.testing.assert_allclose([expected[path] for path in paths], best, rtol=1e-4)


def _context(text: list[int], num_slots: int = 64, host=()) -> Context:
    garbage = [3] * (num_slots - len(text))
    return Context(jnp.asarray(text + garbage, jnp.int32), jnp.int32(len(text)), jnp.int32(1), host)


def _advance(drafter, update, state, text: list[int], num_appended: int):
    """The state after a step that appended the text's last tokens."""
    path = jnp.full(drafter.max_depth + 1, NO_NODE)
    none = jnp.zeros((drafter.num_nodes, 0))
    tree = draft_tree.root_only(jnp.int32(0), drafter.num_nodes)
    feedback = Feedback(tree, tree.tokens, tree.tokens, none, none, path, jnp.int32(num_appended))
    return update((), state, _context(text), feedback)


@pytest.mark.parametrize(("max_match", "max_depth", "num_nodes"), [(4, 6, 17), (1, 3, 5), (16, 24, 65)])
def test_all_match_lengths_of_the_context_vote(max_match, max_depth, num_nodes):
    rng = np.random.default_rng(0)
    drafter = suffix(
        corpus=None, combine="vote", remember=0, max_match=max_match, max_depth=max_depth, num_positions=64, num_nodes=num_nodes
    )
    draft = jax.jit(drafter.draft)
    state = drafter.init((), _context([0]))
    num_drafted = 0
    for _ in range(60):
        text = rng.integers(0, 4, rng.integers(1, 50)).tolist()
        paths = _paths(draft((), state, _context(text)))
        found = _shares(text, len(text), text, max_match, max_depth)
        _assert_best(paths, _mean(list(found.values())), num_nodes)
        num_drafted += len(paths)
    assert num_drafted > 60


@pytest.mark.parametrize(("factor", "min_probability"), [(1.0, 0.1), (2.5, 0.0), (64.0, 0.02)])
def test_the_best_match_length_wins(factor, min_probability):
    rng = np.random.default_rng(1)
    make = functools.partial(suffix, corpus=None, combine="best", remember=0, num_positions=64, max_match=5, max_depth=6)
    drafter = make(factor=factor, min_probability=min_probability, num_nodes=33)
    draft = jax.jit(drafter.draft)
    state = drafter.init((), _context([0]))
    winners = set()
    for _ in range(60):
        text = rng.integers(0, 3, rng.integers(2, 50)).tolist()
        paths = _paths(draft((), state, _context(text)))
        trees: dict[int, list[float]] = {}
        found = _shares(text, len(text), text, 5, 6)
        for length, estimates in found.items():
            likely = sorted((e for path, e in estimates.items() if path and e >= min_probability), reverse=True)
            trees[length] = likely[: min(int(factor * length), 32)]
        best = max((sum(tree) for tree in trees.values()), default=0.0)
        winner = [length for length, tree in trees.items() if np.isclose(sum(tree), best)]
        if not best:
            assert not paths
            continue
        drafted = {length: sorted((found[length].get(path, -1.0) for path in paths), reverse=True) for length in winner}
        assert any(len(d) == len(trees[x]) and np.allclose(d, trees[x]) for x, d in drafted.items())
        winners.update(winner if len(winner) == 1 else [])
    assert len(winners) > 1


def test_the_longest_then_latest_matches_are_looked_at():
    text = [9, 1, 5, 2, 1, 6, 2, 1, 7, 3, 1, 8, 2, 1]
    drafter = suffix(corpus=None, combine="vote", remember=0, num_positions=3, max_depth=1)
    tree = jax.jit(drafter.draft)((), drafter.init((), _context(text)), _context(text))
    assert sorted(_paths(tree)) == [(6,), (7,), (8,)]  # after "2 1", and the latest after "1" alone


@pytest.mark.parametrize("remember", [24, 40])
def test_earlier_answers_vote_until_they_are_overwritten(remember):
    rng = np.random.default_rng(2)
    drafter = suffix(corpus=None, combine="vote", remember=remember, max_match=4, max_depth=6, num_nodes=33, num_positions=64)
    draft, update = jax.jit(drafter.draft), jax.jit(drafter.update)
    assert drafter.renew is not None
    state, written, sources = None, [], []
    for request in range(6):
        text = rng.integers(0, 4, 3).tolist()
        context = _context(text)
        if state is None:
            state = drafter.init((), context)
        else:
            state = drafter.renew((), state, context)
            written.append(SEPARATOR)
        num_own = 0
        for _ in range(5):
            ring = written[max(len(written) - remember, 0) :]
            tree = draft((), state, _context(text))
            by_context = _shares(text, len(text), text, 4, 6)
            by_answers = _shares(ring, max(len(ring) - num_own, 0), text, 4, 6, smoothing=1)
            _assert_best(_paths(tree), _mean([*by_context.values(), *by_answers.values()]), 33)
            sources.append(set(np.asarray(tree.sources)[np.asarray(tree.parents) >= 0].tolist()))
            new = rng.integers(0, 4, rng.integers(1, 5)).tolist()
            text, written, num_own = text + new, written + new, num_own + len(new)
            state = _advance(drafter, update, state, text, len(new))
        same = _advance(drafter, update, state, text, 0)  # of a row that has ended
        assert all(np.array_equal(a, b) for a, b in zip(state, same, strict=True))
        if not request:
            assert all(found <= {0} for found in sources)  # the first has nothing to remember
    assert any(1 in found for found in sources)


@functools.cache
def _documents(num_tokens: int = 10) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(2, 2 + num_tokens, 70).astype(np.int32) for _ in range(6)]


@functools.cache
def _databases(is_trie: bool = False) -> Databases:
    if is_trie:
        return Databases(statistics=NgramTrie.build(_documents(), max_order=MAX_CORPUS_MATCH + 1, min_documents=1))
    return Databases(statistics=SuffixArray.build(_documents()), model_text=SuffixArray.build(_documents(5)))


@pytest.mark.parametrize("corpus", ["statistics", "model"])
def test_context_and_corpus_vote_on_one_tree(corpus):
    documents = _documents() if corpus == "statistics" else _documents(5)
    drafter = suffix(_databases(), corpus=corpus, combine="vote", remember=0, num_positions=64, max_depth=8, num_nodes=513)
    small = suffix(_databases(), corpus=corpus, combine="vote", remember=0, num_positions=64, max_depth=8, num_nodes=17)
    assert drafter.refresh is not None and small.refresh is not None
    draft, draft_small = jax.jit(drafter.draft), jax.jit(small.draft)
    rng = np.random.default_rng(4)
    for _ in range(8):
        text = [
            *rng.integers(2, 12, 20).tolist(),
            *documents[0][:30].tolist(),
            *documents[1][40 : rng.integers(41, 50)].tolist(),
        ]
        tree = draft((), (), _context(text, host=drafter.refresh(_context(text))))
        by_context = _shares(text, len(text), text, 16, 8)
        expected = _mean([*by_context.values(), *_smoothed(documents, text).values()])
        _assert_best(_paths(tree), expected, 513)
        assert np.any(np.asarray(tree.sources) == 2)
        first = _paths(draft_small((), (), _context(text, host=small.refresh(_context(text)))))
        best = sorted(expected.values(), reverse=True)[:16]
        assert sum(expected[path] for path in first) > 0.9 * sum(best)  # the corpus sends no more than 16 nodes


def test_a_trie_of_ngrams_drafts_what_the_text_does_up_to_its_order():
    text = _documents()[2][:50].tolist()
    found = []
    for is_trie in (False, True):
        drafter = suffix(_databases(is_trie), combine="vote", remember=0, max_depth=1)
        assert drafter.refresh is not None
        tree = jax.jit(drafter.draft)((), (), _context(text, host=drafter.refresh(_context(text))))
        found.append((sorted(_paths(tree)), np.asarray(tree.sources).tolist()))
    assert found[0] == found[1] and 2 in found[0][1]


def test_the_corpus_best_length_competes_by_score():
    drafter = suffix(_databases(), combine="best", remember=0, factor=2.0, min_probability=0.1)
    assert drafter.refresh is not None
    text = [0, *_documents()[2][40:60].tolist()]
    tree = jax.jit(drafter.draft)((), (), _context(text, host=drafter.refresh(_context(text))))
    following = tuple(_documents()[2][60:68].tolist())
    assert _paths(tree) == [following[:depth] for depth in range(1, 9)]  # one occurrence, sure of all its tokens
    assert set(np.asarray(tree.sources)[1:9].tolist()) == {2}


def test_what_the_corpus_said_holds_for_one_length_only():
    drafter = suffix(_databases(), combine="vote", remember=0)
    assert drafter.refresh is not None
    text = _documents()[0][:20].tolist()
    host = drafter.refresh(_context(text))
    draft = jax.jit(drafter.draft)
    assert 2 in np.asarray(draft((), (), _context(text, host=host)).sources)
    longer = [*text, int(_documents()[0][20])]
    assert 2 not in np.asarray(draft((), (), _context(longer, host=host)).sources)


@pytest.mark.parametrize(("combine", "loop", "temperature"), [("vote", "host", 1.0), ("best", "device", 0.0)])
def test_decoding_writes_plain_decodings_tokens(lm, combine, loop, temperature):
    prompt = np.random.default_rng(5).integers(2, 12, 30).tolist()
    options = {"max_new_tokens": 40, "temperature": temperature}
    reference = decode.generate(lm, prompt, **options)
    drafter = suffix(_databases(), combine=combine, remember=64, num_nodes=17)
    out = decode.generate(lm, prompt, drafter=drafter, loop=loop, **options)
    assert exactness.check(lm, drafter, reference, out, temperature=temperature).is_explained
    if loop == "host":
        assert sum(out.source_counts["statistics"]["proposed"]) > 0


def test_a_session_remembers_its_answers(lm):
    session = decode.Session(lm, drafter=suffix(corpus=None, remember=64))
    first = session.generate("abc", max_new_tokens=30)
    session.reset()
    again = session.generate("abc", max_new_tokens=30)
    assert again.tokens == first.tokens and again.num_steps < first.num_steps
    assert sum(again.source_counts["earlier answers"]["accepted"]) > 0
    session.reset(keep_databases=False)
    assert session.generate("abc", max_new_tokens=30).num_steps == first.num_steps


def test_the_same_options_give_the_same_functions():
    first, second = suffix(_databases()), suffix(_databases(), factor=8)
    assert jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": "web"}, "corpus is 'statistics', 'model' or None, not 'web'"),
        ({"combine": "sum"}, "combine is 'best' or 'vote', not 'sum'"),
        ({"remember": -1}, "remember must be at least 0"),
        ({"remember": 24}, "remember must be 0 or more than max_depth, 24"),
        ({"factor": 0}, "factor must be positive"),
        ({"min_probability": 1.0}, "min_probability must be at least 0 and less than 1"),
        ({"decay": 0.0}, "decay must be greater than 0"),
        ({"max_match": 0}, "max_match must be at least 1"),
        ({"max_depth": 0}, "max_depth must be at least 1"),
        ({"num_positions": 0}, "num_positions must be at least 1"),
        ({"num_nodes": 1}, "num_nodes must be at least 2"),
        ({}, "statistics database is missing"),
        ({"corpus": "model"}, "model_text database is missing"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        suffix(**options)
