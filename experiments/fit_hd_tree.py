r"""Fits the weights of `hd_tree`: how likely a candidate is, from what its sources say about it.

    python -m experiments.fit_hd_tree --traces=answers.jsonl --questions=question.jsonl --tokenizer=FOLDER --template=vicuna \
        --model_corpus=own.jsonl.gz --statistics_corpus=other.jsonl.gz --output=hd_tree.safetensors

Text of a model is read a few tokens at a time. Before each token the drafter's own code lists the candidates and their
features; the label is the one that came, or that none did. A network for each set of sources is fitted to these by maximum
likelihood. The text is that of two kinds:

    recorded answers   (as `experiments.replay` reads them) to the questions at even places of the question file (from 0), with
                       databases of both corpora, READINGS times; the other questions stay unseen, for a test
    the model corpus   the answers to every HELD_OUT-th prompt, with databases of the answers to the other prompts

The weights are small enough to be shipped, and know nothing of single tokens.
"""

from __future__ import annotations

import functools
import pathlib
import time
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import flags
from safetensors.numpy import load_file, save_file

from experiments import program, questions, replay, replay_databases, traces
from experiments.build_databases import read_jsonl
from hd_jax.databases import successor_table
from hd_jax.databases.collection import Databases
from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.drafters.base import Context
from hd_jax.drafters.candidates import HIT_BOUNDS, SUBSETS, candidates, network, successor_tables
from hd_jax.drafters.hd_tree import blank_state, learn, read
from hd_jax.drafters.text_index import MAX_MATCH, recent
from hd_jax.models import tokenizer as tokenizers
from hd_jax.runner import num_slots

HELD_OUT = 5  # of so many prompts of the corpora one is read, and not in the databases
READINGS = 4  # of the recorded answers, each with other steps: so they weigh as much as those of the corpus
READ_AHEAD = 5  # tokens that are looked at with one state, at most: a tree's nodes are as far from it
HISTORY = 8192  # tokens that the state has room for
HIDDEN = 32
BATCH = 1024
LEARNING_RATE = 1.5e-2
MAX_PROLONGED = 0.985  # probability with which a match is taken to go on


class Samples(NamedTuple):
    """Of M tokens, each with its candidates; numpy arrays, or JAX's under jit."""

    features: Any  # float32[M, I, F]
    is_one: Any  # bool[M, I], candidates, and at last that none is right
    labels: Any  # int32[M]
    matches: Any  # int32[M], length of the context's longest match
    is_hit: Any  # bool[M], whether its continuation came


def collect(tables: dict[str, Any], texts: Sequence[traces.Turn], sources: str, seed: int) -> Samples:
    """Reads texts with `hd_tree`'s own state and candidates."""
    rng = np.random.default_rng(seed)
    size = num_slots(max(len(text.prompt) + len(text.answer) for text in texts), 0)
    parts = []
    for text in tqdm.tqdm(texts, f"reading for {sources}"):
        whole = np.zeros(size, np.int32)
        whole[: len(text.prompt) + len(text.answer)] = [*text.prompt, *text.answer]
        steps = rng.integers(1, READ_AHEAD + 1, len(text.answer))
        starts = np.cumsum(steps) - steps
        steps, starts = steps[starts < len(text.answer)], starts[starts < len(text.answer)]
        steps = np.minimum(steps, len(text.answer) - starts)
        num_steps = 1 << max(int(len(steps) - 1).bit_length(), 6)  # few sizes, so few programs
        steps = np.pad(steps, (0, num_steps - len(steps)))
        out = _read(tables, jnp.asarray(whole), jnp.int32(len(text.prompt)), jnp.asarray(steps), sources=sources)
        is_read = np.arange(READ_AHEAD) < steps[:, None]
        parts.append(Samples(*(np.asarray(part)[is_read] for part in out)))
    return Samples(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@functools.partial(jax.jit, static_argnames="sources")
def _read(tables, tokens: jax.Array, prompt_length: jax.Array, steps: jax.Array, *, sources: str) -> Samples:
    blank = blank_state(HISTORY)
    state = read(blank, Context(tokens, prompt_length, prompt_length))

    def step(carry, num_read):
        state, length = carry
        context = Context(tokens, length, prompt_length)
        coming = jax.lax.dynamic_slice_in_dim(jnp.pad(tokens, (0, READ_AHEAD)), length, READ_AHEAD)
        line = jnp.concatenate([recent(state.seen), coming])
        suffixes = line[jnp.arange(READ_AHEAD)[:, None] + jnp.arange(MAX_MATCH)]
        found = candidates(tables, state, context, suffixes, sources, MAX_MATCH)
        is_right = found.is_candidate & (found.tokens == coming[:, None])
        labels = jnp.where(jnp.any(is_right, axis=1), jnp.argmax(is_right, axis=1), found.tokens.shape[1] - 1)
        favorites = jnp.max(found.favorites[:, : len(HIT_BOUNDS)], axis=1)
        out = Samples(
            features=found.features,
            is_one=found.is_candidate.at[:, -1].set(True),
            labels=labels,
            matches=jnp.max(found.matches * found.is_candidate, axis=1),
            is_hit=favorites == coming,
        )
        state = learn(tables, state, context, coming, num_read, sources, MAX_MATCH)
        return (state, length + num_read), out

    _, out = jax.lax.scan(step, (state, prompt_length), steps)
    return out


def fit(samples: Samples, held_out: Samples, epochs: int, seed: int) -> tuple[dict[str, jax.Array], float]:
    """Weights by maximum likelihood, and their mean loss in nats on the held-out samples."""
    num_features = samples.features.shape[2]
    keys = jax.random.split(jax.random.key(seed))
    net = {
        "features": jax.random.normal(keys[0], (num_features, HIDDEN)) * num_features**-0.5,
        "bias": jnp.zeros(HIDDEN),
        "hidden": jax.random.normal(keys[1], (HIDDEN, HIDDEN)) * HIDDEN**-0.5,
        "hidden_bias": jnp.zeros(HIDDEN),
        "out": jnp.ones(HIDDEN) * HIDDEN**-0.5 * jnp.where(jnp.arange(HIDDEN) % 2, 1, -1),
    }
    batch_size = min(BATCH, len(samples.labels))
    num_batches = len(samples.labels) // batch_size
    optimizer = optax.adam(optax.cosine_onecycle_schedule(epochs * num_batches, LEARNING_RATE, pct_start=0.3))

    def loss_of(net, batch: Samples) -> jax.Array:
        scores = network(net, batch.features)
        found = jax.nn.log_softmax(jnp.where(batch.is_one, scores, -jnp.inf), axis=-1)
        return -jnp.mean(jnp.take_along_axis(found, batch.labels[:, None], axis=-1))

    @jax.jit
    def update(net, opt_state, batch: Samples):
        loss, gradient = jax.value_and_grad(loss_of)(net, batch)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(net, updates), opt_state, loss

    opt_state: Any = optimizer.init(net)
    rng = np.random.default_rng(seed)
    for _ in tqdm.trange(epochs, desc="fitting"):
        order = rng.permutation(len(samples.labels))
        for index in range(num_batches):
            rows = order[index * batch_size : (index + 1) * batch_size]
            net, opt_state, _ = update(net, opt_state, Samples(*(part[rows] for part in samples)))
    chunks = range(0, len(held_out.labels), BATCH)
    losses = [float(jax.jit(loss_of)(net, Samples(*(part[i : i + BATCH] for part in held_out)))) for i in chunks]
    sizes = [min(BATCH, len(held_out.labels) - i) for i in chunks]
    return net, float(np.average(losses, weights=sizes))


def prolonged(samples: Samples) -> np.ndarray:
    """Log-probability, by a match's length, float32[MAX_MATCH + 1], that what followed it follows again."""
    hits = np.bincount(samples.matches, samples.is_hit, minlength=MAX_MATCH + 1)
    total = np.bincount(samples.matches, minlength=MAX_MATCH + 1)
    return np.log(np.minimum((hits + 1) / (total + 2), MAX_PROLONGED)).astype(np.float32)


def run(settings: replay.Settings, output: pathlib.Path, subsets: Sequence[str], epochs: int, seed: int) -> None:
    """Fits the weights of the subsets and writes them beside those that the file holds already."""
    tokenizer = tokenizers.load(settings.tokenizer, template=settings.template)
    asked = questions.read(settings.questions)
    chosen = questions.select(asked, questions.TASKS, settings.limit)
    texts = traces.turns(asked, chosen, traces.read(settings.traces), tokenizer)
    seen, unseen = ([text for text in texts if text.place % 2 == part] for part in (0, 1))
    databases, _ = replay_databases.from_corpora(
        settings.model_corpus,
        settings.statistics_corpus,
        settings.statistics_tokens,
        tokenizer,
        pathlib.Path(settings.cache_dir),
    )
    others, answers = split_corpora(settings.model_corpus, settings.statistics_corpus, tokenizer)
    for sources in subsets:
        clock = time.perf_counter()
        tables = _tables(databases, sources)
        held_out = collect(tables, unseen[::4], sources, seed)
        parts = [collect(tables, seen, sources, seed + 1 + reading) for reading in range(READINGS)]
        parts.append(collect(_tables(others, sources), answers, sources, seed + 1 + READINGS))
        samples = Samples(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        net, loss = fit(samples, held_out, epochs, seed)
        named = {f"{sources}.{name}": np.asarray(array) for name, array in {**net, "prolonged": prolonged(parts[0])}.items()}
        kept = load_file(output) if output.exists() else {}
        beside = output.with_name(f".{output.name}.part")
        save_file({**kept, **named}, beside)
        beside.replace(output)
        seconds = time.perf_counter() - clock
        print(f"{sources}: {len(samples.labels)} tokens; {loss:.4f} nats on {len(held_out.labels)} others; {seconds:.0f} s")


def split_corpora(
    model_corpus: str | None, statistics_corpus: str | None, tokenizer: tokenizers.Tokenizer
) -> tuple[Databases, list[traces.Turn]]:
    """Databases without the answers to every HELD_OUT-th prompt, and the model's answers to those.

    Raises:
      ValueError: a record has no "prompt" or no "text".
    """
    given: dict[str, Any] = {}
    answers = []
    for kind, corpus in (("model_text", model_corpus), ("statistics", statistics_corpus)):
        documents = []
        for number, record in read_jsonl(corpus) if corpus else ():
            if not isinstance(record.get("prompt"), str) or not isinstance(record.get("text"), str):
                raise ValueError(f'{corpus}, line {number}: a record needs a "prompt" and a "text"')
            ids = [*tokenizer.encode(record["text"], add_bos=False), tokenizer.eos_ids[-1]]
            if zlib.crc32(record["prompt"].encode()) % HELD_OUT:
                documents.append(np.array(ids, np.int32))
            elif kind == "model_text":
                prompt = tokenizer.chat([{"role": "user", "content": record["prompt"]}])
                answers.append(traces.Turn(number, number, "corpus", 0, prompt, ids))
        if documents:
            given[kind] = NgramTrie.build(documents, max_order=successor_table.MAX_ORDER + 1, min_documents=1)
    return Databases(**given, token_classes=tokenizer.token_classes), answers


def _tables(databases: Databases, sources: str) -> dict[str, Any]:
    assert databases.token_classes is not None
    return {"classes": jnp.asarray(databases.token_classes, jnp.int32), **successor_tables(databases, sources)}


def define_flags() -> None:
    """Defines the flags; a function, so that tests can import several programs."""
    replay.define_flags()
    flags.DEFINE_string("output", None, "Weights file; sets of sources that are not fitted anew are kept.", required=True)
    flags.DEFINE_list("sources", list(SUBSETS), "Comma list of sets of sources to fit weights for.")
    flags.DEFINE_integer("epochs", 20, "Passes over the samples.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the order and of the first weights.")


def main(argv: Sequence[str]) -> None:
    del argv
    names = ("output", "sources", "epochs", "seed")
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
    unknown = sorted(set(values["sources"]) - set(SUBSETS))
    if unknown:
        raise ValueError(f"--sources: there is no set {', '.join(unknown)}; there are: {', '.join(SUBSETS)}")
    output = pathlib.Path(values["output"])
    if not output.parent.is_dir():
        raise ValueError(f"--output={output}: its folder does not exist")
    settings = replay.given_settings()
    if settings.databases or not settings.model_corpus or not settings.statistics_corpus:
        raise ValueError("weights are fitted with databases of two corpora: --model_corpus and --statistics_corpus")
    run(settings, output, values["sources"], values["epochs"], values["seed"])


if __name__ == "__main__":
    define_flags()
    program.run(main)
