"""From checked requests to results: capacities, prefill, dispatches of steps, and what the host does between them."""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hd_jax import admission, budget, compilation, loop, prefill, sharding, step_costs
from hd_jax.databases.collection import Databases
from hd_jax.draft_tree import NO_TOKEN
from hd_jax.drafters.base import Drafter
from hd_jax.models.config import ModelConfig
from hd_jax.models.llama import Cache, Llama, empty_cache, with_slots
from hd_jax.models.tokenizer import Tokenizer
from hd_jax.result import NOT_DRAFTED, Result
from hd_jax.sampling import Sampling, SamplingMode

EXACT_WIDTH = 64  # nodes of every pass in exact mode
SYNC_EVERY = 32  # steps a dispatch with loop="device"
MIN_TEMPERATURE, MIN_TOP_P = 1e-3, 1e-6  # below these, float32 is not enough; both mean the likeliest token

_has_run: set[Hashable] = set()  # programs that have taken steps in this process


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
    """A model ready for decoding; made by `decode.load`."""

    config: ModelConfig
    model: Llama
    params: Any
    tokenizer: Tokenizer
    folder: str
    max_context: int  # tokens of prompt and answer together
    databases: Databases = dataclasses.field(default_factory=Databases)


@dataclasses.dataclass(frozen=True)
class Options:
    """How to decode; the same for all rows of a call. See `decode.generate`."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    logprobs: int = 0
    loop: str = "device"
    exact: bool = False
    budget: str | Mapping[int, float] | None = None
    ends_at_stop_tokens: bool = True

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.max_new_tokens, int | np.integer) or self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < float("inf"):
            problems.append(f"temperature must be 0 or a finite number of at least {MIN_TEMPERATURE}, not {self.temperature}")
        if self.top_k < 0:
            problems.append(f"top_k must be at least 0 (0 is no limit), not {self.top_k}")
        if not MIN_TOP_P <= self.top_p <= 1:
            problems.append(f"top_p must be in (0, 1], and at least {MIN_TOP_P}, not {self.top_p}")
        if self.logprobs < 0:
            problems.append(f"logprobs must be at least 0, not {self.logprobs}")
        if self.loop not in ("device", "host"):
            problems.append(f"loop must be 'device' or 'host', not {self.loop!r}")
        if isinstance(self.budget, Mapping):
            if 1 not in self.budget or not all(isinstance(n, int | np.integer) and n >= 1 for n in self.budget):
                problems.append(f"a budget's sizes are whole numbers, 1 among them, not {list(self.budget)}")
            if not all(0 < cost < float("inf") for cost in self.budget.values()):
                problems.append(f"a budget's costs must be positive and finite, not {list(self.budget.values())}")
        elif self.budget not in (None, "adaptive"):
            problems.append(f"budget must be 'adaptive', costs by number of nodes, or None, not {self.budget!r}")
        if any(not text for text in self.stop):
            problems.append("an empty stop string would end every text at once")
        if problems:
            raise ValueError("; ".join(problems))


def options_of(*, stop: str | Sequence[str] = (), **settings: Any) -> Options:
    """Options by keyword. Raises ValueError for one that there is not, or that is out of range."""
    known = [field.name for field in dataclasses.fields(Options)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"there is no option {', '.join(unknown)} here; there are: {', '.join(known)}")
    return Options(stop=(stop,) if isinstance(stop, str) else tuple(stop), **settings)


@dataclasses.dataclass(frozen=True)
class Row:
    """One text to decode."""

    prompt: list[int]
    seed: int
    sample: int = 0
    recorded: list[int] | None = None  # an answer whose tokens replace those that the model draws; the row ends where it ends


@dataclasses.dataclass
class Progress:
    """A run after a dispatch. The next dispatch takes `state` over: only the last one's stays valid."""

    tokens: list[list[int]]  # generated so far, per row
    state: loop.State
    results: list[Result]  # of all rows with the last dispatch; empty before


@dataclasses.dataclass(eq=False)
class _Text:
    """What the host knows of a row."""

    row: Row
    tokens: list[int] = dataclasses.field(default_factory=list)  # generated, up to the end of a stop string
    accept_lengths: list[int] = dataclasses.field(default_factory=list)  # of each step, as the next two
    num_nodes: list[int] = dataclasses.field(default_factory=list)
    pass_sizes: list[int] = dataclasses.field(default_factory=list)
    is_stopped: bool = False  # by a stop string
    prefill_ms: float = 0.0  # this and the next two as in a Result
    decode_ms: float = 0.0
    share_ms: float = 0.0
    result: Result | None = None  # once it has ended


def pass_sizes(drafter: Drafter, options: Options) -> tuple[int, ...]:
    """How many nodes a pass may have. Where there is more than one number, the budget is adaptive.

    Exact mode has one width, so there is nothing to choose.
    """
    if options.exact:
        return (EXACT_WIDTH,)
    if options.budget is None:
        return (drafter.num_nodes,)
    if isinstance(options.budget, Mapping):
        sizes = tuple(sorted(int(size) for size in options.budget if size <= drafter.num_nodes))
        if len(sizes) == 1 < drafter.num_nodes:
            raise ValueError(f"the budget has no size from 2 to the {drafter.num_nodes} nodes of drafter {drafter.name}")
        return sizes
    return budget.sizes_of(drafter.num_nodes)


def num_slots(num_tokens: int, max_depth: int) -> int:
    """S for texts of so many tokens and what is written behind them, a path or a chunk: few sizes, for few programs.

    There are twice as many on a CPU, whose steps attend to all slots and feel it most.
    """
    least = 128 if jax.default_backend() == "cpu" else 256
    size, behind = 256, max(max_depth + 1, prefill.chunk_sizes()[-1])
    while size < num_tokens + behind:
        size += least * max(1, 2 ** size.bit_length() // 1024)
    return size


def run(
    lm: LM,
    drafter: Drafter,
    rows: Sequence[Row],
    options: Options,
    *,
    batch_size: int | None = None,
    sync_every: int = SYNC_EVERY,
    kept_cache: Cache | None = None,
    num_cached: int = 0,
    kept_drafter_state: Any = None,
) -> Iterator[Progress]:
    """Decodes the rows in one batch: yields Progress after every dispatch of steps, the last one with the Results.

    Rows that find no place in the batch wait. As soon as one has ended, the next takes its place (continuous batching): its
    prompt is read alone, on a mesh beside one of each other part, and then copied in. No program is compiled for that.

    Args:
      lm: the model.
      drafter: the method.
      rows: their prompts must be checked (`check_prompt`).
      options: for all rows.
      batch_size: rows decoded together at most; None for all. On a mesh, axis `data` must divide it.
      sync_every: steps a dispatch; one with loop="host". For a drafter that needs the host, a dispatch ends before a draft.
      kept_cache: for a single row, holds the keys and values of the prompt's first `num_cached` tokens; donated.
      num_cached: at most the prompt's length less one.
      kept_drafter_state: of an earlier request of a single row, for the drafter to renew.
    """
    if options.logprobs > lm.config.vocab_size:
        raise ValueError(f"logprobs must be at most the vocabulary's {lm.config.vocab_size}, not {options.logprobs}")
    if options.exact and drafter.num_nodes > EXACT_WIDTH:
        raise ValueError(f"exact mode runs {EXACT_WIDTH} nodes a step; drafter {drafter.name} has {drafter.num_nodes}")
    mesh = lm.model.mesh
    if options.budget is not None and mesh is not None:
        raise ValueError("a budget is for one device; on a mesh every step verifies all nodes: leave it out")
    if batch_size is None:
        batch_size = len(rows)
    num_parts = sharding.num_row_parts(mesh)
    sharding.check_rows(batch_size, num_parts)
    part_size = -(-min(batch_size, len(rows)) // num_parts)
    num_places = num_parts * part_size
    is_replaced = num_places == 1 or len(rows) == num_parts  # an admission fills all places, so it makes the state anew
    by_rows = sharding.by_rows(mesh)
    drafter = sharding.put(drafter, sharding.replicated(mesh))
    slots = num_slots(max(_limit(lm, row, options) for row in rows), drafter.max_depth)
    cache = empty_cache(lm.config, num_parts, slots, mesh) if kept_cache is None else kept_cache
    slots = max(cache[0][1].shape[2], slots)
    cache = with_slots(cache, slots, lm.config)
    sizes = pass_sizes(drafter, options)
    is_adaptive = len(sizes) > 1
    settings = loop.StepSettings(
        mode=sampling_mode(lm, options),
        num_logprobs=options.logprobs,
        is_exact=options.exact,
        width=EXACT_WIDTH if options.exact else 0,
        sizes=sizes if is_adaptive else (),
    )
    costs = None
    if is_adaptive:
        by_size = options.budget if isinstance(options.budget, Mapping) else dict.fromkeys(sizes, 1.0)
        given = [by_size[sizes[0]], by_size[sizes[1]], *(by_size[size] for size in sizes[1:])]  # a try as the smallest draft
        costs = sharding.put(np.asarray(given, np.float32), None)  # one device has a budget
    if options.loop == "host" or (drafter.refresh is not None and not is_adaptive):
        sync_every = 1

    def request_for(texts: Sequence[_Text]) -> loop.Request:
        return sharding.put(request_of(lm, [text.row for text in texts], options), by_rows)

    def started(cache: Cache, texts: Sequence[_Text], chunks: Sequence[tuple[int, int]]) -> loop.State:
        """The state of one row a part before the first step; these chunks of its prompt are read into the cache (donated)."""
        buffer = np.zeros((num_parts, slots), np.int32)
        for row, text in zip(buffer, texts, strict=True):
            row[: len(text.row.prompt)] = text.row.prompt
        request, tokens = request_for(texts), sharding.put(jnp.asarray(buffer), by_rows)
        cache = prefill.read(lm.model, lm.params, cache, tokens, num_cached, chunks, is_exact=options.exact)
        drafter_state = admission.init_drafter(drafter, request, tokens, kept_drafter_state, mesh=mesh)
        return admission.start(drafter, request, cache, tokens, drafter_state, settings, mesh=mesh)

    def admitted(state: loop.State, new: loop.State, places: Sequence[int]) -> loop.State:
        """The state with the new rows, each at a place of its part."""
        if is_replaced:
            return admission.with_budget(new, settings, costs, drafter.num_nodes)
        return admission.admit(lm.model, state, new, sharding.put(jnp.asarray(places, jnp.int32), by_rows))

    run_steps = compilation.here(loop.run_steps)
    found: Any = None  # what the host looked up last

    def arguments(request: loop.Request, state: loop.State, max_steps: int, min_rows: int) -> tuple:
        nonlocal found
        if found is None or (drafter.refresh is not None and (state.budget is None or state.budget.is_drafting)):
            found = loop.refresh(drafter, request, state)
        host = found if mesh is None else sharding.put(found, by_rows)  # a program takes arrays of the host sooner than `put`
        return lm.model, settings, lm.params, drafter, request, host, state, np.int32(max_steps), np.int32(min_rows)

    def dispatch(request: loop.Request, state: loop.State, max_steps: int, min_rows: int = 1) -> tuple[loop.State, loop.Record]:
        return run_steps(*arguments(request, state, max_steps, min_rows), sync_every=sync_every)

    texts = [_Text(row) for row in rows]
    filler, nowhere = texts[0], [part_size] * num_parts  # stands in free places, and for parts where no row is admitted
    clock = time.perf_counter()  # Whatever is the first of its kind is compiled here, and leaves nothing that is read.
    request = request_for([filler] * num_places)
    sizes_read = {size for row in rows for size, _ in prefill.chunks_of(len(row.prompt) - 1 - num_cached, options.exact)}
    new = started(cache, [filler] * num_parts, [(size, 0) for size in sorted(sizes_read)])
    state = new if is_replaced else admission.widened(lm.model, new, part_size=part_size)
    state = admission.with_budget(state, settings, costs, drafter.num_nodes)
    program = (lm.model, settings, sync_every, step_costs.shape_key((drafter, request, state)))
    if is_adaptive and options.budget == "adaptive":
        lower = functools.partial(run_steps.lower, *arguments(request, state, 0, 1), sync_every=sync_every)
        times, state = step_costs.of_program(program, lower, dispatch, request, state, sizes)
        costs = sharding.put(np.asarray(times, np.float32), None)
        state = admission.with_budget(state, settings, costs, drafter.num_nodes)
    if not is_replaced:
        state = admitted(state, new, nowhere)
    # A program's first run is slow. A batch's is not made here: all of its places are free.
    state, _ = dispatch(request, state, int(is_replaced and program not in _has_run))
    if is_replaced:
        _has_run.add(program)
    jax.block_until_ready(state)
    compile_ms, clock = _lap(clock)

    waiting = collections.deque(texts)
    batch: list[_Text | None] = [None] * num_places
    while waiting or any(batch):
        while waiting and None in batch:
            entering, places = [filler] * num_parts, list(nowhere)
            taken = _seat(waiting, batch, part_size)
            for place, text in taken.items():
                part, places[part] = divmod(place, part_size)
                entering[part] = text
            longest = max(len(text.row.prompt) for text in taken.values())
            chunks = prefill.chunks_of(longest - 1 - num_cached, options.exact)
            new = started(state.cache if is_replaced else new.cache, entering, chunks)
            state = admitted(state, new, places)
            request = request_for([text or filler for text in batch])
            jax.block_until_ready(state)
            lap_ms, clock = _lap(clock)
            for place, text in _texts(batch):
                if place in taken:
                    text.prefill_ms = lap_ms / len(taken)
                    text.share_ms += lap_ms / len(taken)
                else:
                    text.decode_ms += lap_ms

        state, record = dispatch(request, state, sync_every, num_places if waiting else 1)
        appended, nodes, run_sizes = (sharding.fetch(values) for values in record)
        tokens, lengths, is_finished = (sharding.fetch(x) for x in (state.tokens, state.lengths, state.is_finished))
        ended = []
        for place, text in _texts(batch):
            is_step = appended[place] > 0
            text.accept_lengths += appended[place][is_step].tolist()
            text.num_nodes += nodes[place][is_step].tolist()
            text.pass_sizes += run_sizes[is_step].tolist()
            text.tokens = tokens[place, len(text.row.prompt) : lengths[place]].tolist()
            end = _find_stop(lm.tokenizer, text.tokens, options.stop) if options.stop else None
            if end is not None:
                text.tokens, text.is_stopped = text.tokens[:end], True
            if is_finished[place] or text.is_stopped:
                ended.append(place)
        if options.stop:
            is_finished = is_finished | np.isin(np.arange(num_places), ended)
            state = state._replace(is_finished=sharding.put(jnp.asarray(is_finished), by_rows))
        lap_ms, clock = _lap(clock)
        active = _texts(batch)
        for _, text in active:
            text.decode_ms += lap_ms
            text.share_ms += lap_ms / len(active)
        kept = (state.sources, state.counts, state.logprobs)
        fetched = jax.tree.map(sharding.fetch, kept) if ended else kept
        for place in ended:
            text, batch[place] = batch[place], None
            assert text is not None
            of_row = jax.tree.map(lambda x, place=place: x[place], fetched)
            text.result = _result(lm, drafter, options, text, of_row, compile_ms)
        is_done = not waiting and not any(batch)
        results = [text.result for text in texts if text.result] if is_done else []
        paused = time.perf_counter()
        yield Progress([text.tokens for text in texts], state, results)
        clock += time.perf_counter() - paused  # what the caller did in between is no part of the decoding


def _texts(batch: Sequence[_Text | None]) -> list[tuple[int, _Text]]:
    """The texts of a batch, each with its place."""
    return [(place, text) for place, text in enumerate(batch) if text is not None]


def _seat(waiting: collections.deque[_Text], batch: list[_Text | None], part_size: int) -> dict[int, _Text]:
    """Gives texts that wait free places of the batch, at most one in each part; the places taken."""
    taken = {}
    for start in range(0, len(batch), part_size):
        free = [place for place in range(start, start + part_size) if batch[place] is None]
        if free and waiting:
            taken[free[0]] = batch[free[0]] = waiting.popleft()
    return taken


def check_prompt(lm: LM, tokens: Any) -> list[int]:
    """A sequence of token ids as a list of ints.

    Raises:
      ValueError: the prompt is empty, holds an id outside the vocabulary, or leaves no room for an answer.
    """
    ids = [int(token) for token in tokens]
    if not ids:
        raise ValueError("the prompt is empty; it needs at least one token")
    bad = next(((i, t) for i, t in enumerate(ids) if not 0 <= t < lm.config.vocab_size), None)
    if bad:
        raise ValueError(
            f"token id {bad[1]} at index {bad[0]} of the prompt is outside the vocabulary of {lm.config.vocab_size}"
        )
    if len(ids) >= lm.max_context:
        raise ValueError(
            f"the prompt has {len(ids)} tokens; the model's context of {lm.max_context} leaves no room for an answer"
        )
    return ids


def request_of(lm: LM, rows: Sequence[Row], options: Options) -> loop.Request:
    """The rows as the loop takes them, numpy arrays. Raises ValueError where some have a record and others have none."""
    recorded: Any = None
    if any(row.recorded is not None for row in rows):
        recorded = np.full((len(rows), lm.max_context), NO_TOKEN, np.int32)
        for index, row in enumerate(rows):
            if row.recorded is None:
                raise ValueError("either all rows of a batch are recorded, or none")
            text = [*row.prompt, *row.recorded][: lm.max_context]
            recorded[index, : len(text)] = text
    stop = list(lm.tokenizer.eos_ids) if options.ends_at_stop_tokens and recorded is None else []
    return loop.Request(
        sampling=sampling_of(rows, options),
        prompt_lengths=_host_array([len(row.prompt) for row in rows], np.int32),
        limits=_host_array([_limit(lm, row, options) for row in rows], np.int32),
        stop_tokens=_host_array([stop or [NO_TOKEN]] * len(rows), np.int32),
        recorded=recorded,
    )


def _limit(lm: LM, row: Row, options: Options) -> int:
    num_new = options.max_new_tokens if row.recorded is None else len(row.recorded)
    return min(len(row.prompt) + num_new, lm.max_context)


def sampling_mode(lm: LM, options: Options) -> SamplingMode:
    """What a program for these options must be able to do."""
    return SamplingMode(options.temperature > 0, 0 < options.top_k < lm.config.vocab_size, options.top_p < 1)


def sampling_of(rows: Sequence[Row], options: Options) -> Sampling:
    """The rows' sampling settings, numpy arrays of [B] each."""
    num_rows = len(rows)
    return Sampling(
        temperature=_host_array([options.temperature] * num_rows, np.float32),
        top_k=_host_array([options.top_k] * num_rows, np.int32),
        top_p=_host_array([options.top_p] * num_rows, np.float32),
        seeds=_host_array([row.seed for row in rows], np.uint32),
        samples=_host_array([row.sample for row in rows], np.uint32),
    )


def _host_array(values: Any, dtype: Any) -> Any:
    """An array on the host: all of a request go to the device in one call."""
    return np.array(values, dtype)


def _lap(since: float) -> tuple[float, float]:
    now = time.perf_counter()
    return (now - since) * 1e3, now


def _find_stop(tokenizer: Tokenizer, ids: list[int], stop: Sequence[str]) -> int | None:
    """How many tokens it takes until the text holds a stop string; None if it does not."""
    contains = lambda count: any(s in tokenizer.decode(ids[:count]) for s in stop)  # noqa: E731
    if not contains(len(ids)):
        return None
    low, high = 0, len(ids)  # the text of more tokens holds what that of fewer holds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if contains(middle) else (middle, high)
    return high


def _result(
    lm: LM,
    drafter: Drafter,
    options: Options,
    text: _Text,
    of_row: tuple[np.ndarray, np.ndarray, loop.Logprobs | None],
    compile_ms: float,
) -> Result:
    """The result of a text that has ended; `of_row` are its sources, counts and logprobs in the state."""
    sources, counts, logprobs = of_row
    tokens, steps = text.tokens, text.accept_lengths
    slots = slice(len(text.row.prompt), len(text.row.prompt) + len(tokens))
    if text.is_stopped:  # Steps beyond the stop string do not count, and its step counts what it kept.
        steps, left = [], len(tokens)
        for count in text.accept_lengths:
            if left > 0:
                steps.append(min(count, left))
            left -= count
    is_stop_token = options.ends_at_stop_tokens and tokens[-1] in lm.tokenizer.eos_ids
    said = lm.tokenizer.decode(tokens[:-1] if is_stop_token else tokens)
    found = [said.index(s) for s in options.stop if s in said]
    if text.is_stopped and found:
        said = said[: min(found)]
    if is_stop_token or text.is_stopped:
        reason = "stop"
    else:
        reason = "length" if len(tokens) >= options.max_new_tokens else "context"
    names = drafter.source_names
    top: list[tuple[float, dict[int, float]]] = []
    if logprobs is not None:
        for slot in range(slots.start, slots.stop):
            best = dict(zip(logprobs.top_tokens[slot].tolist(), logprobs.top[slot].tolist(), strict=True))
            top.append((float(logprobs.chosen[slot]), best))
    return Result(
        text=said,
        tokens=tokens,
        prompt_tokens=list(text.row.prompt),
        finish_reason=reason,
        accept_lengths=steps,
        nodes_per_step=float(np.mean(text.num_nodes[: len(steps)])),
        pass_sizes=text.pass_sizes[: len(steps)],
        sources=[NOT_DRAFTED if s < 0 else names[s] for s in sources[slots].tolist()],
        source_counts={
            name: {"proposed": counts[0, i, 1:].tolist(), "accepted": counts[1, i, 1:].tolist()} for i, name in enumerate(names)
        },
        compile_ms=compile_ms,
        prefill_ms=text.prefill_ms,
        decode_ms=text.decode_ms,
        share_ms=text.share_ms,
        logprobs=top,
        tokenizer=lm.tokenizer,
    )


def fresh_drafter_state(lm: LM, drafter: Drafter) -> Any:
    """The state (of one row) of a drafter that has seen nothing but one token: for the shapes of a saved one."""
    options = Options(max_new_tokens=1)
    request = request_of(lm, [Row([0], 0)], options)
    return admission.init_drafter(drafter, request, jnp.zeros((1, num_slots(2, drafter.max_depth)), jnp.int32), None)
