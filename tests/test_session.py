"""Sessions: the cache over turns, what a drafter learned over requests, saving and opening."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax import decode, draft_tree, exactness, prefill
from hd_jax.databases.collection import Databases
from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.databases.trigrams import TrigramCounts
from hd_jax.drafters.base import Context, Drafter


@functools.lru_cache
def bigrams(vocab_size: int = 48) -> Drafter:
    """Learns over requests: drafts the token that last followed the newest one."""

    def learn(table, context: Context):
        pairs = jnp.arange(context.tokens.shape[0] - 1)
        first = jnp.where(pairs < context.length - 1, context.tokens[:-1], vocab_size)
        return table.at[first].set(context.tokens[1:], mode="drop")

    def draft(tables, table, context: Context):
        del tables
        after = table[context.root]
        return draft_tree.from_chain(context.root, after[None], (after >= 0).astype(jnp.int32))

    return Drafter(
        "bigrams",
        num_nodes=2,
        max_depth=1,
        source_names=("bigrams",),
        draft=draft,
        init=lambda tables, context: learn(jnp.full(vocab_size, -1, jnp.int32), context),
        update=lambda tables, table, context, feedback: learn(table, context),
        renew=lambda tables, table, context: learn(table, context),
    )


def test_turns_continue_the_chat_and_reuse_the_cache(lm, monkeypatch):
    reads: list[tuple[int, int]] = []
    read = prefill.read

    def counted(*args, **kwargs):
        reads.append((args[4], sum(count for _, count in args[5])))
        return read(*args, **kwargs)

    monkeypatch.setattr(prefill, "read", counted)
    session = decode.Session(lm, drafter="pld")
    first = session.generate("hello", max_new_tokens=20)
    second = session.generate("again", max_new_tokens=20)
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2
    started = [first for first, count in reads if count]
    assert started == [0, len(first.prompt_tokens) + min(_kept(lm, first), 20 - 1)]
    whole = decode.generate(lm, session.messages[:-1], max_new_tokens=20)
    assert whole.prompt_tokens == second.prompt_tokens
    assert exactness.check(lm, session.drafter, whole, second).is_explained


def _kept(lm, result) -> int:
    """How many of the generated tokens the next prompt has again (the letters of this tokenizer stand for several ids)."""
    again = lm.tokenizer.encode(result.text)
    return next((i for i, (a, b) in enumerate(zip(again, result.tokens, strict=False)) if a != b), len(result.tokens))


def test_a_drafter_keeps_what_it_learned_until_told_otherwise(lm):
    session = decode.Session(lm, drafter=bigrams())
    cold = session.generate("hello", max_new_tokens=30)
    session.reset()
    warm = session.generate("hello", max_new_tokens=30)
    assert warm.tokens == cold.tokens
    assert warm.num_steps < cold.num_steps
    session.reset(keep_databases=False)
    assert session.generate("hello", max_new_tokens=30).accept_lengths == cold.accept_lengths


def test_a_saved_session_goes_on_as_if_it_had_not_been(lm, tmp_path):
    session = decode.Session(lm, drafter=bigrams())
    session.generate("hello", max_new_tokens=30)
    session.save(tmp_path / "chat")
    opened = decode.Session.open(lm, tmp_path / "chat", drafter=bigrams())
    a, b = session.generate("again", max_new_tokens=30), opened.generate("again", max_new_tokens=30)
    assert (a.tokens, a.accept_lengths) == (b.tokens, b.accept_lengths)
    assert opened.messages == session.messages
    assert not list((tmp_path / "chat").glob("*.part"))


def _databases() -> Databases:
    documents = [np.random.default_rng(seed).integers(2, 48, 300).astype(np.int32) for seed in range(2)]
    return Databases(
        model_text=SuffixArray.build(documents),
        statistics=NgramTrie.build(documents, min_documents=1),
        trigrams=TrigramCounts.build(documents),
    )


@pytest.mark.parametrize(
    ("name", "options", "others"),
    [
        ("recycling", {}, {"num_successors": 4}),
        ("aded", {"adapt": "from_logits"}, {"max_pairs": 64}),
        ("aded", {"adapt": "from_text"}, {"max_pairs": 64}),
        ("hd_tree", {"sources": "cmsr", "rounds": 2}, {"history": 64}),
    ],
)
def test_what_a_drafter_of_ours_learned_is_saved_with_the_session(lm, tmp_path, name, options, others):
    make = functools.partial(decode.make_drafter, lm, name, databases=_databases(), **options)
    session = decode.Session(lm, drafter=make(num_nodes=9))
    session.generate("hello", max_new_tokens=40)
    session.save(tmp_path)
    opened = decode.Session.open(lm, tmp_path, drafter=make(num_nodes=9))
    first, second = (each.generate("again", max_new_tokens=40) for each in (session, opened))
    told = lambda result: (result.tokens, result.accept_lengths, result.source_counts)  # noqa: E731
    assert told(first) == told(second)
    cold = decode.generate(lm, opened.messages[:-1], drafter=opened.drafter, max_new_tokens=40)
    assert cold.source_counts != second.source_counts, "what was learned changes nothing here: the test would show nothing"
    with pytest.raises(ValueError, match="other shapes"):
        decode.Session.open(lm, tmp_path, drafter=make(num_nodes=9, **others))


def test_bad_input_leaves_the_chat_as_it_was(lm, tmp_path):
    session = decode.Session(lm)
    session.generate("hello", max_new_tokens=3)
    for message, options in (("", {}), ("hello", {"max_new_tokens": 0}), ("a" * 600, {})):
        with pytest.raises(ValueError):
            session.generate(message, **options)
        assert len(session.messages) == 2
    session.save(tmp_path)
    with pytest.raises(ValueError, match="saved with drafter none, not pld"):
        decode.Session.open(lm, tmp_path, drafter="pld")
    with pytest.raises(ValueError, match="no saved session"):
        decode.Session.open(lm, tmp_path / "elsewhere")
