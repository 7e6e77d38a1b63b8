r"""What a step of decoding costs on this machine, by the number of nodes it verifies.

    python -m experiments.step_cost --nodes=1,2,4,8,16,32,64 --context=256 --transformers

Each figure is the time of whole steps (draft, verification, commit) as the device loop runs them, with a drafter whose
drafts cost nothing and are wrong. The sizes take turns, round by round, so that a machine that other work slows down
for a while slows all of them alike; medians over the rounds are reported. With --transformers, steps of one token by
Hugging Face transformers (torch, the same weights, float32, key/value cache) take their turns too: the model's own
forward pass, and `generate` per token.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from absl import flags

from experiments import program, report
from hd_jax import decode, draft_tree, runner
from hd_jax.drafters.base import Drafter
from hd_jax.runner import LM, Options, Row


@functools.lru_cache
def wrong_drafts(num_nodes: int) -> Drafter:
    """Drafts the root's token again and again: a chain that costs nothing to draft, and is hardly ever right."""

    def draft(tables: Any, state: Any, context: Any):
        del tables, state
        if num_nodes == 1:
            return draft_tree.root_only(context.root)
        chain = jnp.broadcast_to(context.root, num_nodes - 1)
        return draft_tree.from_chain(context.root, chain, jnp.int32(num_nodes - 1))

    return Drafter("wrong", num_nodes=num_nodes, max_depth=num_nodes - 1, source_names=("wrong",), draft=draft)


def step_ms(lm: LM, num_nodes: int, context: int, num_steps: int) -> float:
    """Milliseconds of a step after `context` tokens: the mean over a run of at most `num_steps` tokens."""
    prompt = [(7 * i) % lm.config.vocab_size for i in range(context)]
    options = Options(max_new_tokens=num_steps, ends_at_stop_tokens=False)
    *_, last = runner.run(lm, wrong_drafts(num_nodes), [Row(prompt, 0)], options)
    result = last.results[0]
    return result.decode_ms / result.num_steps


def transformers_step(folder: str, context: int, num_steps: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Functions that measure one round: milliseconds of a forward pass of one token, and of `generate` per token."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache
    except ImportError as error:
        raise ValueError(f"--transformers needs torch, which hd_jax itself does not: {error}") from error
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([[(7 * i) % model.config.vocab_size for i in range(context)]])

    def forward() -> float:
        with torch.no_grad():
            cache = DynamicCache()
            token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
            clock = time.perf_counter()
            for _ in range(num_steps):
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            return (time.perf_counter() - clock) * 1e3 / num_steps

    def generate() -> float:
        with torch.no_grad():
            times = []
            for new in (1, num_steps + 1):  # the difference leaves the prompt's pass out
                clock = time.perf_counter()
                model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
                times.append(time.perf_counter() - clock)
            return (times[1] - times[0]) * 1e3 / num_steps

    return forward, generate


def define_flags() -> None:
    """Defines the flags; a function, so that tests can import several programs."""
    flags.DEFINE_string("model", None, "Model folder or hub name; by default the embedded model.")
    flags.DEFINE_list("nodes", ["1", "2", "4", "8", "16", "32", "64"], "Sizes of the tree, the root included.")
    flags.DEFINE_integer("context", 256, "Tokens before the first step.", lower_bound=1)
    flags.DEFINE_integer("num_steps", 32, "Steps a round.", lower_bound=1)
    flags.DEFINE_integer("num_rounds", 7, "Rounds; medians over them are reported.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of parameters and cache; by default the model's.")
    flags.DEFINE_string("mesh", None, "Devices that the model is split over, as model=4; by default one.")
    flags.DEFINE_bool("transformers", False, "Also time Hugging Face transformers (needs torch).")
    flags.DEFINE_string("output_dir", None, "Folder for step_cost.json and step_cost.md; by default nothing is written.")


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    try:
        sizes = [int(text) for text in values.nodes]
    except ValueError:
        raise ValueError(f"--nodes={','.join(values.nodes)}: whole numbers are needed, as in --nodes=1,4,16") from None
    if not sizes or min(sizes) < 1 or max(sizes) > runner.RESERVE:
        raise ValueError(f"--nodes={','.join(values.nodes)}: sizes are from 1 to {runner.RESERVE}")
    lm = decode.load(values.model, dtype=values.dtype, mesh=values.mesh)
    if values.context + values.num_steps > lm.max_context:
        raise ValueError(
            f"--context={values.context} and {values.num_steps} steps exceed the model's context of {lm.max_context}"
        )
    measures: dict[str, Callable[[], float]] = {
        f"{n} nodes": functools.partial(step_ms, lm, n, values.context, values.num_steps) for n in sizes
    }
    if values.transformers:
        forward, generate = transformers_step(lm.folder, values.context, values.num_steps)
        measures |= {"transformers, forward of one token": forward, "transformers, generate per token": generate}
    for measure in measures.values():  # compiles, and warms up
        measure()
    times: dict[str, list[float]] = {name: [] for name in measures}
    for _ in tqdm.tqdm(range(values.num_rounds), unit="round"):
        for name, measure in measures.items():
            times[name].append(measure())
    medians = {name: statistics.median(found) for name, found in times.items()}
    base = medians[f"{sizes[0]} nodes"]
    head = ["step", "median ms", "min", "max", f"over {sizes[0]} nodes"]
    body = [[n, f"{medians[n]:.2f}", f"{min(t):.2f}", f"{max(t):.2f}", f"{medians[n] / base:.2f}"] for n, t in times.items()]
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, jax {jax.__version__}"
    mesh = f"mesh {values.mesh}, " if values.mesh else ""
    facts = f"{lm.config.dtype}, {mesh}{values.context} tokens of context, {device}"
    print(f"{facts}\n{report.aligned(head, body)}")
    if values.output_dir:
        folder = pathlib.Path(values.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "model": values.model or "embedded",
            "facts": facts,
            "context": values.context,
            "median_ms": medians,
            "ms": times,
        }
        report.write_file(folder / "step_cost.json", json.dumps(record, indent=1) + "\n")
        report.write_file(folder / "step_cost.md", f"# Cost of a step\n\n{facts}\n\n{report.markdown(head, body)}\n")
        print(f"Written to {folder}")


if __name__ == "__main__":
    define_flags()
    program.run(main)
