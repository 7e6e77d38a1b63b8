r"""Where a step's time goes on this machine: by the number of nodes, the length of the context, the loop and the drafter.

    python -m experiments.step_cost --nodes=1,2,4,8,16,32,64 --context=256 --transformers
    python -m experiments.step_cost --shape=llama-2-7b --nodes=1,8,64 --context=256,1024,3072

The first table has whole steps (draft, verification, commit), with a drafter whose drafts cost nothing and are wrong. The
device loop runs many steps a dispatch; the host loop, which is timed for the first and the last size, one. Beside them stands
what the step must at least do: the bare products with the weights, the faster of two operand orders, alone and with those of
attention to the committed tokens; and the share of this device's measured copy rate at which a step reads the weights and the
committed keys and values. The second table has each drafter's draft and update, many in one program, without the model, after a
short text and after a long one.

All that is timed takes turns, round by round, so that a machine that other work slows down for a while slows all of it alike;
medians over the rounds are reported. --transformers adds Hugging Face transformers (torch, the same weights, or random ones
of the shape): a forward pass of one token, and `generate` per token. For the embedded model it also compares whole answers to
the embedded questions: `generate` plain and with prompt lookup, and hd_jax's plain decoding and `hd_tree`, with
a fixed number of nodes and with an adaptive budget.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import tqdm
from absl import flags

from experiments import device_floor, program, questions, report, shapes
from hd_jax import decode, draft_tree, drafters, runner, sharding
from hd_jax.drafters.base import Drafter
from hd_jax.models import tokenizer as tokenizers
from hd_jax.runner import LM, Options, Row

MAX_NODES = 128
LOOKUP_TOKENS = 10  # of transformers' prompt lookup, as Spec-Bench sets it for Vicuna
DRAFT_CONTEXTS = (512, 8192)  # tokens after which drafts are timed
HD_TREE_NODES, HD_TREE_MOST = 8, 16  # of hd_tree beside transformers, alone and with an adaptive budget


@functools.lru_cache
def wrong_drafts(num_nodes: int) -> Drafter:
    """Drafts the ids after the root's, as a chain: it costs nothing to draft, and is hardly ever right."""

    def draft(tables: Any, state: Any, context: Any):
        del tables, state
        if num_nodes == 1:
            return draft_tree.root_only(context.root)
        chain = context.root + jnp.arange(1, num_nodes)
        return draft_tree.from_chain(context.root, chain, jnp.int32(num_nodes - 1))

    return Drafter("wrong", num_nodes=num_nodes, max_depth=num_nodes - 1, source_names=("wrong",), draft=draft)


def prompt_of(lm: LM, num_tokens: int) -> list[int]:
    """Token ids without a meaning, which hardly repeat."""
    return [(7 * i) % lm.config.vocab_size for i in range(num_tokens)]


def run_steps(lm: LM, num_nodes: int, context: int, num_steps: int, loop: str = "device") -> Any:
    """The Result of a run of at most `num_steps` tokens after `context`."""
    options = Options(max_new_tokens=num_steps, ends_at_stop_tokens=False, loop=loop)
    *_, last = runner.run(lm, wrong_drafts(num_nodes), [Row(prompt_of(lm, context), 0)], options)
    return last.results[0]


def step_ms(lm: LM, num_nodes: int, context: int, num_steps: int, loop: str = "device") -> float:
    """Milliseconds of a step after `context` tokens: the mean over a run of at most `num_steps` tokens."""
    result = run_steps(lm, num_nodes, context, num_steps, loop)
    return result.decode_ms / result.num_steps


def transformers_model(lm: LM, folder: str | None) -> Any:
    """transformers' model of a folder's weights, or with random ones of the same shape, on the GPU where torch finds one."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ValueError(f"--transformers needs torch, which hd_jax itself does not: {error}") from error
    dtype = getattr(torch, lm.config.dtype)
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() != "cpu" else "cpu"
    if folder is not None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.to(device).eval()
    c = lm.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_context,
    )
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def transformers_step(model: Any, prompt: Sequence[int], num_steps: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Functions that measure one round: milliseconds of a forward pass of one token, and of `generate` per token."""
    import torch
    from transformers import DynamicCache

    ids = torch.tensor([list(prompt)], device=model.device)
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None

    def forward() -> float:
        with torch.no_grad():
            cache = DynamicCache()
            token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            wait()
            clock = time.perf_counter()
            for _ in range(num_steps):
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            wait()
            return (time.perf_counter() - clock) * 1e3 / num_steps

    def generate() -> float:
        with torch.no_grad():
            times = []
            for new in (1, num_steps + 1):  # the difference leaves the prompt's pass out
                clock = time.perf_counter()
                model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
                wait()
                times.append(time.perf_counter() - clock)
            return (times[1] - times[0]) * 1e3 / num_steps

    return forward, generate


def answers_beside_transformers(lm: LM, model: Any, num_questions: int, max_new_tokens: int) -> dict[str, dict[str, Any]]:
    """Whole answers to the embedded questions, the first ones of each task, prompt included, by five ways in turns.

    Returns:
      By way: "tokens_per_second", total tokens over total seconds, "seconds", "tokens", and "same_texts", how many of the
      answers are those of hd_jax's plain decoding (float rounding decides between near ties).
    """
    import torch

    asked = questions.read(questions.EMBEDDED)
    chosen = questions.select(asked, questions.TASKS, num_questions)
    prompts = [decode.encode_prompt(lm, question.turns[0]) for question in chosen]

    def by_transformers(prompt: list[int], **options: Any) -> tuple[list[int], float]:
        with torch.no_grad():
            ids = torch.tensor([prompt], device=model.device)
            clock = time.perf_counter()
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=list(lm.tokenizer.eos_ids),
                pad_token_id=0,
                **options,
            )
            new = out[0, len(prompt) :].tolist()
            return new, time.perf_counter() - clock

    def by_us(prompt: list[int], **options: Any) -> tuple[list[int], float]:
        result = decode.generate(lm, prompt, max_new_tokens=max_new_tokens, **options)
        return result.tokens, (result.prefill_ms + result.decode_ms) / 1e3

    ways: dict[str, Callable[[list[int]], tuple[list[int], float]]] = {
        "transformers, generate": by_transformers,
        "transformers, prompt lookup": functools.partial(by_transformers, prompt_lookup_num_tokens=LOOKUP_TOKENS),
        "hd_jax, plain": by_us,
        f"hd_jax, hd_tree of {HD_TREE_NODES} nodes": functools.partial(by_us, drafter="hd_tree", num_nodes=HD_TREE_NODES),
        f"hd_jax, hd_tree of up to {HD_TREE_MOST}": functools.partial(
            by_us, drafter="hd_tree", num_nodes=HD_TREE_MOST, budget="adaptive"
        ),
    }
    for prompt in prompts:  # compiles, and warms up
        for way in ways.values():
            way(prompt)
    found: dict[str, list[tuple[list[int], float]]] = {name: [] for name in ways}
    for prompt in tqdm.tqdm(prompts, "answers", unit="prompt"):
        for name, way in ways.items():
            found[name].append(way(prompt))
    plain = [tokens for tokens, _ in found["hd_jax, plain"]]
    out = {}
    for name, results in found.items():
        num_tokens, seconds = sum(len(tokens) for tokens, _ in results), sum(taken for _, taken in results)
        same = sum(tokens == expected for (tokens, _), expected in zip(results, plain, strict=True))
        out[name] = {"tokens_per_second": num_tokens / seconds, "seconds": seconds, "tokens": num_tokens, "same_texts": same}
    return out


def define_flags() -> None:
    """Defines the flags; a function, so that tests can import several programs."""
    flags.DEFINE_string("model", None, "Model folder or hub name; by default the embedded model.")
    flags.DEFINE_enum("shape", None, sorted(shapes.SHAPES), "Random weights of this shape, in place of a model.")
    flags.DEFINE_list("nodes", ["1", "2", "4", "8", "16", "32", "64"], "Sizes of the tree, the root included; 1 comes first.")
    flags.DEFINE_list("context", ["256"], "Tokens before the first step.")
    flags.DEFINE_list("drafters", ["none", "pld", "hd", "hd_tree"], "Whose draft and update are timed; may be empty.")
    flags.DEFINE_integer("num_steps", 32, "Steps a round.", lower_bound=1)
    flags.DEFINE_integer("num_rounds", 7, "Rounds; medians over them are reported.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of parameters and cache; by default the model's.")
    flags.DEFINE_string("mesh", None, "Devices that the model is split over, as model=4; by default one.")
    flags.DEFINE_bool("transformers", False, "Also time Hugging Face transformers (needs torch).")
    flags.DEFINE_integer("num_questions", 4, "Of each task, for whole answers beside transformers'; 0 for none.", lower_bound=0)
    flags.DEFINE_integer("max_new_tokens", 96, "Tokens of such an answer.", lower_bound=1)
    flags.DEFINE_string("profile", None, "Folder for a profile (jax.profiler) of one dispatch of the last size and context.")
    flags.DEFINE_string("output_dir", None, "Folder for step_cost.json, .md and .png; by default nothing is written.")


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    if values.model and values.shape:
        raise ValueError("--model and --shape: give one of them")
    sizes = program.whole_numbers("nodes", 1, MAX_NODES)
    embedded = None
    if values.shape:
        embedded = tokenizers.load(decode.EMBEDDED)  # nothing of its text matters here
        most = shapes.SHAPES[values.shape].max_context - values.num_steps
        contexts = program.whole_numbers("context", 1, most)
        mesh = None if values.mesh is None else sharding.make_mesh(values.mesh)
        lm = shapes.random_model(values.shape, embedded, dtype=values.dtype, mesh=mesh)
    else:
        lm = decode.load(values.model, dtype=values.dtype, mesh=values.mesh)
        contexts = program.whole_numbers("context", 1, lm.max_context - values.num_steps)
    for name in values.drafters:
        if name not in drafters.MAKERS:
            raise ValueError(f"--drafters: there is no drafter {name!r}; there are: {', '.join(drafters.MAKERS)}")
    record = measure(lm, sizes, contexts, values)
    tables = list(_tables(record))
    print("\n\n".join([record["facts"], *(f"{title}\n{report.aligned(head, body)}" for title, head, body in tables)]))
    if values.output_dir:
        folder = pathlib.Path(values.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        report.write_file(folder / "step_cost.json", json.dumps(record, indent=1) + "\n")
        parts = [f"# Cost of a step: {record['model']}", record["facts"]]
        parts += [f"## {title}\n\n{report.markdown(head, body)}" for title, head, body in tables]
        if len(sizes) > 1:
            report.write_figure(folder / "step_cost.png", _plot(record))
            parts.append("![cost by nodes](step_cost.png)")
        report.write_file(folder / "step_cost.md", "\n\n".join(parts) + "\n")
        print(f"Written to {folder}")


def measure(lm: LM, sizes: Sequence[int], contexts: Sequence[int], values: Any) -> dict[str, Any]:
    """All figures, as step_cost.json has them; times by name are {"median_ms", "ms", a list by round}."""
    steps = {
        (context, n, loop): functools.partial(step_ms, lm, n, context, values.num_steps, loop)
        for context in contexts
        for n in sizes
        for loop in (("device", "host") if context == contexts[0] and n in (sizes[0], sizes[-1]) else ("device",))
    }
    cached = {0: [], **{context: device_floor.keys_and_values(lm, context) for context in contexts}}
    bare = {("bare", n, c): device_floor.bare_products(lm, n, layers) for n in sizes for c, layers in cached.items()}
    measures: dict[Any, Callable[[], float]] = {**steps, **bare}
    torch_model = None
    if values.transformers:
        torch_model = transformers_model(lm, None if values.shape else lm.folder)
        forward, generate = transformers_step(torch_model, prompt_of(lm, contexts[0]), values.num_steps)
        measures |= {("transformers", "forward"): forward, ("transformers", "generate"): generate}
    compile_ms: dict[Any, float] = {}
    prefill: dict[int, float] = {}
    for key, call in tqdm.tqdm(measures.items(), "compiling", unit="program"):
        if key in steps:  # the first run's figures say what compilation took, the second's what the prompt did
            context, n, loop = key
            compile_ms[key] = run_steps(lm, n, context, values.num_steps, loop).compile_ms
            prefill[context] = run_steps(lm, n, context, values.num_steps, loop).prefill_ms
        else:
            call()
    times: dict[Any, list[float]] = {key: [] for key in measures}
    for _ in tqdm.tqdm(range(values.num_rounds), "measuring", unit="round"):
        for key, call in measures.items():
            times[key].append(call())
    medians = {key: statistics.median(found) for key, found in times.items()}
    copied, multiplied = device_floor.copy_rate(), device_floor.matmul_rate()
    rows = []
    for context in contexts:
        for n in sizes:
            ms = medians[context, n, "device"]
            rows.append(
                {
                    "context": context,
                    "nodes": n,
                    "device_ms": ms,
                    "all_device_ms": times[context, n, "device"],
                    "host_ms": medians.get((context, n, "host")),
                    "over_one_node": ms / medians[context, sizes[0], "device"],
                    "bare_ms": medians["bare", n, 0],
                    "bare_with_attention_ms": medians["bare", n, context],
                    "share_of_copy_rate": device_floor.bytes_read(lm, context) / (ms * 1e-3) / copied,
                    "compile_s": compile_ms[context, n, "device"] / 1e3,
                }
            )
    prefills = [
        {
            "context": context,
            "prefill_ms": ms,
            "share_of_matmul_rate": 2 * device_floor.num_weights(lm) * (context - 1) / (ms * 1e-3) / multiplied,
        }
        for context, ms in prefill.items()
    ]
    device = jax.devices()[0]
    facts = ["random weights"] * bool(values.shape) + [lm.config.dtype] + [f"mesh {values.mesh}"] * bool(values.mesh)
    facts += [device.device_kind, f"{os.cpu_count()} CPU cores", f"jax {jax.__version__}"]
    record: dict[str, Any] = {
        "model": values.shape or values.model or "embedded",
        "facts": ", ".join(facts),
        "copy_gb_per_s": copied / 1e9,
        "matmul_tflop_per_s": multiplied / 1e12,
        "weights_gb": sum(x.nbytes for x in jax.tree.leaves(lm.params)) / 1e9,
        "peak_memory_gb": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9,
        "steps": rows,
        "prefill": prefills,
        "drafters": list(_drafter_costs(lm, values, medians[contexts[0], sizes[0], "device"])),
    }
    if torch_model is not None:
        record["transformers_ms"] = {name: medians["transformers", name] for name in ("forward", "generate")}
        if values.num_questions and not values.shape:
            record["answers"] = answers_beside_transformers(lm, torch_model, values.num_questions, values.max_new_tokens)
    if values.profile:
        last = runner.run(
            lm,
            wrong_drafts(sizes[-1]),
            [Row(prompt_of(lm, contexts[-1]), 0)],
            Options(max_new_tokens=values.num_steps, ends_at_stop_tokens=False),
        )
        with jax.profiler.trace(values.profile):
            for progress in last:
                jax.block_until_ready(progress.state)
    return record


def _drafter_costs(lm: LM, values: Any, plain_ms: float) -> Iterator[dict[str, Any]]:
    """Of draft and update within the device loop. A shape has no databases, so its drafters are the embedded model's."""
    if not values.drafters:
        return
    longest = max(DRAFT_CONTEXTS)
    source = dataclasses.replace(decode.load() if values.shape else lm, max_context=longest + 1)  # the model does not run
    asked = source.tokenizer.encode("\n".join(turn for q in questions.read(questions.EMBEDDED) for turn in q.turns))
    text = (asked * (longest // len(asked) + 1))[:longest]
    for name in values.drafters:
        for num_nodes in (8, 16, 32, 64) if name == "hd_tree" else (None,):
            options: dict[str, Any] = {} if num_nodes is None else {"num_nodes": num_nodes}
            drafter = decode.make_drafter(source, name, **options)
            us = [decode.measure_draft_us(source, drafter, text[:length]) for length in DRAFT_CONTEXTS]
            yield {"drafter": name, "nodes": drafter.num_nodes, "us": us, "of_plain_step": us[0] / 1e3 / plain_ms}


def _tables(record: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    head = ["context", "nodes", "ms a step", "over the first", "host loop, ms", "bare products, ms", "over them"]
    head += ["with attention's, ms", "over them", "share of copy rate", "compiled in s"]
    body = []
    for row in record["steps"]:
        cells = [f"{row['context']}", f"{row['nodes']}", f"{row['device_ms']:.2f}", f"{row['over_one_node']:.2f}"]
        cells += [
            "" if row["host_ms"] is None else f"{row['host_ms']:.2f}",
            f"{row['bare_ms']:.2f}",
            f"{row['device_ms'] / row['bare_ms']:.2f}",
            f"{row['bare_with_attention_ms']:.2f}",
            f"{row['device_ms'] / row['bare_with_attention_ms']:.2f}",
        ]
        body.append([*cells, f"{row['share_of_copy_rate']:.0%}", f"{row['compile_s']:.1f}"])
    memory = f", at most {record['peak_memory_gb']:.1f} GB in use" if record["peak_memory_gb"] else ""
    rate = f"copying {record['copy_gb_per_s']:.0f} GB/s, read and written; weights {record['weights_gb']:.2f} GB{memory}"
    yield f"Steps ({rate})", head, body
    body = [[f"{r['context']}", f"{r['prefill_ms']:.1f}", f"{r['share_of_matmul_rate']:.0%}"] for r in record["prefill"]]
    title = f"Prefill (a large product runs at {record['matmul_tflop_per_s']:.2f} TFLOP/s)"
    yield title, ["tokens", "ms", "share of that rate"], body
    if record["drafters"]:
        body = [
            [r["drafter"], f"{r['nodes']}", *(f"{us:.0f}" for us in r["us"]), f"{r['of_plain_step']:.1%}"]
            for r in record["drafters"]
        ]
        head = ["drafter", "nodes", *(f"us, after {length} tokens" for length in DRAFT_CONTEXTS), "of a plain step"]
        yield "Draft and update, without the model", head, body
    if "transformers_ms" in record:
        ours = record["steps"][0]["device_ms"]
        body = [[name, f"{ms:.2f}", f"{ms / ours:.2f}"] for name, ms in record["transformers_ms"].items()]
        yield "transformers, one token", ["by", "ms", "over ours"], body
    if "answers" in record:
        base = record["answers"]["transformers, generate"]["tokens_per_second"]
        body = [
            [name, f"{found['tokens_per_second']:.0f}", f"{found['tokens_per_second'] / base:.2f}", f"{found['same_texts']}"]
            for name, found in record["answers"].items()
        ]
        yield "Whole answers", ["by", "tokens/s", "over transformers' generate", "same texts as plain"], body


def _plot(record: dict[str, Any]) -> matplotlib.figure.Figure:
    """Milliseconds by nodes, a line a context; and of the bare products."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    contexts = list(dict.fromkeys(row["context"] for row in record["steps"]))
    for context in contexts:
        rows = [row for row in record["steps"] if row["context"] == context]
        nodes, bare = [r["nodes"] for r in rows], [r["bare_with_attention_ms"] for r in rows]
        (line,) = axes.plot(nodes, [r["device_ms"] for r in rows], "o-", label=f"step, {context} tokens of context")
        axes.plot(nodes, bare, "s--", color=line.get_color(), label="its bare products, attention's among them")
    rows = [row for row in record["steps"] if row["context"] == contexts[0]]
    axes.plot(
        [r["nodes"] for r in rows], [r["bare_ms"] for r in rows], "s--", color="gray", label="bare products with the weights"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks([r["nodes"] for r in rows], [str(r["nodes"]) for r in rows])
    axes.set(xlabel="nodes a step", ylabel="milliseconds", ylim=(0, None), title=f"Cost of a step: {record['model']}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    define_flags()
    program.run(main)
