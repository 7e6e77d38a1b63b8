"""What decoding returns, with its statistics, and how a notebook shows it."""

from __future__ import annotations

import dataclasses
import html
import itertools

from hd_jax.models.tokenizer import Tokenizer

NOT_DRAFTED = "not drafted"  # the source of a token that the model added itself

# Background colours for a notebook, readable under black text; sources take them in order.
_COLOURS = ("#bfe3c0", "#c5d8f5", "#f9dcb0", "#e3cdf0", "#f6c6cf", "#cdeeea")


@dataclasses.dataclass(frozen=True)
class Result:
    """One decoded row.

    Attributes:
      text: of the generated tokens, without the stop token or the stop string.
      tokens: generated ids; a stop token is the last of them.
      prompt_tokens: ids of the prompt.
      finish_reason: "stop" (a stop token or string), "length" (max_new_tokens) or "context" (the cache's end).
      accept_lengths: tokens that each step appended, the model's own bonus token included; their sum is len(tokens).
      nodes_per_step: draft nodes verified per step, the root not counted.
      pass_sizes: nodes that each step's pass had room for, the root included: what an adaptive budget chose.
      sources: per token, the database that drafted it, or "not drafted".
      source_counts: per source, {"proposed": [...], "accepted": [...]} nodes by depth, depth 1 first; of all steps that
        ran, those that a stop string then cut off included.
      compile_ms: spent on compilation, in none of the other times; of the whole call.
      prefill_ms: of the prompt, the drafter's start included. Rows that a mesh prefills at the same time share it equally.
      decode_ms: from there to the row's end; in a batch, what was done for other rows meanwhile included.
      share_ms: the row's prefill_ms, and of every step's time an equal share with the rows that were decoded together: sums
        over the rows of a call to the call's time, where prefill_ms + decode_ms is what one row takes.
      logprobs: per token, (log-probability of the token, {token id: log-probability} of the likeliest); empty unless asked for.
    """

    text: str
    tokens: list[int]
    prompt_tokens: list[int]
    finish_reason: str
    accept_lengths: list[int]
    nodes_per_step: float
    pass_sizes: list[int]
    sources: list[str]
    source_counts: dict[str, dict[str, list[int]]]
    compile_ms: float
    prefill_ms: float
    decode_ms: float
    share_ms: float
    logprobs: list[tuple[float, dict[int, float]]] = dataclasses.field(default_factory=list)
    tokenizer: Tokenizer | None = dataclasses.field(default=None, repr=False, compare=False)  # for display

    def pieces(self) -> list[str]:
        """The text of each token: what it adds to the text before it."""
        assert self.tokenizer is not None
        texts = [self.tokenizer.decode(self.tokens[:end]) for end in range(len(self.tokens) + 1)]
        whole = [text.rstrip("\ufffd") for text in texts]  # a character that is not complete yet
        return [after[len(before) :] for before, after in itertools.pairwise(whole)]

    @property
    def num_steps(self) -> int:
        """Passes of the model, prefill not counted."""
        return len(self.accept_lengths)

    @property
    def tokens_per_step(self) -> float:
        """Generated tokens over steps (mean accepted tokens, the bonus included); 1 for plain decoding."""
        return len(self.tokens) / max(self.num_steps, 1)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the seconds of prefill and decoding, compilation not counted; of a batch, this row's alone."""
        return len(self.tokens) / max((self.prefill_ms + self.decode_ms) / 1e3, 1e-9)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        colours = dict(zip(self.source_counts, _COLOURS * len(self.source_counts), strict=False))
        spans = []
        for piece, source in zip(self.pieces(), self.sources, strict=True):
            style = f"background:{colours[source]};color:#111" if source in colours else ""
            spans.append(f'<span style="{style}" title="{html.escape(source)}">{html.escape(piece)}</span>')
        counts = {name: self.sources.count(name) for name in [NOT_DRAFTED, *self.source_counts]}
        legend = " ".join(
            f'<span style="background:{colours.get(name, "transparent")};color:inherit;padding:0 .4em;border:1px solid #8884">'
            f"{html.escape(name)} {count}</span>"
            for name, count in counts.items()
            if count
        )
        summary = (
            f"{len(self.tokens)} tokens in {self.num_steps} steps: {self.tokens_per_step:.2f} a step, "
            f"{self.tokens_per_second:.0f} a second; {html.escape(self.finish_reason)}"
        )
        return (
            f'<div style="white-space:pre-wrap;line-height:1.6">{"".join(spans)}</div>'
            f'<div style="font-size:85%;margin-top:.6em">{legend}<br>{summary}</div>'
        )
