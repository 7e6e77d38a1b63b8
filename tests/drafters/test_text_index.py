"""The index of a text against a scan of it, through the drafter that asks it: places, rings, and what a session remembers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hd_tree_rows import Row, assert_matches, databases, random_tokens, scan

from hd_jax.draft_tree import NO_TOKEN
from hd_jax.drafters.candidates import SOURCE_NAMES
from hd_jax.drafters.hd_tree import hd_tree
from hd_jax.drafters.text_index import LONG_KEY, MAX_MATCH, RING, recent


@pytest.mark.parametrize(
    ("history", "prompt_length", "max_match"),
    [(512, 1, 16), (512, 300, 16), (64, 64, 16), (64, 200, 16), (512, 300, 5), (512, 300, 2), (512, 300, 1)],
)
def test_the_index_finds_the_matches_that_a_scan_finds(history, prompt_length, max_match):
    rng = np.random.default_rng(prompt_length)
    row = Row(
        hd_tree(databases(), sources="c", history=history, remember=0, max_match=max_match), random_tokens(rng, prompt_length)
    )
    num_long = num_full = 0
    for _ in range(12):
        # The text's own end, texts that go on from it, and one that begins only now.
        suffixes = [
            row.text[-MAX_MATCH:],
            *(row.text[-MAX_MATCH:] + random_tokens(rng, ahead) for ahead in (1, 2, 5)),
            random_tokens(rng, 2),
        ]
        found = row.asked(suffixes, "c", max_match)
        for index, suffix in enumerate(suffixes):
            expected = scan(row.text, history, suffix, max_match)
            assert_matches(found, index, expected, max(prompt_length - history, 0))
            num_long += sum(match.length > LONG_KEY for match in expected)
            num_full += len(expected) >= RING
        row.append(random_tokens(rng, rng.integers(1, 8)))
    assert max_match <= LONG_KEY or num_long > 5
    assert history < 512 or prompt_length < 300 or num_full > 30


def test_a_long_copy_is_told_by_its_length():
    copied = list(range(100, 130))
    row = Row(hd_tree(databases(), sources="c"), [*copied, 7, *copied[:25]])
    found = row.asked([row.text], "c")
    (place,) = np.flatnonzero(found.is_candidate[0])
    assert (found.tokens[0, place], found.matches[0, place], found.places[0, place]) == (125, MAX_MATCH, 24)
    assert found.sources[0, place] == SOURCE_NAMES.index("context 10+")


def test_newest_tokens():
    rng = np.random.default_rng(0)
    row = Row(hd_tree(databases(), sources="c", history=64, remember=0), [2, 1])
    assert recent(row.state.seen).tolist() == [NO_TOKEN] * (MAX_MATCH - 2) + [2, 1]
    for _ in range(12):
        row.append(random_tokens(rng, 9))
        assert recent(row.state.seen).tolist() == ([NO_TOKEN] * MAX_MATCH + row.text)[-MAX_MATCH:]


def test_a_session_remembers_earlier_text_if_asked_to():
    rng = np.random.default_rng(11)
    drafter = hd_tree(databases(), sources="c", history=64, remember=64)
    row = Row(drafter, random_tokens(rng, 40))
    row.append(random_tokens(rng, 9))
    new = row.renewed([*random_tokens(rng, 30), *row.text[5:10]])
    np.testing.assert_array_equal(new.state.hit_rates, row.state.hit_rates)
    whole = row.text + new.text
    assert int(new.state.seen.num_seen) == len(whole)
    found = new.asked([new.text[-MAX_MATCH:]], "c")
    assert_matches(found, 0, scan(whole, 128, new.text[-MAX_MATCH:]))
    assert found.places[0][found.is_candidate[0]].min() < len(row.text)
    for _ in range(8):  # around the ring
        new.append(random_tokens(rng, 10))
    whole = row.text + new.text
    assert_matches(new.asked([new.text[-MAX_MATCH:]], "c"), 0, scan(whole, 128, new.text[-MAX_MATCH:]))
    assert jax.tree.map(jnp.shape, new.state) == jax.tree.map(jnp.shape, row.state)


def test_a_chat_that_goes_on_is_not_read_twice():
    rng = np.random.default_rng(12)
    drafter = hd_tree(databases(), sources="c", history=64, remember=64)
    row = Row(drafter, random_tokens(rng, 30))
    row.append(random_tokens(rng, 8))
    new = row.renewed(row.text + random_tokens(rng, 9))
    assert int(new.state.seen.num_seen) == len(new.text) and int(new.state.seen.start) == 0
    assert_matches(new.asked([new.text[-MAX_MATCH:]], "c"), 0, scan(new.text, 128, new.text[-MAX_MATCH:]))
    other = new.renewed([2, 1, 0, 2, 1, 0, 0, 1])
    assert int(other.state.seen.start) == len(new.text) and int(np.sum(other.state.seen.occurrences)) == 8
