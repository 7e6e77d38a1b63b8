"""The checker explains near-ties, and nothing else: deliberately wrong verifiers must come out unexplained."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from hd_jax import decode, drafters, exactness, verify
from hd_jax.models import llama
from hd_jax.models.llama import Llama
from hd_jax.runner import Options, Row

PROMPT = [3, 4, 5, 6, 7] * 5


def _changed(result, position: int, token: int):
    return dataclasses.replace(result, tokens=[*result.tokens[:position], token, *result.tokens[position + 1 :]])


def test_equal_results_are_equal(lm):
    out = decode.generate(lm, PROMPT, max_new_tokens=20)
    verdict = exactness.check(lm, drafters.pld(), out, out)
    assert verdict.is_equal and verdict.is_explained and verdict.position == exactness.EQUAL


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_another_token_is_unexplained(lm, temperature):
    options = {"temperature": temperature, "seed": 1}
    out = decode.generate(lm, PROMPT, max_new_tokens=20, **options)
    position = len(out.tokens) // 2
    verdict = exactness.check(lm, drafters.pld(), out, _changed(out, position, (out.tokens[position] + 1) % 48), **options)
    assert not verdict.is_explained
    assert (verdict.position, verdict.is_equal) == (position, False)
    assert verdict.gap > verdict.tolerance > 0
    assert f"token {position} differs" in verdict.message


def test_a_text_that_ends_early_is_unexplained(lm):
    out = decode.generate(lm, PROMPT, max_new_tokens=20)
    verdict = exactness.check(lm, drafters.pld(), out, dataclasses.replace(out, tokens=out.tokens[:9]))
    assert (verdict.is_explained, verdict.position) == (False, 9)


def test_other_prompts_cannot_be_compared(lm):
    out = decode.generate(lm, PROMPT, max_new_tokens=2)
    with pytest.raises(ValueError, match="different prompts"):
        exactness.check(lm, drafters.pld(), out, dataclasses.replace(out, prompt_tokens=[1]))


def test_exact_mode_allows_no_difference(lm):
    out = decode.generate(lm, PROMPT, max_new_tokens=20)
    assert not exactness.check(lm, drafters.pld(), out, _changed(out, 3, 2), exact=True).is_explained


def test_a_tie_is_explained(lm):
    """A model with two rows of its head equal has exact ties between the two tokens; float noise may pick either."""
    out = decode.generate(lm, PROMPT, max_new_tokens=20)
    token = out.tokens[5]
    twin = next(t for t in range(2, 48) if t not in out.tokens and t not in PROMPT)
    embedding = lm.params["embed_tokens"]
    params = {**lm.params, "embed_tokens": embedding.at[twin].set(embedding[token])}
    tied = dataclasses.replace(lm, params=params)
    reference = decode.generate(tied, PROMPT, max_new_tokens=20)
    position = reference.tokens.index(min(token, twin))
    candidate = _changed(reference, position, max(token, twin))
    verdict = exactness.check(tied, drafters.pld(), reference, candidate)
    assert verdict.is_explained and verdict.gap == 0 and verdict.position == position


def test_the_gap_to_a_top_p_border_is_measured_in_probability(lm):
    """Probabilities 0.5, 0.3, 0.2 and top_p 0.8: the least change of the logits adds or takes the third token."""
    logits = jnp.full(lm.config.vocab_size, -1e9).at[:3].set(jnp.log(jnp.asarray([0.5, 0.3, 0.2])))
    near, far = (
        exactness._gap(lm, logits, 9, Row([1], 0), Options(temperature=1.0, top_p=top_p)) for top_p in (0.8 - 1e-6, 0.65)
    )
    assert near < 2e-6 < 0.05 < far


def _accepts_too_much(tree, ancestors, targets, max_depth):
    """Takes the root's first draft, whatever its token."""
    is_child = (tree.parents == 0) & ~tree.is_window
    first = tree.tokens[jnp.argmax(is_child)]
    return _walk(tree, ancestors, targets.at[0].set(jnp.where(jnp.any(is_child), first, targets[0])), max_depth)


def _reads_the_wrong_node(tree, ancestors, targets, max_depth):
    """Takes the bonus token from the node before the accepted one."""
    path = _walk(tree, ancestors, targets, max_depth)
    shifted = jnp.roll(path.nodes, 1).at[0].set(0)
    return path._replace(nodes=jnp.where(path.num_accepted > 0, shifted, path.nodes))


_walk = verify.walk


@pytest.mark.parametrize("wrong_walk", [_accepts_too_much, _reads_the_wrong_node])
def test_wrong_verifiers_come_out_unexplained(lm, monkeypatch, wrong_walk):
    reference = decode.generate(lm, PROMPT, max_new_tokens=40)
    # Another model (equal but for a bound) makes the loop compile anew, with the wrong walk in it.
    config = dataclasses.replace(lm.config, max_context=511 if wrong_walk is _accepts_too_much else 510)
    monkeypatch.setattr(verify, "walk", wrong_walk)
    broken = dataclasses.replace(lm, config=config, model=Llama(config))
    drafter = drafters.hd(order="c", window=3, num_drafts=3, history=64)
    candidate = decode.generate(broken, PROMPT, drafter=drafter, max_new_tokens=40)
    monkeypatch.undo()
    assert candidate.tokens != reference.tokens
    verdict = exactness.check(lm, drafter, reference, candidate)
    assert not verdict.is_explained, verdict.message


def test_a_wrong_cache_comes_out_unexplained(lm, monkeypatch):
    """Committing rows in the tree's order instead of the path's: the mistake that copies of a cache make."""
    reference = decode.generate(lm, PROMPT, max_new_tokens=60)
    config = dataclasses.replace(lm.config, max_context=509)
    write = llama.write_rows
    monkeypatch.setattr(
        llama,
        "write_rows",
        lambda cache, rows, *where: write(cache, tuple((k[:, :, ::-1], v[:, :, ::-1]) for k, v in rows), *where),
    )
    broken = dataclasses.replace(lm, config=config, model=Llama(config))
    drafter = drafters.hd(order="c", window=3, num_drafts=3, history=64)
    candidate = decode.generate(broken, PROMPT, drafter=drafter, max_new_tokens=60)
    monkeypatch.undo()
    verdict = exactness.check(lm, drafter, reference, candidate)
    assert not verdict.is_explained, verdict.message


def test_first_divergence():
    assert exactness.first_divergence([1, 2, 3], [1, 2, 3]) == exactness.EQUAL
    assert exactness.first_divergence([1, 2, 3], [1, 5, 3]) == 1
    assert exactness.first_divergence([1, 2], [1, 2, 3]) == 2
    assert exactness.first_divergence(np.array([]).tolist(), [1]) == 0
