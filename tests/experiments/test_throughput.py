"""Rates by the size of the batch: what is decoded, counted, shown, and refused."""

from __future__ import annotations

import dataclasses

import pytest

from experiments import specbench, throughput
from hd_jax import decode

PROMPTS = [[3, 4, 5] * 4, [9], [5, 6, 7]]


def test_each_method_runs_at_each_batch_size(lm, monkeypatch):
    asked = []
    generate = decode.generate

    def recorded(lm, prompts, *, drafter, **options):
        asked.append((drafter.name, options["batch_size"], len(prompts)))
        return generate(lm, prompts, drafter=drafter, **options)

    monkeypatch.setattr(decode, "generate", recorded)
    cases = throughput.cases_of(lm, ("none", "pld:num_nodes=4"), (1, 2))
    rows = throughput.measure(lm, cases, PROMPTS, max_new_tokens=8, num_rounds=2)
    once = [("none", 1, 3), ("pld", 1, 3), ("none", 2, 3), ("pld", 2, 3)]
    assert asked == [("none", 1, 3), *once, *once, *once]  # the reference, the first round, the measured ones
    assert [(row["method"], row["batch_size"]) for row in rows] == [
        *(("none", 1), ("pld-num_nodes=4", 1)),
        *(("none", 2), ("pld-num_nodes=4", 2)),
    ]
    for row in rows:
        assert len(row["rates"]) == 2 and min(row["rates"]) <= row["median"] <= max(row["rates"])
        assert row["nodes_per_pass"] == (1 if row["method"] == "none" else 4)
        assert row["tokens"] == rows[0]["tokens"] or row["near_ties"]
    assert rows[0]["over_plain"] == rows[2]["over_plain"] == rows[0]["tokens_per_step"] == 1
    head, body = throughput.table(rows)
    assert all(len(line) == len(head) for line in body) and [line[1] for line in body] == ["1", "1", "2", "2"]
    (axes,) = throughput.plot(rows).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["none", "pld-num_nodes=4"]


def test_a_wrong_text_ends_the_run(lm, monkeypatch):
    generate = decode.generate

    def wrong(lm, prompts, *, drafter, **options):
        results = generate(lm, prompts, drafter=drafter, **options)
        if drafter.name == "pld":
            tokens = results[1].tokens
            results[1] = dataclasses.replace(results[1], tokens=[*tokens[:2], (tokens[2] + 1) % 48, *tokens[3:]])
        return results

    monkeypatch.setattr(decode, "generate", wrong)
    cases = throughput.cases_of(lm, ("none", "pld:num_nodes=4"), (2,))
    with pytest.raises(specbench.UnexplainedDifference, match=r"pld-num_nodes=4, batch size 2, question 1: token 2 differs"):
        throughput.measure(lm, cases, PROMPTS, max_new_tokens=8, num_rounds=1)


def test_wrong_methods_are_refused(lm):
    with pytest.raises(ValueError, match="the budget is fixed or adaptive, not 'small'"):
        throughput.cases_of(lm, ("pld:budget=small",), (1,))
    with pytest.raises(ValueError, match="unknown drafter 'magic'"):
        throughput.cases_of(lm, ("magic",), (1,))
