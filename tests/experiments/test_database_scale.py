"""The program that measures suffix arrays by size: the corpora it grows, and what it reports."""

from __future__ import annotations

import numpy as np

from experiments import database_scale


def test_grown_corpora_repeat_the_documents_with_substitutions():
    documents = [np.arange(10, 40, dtype=np.int32), np.arange(50, 120, dtype=np.int32)]
    found = database_scale.grown(documents, 1050, 0.1, seed=0)
    assert [len(document) for document in found] == [30, 70] * 10 + [30, 20]
    np.testing.assert_array_equal(np.concatenate(found[:2]), np.concatenate(documents))
    text = np.concatenate(found)
    is_changed = text != np.resize(np.concatenate(documents), 1050)
    assert not is_changed[:100].any() and 50 < is_changed.sum() < 140  # 95 places on average, minus few unlucky draws
    assert set(text.tolist()) <= set(np.concatenate(documents).tolist())
    assert [len(document) for document in database_scale.grown(documents, 20, 0.1, seed=0)] == [20]


def test_measures_and_removes_its_file(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 9, 50).astype(np.int32) for _ in range(4)]
    row = database_scale.measure(1000, documents, documents[0], str(tmp_path), 0.02, 20, 0)
    assert row["tokens"] == 1000 and row["documents"] == 20 and row["mean_matched_length"] > 4
    assert 8 < row["bytes_per_token"] < 10 and min(row[f"{name}_us"] for name in ("find", "frequent_prefixes")) > 0
    assert not list(tmp_path.iterdir())
    head, body = database_scale.table([row, row])
    assert len(body) == 2 and all(len(line) == len(head) for line in body) and body[0][0] == "1,000"
