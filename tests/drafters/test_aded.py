"""ADED against plain Python: both rules of adaptation, both searches, bounds, and what a session keeps."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax import decode, drafters
from hd_jax.databases import pair_overlay
from hd_jax.databases.collection import Databases
from hd_jax.databases.trigrams import TrigramCounts
from hd_jax.draft_tree import NO_NODE, NO_PARENT, NO_TOKEN, UNUSED, DraftTree
from hd_jax.drafters.aded import aded, weights
from hd_jax.drafters.base import Context, Drafter, Feedback

VOCAB_SIZE = 12


def _documents(seed: int = 0, vocab: int = VOCAB_SIZE) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    skewed = rng.dirichlet(np.full(vocab, 0.3))
    return [rng.choice(vocab, 120, p=skewed).astype(np.int32) for _ in range(6)]


@pytest.fixture(scope="module")
def databases() -> Databases:
    return Databases(trigrams=TrigramCounts.build(_documents(), max_successors=4))


def _context(tokens: list[int], size: int = 64) -> Context:
    padded = np.zeros(size, np.int32)
    padded[: len(tokens)] = tokens
    return Context(jnp.asarray(padded), jnp.int32(len(tokens)), jnp.int32(1))


def _feedback(tree: DraftTree, top_tokens: np.ndarray, top_logits: np.ndarray, num_appended: int = 1) -> Feedback:
    path = jnp.full(5, NO_NODE).at[0].set(0)
    logits = jnp.asarray(top_logits, jnp.float32)
    return Feedback(tree, tree.tokens, tree.tokens, jnp.asarray(top_tokens, jnp.int32), logits, path, jnp.int32(num_appended))


def _row(drafter: Drafter, state, pair) -> dict[int, float]:
    """The matrix' row of one pair."""
    tokens, found, _ = weights(drafter.tables, state, jnp.asarray([pair], jnp.int32))
    return {int(t): float(w) for t, w in zip(tokens[0], found[0], strict=True) if t != NO_TOKEN}


def _bucket(pair: tuple[int, int], num_buckets: int) -> int:
    return int(pair_overlay.buckets(jnp.asarray([pair], jnp.int32), num_buckets)[0])


def _assert_rows(drafter: Drafter, state, expected: dict[tuple[int, int], dict[int, float]]) -> None:
    for pair, row in expected.items():
        found = _row(drafter, state, pair)
        assert found.keys() == row.keys(), pair
        assert [found[t] for t in row] == pytest.approx(list(row.values()), abs=1e-5)


def _heaviest(row: dict[int, float], num_successors: int) -> dict[int, float]:
    return dict(sorted(row.items(), key=lambda item: -item[1])[:num_successors])


def test_without_adaptation_the_rows_are_the_corpus(databases):
    """Discounted frequencies of a known pair; of an unknown one, those of its second token."""
    drafter = aded(databases, adapt="none", discount=0.0, num_successors=4, min_count=1)
    state = drafter.init(drafter.tables, _context([1, 2]))
    counts = databases.trigrams
    for place in range(0, len(counts.pairs), 7):
        pair, entries = counts.pairs[place], slice(counts.starts[place], counts.starts[place + 1])
        row = _row(drafter, state, pair.tolist())
        for token, count in zip(counts.successors[entries].tolist(), counts.counts[entries].tolist(), strict=True):
            assert (
                row[token] >= count / counts.totals[place] - 1e-6
            )  # what was left out of the pair is lent by its second token
    second = int(counts.pairs[0, 1])
    followers = {int(b): int(n) for (a, b), n in zip(counts.pairs, counts.totals, strict=True) if a == second}
    row = _row(drafter, state, [VOCAB_SIZE + 5, second])
    total = sum(followers.values())
    assert row == pytest.approx({t: followers[t] / total for t in row}) and len(row) == min(4, len(followers))


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_from_logits_moves_rows_as_plain_python_does(databases, rate):
    """Trees with equal pairs, unused places and colliding buckets; the last node of a bucket is recorded."""
    rng = np.random.default_rng(1)
    num_buckets, k = 32, 4
    drafter = aded(databases, num_successors=k, max_pairs=num_buckets, rate=rate, num_nodes=8)
    state = drafter.init(drafter.tables, _context([1, 2]))
    update = jax.jit(drafter.update)
    for _ in range(8):
        text = rng.integers(0, VOCAB_SIZE, 6).tolist()
        parents = np.array([NO_PARENT, *(int(rng.integers(0, i)) for i in range(1, 8))], np.int32)
        tokens = rng.integers(0, 4, 8).astype(np.int32)
        tokens[0] = text[-2]
        is_used = np.array([True, *(rng.random(7) < 0.8)])
        top = np.array([rng.permutation(VOCAB_SIZE)[:k] for _ in range(8)], np.int32)
        logits = np.sort(rng.normal(size=(8, k)))[:, ::-1].astype(np.float32)
        parents_or_unused = jnp.asarray(np.where(is_used, parents, UNUSED))
        tree = DraftTree(jnp.asarray(tokens), parents_or_unused, jnp.zeros(8, jnp.int32), jnp.zeros(8, bool), jnp.ones(8))
        winners: dict[int, tuple[tuple[int, int], dict[int, float]]] = {}
        for node in range(8):
            if not is_used[node]:
                continue
            above = text[-3] if node == 0 else int(tokens[parents[node]])
            pair = (above, int(tokens[node]))
            row = {t: (1 - rate) * w for t, w in _row(drafter, state, pair).items()}
            shares = np.exp(logits[node]) / np.exp(logits[node]).sum()
            for token, share in zip(top[node].tolist(), shares.tolist(), strict=True):
                row[token] = row.get(token, 0.0) + rate * share
            winners[_bucket(pair, num_buckets)] = (pair, _heaviest({t: w for t, w in row.items() if w > 0}, k))
        state = update(drafter.tables, state, _context(text), _feedback(tree, top, logits))
        _assert_rows(drafter, state, dict(winners.values()))


def test_from_text_adds_as_plain_python_does(databases):
    """Steps over a text that repeats itself: equal tri-grams in one window, rows that fill up, and the cap."""
    rng = np.random.default_rng(2)
    gain, cap, k, num_buckets = 0.5, 1.2, 4, 1 << 12
    drafter = aded(
        databases, adapt="from_text", num_successors=k, max_pairs=num_buckets, gain=gain, cap=cap, num_recent=8, num_nodes=8
    )
    assert drafter.num_top_logits == 0
    state = drafter.init(drafter.tables, _context([1, 2]))
    update = jax.jit(drafter.update)
    text = rng.integers(0, 3, 2).tolist()
    tree = DraftTree(*(jnp.zeros(8, jnp.int32) for _ in range(3)), jnp.zeros(8, bool), jnp.ones(8))
    capped = 0
    for _ in range(25):
        text += rng.integers(0, 3, int(rng.integers(1, 4))).tolist()
        newest = text[-8:]
        rows: dict[tuple[int, int], dict[int, float]] = {}
        for a, b, c in zip(newest[:-2], newest[1:-1], newest[2:], strict=True):
            row = rows.setdefault((a, b), _row(drafter, state, (a, b)))
            row[c] = row.get(c, 0.0) + gain
        assert len({_bucket(pair, num_buckets) for pair in rows}) == len(rows), "two pairs of the test share a bucket"
        expected = {pair: {t: min(w, cap) for t, w in _heaviest(row, k).items()} for pair, row in rows.items()}
        capped += sum(w == cap for row in expected.values() for w in row.values())
        state = update(drafter.tables, state, _context(text), _feedback(tree, np.zeros((8, 0)), np.zeros((8, 0))))
        _assert_rows(drafter, state, expected)
    assert capped > 5


def test_the_prompt_is_read_if_asked_for(databases):
    text = np.random.default_rng(3).integers(0, 3, 150).tolist()  # of several chunks
    context = _context(text, 160)
    quiet, reader = (aded(databases, adapt="from_text", prompt_gain=gain, cap=100.0) for gain in (0.0, 0.25))
    state = reader.init(reader.tables, context)
    pair = (text[0], text[1])
    before = _row(quiet, quiet.init(quiet.tables, context), pair)
    row = _row(reader, state, pair)
    for token in row:
        times = sum(text[i : i + 3] == [*pair, token] for i in range(148))
        assert row[token] == pytest.approx(before.get(token, 0.0) + 0.25 * times, abs=1e-4)
    assert max(row.values()) > 1.5


@pytest.mark.parametrize("adapt", ["from_logits", "from_text"])
def test_a_row_that_has_ended_learns_nothing(databases, adapt):
    drafter = aded(databases, adapt=adapt, num_successors=4, max_pairs=64, num_nodes=8)
    context = _context([1, 2, 1, 2, 3])
    state = drafter.init(drafter.tables, context)
    tree = drafter.draft(drafter.tables, state, context)
    top = np.tile(np.arange(drafter.num_top_logits), (8, 1))
    for num_appended in (0, 1):
        after = drafter.update(drafter.tables, state, context, _feedback(tree, top, np.zeros(top.shape), num_appended))
        is_equal = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True))
        assert is_equal == (num_appended == 0)


@pytest.mark.parametrize("adapt", ["from_logits", "from_text"])
def test_ten_thousand_updates_stay_within_bounds(databases, adapt):
    drafter = aded(databases, adapt=adapt, num_successors=4, max_pairs=16, num_nodes=8)
    state = drafter.init(drafter.tables, _context([1, 2]))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)

    def step(index, state):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), index), 3)
        context = Context(jax.random.randint(keys[0], (64,), 0, VOCAB_SIZE), jnp.int32(40), jnp.int32(1))
        tree = drafter.draft(drafter.tables, state, context)
        shape = (8, drafter.num_top_logits)
        logits = 30 * jax.random.normal(keys[1], shape)
        tokens = jax.random.randint(keys[2], (8, 1), 0, VOCAB_SIZE) + jnp.arange(shape[1])
        path = jnp.full(5, NO_NODE).at[0].set(0)
        return drafter.update(
            drafter.tables,
            state,
            context,
            Feedback(tree, tree.tokens, tree.tokens, tokens % VOCAB_SIZE, logits, path, jnp.int32(1)),
        )

    state = jax.jit(lambda state: jax.lax.fori_loop(0, 10_000, step, state))(state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    found, tokens = np.asarray(state.weights), np.asarray(state.tokens)
    assert np.isfinite(found).all() and (found >= 0).all() and found.max() <= (1.0001 if adapt == "from_logits" else 3.0)
    assert np.all((found > 0) == (tokens != NO_TOKEN)) and (np.diff(found, axis=1) <= 0).all()
    assert all(len(set(row[row != NO_TOKEN].tolist())) == (row != NO_TOKEN).sum() for row in tokens)
    assert np.count_nonzero(state.keys[:, 1] != NO_TOKEN) > 8


def _child_paths(tree: DraftTree) -> set[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(np.asarray(tree.tokens)[1:].tolist(), np.asarray(tree.parents)[1:].tolist(), strict=True):
        paths.append((*paths[parent], token) if parent != UNUSED else ())
    return set(paths) - {()}


@pytest.mark.parametrize("search", ["best_first", "mcts"])
def test_drafts_are_the_same_in_another_process(databases, search, tmp_path):
    """The tri-grams' file, opened again."""
    options = {"adapt": "none", "search": search, "num_nodes": 16, "iterations": 40}
    databases.trigrams.save(tmp_path / "trigrams.safetensors", fingerprint="f")
    drafter = aded(databases, **options)
    context = _context([1, 2, 3])
    tree = jax.jit(drafter.draft)(drafter.tables, drafter.init(drafter.tables, context), context)
    script = (
        "import sys, jax, jax.numpy as jnp\n"
        "from hd_jax.databases.collection import Databases\n"
        "from hd_jax.drafters import aded\n"
        "from hd_jax.drafters.base import Context\n"
        f"drafter = aded(Databases(sys.argv[1], 'f'), **{options!r})\n"
        "context = Context(jnp.zeros(64, jnp.int32).at[:3].set(jnp.asarray([1, 2, 3])), jnp.int32(3), jnp.int32(1))\n"
        "tree = jax.jit(drafter.draft)(drafter.tables, drafter.init(drafter.tables, context), context)\n"
        "print(tree.tokens.tolist(), tree.parents.tolist())\n"
    )
    out = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"{tree.tokens.tolist()} {tree.parents.tolist()}"
    assert len(_child_paths(tree)) > 8


def _lm_databases() -> Databases:
    rng = np.random.default_rng(3)
    return Databases(trigrams=TrigramCounts.build([rng.integers(2, 48, 300).astype(np.int32) for _ in range(2)]))


@pytest.mark.parametrize("remember", [True, False])
def test_a_session_keeps_what_was_learned_if_asked_to(lm, remember):
    session = decode.Session(lm, drafter=aded(_lm_databases(), remember=remember, num_nodes=9))
    cold = session.generate("hello", max_new_tokens=40)
    session.reset()
    warm = session.generate("hello", max_new_tokens=40)
    assert warm.tokens == cold.tokens
    assert (warm.accept_lengths == cold.accept_lengths) == (not remember)
    session.reset(keep_databases=False)
    assert session.generate("hello", max_new_tokens=40).accept_lengths == cold.accept_lengths


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapt": "both"}, "adapt is one of from_logits, from_text, none, not 'both'"),
        ({"search": "dfs"}, "search is best_first or mcts, not 'dfs'"),
        ({"max_pairs": 100}, "max_pairs must be a power of two, not 100"),
        ({"num_recent": 2}, "num_recent must be at least 3, not 2"),
        ({"num_nodes": 1}, "num_nodes must be at least 2, not 1"),
        ({"depth": 0}, "depth must be at least 1, not 0"),
        ({"rate": 0.0}, "rate must be greater than 0 and at most 1, not 0"),
        ({"gain": float("inf")}, "gain must be positive and finite, not inf"),
        ({"wave": 40}, "wave must divide its 150 iterations, not be 40"),
        ({"c1": -1.0}, "c1 must be at least 0 and finite, not -1"),
        ({"remember": "yes"}, "remember is true or false"),
        ({"discount": 1.0}, "discount must be at least 0 and less than 1, not 1"),
    ],
)
def test_bad_options_are_named(databases, options, message):
    with pytest.raises(ValueError, match=message):
        aded(databases, **options)


def test_a_missing_database_is_named():
    with pytest.raises(ValueError, match="trigrams database is missing"):
        drafters.make("aded", Databases(), {})
