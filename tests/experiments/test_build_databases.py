"""The program that builds databases: its inputs, the answers it keeps, and every kind of job."""

import gzip
import json
import subprocess
import sys
import types

import numpy as np
import pytest

from experiments import build_databases
from experiments.build_databases import Job, Library, Request
from hd_jax.databases import SEPARATOR
from hd_jax.databases.frequent_ngrams import FrequentNgrams
from hd_jax.databases.ngram_trie import NgramTrie
from hd_jax.databases.suffix_array import SuffixArray
from hd_jax.databases.trigrams import TrigramCounts
from hd_jax.models import tokenizer as tokenizers_of_models


class Letters:
    """A tokenizer of letters."""

    fingerprint, bos_id, has_chat_template = "letters", 0, True

    def encode(self, text, add_bos=True):
        return [*([self.bos_id] if add_bos else []), *(ord(c) - 96 for c in text)]

    def chat(self, messages):
        return [self.bos_id, *(t for m in messages for t in self.encode(m["content"], add_bos=False)), 99]


class FakeModel:
    """Answers a prompt with a run of numbers that begins at its first letter, plus the seed; counts what it is asked."""

    def __init__(self):
        self.tokenizer, self.max_context, self.batches = Letters(), 64, []

    def generate(self, lm, prompts, *, drafter, max_new_tokens, temperature, seed):
        assert lm is self and drafter is None
        self.batches.append((len(prompts), temperature))
        first = [prompt[min(1, len(prompt) - 1)] + s for prompt, s in zip(prompts, seed, strict=True)]
        return [types.SimpleNamespace(tokens=list(range(f, f + max_new_tokens)), text=f"{f}") for f in first]

    @property
    def library(self):
        return Library(lambda name: self, self.generate, lambda name: Letters())


def write_lines(path, records):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return str(path)


PROMPTS = [
    {"turns": ["abc", "not asked"]},
    {"turns": [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "x"}]},
    {"prompt": "cd"},
    {"prompt": "z" * 40},  # more than half of the context
    {"prompt": "d"},
]


def model_job(tmp_path, **options):
    prompts = write_lines(tmp_path / "p.jsonl.gz", PROMPTS)
    options = {"ngram": 3, "max_new_tokens": 6, "batch_size": 3, **options}
    return Job("model", str(tmp_path / "m.safetensors"), prompts=prompts, **options)


def test_model_job_counts_all_answers_and_keeps_them(tmp_path, capsys):
    lm, job = FakeModel(), model_job(tmp_path)
    line = build_databases.run(job, lm.library)
    answers = [list(range(first, first + 6)) for first in (1, 19, 3, 4)]  # a, s, c, d
    kept = [json.loads(line) for line in (tmp_path / "m.safetensors.answers.jsonl").read_text().splitlines()]
    assert kept[0] == {"model": "embedded", "tokenizer": "letters", "temperature": 0.0, "max_new_tokens": 6}
    assert [record["tokens"] for record in kept[1:]] == answers
    assert lm.batches == [(3, 0.0), (1, 0.0)]
    assert "1 prompts of over 32 tokens" in capsys.readouterr().out and "from 24 tokens in 4 documents" in line
    database = FrequentNgrams.open(job.output, "letters")
    np.testing.assert_array_equal(database.ngrams, FrequentNgrams.build([np.array(a) for a in answers], 3).ngrams)
    # Other settings: the same answers, and the model does not run.
    build_databases.run(model_job(tmp_path, ngram=2, max_ngrams=3), lm.library)
    assert len(lm.batches) == 2 and FrequentNgrams.open(job.output, "letters").ngrams.shape == (3, 2)


@pytest.mark.parametrize("num_kept", [0, 1, 2, 4])
@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_killed_job_goes_on_where_it_was(tmp_path, num_kept, cut):
    job = model_job(tmp_path, batch_size=1)
    whole_model = FakeModel()
    build_databases.run(job, whole_model.library)
    path = tmp_path / "m.safetensors.answers.jsonl"
    whole, database = path.read_bytes(), (tmp_path / "m.safetensors").read_bytes()
    lines = whole.splitlines(keepends=True)
    rest = b"".join(lines[1 + num_kept :])
    path.write_bytes(b"".join(lines[: 1 + num_kept]) + rest[: min(cut, max(len(lines[-1]) - 1, 0))])
    lm = FakeModel()
    build_databases.run(job, lm.library)
    assert path.read_bytes() == whole and len(lm.batches) == 4 - num_kept
    opened = FrequentNgrams.open(tmp_path / "m.safetensors", "letters")
    (tmp_path / "whole").write_bytes(database)
    np.testing.assert_array_equal(opened.ngrams, FrequentNgrams.open(tmp_path / "whole", "letters").ngrams)


def test_answers_come_to_the_file_one_by_one(tmp_path):
    path = tmp_path / "a.jsonl"

    def decode(batch):
        if batch[0].seed == 4:
            raise KeyboardInterrupt
        return [types.SimpleNamespace(tokens=[r.seed], text="") for r in batch]

    requests = [Request([0], seed) for seed in range(8)]
    with pytest.raises(KeyboardInterrupt):
        build_databases.collect_answers(path, {"h": 1}, requests, decode, batch_size=2, max_tokens=None)
    assert [json.loads(line).get("tokens") for line in path.read_text().splitlines()] == [None, [0], [1], [2], [3]]


def test_kept_answers_of_another_job_are_refused(tmp_path):
    lm = FakeModel()
    build_databases.run(model_job(tmp_path), lm.library)
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 1: written with .*'max_new_tokens': 6.* but this job is .* 7"):
        build_databases.run(model_job(tmp_path, max_new_tokens=7), lm.library)
    path = tmp_path / "m.safetensors.answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2]]))
    with pytest.raises(ValueError, match="line 2: not this job's request"):
        build_databases.run(model_job(tmp_path), lm.library)
    path.write_text(lines[0] + '{"tokens": 1}\n')
    with pytest.raises(ValueError, match="line 2: not an answer that this program wrote"):
        build_databases.run(model_job(tmp_path), lm.library)


def test_max_tokens_stops_the_model_and_cuts_the_last_answer(tmp_path):
    lm = FakeModel()
    line = build_databases.run(model_job(tmp_path, batch_size=1, max_tokens=8), lm.library)
    assert len(lm.batches) == 2 and "from 8 tokens in 2 documents" in line
    assert FrequentNgrams.open(tmp_path / "m.safetensors", "letters").ngrams.tolist() == [
        [1, 2, 3],
        [2, 3, 4],
        [3, 4, 5],
        [4, 5, 6],
    ]


def test_sampled_job_draws_texts_with_seeds_of_their_own(tmp_path):
    lm, output = FakeModel(), tmp_path / "s"
    job = Job("sampled", str(output), num_tokens=14, max_new_tokens=4, batch_size=2, seed=7)
    build_databases.run(job, lm.library)
    assert lm.batches == [(2, 1.0)] * 2
    text = [7, 8, 9, 10, SEPARATOR, 8, 9, 10, 11, SEPARATOR, 9, 10, 11, 12, SEPARATOR, 10, 11, SEPARATOR]
    assert SuffixArray.open(output, "letters").text.tolist() == text


def test_statistics_and_trigrams_of_text(tmp_path):
    inputs = (
        write_lines(tmp_path / "a.jsonl.gz", [{"text": "abcab", "prompt": "zzz"}, {"text": "hidden", "source": "bad one"}]),
        write_lines(
            tmp_path / "b.jsonl",
            [
                {"turns": [{"role": "user", "content": "qq"}, {"role": "assistant", "content": "abc"}]},
                {"turns": ["ab", "ca"]},
            ],
        ),
        str(tmp_path / "c.txt"),
    )
    (tmp_path / "c.txt").write_text("abc")
    a, b, c = 1, 2, 3
    documents = [[a, b, c, a, b], [a, b, c], [a, b, SEPARATOR, c, a], [a, b, c]]
    arrays = [np.array(document, np.int32) for document in documents]
    output, library = str(tmp_path / "out"), FakeModel().library
    common = {"inputs": inputs, "exclude_sources": ("bad",)}

    build_databases.run(Job("statistics", output, form="suffix_array", **common), library)
    found = SuffixArray.open(output, "letters")
    np.testing.assert_array_equal(found.text, SuffixArray.build(arrays).text)

    build_databases.run(Job("statistics", output, form="ngrams", min_documents=2, **common), library)
    trie, expected = NgramTrie.open(output, "letters"), NgramTrie.build(arrays, min_documents=2)
    assert [level.tolist() for level in trie.tokens] == [level.tolist() for level in expected.tokens]

    build_databases.run(Job("trigrams", output, **common), library)
    assert TrigramCounts.open(output, "letters").pairs.tolist() == TrigramCounts.build(arrays).pairs.tolist()

    line = build_databases.run(Job("trigrams", output, answers_only=False, max_tokens=9, **common), library)
    assert "from 9 tokens in 1 documents" in line  # zzz, a separator, abcab


def test_tokenizer_folder_and_its_fingerprint(tmp_path):
    import tokenizers

    folder = tmp_path / "model"
    folder.mkdir()
    words = {word: index for index, word in enumerate(["<unk>", "one", "two", "three"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    inputs = (write_lines(tmp_path / "a.jsonl", [{"text": "one two three two three"}]),)
    output = tmp_path / "t"
    library = Library(lambda name: None, lambda *args: None, lambda name: tokenizers_of_models.load(str(name)))
    build_databases.run(Job("trigrams", str(output), model=str(folder), inputs=inputs), library)
    fingerprint = tokenizers_of_models.load(str(folder)).fingerprint
    assert TrigramCounts.open(output, fingerprint).pairs.tolist() == [[1, 2], [2, 3], [3, 2]]
    with pytest.raises(ValueError, match="another tokenizer"):
        TrigramCounts.open(output, "letters")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ab"}\n{"text": 3}\n', "line 2: a text is not a string"),
        ("a.jsonl", b'{"text": "ab"}\n\nnot json\n', "line 3: Expecting value"),
        ("a.jsonl", b'["ab"]\n', "line 1: not a JSON object"),
        ("a.jsonl", b'{"txt": "ab"}\n', 'line 1: a record needs "text"'),
        ("a.jsonl", b'{"turns": [3]}\n', "line 1: a text is not a string"),
        ("a.jsonl.gz", b'{"text": "ab"}\n', "a.jsonl.gz, line 0: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "ab"}\n' * 9, mtime=0)[:-9], "a.jsonl.gz, line"),
        ("a.txt", b"ab\xff", "a.txt: not UTF-8"),
        ("a.jsonl", b"", "there is no text in"),
        ("a.csv", b"", "a.csv: the name must end in .txt or .jsonl or .jsonl.gz"),
    ],
)
def test_bad_inputs_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    job = Job("trigrams", str(tmp_path / "out"), inputs=(str(tmp_path / name),))
    with pytest.raises(ValueError) as error:
        build_databases.run(job, FakeModel().library)
    assert message in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line", ['{"turns": []}', '{"turns": [{"role": "assistant", "content": "a"}]}', '{"prompt": ""}', "{}"]
)
def test_bad_prompts_are_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r'p.jsonl, line 2: a record needs "turns" with a user'):
        build_databases.read_prompts(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kind=model"], "--kind=model needs --prompts"),
        (["--kind=trigrams"], "--kind=trigrams needs --inputs"),
        (["--kind=trigrams", "--inputs=none.txt"], "none.txt: there is no such file"),
        (["--kind=trigrams", "--ngram=3"], "--kind=trigrams has no --ngram; it has --inputs"),
        (["--kind=phrases"], "kind"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(tmp_path, flags, message):
    command = [sys.executable, "-m", "experiments.build_databases", f"--output={tmp_path / 'out'}", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and done.stderr.strip().count("\n") == 0


def test_an_output_that_cannot_be_written_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="cannot be written"):
        build_databases.run(Job("sampled", str(tmp_path / "none" / "out")), FakeModel().library)
