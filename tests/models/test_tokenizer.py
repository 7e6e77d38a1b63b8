"""Tokenizers and chat formats, on a small byte-level BPE."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
import tokenizers

from hd_jax.models import tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TALK = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And?"},
]


def make_folder(folder: pathlib.Path, vocab_size: int = 300, **settings) -> pathlib.Path:
    """A folder with a tokenizer of 256 bytes, two special tokens and some merges."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([SYSTEM] * 3, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bpe.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def shown(loaded: tokenizer.Tokenizer, ids: list[int]) -> str:
    """The text of ids with the special tokens spelled out."""
    return "".join({0: "<s>", 1: "</s>"}.get(i) or loaded.decode([i]) for i in ids)


@pytest.fixture
def bpe(tmp_path) -> tokenizer.Tokenizer:
    return tokenizer.load(make_folder(tmp_path / "vicuna-7b-v1.3"))


def test_encode_and_decode(bpe):
    text = "The assistant's größte 猫 , isn't it ."
    ids = bpe.encode(text)
    assert ids[0] == bpe.bos_id == 0
    assert bpe.encode(text, add_bos=False) == ids[1:]
    assert len(ids) < len(text.encode())
    assert bpe.decode(ids) == text
    assert bpe.decode([*ids, 1]) == text
    assert bpe.vocab_size == 300


def test_vicuna(bpe):
    assert bpe.has_chat_template
    asked = f"<s>{SYSTEM} USER: Hello! ASSISTANT: Hi.</s>USER: And? "
    assert shown(bpe, bpe.chat(TALK)) == asked + "ASSISTANT:"
    assert shown(bpe, bpe.chat(TALK, add_generation_prompt=False)) == asked
    briefly = [{"role": "system", "content": "Be brief."}, TALK[0]]
    assert shown(bpe, bpe.chat(briefly)) == "<s>Be brief. USER: Hello! ASSISTANT:"


def test_llama_2(tmp_path):
    loaded = tokenizer.load(make_folder(tmp_path / "Llama-2-7b-chat-hf"))
    assert shown(loaded, loaded.chat(TALK)) == "<s>[INST] Hello! [/INST] Hi. </s><s>[INST] And? [/INST]"
    system = [{"role": "system", "content": "Be brief."}]
    expected = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello! [/INST] Hi. </s><s>[INST] And? [/INST]"
    assert shown(loaded, loaded.chat(system + TALK)) == expected


def test_the_template_is_the_folders_or_by_name_or_as_asked(tmp_path):
    own = make_folder(tmp_path / "vicuna-own", chat_template="{% for m in messages %}{{ m['content'] + '|' }}{% endfor %}")
    loaded = tokenizer.load(own)
    assert shown(loaded, loaded.chat(TALK)) == "Hello!|Hi.|And?|"
    assert tokenizer.load(own, template="vicuna").chat_template == tokenizer.TEMPLATES["vicuna"]
    with pytest.raises(ValueError, match="unknown chat template 'alpaca'; built in: vicuna, llama-2"):
        tokenizer.load(own, template="alpaca")

    cached = make_folder(tmp_path / "models--lmsys--vicuna-7b-v1.3" / "snapshots" / "1234")
    assert tokenizer.load(cached).chat_template == tokenizer.TEMPLATES["vicuna"]

    renamed = make_folder(tmp_path / "model")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (renamed / "config.json").write_text(json.dumps(config | {"_name_or_path": "meta-llama/Llama-2-7b-chat-hf"}))
    assert tokenizer.load(renamed).chat_template == tokenizer.TEMPLATES["llama-2"]


def test_a_folder_without_template_says_so_when_one_is_needed(tmp_path):
    loaded = tokenizer.load(make_folder(tmp_path / "Llama-2-7b"))
    assert not loaded.has_chat_template
    with pytest.raises(ValueError, match=r"Llama-2-7b has no chat template.*template='vicuna' or 'llama-2'"):
        loaded.chat(TALK)


KINDS = {
    "word": ["\u2581the", "\u0120the", "\u2581\u00c4r", "\u2581\u732b"],
    "word part": ["ing", "A", "\u732b"],
    "digit": ["7", "\u25812024", "\u01209"],
    "white space": ["\u2581", "\u0120", "<0x0A>", "\u010a", "\u010a\u010a"],  # a line's end in both vocabularies' forms
    "sentence end": [".", "!", "?", ":", ";", "\u0120?"],
    "comma": [",", "\u0120,"],
    "other": ["(", "'s", "\u2581-", "...", "_"],
    "special": ["<s>", "</s>"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_token_classes(tmp_path, kind):
    folder = make_folder(tmp_path / "model")
    pieces = [piece for name in reversed(KINDS) for piece in KINDS[name]]
    bpe = tokenizers.Tokenizer(tokenizers.models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<s>"))
    bpe.add_special_tokens(["<s>", "</s>"])
    bpe.save(str(folder / "tokenizer.json"))
    classes = tokenizer.load(folder).token_classes
    assert classes.shape == (len(pieces),) and classes.dtype == "int32"
    found = {piece: tokenizer.TOKEN_CLASSES[classes[pieces.index(piece)]] for piece in KINDS[kind]}
    assert found == dict.fromkeys(KINDS[kind], kind)


def test_all_token_classes_are_tested():
    assert set(KINDS) == set(tokenizer.TOKEN_CLASSES)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "at least one message"),
        ([{"role": "user"}], "message 0 is not a mapping with a role and a text"),
        (
            [TALK[0], {"role": "human", "content": "Hi"}],
            "message 1 has the role 'human'; the roles are system, user, assistant",
        ),
        ([TALK[0], {"role": "system", "content": "Hi"}], "cannot hold these messages: a system message can only be the first"),
    ],
)
def test_malformed_messages(bpe, messages, expected):
    with pytest.raises(ValueError, match=expected):
        bpe.chat(messages)


def test_eos_ids_come_from_every_file(tmp_path):
    folder = make_folder(tmp_path / "model")
    assert tokenizer.load(folder).eos_ids == (1,)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 5}))
    assert tokenizer.load(folder).eos_ids == (1, 5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert tokenizer.load(folder).eos_ids == (1, 7, 9)


def test_the_fingerprint_is_of_the_vocabulary_alone(tmp_path):
    first = make_folder(tmp_path / "first")
    same = make_folder(tmp_path / "elsewhere" / "vicuna", model_max_length=77)
    assert tokenizer.load(same).fingerprint == tokenizer.load(first).fingerprint
    assert tokenizer.load(make_folder(tmp_path / "larger", vocab_size=301)).fingerprint != tokenizer.load(first).fingerprint

    content = json.loads((first / "tokenizer.json").read_text())
    spelled = {**content, "model": content["model"] | {"merges": [" ".join(pair) for pair in content["model"]["merges"]]}}
    (first / "tokenizer.json").write_text(json.dumps(spelled))  # As older versions of the library write merges.
    assert tokenizer.load(first).fingerprint == tokenizer.load(same).fingerprint

    merges = content["model"]["merges"]
    reordered = {**content, "model": content["model"] | {"merges": merges[1::-1] + merges[2:]}}
    (first / "tokenizer.json").write_text(json.dumps(reordered))
    assert tokenizer.load(first).fingerprint != tokenizer.load(same).fingerprint


def test_folders_without_a_readable_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer"):
        tokenizer.load(tmp_path)
    folder = make_folder(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the tokenizer in .*model cannot be read"):
        tokenizer.load(folder)
    with pytest.raises(ValueError, match="there is no folder"):
        tokenizer.load(tmp_path / "nowhere")


def test_torch_is_not_needed_and_transformers_only_to_load(tmp_path):
    folder = make_folder(tmp_path / "vicuna")
    # A None in sys.modules makes a module neither importable nor found; transformers imports torch where it finds it.
    program = f"""
import sys
sys.modules["torch"] = None
from hd_jax.models import tokenizer
assert not {{"transformers", "orbax", "huggingface_hub"}} & set(sys.modules)
loaded = tokenizer.load({str(folder)!r})
assert loaded.chat([{{"role": "user", "content": "Hi"}}])[0] == 0
assert sys.modules["torch"] is None
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # No advice to install PyTorch either.
