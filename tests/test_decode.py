"""The door: every drafter, both loops, greedy and sampled, batches, stops and ends give plain decoding's tokens."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax import decode, draft_tree, drafters, exactness, prefill, runner
from hd_jax.databases.collection import Databases
from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.databases.trigrams import TrigramCounts
from hd_jax.draft_tree import NO_PARENT, UNUSED, DraftTree
from hd_jax.drafters.base import Context, Drafter

PROMPTS = [[3, 4, 5, 6, 7] * 5, [9], np.random.default_rng(0).integers(2, 48, 80).tolist()]
MANY = [*PROMPTS, [5, 6, 7] * 4, [11, 30, 2, 8]]
NUM_NEW = 40


@functools.lru_cache
def random_trees(num_nodes: int = 9) -> Drafter:
    """Adversarial: random shapes, duplicate children, window nodes and unused places, with few distinct tokens."""

    def draft(tables, state, context: Context) -> DraftTree:
        del tables, state
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), context.length), 5)
        places = jnp.arange(num_nodes)
        parents = jax.random.randint(keys[0], (num_nodes,), 0, jnp.maximum(places, 1))
        parents = jnp.where((jax.random.uniform(keys[1], (num_nodes,)) < 0.1) & (places > num_nodes // 2), UNUSED, parents)
        # Half of the tokens are from the text, and children repeat each other.
        text = context.tokens[jax.random.randint(keys[2], (num_nodes,), 0, context.length)]
        is_window = (jax.random.uniform(keys[3], (num_nodes,)) < 0.1) & (places > 0)
        return DraftTree(
            tokens=jnp.where(places == 0, context.root, text),
            parents=jnp.where(places == 0, NO_PARENT, parents),
            sources=jnp.where(places == 0, draft_tree.NO_SOURCE, 0),
            is_window=is_window,
            probabilities=jnp.where(places % 2 == 0, jax.random.uniform(keys[4], (num_nodes,)), draft_tree.UNKNOWN),
        )

    return Drafter("random", num_nodes=num_nodes, max_depth=num_nodes - 1, source_names=("random",), draft=draft)


@functools.lru_cache
def always_wrong(num_nodes: int = 6) -> Drafter:
    """Adversarial: the same long chain every time, of a token that no text here holds."""

    def draft(tables, state, context: Context) -> DraftTree:
        del tables, state
        tokens = jnp.full(num_nodes - 1, 0, jnp.int32)
        return draft_tree.from_chain(context.root, tokens, jnp.int32(num_nodes - 1))

    return Drafter("wrong", num_nodes=num_nodes, max_depth=num_nodes - 1, source_names=("wrong",), draft=draft)


@functools.lru_cache
def python_pld(num_tokens: int = 4) -> Drafter:
    """A drafter in plain Python, on the host: what followed the last occurrence of the newest token."""

    def refresh(context: Context):
        text = context.tokens[: int(context.length)].tolist()
        hits = [i for i, token in enumerate(text[:-1]) if token == text[-1]]
        found = text[hits[-1] + 1 :][:num_tokens] if hits else []
        return np.asarray(found + [0] * (num_tokens - len(found)), np.int32), np.int32(len(found)), np.int32(len(text))

    def draft(tables, state, context: Context) -> DraftTree:
        del tables, state
        tokens, length, at = context.host
        return draft_tree.from_chain(context.root, tokens, jnp.where(at == context.length, length, 0))

    return Drafter(
        "python", num_nodes=num_tokens + 1, max_depth=num_tokens, source_names=("context",), draft=draft, refresh=refresh
    )


@functools.cache
def _databases() -> Databases:
    """Small ones that hold some of what the model writes, as if they had been made of its answers."""
    rng = np.random.default_rng(3)
    documents = [np.asarray(PROMPTS[0], np.int32), *(rng.integers(2, 48, 200).astype(np.int32) for _ in range(4))]
    return Databases(
        model_text=SuffixArray.build(documents),
        statistics=NgramTrie.build(documents, min_documents=1),
        trigrams=TrigramCounts.build(documents),
    )


DRAFTERS = {
    "pld": drafters.pld(),
    "hd": drafters.hd(order="c", window=3, num_drafts=3, history=64),
    "random": random_trees(),
    "wrong": always_wrong(),
    "python": python_pld(),
    "lookahead": drafters.lookahead(window=3, num_drafts=3, history=64),
    "rest": drafters.rest(_databases(), num_nodes=9),
    "recycling": drafters.recycling(vocab_size=48, num_nodes=17),
    "suffix": drafters.suffix(_databases(), num_nodes=9),
    "aded": drafters.aded(_databases(), num_successors=4, max_pairs=64, num_nodes=9),
    "aded from text": drafters.aded(
        _databases(), adapt="from_text", search="mcts", prompt_gain=0.1, max_pairs=64, iterations=12, num_nodes=9
    ),
    "hd_tree": drafters.hd_tree(_databases(), rounds=2, width=2, history=64, num_nodes=9),
    "hd_tree recycling": drafters.hd_tree(_databases(), sources="cmsr", rounds=2, width=2, history=64, num_nodes=9),
}
# Greedy decoding and sampling are two programs that take seconds to compile; a drafter sees no more of either than its tokens.
TEMPERATURES = {
    "rest": [0.0],
    "suffix": [0.0],
    "hd_tree": [0.0],
    "hd_tree recycling": [1.5],
    "lookahead": [0.0, 1.5],
    "recycling": [0.0, 1.5],
}
TEMPERATURES |= {"aded": [0.0, 1.5], "aded from text": [1.5]}
CASES = [(name, temperature) for name in DRAFTERS for temperature in TEMPERATURES.get(name, [0.0, 0.7, 1.5])]


@functools.cache
def _plain(lm, temperature: float, exact: bool, **options):
    """Plain decoding of MANY, one prompt at a time."""
    return [
        decode.generate(lm, prompt, max_new_tokens=NUM_NEW, temperature=temperature, seed=i, exact=exact, **options)
        for i, prompt in enumerate(MANY)
    ]


def _assert_equal(lm, drafter, reference, candidate, **options):
    for index, (a, b) in enumerate(zip(reference, candidate, strict=True)):
        verdict = exactness.check(lm, drafter, a, b, seed=index, **options)
        assert verdict.is_explained, verdict.message
        assert verdict.is_equal or not options.get("exact")
        assert sum(b.accept_lengths) == len(b.tokens) == len(b.sources)


@pytest.mark.parametrize(("name", "temperature"), CASES)
def test_every_drafter_writes_plain_decodings_tokens(lm, name, temperature):
    drafter = DRAFTERS[name]
    options = {"max_new_tokens": NUM_NEW, "temperature": temperature}
    reference = _plain(lm, temperature, False)
    for loop in ("device", "host"):
        out = [decode.generate(lm, p, drafter=drafter, seed=i, loop=loop, **options) for i, p in enumerate(PROMPTS)]
        _assert_equal(lm, drafter, reference[: len(PROMPTS)], out, temperature=temperature)
    batch = decode.generate(lm, MANY, drafter=drafter, seed=range(len(MANY)), batch_size=2, **options)
    _assert_equal(lm, drafter, reference, batch, temperature=temperature, num_rows=2)


BUDGET = {1: 1.0, 3: 1.03, 9: 1.06}  # at such costs drafts pay at once, so that several sizes run
# The others among ours meet the budget as these do: with chains, trees, windows, logits, and on the host.
STOOD_FOR = {"random", "wrong", "recycling", "suffix", "aded", "aded from text", "hd_tree"}


@pytest.mark.parametrize("name", [name for name in DRAFTERS if name not in STOOD_FOR])
def test_an_adaptive_budget_changes_no_token(lm, name):
    drafter, temperature = DRAFTERS[name], TEMPERATURES.get(name, [0.0])[-1]
    options = {"max_new_tokens": NUM_NEW, "temperature": temperature, "budget": BUDGET, "logprobs": 2}
    out = decode.generate(lm, MANY, drafter=drafter, seed=range(len(MANY)), batch_size=2, **options)
    _assert_equal(lm, drafter, _plain(lm, temperature, False), out, temperature=temperature, num_rows=2, budget=BUDGET)
    assert len({size for result in out for size in result.pass_sizes}) > 1
    for result, plain in zip(out, _plain(lm, temperature, False, logprobs=2), strict=True):
        if result.tokens == plain.tokens:
            found, expected = ([chosen for chosen, _ in r.logprobs] for r in (result, plain))
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_exact_mode_has_no_budget(lm):
    options = {"drafter": DRAFTERS["pld"], "max_new_tokens": NUM_NEW, "exact": True}
    out = decode.generate(lm, PROMPTS[0], budget=BUDGET, **options)
    assert set(out.pass_sizes) == {runner.EXACT_WIDTH}
    assert out.accept_lengths == decode.generate(lm, PROMPTS[0], **options).accept_lengths


@pytest.mark.parametrize(("name", "temperature"), [case for case in CASES if case[1] != 0.7])
def test_exact_mode_is_bit_equal(lm, name, temperature):
    options = {"max_new_tokens": NUM_NEW, "temperature": temperature, "exact": True, "logprobs": 2}
    reference = _plain(lm, temperature, True, logprobs=2)
    out = [decode.generate(lm, p, drafter=DRAFTERS[name], seed=i, **options) for i, p in enumerate(PROMPTS)]
    for a, b in zip(reference, out, strict=False):
        assert a.tokens == b.tokens
        assert a.logprobs == b.logprobs
    if (name, temperature) == ("hd", 0.0):
        assert all(r.tokens_per_step > 1 for r in out)


def test_a_prompt_of_several_chunks(lm):
    prompt = np.random.default_rng(1).integers(2, 48, 256 + 64 + 9).tolist()
    assert prefill.chunks_of(len(prompt) - 1) == [(256, 1), (64, 2)]
    reference = decode.generate(lm, prompt, max_new_tokens=NUM_NEW)
    out = decode.generate(lm, [PROMPTS[0], prompt], drafter="pld", max_new_tokens=NUM_NEW)
    _assert_equal(lm, DRAFTERS["pld"], [_plain(lm, 0.0, False)[0], reference], out)
    assert reference.tokens != decode.generate(lm, prompt[100:], max_new_tokens=NUM_NEW).tokens


@pytest.mark.parametrize("name", ["hd", "python"])
def test_exact_mode_is_bit_equal_in_a_batch(lm, name):
    """To each text alone, in a cache of its own size: the last prompt asks for more slots than the others."""
    long = np.random.default_rng(1).integers(2, 48, 200).tolist()
    options = {"max_new_tokens": NUM_NEW, "temperature": 1.5, "exact": True, "logprobs": 2}
    alone = [*_plain(lm, 1.5, True, logprobs=2), decode.generate(lm, long, seed=5, **options)]
    out = decode.generate(lm, [*MANY, long], drafter=DRAFTERS[name], seed=range(6), batch_size=3, **options)
    assert runner.num_slots(len(long) + NUM_NEW, 0) > runner.num_slots(max(map(len, MANY)) + NUM_NEW, 0)
    assert [r.tokens for r in out] == [r.tokens for r in alone]
    assert [r.logprobs for r in out] == [r.logprobs for r in alone]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_what_waits_is_decoded_as_if_it_were_alone(lm, batch_size):
    """Its statistics too, and where a stop string ends some texts early."""
    stop = _plain(lm, 0.0, False)[1].text[11:13]
    options = {"drafter": DRAFTERS["pld"], "max_new_tokens": NUM_NEW, "stop": stop}
    alone = [decode.generate(lm, prompt, seed=i, **options) for i, prompt in enumerate(MANY)]
    assert {r.finish_reason for r in alone} == {"stop", "length"}
    out = decode.generate(lm, MANY, seed=range(len(MANY)), batch_size=batch_size, **options)
    for a, b in zip(alone, out, strict=True):
        for name in ("text", "tokens", "prompt_tokens", "finish_reason", "accept_lengths", "pass_sizes", "sources"):
            assert getattr(a, name) == getattr(b, name), name
        if a.finish_reason == "length":  # After a stop string, steps run on until the host looks.
            assert a.source_counts == b.source_counts
    shares = np.asarray([r.share_ms for r in out])
    own = np.asarray([r.prefill_ms + r.decode_ms for r in out])
    if batch_size == 1:
        np.testing.assert_allclose(shares, own)
    else:
        assert np.all(shares < own)
        assert shares.sum() <= own[0] + own[1:].sum() and shares.sum() > own.max()


def test_a_place_is_taken_as_soon_as_it_is_free(lm):
    """Plain decoding of a text of 40 tokens and three of 3, for which the context's end leaves room, in two places."""
    short = dataclasses.replace(lm, max_context=60)
    rows = [runner.Row([3] * 9, 0), *(runner.Row([4] * 57, seed) for seed in range(3))]
    options = runner.Options(max_new_tokens=40, ends_at_stop_tokens=False)
    run = list(runner.run(short, drafters.none(), rows, options, batch_size=2, sync_every=32))
    lengths = [[len(tokens) for tokens in progress.tokens] for progress in run]
    assert lengths == [[3, 3, 0, 0], [6, 3, 3, 0], [38, 3, 3, 3], [40, 3, 3, 3]]
    assert [len(r.tokens) for r in run[-1].results] == [40, 3, 3, 3]


def test_the_right_drafts_are_all_accepted(lm):
    reference = _plain(lm, 0.0, False)[0]
    drafter = exactness.forced(reference.prompt_tokens + reference.tokens, 8)
    out = decode.generate(lm, PROMPTS[0], drafter=drafter, max_new_tokens=NUM_NEW)
    assert out.tokens == reference.tokens
    assert out.accept_lengths == [8] * (NUM_NEW // 8)
    assert out.source_counts["text"]["accepted"][0] == NUM_NEW // 8


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.8), (20, 0.9)])
def test_limits_on_sampling_keep_the_tokens_equal(lm, top_k, top_p):
    options = {"temperature": 1.2, "top_k": top_k, "top_p": top_p}
    reference = decode.generate(lm, PROMPTS[0], max_new_tokens=NUM_NEW, **options)
    out = decode.generate(lm, PROMPTS[0], drafter=DRAFTERS["hd"], max_new_tokens=NUM_NEW, **options)
    assert exactness.check(lm, DRAFTERS["hd"], reference, out, **options).is_explained


def _chains(token: int, length: int, max_depth: int) -> Drafter:
    def draft(tables, state, context: Context) -> DraftTree:
        del tables, state
        text = jnp.full(length, token, jnp.int32)
        return draft_tree.from_chain(context.root, text, jnp.int32(length))

    return Drafter("chains", num_nodes=length + 1, max_depth=max_depth, source_names=("chains",), draft=draft)


def test_drafters_that_break_their_word_cannot_change_the_text(lm):
    """Ids outside the vocabulary, and trees deeper than max_depth."""
    reference = _plain(lm, 0.0, False)[0]
    for token in (48, 2**30, -1):
        out = decode.generate(lm, PROMPTS[0], drafter=_chains(token, 3, 3), max_new_tokens=NUM_NEW)
        assert out.tokens == reference.tokens
    forced = exactness.forced(reference.prompt_tokens + reference.tokens, 6)
    out = decode.generate(lm, PROMPTS[0], drafter=forced.replace(max_depth=2), max_new_tokens=NUM_NEW)
    assert out.tokens == reference.tokens
    assert set(out.accept_lengths[:-1]) == {3}


def test_a_stop_token_inside_a_draft_ends_the_text(lm):
    whole = _plain(lm, 0.0, False)[0].tokens
    for end in (5, 6, 7, 13):  # within a draft of eight, wherever it starts
        if whole.index(whole[end]) != end:
            continue
        stopping = _with_stop_token(lm, whole[end])
        drafter = exactness.forced(PROMPTS[0] + whole, 8)
        for method in (None, drafter):
            out = decode.generate(stopping, PROMPTS[0], drafter=method, max_new_tokens=NUM_NEW)
            assert out.tokens == whole[: end + 1]
            assert out.finish_reason == "stop"
            assert out.text == lm.tokenizer.decode(whole[:end])


def _with_stop_token(lm, token: int):
    tokenizer = copy.copy(lm.tokenizer)
    tokenizer.eos_ids = (token,)
    return dataclasses.replace(lm, tokenizer=tokenizer)


def test_a_stop_string_inside_a_draft_cuts_text_and_tokens(lm):
    whole = _plain(lm, 0.0, False)[0]
    for start, length in itertools.product((3, 10, 20), (1, 2, 3)):
        string = whole.text[start : start + length]
        first = whole.text.index(string)
        drafter = exactness.forced(PROMPTS[0] + whole.tokens, 8)
        for method, loop in ((None, "device"), (drafter, "device"), (drafter, "host")):
            out = decode.generate(lm, PROMPTS[0], drafter=method, max_new_tokens=NUM_NEW, stop=string, loop=loop)
            assert out.text == whole.text[:first]
            assert out.tokens == whole.tokens[: first + length]
            assert sum(out.accept_lengths) == len(out.tokens)
            assert out.finish_reason == "stop"


@pytest.mark.parametrize("name", [None, "pld", "hd"])
def test_the_caches_end_ends_the_text(lm, name):
    short = dataclasses.replace(lm, max_context=60)
    drafter = DRAFTERS[name] if name else None
    out = decode.generate(short, PROMPTS[0], drafter=drafter, max_new_tokens=100)
    assert (len(out.tokens), out.finish_reason) == (60 - len(PROMPTS[0]), "context")
    long = decode.generate(lm, PROMPTS[0], max_new_tokens=60)
    assert out.tokens == long.tokens[: len(out.tokens)]
    out = decode.generate(short, PROMPTS[0], drafter=drafter, max_new_tokens=7)
    assert (len(out.tokens), out.finish_reason) == (7, "length")


def test_samples_differ_and_repeat(lm):
    options = {"temperature": 1.0, "max_new_tokens": 12, "num_samples": 3}
    first = decode.generate(lm, PROMPTS[:2], **options)
    again = decode.generate(lm, PROMPTS[:2], drafter=DRAFTERS["pld"], **options)
    assert [[r.tokens for r in group] for group in first] == [[r.tokens for r in group] for group in again]
    assert len({tuple(r.tokens) for group in first for r in group}) == 6


def test_logprobs_are_the_models(lm):
    out = decode.generate(lm, PROMPTS[0], max_new_tokens=8, logprobs=3, drafter=DRAFTERS["pld"])
    for token, (chosen, top) in zip(out.tokens, out.logprobs, strict=True):
        assert len(top) == 3
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert top[token] == chosen == max(top.values())


def test_stream_adds_up_to_generate(lm):
    for options in ({}, {"stop": _plain(lm, 0.0, False)[0].text[15:18]}, {"temperature": 0.9}):
        whole = decode.generate(lm, PROMPTS[0], max_new_tokens=NUM_NEW, drafter="pld", **options)
        pieces = list(decode.stream(lm, PROMPTS[0], max_new_tokens=NUM_NEW, drafter="pld", steps_per_piece=2, **options))
        assert "".join(p.text for p in pieces) == whole.text
        assert [t for p in pieces for t in p.tokens][: len(whole.tokens)] == whole.tokens
        assert len(pieces) > 1


def test_a_string_is_a_users_message(lm):
    said = decode.generate(lm, "hello", max_new_tokens=3)
    assert said.prompt_tokens == lm.tokenizer.chat([{"role": "user", "content": "hello"}])
    assert decode.generate(lm, [{"role": "user", "content": "hello"}], max_new_tokens=3).tokens == said.tokens


BAD = [
    ({"prompt": []}, "empty"),
    ({"prompt": ""}, "empty"),
    ({"prompt": [3, 48]}, "token id 48 at index 1"),
    ({"prompt": [3, -1]}, "token id -1"),
    ({"prompt": [3] * 512}, "512 tokens"),
    ({"prompt": 3.5}, "a prompt is"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
    ({"top_p": 0.0}, r"top_p must be in \(0, 1\], and at least 1e-06, not 0"),
    ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"loop": "gpu"}, "'device' or 'host'"),
    ({"stop": ""}, "stop string"),
    ({"num_samples": 0}, "num_samples"),
    ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ({"seed": [1, 2]}, "2 seeds were given for 1 prompts"),
    ({"drafter": "magic"}, "unknown drafter 'magic'; there are: none, "),
    ({"drafter": "hd"}, "model database is missing"),
    ({"drafter": drafters.pld}, "a maker must be called"),
    ({"temperature": 1e-30}, "at least 0.001"),
    ({"top_p": 1e-30}, "at least 1e-06"),
    ({"max_new_tokens": 4.5}, "max_new_tokens"),
    ({"logprobs": 49}, "at most the vocabulary's 48"),
    ({"drafter": "pld", "num_nodes": 1}, "num_nodes of at least 2"),
    ({"budget": "small"}, "budget must be 'adaptive'"),
    ({"budget": {4: 1.0}}, "1 among them"),
    ({"budget": {1: 1.0, 4: 0.0}}, "positive and finite"),
    ({"drafter": "pld", "budget": {1: 1.0, 99: 2.0}}, "no size from 2 to the 11 nodes"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(lm, arguments, message):
    arguments = {"prompt": [3, 4], **arguments}
    with pytest.raises(ValueError, match=message):
        decode.generate(lm, **arguments)


def test_unknown_options_are_named(lm):
    with pytest.raises(ValueError, match="pld has no option window; it has: max_ngram, num_nodes"):
        decode.make_drafter(lm, "pld", window=3)


def test_a_second_request_of_the_same_size_compiles_nothing(lm, caplog):
    compiled = lambda: [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]  # noqa: E731
    decode.generate(lm, PROMPTS[0], drafter="pld", max_new_tokens=20)
    with jax.log_compiles():
        decode.generate(lm, [4, 5, 6, 7], drafter=drafters.pld(), max_new_tokens=30, temperature=0.0, seed=3)
        assert not compiled()
        decode.generate(lm, [4, 5, 6, 7], drafter=drafters.pld(num_nodes=3), max_new_tokens=30)
        assert len([m for m in compiled() if "run_steps" in m]) == 1
        assert not [m for m in compiled() if "prefill" in m]


@pytest.mark.parametrize(("num_nodes", "options"), [(6, {}), (7, {"stop": "no such text"}), (8, {"budget": {1: 1.0, 4: 1.2}})])
def test_a_loaded_models_first_request_compiles_each_program_once(lm, caplog, num_nodes, options):
    """A loaded model's weights are bound to a device, and so is what a program makes of them."""
    compiled = lambda name: [r for r in caplog.records if f"XLA compilation of jit({name})" in r.getMessage()]  # noqa: E731
    bound = dataclasses.replace(lm, params=jax.device_put(lm.params, jax.devices()[0]))
    with jax.log_compiles():
        # As no other test does, and for more than one dispatch.
        decode.generate(bound, PROMPTS[0], drafter=drafters.pld(num_nodes=num_nodes), max_new_tokens=200 + num_nodes, **options)
    assert len(compiled("run_steps")) == 1
    assert len(compiled("prefill")) <= 1 and len(compiled("init_drafter")) == 1  # prefill is the same for all drafters


def test_taking_a_place_in_a_batch_compiles_nothing(lm, caplog):
    """All is compiled before the first step: by a batch for which no row waits, too."""
    compiled = lambda: [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]  # noqa: E731
    options = {"drafter": drafters.pld(num_nodes=5), "max_new_tokens": 20, "batch_size": 2, "logprobs": 1}
    with jax.log_compiles():
        decode.generate(lm, MANY[:2], **options)
        for name in ("widened", "admit", "run_steps"):
            assert len([m for m in compiled() if f"jit({name})" in m]) == 1, name
        caplog.clear()
        decode.generate(lm, MANY, **options)
        assert not compiled()


def test_a_result_shows_itself_coloured(lm):
    out = decode.generate(lm, PROMPTS[0], drafter="pld", max_new_tokens=NUM_NEW)
    shown = out._repr_html_()
    assert shown.count("<span") >= NUM_NEW
    assert f"{NUM_NEW} tokens in {out.num_steps} steps" in shown
    assert "".join(out.pieces()) == out.text == str(out)


def test_draft_time_is_measured(lm):
    assert decode.measure_draft_us(lm, DRAFTERS["hd"], PROMPTS[0], num_repeats=1) > 0
    assert runner.num_slots(1, 0) == runner.num_slots(100, 7) < runner.num_slots(100, 200) < runner.num_slots(600, 7)


def test_recorded_rows_end_where_their_records_end(lm):
    """Neither stop tokens nor the limit of other rows ends them, and drafts are judged by the records."""
    answers = [[5, 1, 6, 9, 5, 1, 6, 9, 5, 1, 6, 7], [8, 3]]
    rows = [runner.Row(prompt, 0, recorded=answer) for prompt, answer in zip(PROMPTS, answers, strict=False)]
    *_, last = runner.run(lm, drafters.pld(num_nodes=3), rows, runner.Options(max_new_tokens=1))
    assert [result.tokens for result in last.results] == answers
    assert max(last.results[0].accept_lengths) > 1
    with pytest.raises(ValueError, match="either all rows of a batch are recorded, or none"):
        runner.request_of(lm, [rows[0], runner.Row([3], 0)], runner.Options())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tree: None, "must return a DraftTree, not NoneType"),
        (lambda tree: draft_tree.padded(tree, 6), r"the tree's tokens are int32\[6\], not int32\[5\]; its num_nodes is 5"),
        (lambda tree: tree._replace(parents=tree.parents * 1.0), r"the tree's parents are float32\[5\], not int32\[5\]"),
        (lambda tree: tree._replace(probabilities=jnp.ones(4)), r"the tree's probabilities are float32\[4\]"),
    ],
)
def test_a_draft_that_is_no_tree_of_the_drafters_size_is_named(lm, spoil, message):
    draft = lambda tables, state, context: spoil(draft_tree.root_only(context.root, 5))  # noqa: E731
    drafter = Drafter("mine", num_nodes=5, max_depth=4, source_names=("mine",), draft=draft)
    with pytest.raises(ValueError, match=f"drafter mine: .*{message}"):
        decode.generate(lm, [3, 4, 5], drafter=drafter, max_new_tokens=4)


def test_a_drafters_root_does_not_count(lm):
    def draft(tables, state, context):
        tree = draft_tree.root_only(context.root + 1, 3)
        return tree._replace(parents=tree.parents.at[0].set(2))

    drafter = Drafter("lost", num_nodes=3, max_depth=2, source_names=("lost",), draft=draft)
    plain = decode.generate(lm, [3, 4, 5], max_new_tokens=20)
    assert decode.generate(lm, [3, 4, 5], drafter=drafter, max_new_tokens=20).tokens == plain.tokens


def test_whole_numbers_are_asked_for(lm):
    with pytest.raises(ValueError, match=r"drafter pld: max_ngram is a whole number, not 3\.5"):
        decode.make_drafter(lm, "pld", max_ngram=3.5)
