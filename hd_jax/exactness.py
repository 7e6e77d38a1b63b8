"""Whether two decodings are equal, and if not, whether float arithmetic explains it.

Passes of one node and of several sum in different orders, so their logits differ in the last bits, and where the two
best tokens are nearer to each other than that, the argmax may flip. That is the only difference fast mode permits. At
the first divergence both programs are run on the common text: plain decoding, a node a step, and chains of as many nodes
as the candidate's passes may have. The divergence is explained iff the reference's gap is at most `TOLERANCE` times the
largest difference between the logits of the two.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax import compilation, draft_tree, prefill, runner, sampling, sharding
from hd_jax.drafters.base import Context, Drafter
from hd_jax.drafters.none import none
from hd_jax.models.llama import Llama, empty_cache, write_rows
from hd_jax.result import Result
from hd_jax.runner import LM, Options, Row

TOLERANCE = 4.0  # largest explained gap, in units of the largest difference of logits
EQUAL = -1  # Verdict.position where there is no divergence


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a candidate's tokens compare with the reference's.

    Attributes:
      position: index of the first generated token that differs, or EQUAL.
      is_explained: whether arithmetic explains it; True where nothing differs.
      gap: the reference's distance, in logits (after temperature and noise), between its two best tokens, or from a
        top-k or top-p border, whichever is smaller.
      tolerance: largest gap that is explained.
      message: one line for a reader.
    """

    position: int = EQUAL
    is_explained: bool = True
    gap: float = 0.0
    tolerance: float = 0.0
    message: str = "equal"

    @property
    def is_equal(self) -> bool:
        return self.position == EQUAL


def first_divergence(reference: Sequence[int], candidate: Sequence[int]) -> int:
    """Index of the first token that differs, an end that comes early included; EQUAL if there is none."""
    for index, (a, b) in enumerate(zip(reference, candidate, strict=False)):
        if a != b:
            return index
    return EQUAL if len(reference) == len(candidate) else min(len(reference), len(candidate))


def check(
    lm: LM,
    drafter: Drafter,
    reference: Result,
    candidate: Result,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    sample: int = 0,
    exact: bool = False,
    num_rows: int = 1,
    budget: str | Mapping[int, float] | None = None,
    reference_lm: LM | None = None,
) -> Verdict:
    """Compares a candidate with plain decoding's answer to the same prompt.

    Args:
      lm: the model of both, as the candidate ran it.
      drafter: the candidate's.
      reference: by plain decoding.
      candidate: by `drafter`.
      temperature, top_k, top_p, seed, sample: of both.
      exact: both were decoded in exact mode, where any difference is a failure.
      num_rows: rows of the batch that the candidate was decoded in.
      budget: the candidate's.
      reference_lm: the same model as the reference ran it, where that was on another mesh.

    Raises:
      ValueError: the two have different prompts.
    """
    if reference.prompt_tokens != candidate.prompt_tokens:
        raise ValueError("the two results answer different prompts: there is nothing to compare")
    position = first_divergence(reference.tokens, candidate.tokens)
    if position == EQUAL:
        return Verdict()
    tokens = [_shown(result, position) for result in (reference, candidate)]
    where = f"token {position} differs: plain decoding has {tokens[0]}, {drafter.name} {tokens[1]}"
    if exact:
        return Verdict(position, False, message=f"{where}; exact mode allows no difference")
    if position >= min(len(reference.tokens), len(candidate.tokens)):
        return Verdict(position, False, message=f"{where}: the texts are equal up to the end of the shorter one")
    prompt = reference.prompt_tokens
    text = [*prompt, *reference.tokens[:position]]
    options = Options(temperature=temperature, top_k=top_k, top_p=top_p, budget=budget)
    row = Row(list(prompt), seed % 2**32, sample)
    reference_lm = reference_lm or lm
    plain = _last_logits(reference_lm, none().num_nodes, sharding.num_row_parts(reference_lm.model.mesh), prompt, text)
    wide = [_last_logits(lm, size, num_rows, prompt, text) for size in runner.pass_sizes(drafter, options)]
    # The same arithmetic on both sides: warped scores differ by at most this, where no border lies between them.
    scale = max(temperature, 1e-6) if temperature > 0 else 1.0
    difference = max(float(np.max(np.abs(plain - logits))) for logits in wide) / scale
    gap = _gap(lm, jnp.asarray(plain), len(text), row, options)
    tolerance = TOLERANCE * difference
    is_explained = gap <= tolerance
    verdict = "a near-tie" if is_explained else "not explained by arithmetic"
    return Verdict(position, is_explained, gap, tolerance, f"{where}; gap {gap:.2e}, tolerance {tolerance:.2e}: {verdict}")


def _shown(result: Result, position: int) -> str:
    return str(result.tokens[position]) if position < len(result.tokens) else "ended"


def _last_logits(lm: LM, width: int, num_rows: int, prompt: Sequence[int], text: Sequence[int]) -> np.ndarray:
    """Logits float32[V] after the last token of `text`, by passes of `width` nodes from the prompt on, as decoding runs them.

    The text stands in every row of a batch of `num_rows`, after a prefill of one row a part of the mesh.

    Each pass is a chain of the text's next tokens; the last one ends with the text, so that its last node is the one asked for.
    """
    mesh, slots = lm.model.mesh, runner.num_slots(len(text) + 1, width)
    num_parts = sharding.num_row_parts(mesh)
    buffer = np.zeros((num_parts, slots + width), np.int32)
    buffer[:, : len(text)] = text
    tokens = sharding.put(jnp.asarray(buffer), sharding.by_rows(mesh))
    cache = empty_cache(lm.config, num_parts, slots, mesh)
    cache = prefill.read(lm.model, lm.params, cache, tokens, 0, prefill.chunks_of(len(prompt) - 1))
    span = (jnp.int32(len(prompt) - 1), jnp.int32(len(text)))
    part_size = -(-num_rows // num_parts)
    chain_logits = compilation.here(_chain_logits)
    return np.asarray(chain_logits(lm.model, lm.params, cache, tokens, *span, width=width, part_size=part_size))


@compilation.jit(static_argnames=("model", "width", "part_size"))
def _chain_logits(
    model: Llama, params, cache, tokens: jax.Array, first: jax.Array, end: jax.Array, *, width: int, part_size: int
) -> jax.Array:
    """Feeds tokens[first:end], one row a part, in chains of at most `width` nodes to a batch of copies; the last logits."""
    cache, tokens = sharding.repeated((cache, tokens), part_size, model.mesh)
    num_rows = tokens.shape[0]
    chain = jnp.tril(jnp.ones((1, width, width), bool))

    def body(carry):
        start, cache, _ = carry
        count = jnp.minimum(end - start, width)
        piece = jax.lax.dynamic_slice(tokens, (0, start), (num_rows, width))
        positions = jnp.broadcast_to(start + jnp.arange(width), piece.shape)
        starts = jnp.broadcast_to(start, num_rows)
        out: Any = model.apply({"params": params}, piece, positions, chain, cache, starts)
        logits, rows = out
        return start + count, write_rows(cache, rows, starts, model.config), logits[0, count - 1]

    carry = (first, cache, jnp.zeros(model.config.vocab_size, jnp.float32))
    logits = jax.lax.while_loop(lambda c: c[0] < end, body, carry)[2]
    return sharding.constrain(logits, sharding.replicated(model.mesh))


def _gap(lm: LM, logits: jax.Array, position: int, row: Row, options: Options) -> float:
    """Distance between the two best scores for the token at `position`, or to the nearest top-k or top-p border."""
    mode = runner.sampling_mode(lm, options)
    settings = runner.sampling_of([row], options)
    at = jnp.asarray([position], jnp.int32)
    scores = sampling.scores(logits[None, None], at, jnp.zeros((1, 1), jnp.int32), 0, mode, settings)[0, 0]
    best = jax.lax.top_k(scores, 2)[0]
    gap = float(best[0] - best[1])
    scaled = logits / max(options.temperature, runner.MIN_TEMPERATURE)
    is_kept = jnp.isfinite(sampling.warp(logits[None, None], mode, settings)[0, 0])
    if mode.has_top_k or mode.has_top_p:
        inside = jnp.min(jnp.where(is_kept, scaled, jnp.inf))
        gap = min(gap, float(inside - jnp.max(jnp.where(is_kept, -jnp.inf, scaled))))
    if mode.has_top_p:
        # The border is one of probability: a change of all logits by d changes a sum of probabilities by at most 2 d of it.
        limited = sampling.warp(logits[None, None], mode._replace(has_top_p=False), settings)[0, 0]
        p = jax.nn.softmax(limited)
        mass = jnp.sum(jnp.where(is_kept, p, 0.0))
        least = jnp.min(jnp.where(is_kept, p, jnp.inf))
        gap = min(gap, float(jnp.minimum(mass - options.top_p, options.top_p - (mass - least)) / (2 * mass)))
    return max(gap, 0.0)


def forced(tokens: Sequence[int], num_nodes: int) -> Drafter:
    """A drafter that knows the text: it drafts the `num_nodes - 1` tokens that follow in `tokens` (prompt included).

    For tests and for measuring the most that any drafter could gain.
    """
    if num_nodes < 2:
        raise ValueError(f"a forced draft needs at least 2 nodes, not {num_nodes}")
    length = num_nodes - 1
    return Drafter(
        "forced",
        num_nodes=num_nodes,
        max_depth=length,
        source_names=("text",),
        draft=_forced_draft(length),
        tables=jnp.asarray([*tokens, *[0] * num_nodes], jnp.int32),
    )


@functools.lru_cache
def _forced_draft(length: int):
    def draft(tables: jax.Array, state, context: Context):
        del state
        piece = jax.lax.dynamic_slice(tables, (context.length,), (length,))
        return draft_tree.from_chain(context.root, piece, jnp.clip(tables.size - length - 1 - context.length, 0, length))

    return draft
