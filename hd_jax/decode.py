"""The door for notebooks: load a model, generate, stream, keep a session.

from hd_jax import decode

lm = decode.load()
out = decode.generate(lm, "Why is the sky blue?", drafter="hd", max_new_tokens=256)
out.text, out.tokens_per_step, out.sources
"""

from __future__ import annotations

import functools
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax import compilation, draft_tree, drafters, runner, sharding
from hd_jax.databases.collection import Databases
from hd_jax.drafters.base import Context, Drafter, Feedback
from hd_jax.models import llama, weights
from hd_jax.models import tokenizer as tokenizers
from hd_jax.models.llama import Llama
from hd_jax.result import Result
from hd_jax.runner import LM, Row
from hd_jax.session import Session

__all__ = ["LM", "Piece", "Result", "Session", "generate", "load", "make_drafter", "measure_draft_us", "stream"]

EMBEDDED = pathlib.Path(__file__).parent / "assets" / "embedded"
DATABASES = "databases"  # folder of a model's databases, inside the model's own

Message = Mapping[str, str]
Prompt = str | Sequence[Message] | Sequence[int]  # text, chat messages, or token ids


class Piece(NamedTuple):
    """A part of a streamed text."""

    text: str
    tokens: list[int]


def load(
    name: str | os.PathLike | None = None,
    *,
    dtype: str | None = None,
    max_context: int | None = None,
    mesh: str | Mapping[str, int] | jax.sharding.Mesh | None = None,
) -> LM:
    """Loads a model.

    The first load in a process turns JAX's persistent compilation cache on, in `~/.cache/hd_jax` (or in
    JAX_COMPILATION_CACHE_DIR), unless one is set already.

    Args:
      name: a folder in Hugging Face format or converted by `experiments.convert`, or a name on the hub; None for the
        embedded model.
      dtype: "float32" or "bfloat16", of parameters and cache; by default the folder's, but float32 on CPU.
      max_context: tokens of prompt and answer together; at most, and by default, what the model's config allows.
      mesh: of the devices that parameters and cache are split over: "data=2,model=4", such a dictionary, or a jax Mesh
        (see `sharding.make_mesh`); None for one device. Sizes of batches must then be multiples of `data`.

    Raises:
      ValueError: there is no such model, it is not one that can be run, there is no such mesh, or it does not divide the
        model; the message says what would be right.
    """
    _enable_compilation_cache()
    mesh = None if mesh is None else sharding.make_mesh(mesh)
    folder = weights.resolve(str(name)) if name is not None else EMBEDDED
    config, params = weights.load(folder, dtype, mesh)
    config = llama.for_devices(config, mesh)
    if mesh is None:  # A mesh splits each matrix by itself.
        config, params = weights.fused(config, params)
    tokenizer = tokenizers.load(folder)
    if max_context is not None and not 1 < max_context <= config.max_context:
        raise ValueError(f"max_context must be from 2 to {config.max_context}, the model's own, not {max_context}")
    databases = Databases(folder / DATABASES, tokenizer.fingerprint, token_classes=tokenizer.token_classes)
    return LM(config, Llama(config, mesh=mesh), params, tokenizer, str(folder), max_context or config.max_context, databases)


def make_drafter(lm: LM, name: str, *, databases: Databases | str | os.PathLike | None = None, **options: Any) -> Drafter:
    """A drafter for a model.

    Args:
      lm: whose databases are used, those in the folder `databases` of its own folder.
      name: one of `hd_jax.drafters.MAKERS`.
      databases: others than the model's: a collection, or a folder.
      **options: of the method, `num_nodes` among them.

    Raises:
      ValueError: no such method or option, an option out of range, or a database that is missing or is not for this model.
    """
    if databases is None:
        databases = lm.databases
    elif not isinstance(databases, Databases):
        databases = Databases(databases, lm.tokenizer.fingerprint, token_classes=lm.tokenizer.token_classes)
    drafter = drafters.make(name, databases, options, vocab_size=lm.config.vocab_size)
    return sharding.put(drafter, sharding.replicated(lm.model.mesh))


def generate(
    lm: LM,
    prompt: Prompt | Sequence[Prompt],
    *,
    drafter: str | Drafter | None = None,
    num_nodes: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    num_samples: int = 1,
    stop: str | Sequence[str] = (),
    logprobs: int = 0,
    loop: str = "device",
    exact: bool = False,
    budget: str | Mapping[int, float] | None = None,
    batch_size: int | None = None,
) -> Any:
    """Generates text; the same tokens with every drafter.

    Args:
      lm: the model.
      prompt: a text (a user's message where the tokenizer has a chat template), chat messages or token ids; or a list
        of such prompts, which are decoded as a batch.
      drafter: a method's name, a Drafter, or None for plain decoding.
      num_nodes: size of the drafted trees, the root included, for a drafter given by name; None for the method's own.
      max_new_tokens: ends with finish reason "length".
      temperature: 0 takes the likeliest token; above, tokens are drawn.
      top_k: draw among the k likeliest; 0 for all.
      top_p: then among the likeliest that together reach this probability.
      seed: of the noise; one for all prompts, or one each.
      num_samples: texts per prompt, each with noise of its own.
      stop: strings that end a text, which is cut before them.
      logprobs: how many of the likeliest tokens to report the log-probabilities of, per generated token.
      loop: "device" runs many steps a dispatch, "host" one.
      exact: the slower mode in which equality is bit for bit.
      budget: None verifies all of a tree's nodes in every step. "adaptive" chooses among a few sizes, plain decoding's one
        node included, by what drafts promise, what promises were worth in this text, and what the sizes cost here; the costs
        are measured when a program first runs, and kept in JAX's compilation cache. Or these costs by hand, in any unit:
        {1: 1.7, 4: 2.2, 16: 4.1}; sizes beyond the drafter's number of nodes are left out, and drafting alone is taken to cost
        what the smallest draft does. Without effect in exact mode, where every pass has one width.
      batch_size: texts decoded together at most; None for all of them. Further ones wait, and take the places of those that end
        (continuous batching).

    Returns:
      A Result; a list of `num_samples` for num_samples > 1; a list of these for a list of prompts.

    Raises:
      ValueError: an argument is out of range, or a prompt cannot be used.
    """
    options = runner.options_of(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        logprobs=logprobs,
        loop=loop,
        exact=exact,
        budget=budget,
    )
    chosen = _choose(lm, drafter, num_nodes)
    is_batch = _is_batch(prompt)
    prompts = [encode_prompt(lm, p) for p in (list(prompt) if is_batch else [prompt])]
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    seeds = [int(seed)] * len(prompts) if isinstance(seed, int | np.integer) else [int(s) for s in seed]
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds were given for {len(prompts)} prompts")
    rows = [Row(p, s % 2**32, i) for p, s in zip(prompts, seeds, strict=True) for i in range(num_samples)]
    *_, last = runner.run(lm, chosen, rows, options, batch_size=batch_size)
    results = last.results
    grouped = [results[i : i + num_samples] for i in range(0, len(results), num_samples)]
    unwrapped = [group if num_samples > 1 else group[0] for group in grouped]
    return unwrapped if is_batch else unwrapped[0]


def stream(
    lm: LM,
    prompt: Prompt,
    *,
    drafter: str | Drafter | None = None,
    num_nodes: int | None = None,
    seed: int = 0,
    steps_per_piece: int = 4,
    stop: str | Sequence[str] = (),
    **options: Any,
) -> Iterator[Piece]:
    """Generates text piece by piece; the pieces' texts and tokens add up to those of `generate`.

    Args:
      lm, prompt, drafter, num_nodes, seed, stop, **options: as for `generate`, for one sample of one prompt.
      steps_per_piece: steps of decoding between two pieces.

    Yields:
      The text and tokens that came since the last piece. A character whose bytes are not complete is held back, and so
      is what may become a stop string.

    Raises:
      ValueError: as `generate` does, when the first piece is asked for.
    """
    chosen = _choose(lm, drafter, num_nodes)
    settings = runner.options_of(stop=stop, **options)
    if steps_per_piece < 1:
        raise ValueError(f"steps_per_piece must be at least 1, not {steps_per_piece}")
    row = Row(encode_prompt(lm, prompt), int(seed) % 2**32)
    held = max((len(s) for s in settings.stop), default=1) - 1
    text, num_tokens = "", 0
    for out in runner.run(lm, chosen, [row], settings, sync_every=steps_per_piece):
        if out.results:
            final = out.results[0]
            if len(final.text) > len(text) or len(final.tokens) > num_tokens:
                yield Piece(final.text[len(text) :], final.tokens[num_tokens:])
        else:
            tokens = out.tokens[0]
            whole = lm.tokenizer.decode(tokens).rstrip("\ufffd")
            whole = whole[: max(len(whole) - held, len(text))]
            yield Piece(whole[len(text) :], tokens[num_tokens:])
            text, num_tokens = whole, len(tokens)


def encode_prompt(lm: LM, prompt: Any) -> list[int]:
    """The token ids of a prompt.

    Raises:
      ValueError: it is of no known kind, empty, too long, or holds ids outside the vocabulary.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("the prompt is empty; it needs at least one character")
        is_chat = lm.tokenizer.has_chat_template
        ids = lm.tokenizer.chat([{"role": "user", "content": prompt}]) if is_chat else lm.tokenizer.encode(prompt)
    elif _is_chat(prompt):
        ids = lm.tokenizer.chat(prompt)
    elif isinstance(prompt, Sequence | np.ndarray) and all(isinstance(t, int | np.integer) for t in prompt):
        ids = prompt
    else:
        raise ValueError("a prompt is a string, a list of {'role', 'content'} messages, or a list of token ids")
    return runner.check_prompt(lm, ids)


def measure_draft_us(lm: LM, drafter: Drafter, tokens: Sequence[int], num_repeats: int = 5) -> float:
    """Median microseconds that one step's `draft` and `update` take on this device, after a text of token ids.

    Many run in one program, as within the device loop, and learn on; the model does not run, and nothing is accepted. Between
    a model's passes they take longer: on two CPU cores, those of `hd_tree` with 8 or 16 nodes about twice as long.
    """
    tokens = runner.check_prompt(lm, tokens)
    slots = runner.num_slots(len(tokens), drafter.max_depth)
    buffer = jnp.asarray(np.pad(np.asarray(tokens, np.int32), (0, slots - len(tokens))))
    context = Context(buffer, jnp.int32(len(tokens)), jnp.int32(len(tokens)))
    fetched: Any = jax.tree.map(np.asarray, context)
    host = jax.tree.map(jnp.asarray, drafter.refresh(fetched)) if drafter.refresh else ()
    num_iterations = 50

    @functools.partial(jax.jit, donate_argnames="state", compiler_options=compilation.options())
    def iterate(drafter: Drafter, context: Context, host: Any, state: Any):
        def body(index, carry):
            state, checksum = carry
            # Every other time the text is a token shorter: what does not change would be hoisted out of the loop.
            now = context._replace(length=jnp.maximum(context.length - index % 2, 1))
            tree = drafter.draft(drafter.tables, state, now._replace(host=host))
            top = (drafter.num_nodes, drafter.num_top_logits)
            path = jnp.full(drafter.max_depth + 1, draft_tree.NO_NODE).at[0].set(draft_tree.ROOT_INDEX)
            # One token is appended; that waits for the draft, as a step does: else the state is copied, to be read and written.
            num_appended = (tree.parents[-1] < drafter.num_nodes).astype(jnp.int32)
            top_tokens, top_logits = jnp.zeros(top, jnp.int32), jnp.zeros(top)
            feedback = Feedback(tree, tree.tokens, tree.tokens, top_tokens, top_logits, path, num_appended)
            state = drafter.update(drafter.tables, state, now, feedback)
            return state, checksum + jnp.sum(tree.tokens * (tree.parents + 3))  # and what is not used, dropped

        return jax.lax.fori_loop(0, num_iterations, body, (state, jnp.int32(0)))

    state = jax.jit(lambda drafter, context: drafter.init(drafter.tables, context))(drafter, context)
    state, _ = jax.block_until_ready(iterate(drafter, context, host, state))
    times = []
    for _ in range(num_repeats):
        clock = time.perf_counter()
        state, _ = jax.block_until_ready(iterate(drafter, context, host, state))
        times.append((time.perf_counter() - clock) * 1e6 / num_iterations)
    return float(np.median(times))


def _choose(lm: LM, drafter: str | Drafter | None, num_nodes: int | None) -> Drafter:
    if isinstance(drafter, Drafter):
        if num_nodes not in (None, drafter.num_nodes):
            raise ValueError(
                f"num_nodes {num_nodes} was given with a drafter that has {drafter.num_nodes}; set it where it is made"
            )
        return drafter
    if not isinstance(drafter, str | None):
        raise ValueError(f"drafter must be a method's name, a Drafter or None, not {drafter!r} (a maker must be called)")
    options: dict[str, Any] = {} if num_nodes is None else {"num_nodes": num_nodes}
    return make_drafter(lm, drafter or "none", **options)


def _is_chat(prompt: Any) -> bool:
    """Whether this is a list of messages."""
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 0
    return is_list and all(isinstance(m, Mapping) and "role" in m for m in prompt)


def _is_batch(prompt: Any) -> bool:
    """Whether this is a list of prompts: not a prompt itself, and no list of ids."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str) or _is_chat(prompt):
        return False
    return len(prompt) > 0 and not any(isinstance(item, int | np.integer) for item in prompt)


def _enable_compilation_cache() -> None:
    if getattr(jax.config, "jax_compilation_cache_dir") is None:  # noqa: B009 - it is not in the type stubs
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "hd_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
