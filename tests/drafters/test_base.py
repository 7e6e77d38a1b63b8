"""The examples in base.py, as a reader would copy them."""

from __future__ import annotations

import textwrap

import pytest

from hd_jax import decode
from hd_jax.drafters import base


@pytest.mark.parametrize("name", ["echo", "successor"])
def test_an_example_drafts_and_changes_no_token(lm, name):
    lines = [line for line in base.__doc__.splitlines() if line.startswith("    ") or not line]
    code = textwrap.dedent("\n".join(line for line in lines if "decode.generate(" not in line))
    names: dict = {}
    exec(code, names)
    drafter = names[name](**({"vocab_size": lm.config.vocab_size} if name == "successor" else {}))
    prompts = [[3, 4, 5, 6] * 5, [9] * 7, [8]]
    plain = decode.generate(lm, prompts, max_new_tokens=60)
    for budget in (None, {1: 1.0, 2: 1.01, 5: 1.02}):
        drafted = decode.generate(lm, prompts, drafter=drafter, budget=budget, max_new_tokens=60)
        assert [result.tokens for result in drafted] == [result.tokens for result in plain]
        assert max(result.tokens_per_step for result in drafted) > 1.2
