r"""Trains the embedded chat model from scratch and exports it in Hugging Face format.

    python -m experiments.train_embedded --data DIR --output_dir DIR

DIR holds one .jsonl.gz file a task: {"task", "source", "turns": [{"role", "content"}]} or {"task", "source", "text"}, and
validation.jsonl.gz. The loss falls on the assistant's turns (and on all of a plain text); records are packed into
sequences of --sequence_length tokens that do not see each other. Products run with bfloat16 operands and float32 sums.
A killed run goes on from its last checkpoint when started again with the same --output_dir. --num_steps may be changed
between starts: the cosine schedule is a function of step / num_steps.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tokenizers
import tqdm
from absl import flags, logging

from experiments import program, report, training_mix
from hd_jax import decode
from hd_jax.models import llama, weights
from hd_jax.models.config import ModelConfig


@jax.custom_vjp
def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w^T` of [..., in] and [out, in]; operands bfloat16, sums float32."""
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(_half(x), _half(w), contract, preferred_element_type=jnp.float32)


def _product_fwd(x, w):
    return _product(x, w), (x, w)


def _product_bwd(residuals, g):
    x, w = residuals
    dx = jax.lax.dot_general(_half(g), _half(w), (((g.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    # Sums over all tokens: in float32, which is also the faster form of this product on XLA CPU.
    dw = jax.lax.dot_general(g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1]), (((0,), (0,)), ((), ())))
    return dx, dw


_product.defvjp(_product_fwd, _product_bwd)


def _half(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16)


def training_multiply(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    """`llama.multiply` with bfloat16 operands, forwards and backwards: several times faster on CPUs with matrix units."""
    del axis  # always the last
    return _product(x, w)


_QUERY_BLOCK = 128


def _batched(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    contract = (((axis_a,), (axis_b,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention over [heads, T, D] with bool[heads, T, T] below the diagonal, a block of queries at a time: a block reads
    only the keys before its end, which skips near half of the work that a full square does."""
    return _causal_attention_fwd(q, k, v, mask)[0]


def _causal_attention_fwd(q, k, v, mask):
    q, k, v = _half(q), _half(k), _half(v)
    outs, probabilities = [], []
    for start in range(0, q.shape[1], _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, q.shape[1])
        scores = jnp.where(mask[:, start:end, :end], _batched(q[:, start:end], k[:, :end], 2, 2), -1e30)
        p = _half(jax.nn.softmax(scores, axis=-1))
        outs.append(_batched(p, v[:, :end], 2, 1))
        probabilities.append(p)
    out = jnp.concatenate(outs, axis=1)
    return out, (q, k, v, out, probabilities)


def _causal_attention_bwd(residuals, g):
    q, k, v, out, probabilities = residuals
    delta = jnp.sum(g * out, axis=-1, keepdims=True)
    g = _half(g)
    dq, dk, dv = [], jnp.zeros(g.shape, jnp.float32), jnp.zeros(g.shape, jnp.float32)
    for block, start in enumerate(range(0, g.shape[1], _QUERY_BLOCK)):
        end = min(start + _QUERY_BLOCK, g.shape[1])
        p = probabilities[block]
        ds = _half(p * (_batched(g[:, start:end], v[:, :end], 2, 2) - delta[:, start:end]))
        dq.append(_batched(ds, k[:, :end], 2, 1))
        dk = dk.at[:, :end].add(_batched(jnp.swapaxes(ds, 1, 2), q[:, start:end], 2, 1))
        dv = dv.at[:, :end].add(_batched(jnp.swapaxes(p, 1, 2), g[:, start:end], 2, 1))
    return jnp.concatenate(dq, axis=1), dk, dv, None


_causal_attention.defvjp(_causal_attention_fwd, _causal_attention_bwd)


def training_attend(q, new, self_mask, cached, cache_lengths, accumulate_dtype):
    """`llama.attend` without a cache, with bfloat16 operands and a backward pass of its own."""
    del cached, cache_lengths, accumulate_dtype
    num_rows, num_tokens, num_heads, head_dim = q.shape
    heads_first = lambda x: x.reshape(num_rows * num_heads, num_tokens, head_dim)  # noqa: E731
    repeat = lambda x: heads_first(jnp.repeat(x, num_heads // x.shape[1], axis=1))  # noqa: E731
    q = heads_first(jnp.swapaxes(q * head_dim**-0.5, 1, 2))
    out = _causal_attention(q, repeat(new[0]), repeat(new[1]), jnp.repeat(self_mask, num_heads, axis=0))
    out = jnp.swapaxes(out.reshape(num_rows, num_heads, num_tokens, head_dim), 1, 2)
    return out.reshape(num_rows, num_tokens, num_heads * head_dim)


def loss_fn(params, model: llama.Llama, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy in nats a target token, and that of each target, float32[M]."""
    segments = batch["segments"]
    causal = jnp.tril(jnp.ones((segments.shape[1], segments.shape[1]), bool))
    mask = causal & (segments[:, :, None] == segments[:, None, :])
    out: Any = model.apply({"params": params}, batch["tokens"], batch["positions"], mask, method="hidden")
    hidden = out[0].reshape(-1, out[0].shape[-1])[batch["where"]]
    logits: Any = model.apply({"params": params}, hidden, method="head")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.sum(losses * batch["weight"]) / jnp.maximum(jnp.sum(batch["weight"]), 1), losses


def make_optimizer(num_steps: int, learning_rate: float, adam_learning_rate: float) -> optax.GradientTransformation:
    """Muon on the layers' matrices, Adam on the rest, one warm-up and cosine for both."""

    def schedule(peak: float):
        warmup = min(100, max(1, num_steps // 10))
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(num_steps, warmup + 1), peak * 0.02)

    def dimensions(params):
        def of(path, leaf):
            is_matrix = leaf.ndim == 2 and any("layers" in str(key) for key in path)
            return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0) if is_matrix else None

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule(learning_rate),
            weight_decay=0.01,
            adam_learning_rate=schedule(adam_learning_rate),
            adam_b2=0.98,
            muon_weight_dimension_numbers=dimensions,
        ),
    )


def validate(
    params, model: llama.Llama, records: Sequence[training_mix.Record], batch_size: int, sequence_length: int
) -> dict[str, float]:
    """Mean cross-entropy in nats a token, by task and over all target tokens ("overall")."""
    evaluate = jax.jit(loss_fn, static_argnums=1)
    sums: dict[str, list[float]] = {}
    for task in sorted({r.task for r in records}):
        packed = training_mix.pack(
            [dataclasses.replace(r, source="") for r in records if r.task == task], sequence_length, np.random.default_rng(0)
        )
        for first in range(0, len(packed), batch_size):
            rows = list(packed[first : first + batch_size])
            batch = training_mix.collate(rows + [[]] * (batch_size - len(rows)), sequence_length)
            _, losses = evaluate(params, model, batch)
            total = sums.setdefault(task, [0.0, 0.0])
            total[0] += float(np.sum(np.asarray(losses) * batch["weight"]))
            total[1] += float(np.sum(batch["weight"]))
    out = {task: loss / count for task, (loss, count) in sums.items()}
    out["overall"] = sum(s[0] for s in sums.values()) / sum(s[1] for s in sums.values())
    return out


def loop_shares(
    folder: pathlib.Path, paths: Sequence[pathlib.Path], num_prompts: int, batch_size: int = 16
) -> dict[str, float]:
    """Of the model's greedy answers (128 tokens) to first turns, those that repeat an 8-gram over all, by task.

    The prompts are evenly spread over the files' records; plain texts have none.
    """
    lm = decode.load(folder)
    raw = [
        r
        for path in paths
        for r in training_mix.read_records(path)
        if "turns" in r and training_mix.source_weight(r["source"]) > 0
    ]
    raw = [r for r in raw if len(lm.tokenizer.chat(r["turns"][:1])) <= 384]
    chosen = [raw[i * len(raw) // num_prompts] for i in range(min(num_prompts, len(raw)))]
    found: dict[str, list[bool]] = {}
    for first in tqdm.tqdm(range(0, len(chosen), batch_size), desc="answering", unit="batch"):
        batch = chosen[first : first + batch_size]
        for record, result in zip(batch, decode.generate(lm, [r["turns"][:1] for r in batch]), strict=True):
            found.setdefault(record["task"], []).append(report.is_looping(result.tokens))
    found["overall"] = [x for values in found.values() for x in values]
    return {task: sum(values) / len(values) for task, values in found.items()}


def define_flags() -> None:
    """Defines the flags; a function, so that tests can import several programs."""
    flags.DEFINE_string("data", None, "Folder with the training files.", required=True)
    flags.DEFINE_string("output_dir", None, "Folder for the tokenizer, checkpoints and the export.", required=True)
    flags.DEFINE_integer("vocab_size", 8192, "Entries of the byte-level BPE tokenizer.", lower_bound=512)
    flags.DEFINE_integer("hidden_size", 256, "Model width.")
    flags.DEFINE_integer("intermediate_size", 768, "Width of the feed-forward layers.")
    flags.DEFINE_integer("num_layers", 6, "Layers.")
    flags.DEFINE_integer("num_heads", 4, "Query heads.")
    flags.DEFINE_integer("num_kv_heads", 2, "Key/value heads.")
    flags.DEFINE_integer("sequence_length", 512, "Tokens a sequence; longer records are left out.")
    flags.DEFINE_integer("batch_size", 24, "Sequences a step.")
    flags.DEFINE_integer("num_steps", 2000, "Steps in all.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 0.02, "Peak rate of Muon (matrices).")
    flags.DEFINE_float("adam_learning_rate", 4e-3, "Peak rate of Adam (embeddings and norms).")
    flags.DEFINE_integer("save_every", 100, "Steps between checkpoints.")
    flags.DEFINE_integer(
        "num_loop_prompts", 320, "Validation prompts whose greedy answers are checked for loops.", lower_bound=1
    )
    flags.DEFINE_integer("seed", 0, "Of the initial weights and of the order of the data.")


def main(argv: Sequence[str]) -> None:
    del argv
    data, output = pathlib.Path(flags.FLAGS.data), pathlib.Path(flags.FLAGS.output_dir).absolute()
    training_mix.training_files(data)
    export = output / "export"
    export.mkdir(parents=True, exist_ok=True)
    tokenizer_file = export / "tokenizer.json"
    if not tokenizer_file.exists():
        logging.info("training the tokenizer")
        training_mix.train_tokenizer(data, flags.FLAGS.vocab_size).save(str(tokenizer_file))
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=flags.FLAGS.hidden_size,
        intermediate_size=flags.FLAGS.intermediate_size,
        num_layers=flags.FLAGS.num_layers,
        num_heads=flags.FLAGS.num_heads,
        num_kv_heads=flags.FLAGS.num_kv_heads,
        head_dim=flags.FLAGS.hidden_size // flags.FLAGS.num_heads,
        max_context=2048,
        rms_norm_eps=1e-5,
        is_head_tied=True,
    )
    model = llama.Llama(config, training_multiply, training_attend)
    length, batch_size, num_steps = flags.FLAGS.sequence_length, flags.FLAGS.batch_size, flags.FLAGS.num_steps
    train = training_mix.load_split(training_mix.training_files(data), tokenizer, length)
    validation = training_mix.load_split([data / "validation.jsonl.gz"], tokenizer, length)
    logging.info("%d training records, %d validation records", len(train), len(validation))

    optimizer = make_optimizer(num_steps, flags.FLAGS.learning_rate, flags.FLAGS.adam_learning_rate)
    ones = jnp.zeros((1, 1), jnp.int32)
    params = model.init(jax.random.key(flags.FLAGS.seed), ones, ones, jnp.ones((1, 1, 1), bool))["params"]
    state = {"params": params, "optimizer": optimizer.init(params)}
    logging.info("%d parameters", sum(leaf.size for leaf in jax.tree.leaves(params)))

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, batch):
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"], model, batch)
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer_state}, loss

    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(output / "checkpoints", options=options) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start:
            state = checkpoints.restore(start, args=ocp.args.StandardRestore(state))
            logging.info("going on from step %d", start)
        source = training_mix.batches(train, batch_size, length, flags.FLAGS.seed, start)
        progress = tqdm.tqdm(range(start, num_steps), initial=start, total=num_steps, unit="step")
        for step in progress:
            state, loss = train_step(state, next(source))
            if step % 10 == 0:
                rate = progress.format_dict["rate"] or 0.0
                progress.set_postfix(loss=f"{float(loss):.3f}", tokens_per_s=f"{rate * batch_size * length:.0f}")
            if (step + 1) % flags.FLAGS.save_every == 0 or step + 1 == num_steps:
                checkpoints.save(step + 1, args=ocp.args.StandardSave(state))

    losses = validate(state["params"], model, validation, batch_size, length)
    logging.info("validation loss, nats a token: %s", json.dumps(losses, indent=1))
    weights.export_hf(
        export,
        config,
        state["params"],
        tokenizer,
        chat_template=training_mix.CHAT_TEMPLATE,
        bos=training_mix.BOS,
        eos=training_mix.EOS,
    )
    shares = loop_shares(export, [data / "validation.jsonl.gz"], flags.FLAGS.num_loop_prompts)
    logging.info("share of greedy answers that repeat an 8-gram: %s", json.dumps(shares, indent=1))
    settings = flags.FLAGS.get_flags_for_module("__main__")
    recipe = {flag.name: flag.value for flag in settings if flag.name not in ("data", "output_dir")}
    (output / "training.json").write_text(
        json.dumps({"recipe": recipe, "validation_loss": losses, "loop_share": shares}, indent=2)
    )


if __name__ == "__main__":
    define_flags()
    program.run(main)
