"""Recorded answers in an alphabet of letters, and the settings of their replay."""

from __future__ import annotations

import gzip
import json
import pathlib

import numpy as np

from experiments.replay import Settings


class Letters:
    """Token t is the letter chr(97 + t % 26); id 27 ends a text, 30 and 31 begin what the user and the model say."""

    eos_ids = (27,)
    vocab_size = 32
    fingerprint = "letters"
    has_chat_template = True
    token_classes = np.zeros(32, np.int32)

    def encode(self, text, add_bos=True):
        assert not add_bos
        return [ord(letter) - 97 for letter in text]

    def decode(self, ids):
        return "".join(chr(97 + t % 26) for t in ids)

    def chat(self, messages):
        starts = {"user": [30], "assistant": [31]}
        return [t for m in messages for t in [*starts[m["role"]], *self.encode(m["content"], add_bos=False)]] + [31]


QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["abcabc", "again"]},
    {"question_id": 2, "category": "qa", "turns": ["xyzxyzxyz"]},
    {"question_id": 3, "category": "qa", "turns": ["who"]},
]
ANSWERS = [
    {"question_id": 3, "category": "qa", "turns": ["whowhowho"], "new_tokens": [10]},
    {"question_id": 1, "category": "writing", "turns": ["abcabcabd", "abcabc"], "new_tokens": [10, 7]},
    {"question_id": 2, "category": "qa", "turns": ["zyzyzy"], "new_tokens": [6]},  # cut: no end token
]


def write_lines(path: pathlib.Path, records) -> str:
    lines = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return str(path)


def settings_in(tmp_path: pathlib.Path) -> Settings:
    """Of a run over the answers above, with both corpora, whose files are written to a folder."""
    return Settings(
        traces=write_lines(tmp_path / "answers.jsonl", ANSWERS),
        questions=write_lines(tmp_path / "question.jsonl", QUESTIONS),
        tokenizer="letters",
        template=None,
        model_corpus=write_lines(tmp_path / "own.jsonl.gz", [{"text": "whowhowhowhat"}, {"text": "abcabd"}]),
        statistics_corpus=write_lines(tmp_path / "other.jsonl", [{"text": "zyzyzyx"}, {"text": "abcde"}]),
        statistics_tokens=None,
        databases=None,
        cache_dir=str(tmp_path / "cache"),
        methods=("pld", "hd"),
        budgets=(8,),
        warm=False,
        limit=None,
        timed=False,
        shape=None,
    )
