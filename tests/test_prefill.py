"""How prompts are read: in what chunks, and what making it ready leaves behind."""

from __future__ import annotations

import numpy as np
import pytest

from hd_jax import decode, prefill, runner


@pytest.mark.parametrize("sizes", [(256,), (256, 64)])
def test_chunks_read_a_prompt_and_little_more(monkeypatch, sizes):
    monkeypatch.setitem(prefill.CHUNK_SIZES, "cpu", sizes)
    for num_tokens in range(1000):
        chunks = prefill.chunks_of(num_tokens)
        assert [size for size, _ in chunks] == [size for size in sizes if size in dict(chunks)]
        num_read = sum(size * count for size, count in chunks)
        assert num_tokens <= num_read < num_tokens + sizes[-1]
        assert [size for size, _ in prefill.chunks_of(num_tokens, is_exact=True)] == [sizes[-1]] * (num_tokens > 0)


@pytest.fixture
def fresh(monkeypatch):
    """Forgets, on call, what programs the process has run."""

    def forget():
        for module in (prefill, runner):
            monkeypatch.setattr(module, "_has_run", set())

    return forget


def test_what_runs_for_the_first_time_is_run_before_the_clock_starts(lm, fresh, monkeypatch):
    read_alike, dispatch = prefill.read_alike, runner.loop.run_steps
    chunks, steps = [], []

    def counted(*args, chunk_size, **kwargs):
        chunks.append((chunk_size, int(args[5])))
        return read_alike(*args, chunk_size=chunk_size, **kwargs)

    def stepped(*args, **kwargs):
        steps.append(int(args[7]))
        return dispatch(*args, **kwargs)

    monkeypatch.setattr(prefill, "read_alike", counted)
    monkeypatch.setattr(runner.loop, "run_steps", stepped)
    prompt = np.random.default_rng(1).integers(2, 48, 256 + 64 + 9).tolist()
    fresh()
    decode.generate(lm, prompt, max_new_tokens=1)
    assert chunks == [(64, 1), (256, 1), (256, 1), (64, 2)]
    assert steps == [1, runner.SYNC_EVERY]
    chunks.clear(), steps.clear()
    decode.generate(lm, prompt[::-1], max_new_tokens=1)
    assert chunks == [(64, 0), (256, 0), (256, 1), (64, 2)]
    assert steps == [0, runner.SYNC_EVERY]


@pytest.mark.parametrize("drafter", ["none", "pld", "lookahead", "recycling"])
def test_what_is_run_in_vain_leaves_nothing_behind(lm, fresh, drafter):
    """In a session the cache and the drafter's state go on: the second turn is told what programs to make ready, or not."""
    told = []
    for forget in (fresh, lambda: None):
        session = decode.Session(lm, drafter=drafter)
        turns = []
        for message in ("hello" * 40, "again"):
            forget()
            turns.append(session.generate(message, max_new_tokens=20, logprobs=2))
        told.append([(turn.tokens, turn.accept_lengths, turn.logprobs) for turn in turns])
    assert told[0] == told[1]
