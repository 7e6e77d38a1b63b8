"""Text to token ids and back, and the chat format of a model, over transformers' AutoTokenizer."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hd_jax.models import weights

# Chat formats for model folders that have no template of their own. "vicuna" is version 1.1 as FastChat writes it: one
# space before an answer's end token, none after it. "llama-2" is Llama 2's, its system text inside the first question.
TEMPLATES = {
    "vicuna": (
        "{{ bos_token }}"
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% set messages = messages[1:] %}"
        "{% else %}{{ 'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user\\'s questions. ' }}{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
        "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
        "{% else %}{{ raise_exception('a system message can only be the first') }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "llama-2": (
        "{% set system = '' %}"
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set messages = messages[1:] %}"
        "{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + ((system if loop.first else '') + message['content']).strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
        "{% else %}{{ raise_exception('a system message can only be the first') }}{% endif %}"
        "{% endfor %}"
    ),
}

ROLES = ("system", "user", "assistant")
TOKEN_CLASSES = ("word", "word part", "digit", "white space", "special", "sentence end", "comma", "other")
_SPACE_MARKS = ("\u2581", "\u0120")  # of SentencePiece and of byte-level vocabularies, at a word's beginning


class Tokenizer:
    """A model's tokenizer.

    Attributes:
      vocab_size: number of token ids, the added ones included; a model may have more rows than that.
      bos_id: of the token that begins a text; None where there is none.
      eos_ids: of the tokens that end an answer, ascending.
      chat_template: the Jinja template of the chat format; None where none is known.
      has_chat_template: whether `chat` works.
      fingerprint: SHA-256, in hex, of the vocabulary and the merges, so equal where the same ids mean the same text.
    """

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int], chat_template: str | None, name: str):
        """Wraps a transformers tokenizer; see `load`, which finds the rest."""
        self._tokenizer = tokenizer
        self._name = name
        self.vocab_size: int = len(tokenizer)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_ids: tuple[int, ...] = tuple(sorted(set(eos_ids)))
        self.chat_template = chat_template
        self.has_chat_template = chat_template is not None
        self.fingerprint: str = _fingerprint(tokenizer)

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of a text; with `add_bos`, after the BOS or what else this tokenizer puts around a text, if anything."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_bos))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        ids = [int(i) for i in ids]
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @functools.cached_property
    def token_classes(self) -> np.ndarray:
        """int32[vocab_size], the coarse kind of every token: an index into TOKEN_CLASSES."""
        pieces = self._tokenizer.convert_ids_to_tokens(list(range(self.vocab_size)))
        special = set(self._tokenizer.all_special_ids)
        found = ["special" if i in special else _token_class(piece or "") for i, piece in enumerate(pieces)]
        return np.array([TOKEN_CLASSES.index(name) for name in found], np.int32)

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation in the model's chat format.

        Args:
          messages: {"role", "content"} in order; the roles are "system", "user" and "assistant".
          add_generation_prompt: end with what precedes the assistant's next answer.

        Raises:
          ValueError: a malformed message, no known chat format, or messages that the format cannot hold.
        """
        _check_messages(messages)
        if self.chat_template is None:
            raise ValueError(
                f"{self._name} has no chat template, and its name matches none that is built in; "
                f"name one when loading its tokenizer: template={' or '.join(map(repr, TEMPLATES))}"
            )
        import jinja2

        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {self._name} cannot hold these messages: {error}") from error
        return self.encode(text, add_bos=False)  # The template has written the BOS.


def _token_class(piece: str) -> str:
    """One of TOKEN_CLASSES, by a vocabulary's own form of a token."""
    text = piece[1:] if piece.startswith(_SPACE_MARKS) else piece
    if text in ("", "<0x0A>") or set(text) == {"\u010a"}:  # a space; line ends, as a byte or in byte-level form
        return "white space"
    if text[:1].isalpha():
        return "word" if text != piece else "word part"
    if text[:1].isdigit():
        return "digit"
    if text in (".", "!", "?", ":", ";"):
        return "sentence end"
    return "comma" if text == "," else "other"


def load(name: str | os.PathLike[str], template: str | None = None) -> Tokenizer:
    """The tokenizer of a model, by a folder or hub name.

    Args:
      name: as for `weights.resolve`.
      template: a name in `TEMPLATES`, which then replaces the folder's own chat template. By default the folder's own,
        or else the built-in one that the model's name asks for ("vicuna"; "llama-2" and "chat").

    Raises:
      ValueError: no such model or template, or no tokenizer in the folder.
    """
    if template is not None and template not in TEMPLATES:
        raise ValueError(f"unknown chat template {template!r}; built in: {', '.join(TEMPLATES)}")
    folder = weights.resolve(name, has_weights=False)
    # Before the import, which otherwise advises to install PyTorch; the tokenizers need none.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # Slow to import.

    if not any(
        (folder / file).exists() for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    ):
        raise ValueError(f"{folder} holds no tokenizer (tokenizer.json or tokenizer.model)")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # Whatever transformers raises on a damaged file; it has no class of its own for that.
        raise ValueError(f"the tokenizer in {folder} cannot be read: {' '.join(str(error).split())}") from error
    config = _read_optional(folder / "config.json")
    chat_template = tokenizer.chat_template
    if template is None and chat_template is None:
        template = _template_of(folder, config)
    if template is not None:
        chat_template = TEMPLATES[template]
    generation = _read_optional(folder / "generation_config.json")
    named = generation.get("eos_token_id", config.get("eos_token_id"))
    eos_ids = named if isinstance(named, list) else [named]
    eos_ids = [i for i in (*eos_ids, tokenizer.eos_token_id) if i is not None]
    return Tokenizer(tokenizer, eos_ids, chat_template, str(name))


def _template_of(folder: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    """The built-in template that a model's name asks for."""
    folder = folder.resolve()
    # The hub's cache: models--ORG--NAME/snapshots/REVISION.
    named_by = folder.parent.parent if folder.parent.name == "snapshots" else folder
    for name in (named_by.name.lower(), pathlib.Path(config.get("_name_or_path", "")).name.lower()):
        if "vicuna" in name:
            return "vicuna"
        if "llama-2" in name and "chat" in name:
            return "llama-2"
    return None


def _read_optional(path: pathlib.Path) -> dict[str, Any]:
    return weights.read_json(path) if path.exists() else {}


def _check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    if not messages:
        raise ValueError("a conversation needs at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {index} is not a mapping with a role and a text as its content: {message!r}")
        if message.get("role") not in ROLES:
            raise ValueError(f"message {index} has the role {message.get('role')!r}; the roles are {', '.join(ROLES)}")


def _fingerprint(tokenizer: Any) -> str:
    """A hash of what the ids mean: not of files, whose form changes between versions of the libraries."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    # Older versions write a merge as "a b", newer ones as ["a", "b"].
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps([vocab, merges]).encode()).hexdigest()
