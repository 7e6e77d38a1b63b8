"""A chat that goes on: the cache lives from turn to turn, and what a drafter learned from request to request."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from hd_jax import runner
from hd_jax.drafters.base import Drafter
from hd_jax.models.llama import Cache
from hd_jax.result import Result
from hd_jax.runner import LM, Row


class Session:
    """Turns of one chat with one drafter.

    Attributes:
      messages: the chat so far, [{"role", "content"}].
    """

    def __init__(self, lm: LM, *, drafter: str | Drafter | None = None):
        from hd_jax import decode  # the door imports this module

        self.lm = lm
        self.drafter = drafter if isinstance(drafter, Drafter) else decode.make_drafter(lm, drafter or "none")
        self.messages: list[dict[str, str]] = []
        self._cache: Cache | None = None
        self._cached_tokens: list[int] = []  # whose keys and values the cache holds, from slot 0 on
        self._drafter_state: Any = None

    def generate(self, message: str, *, seed: int = 0, stop: str | tuple[str, ...] = (), **options: Any) -> Result:
        """Adds a user's message to the chat and answers it.

        Options are those of `decode.generate` that do not concern the drafter, several prompts or several samples.

        Of the new prompt, what the cache holds already is not computed again.

        Raises:
          ValueError: as `decode.generate`; the chat is then as it was before.
        """
        if not message:
            raise ValueError("the message is empty; it needs at least one character")
        checked = runner.options_of(stop=stop, **options)
        messages = [*self.messages, {"role": "user", "content": message}]
        prompt = runner.check_prompt(self.lm, self.lm.tokenizer.chat(messages))
        num_cached = 0
        for old, new in zip(self._cached_tokens, prompt[:-1], strict=False):
            if old != new:
                break
            num_cached += 1
        cache, self._cache, self._cached_tokens = self._cache, None, []  # the run takes the cache over
        if cache is None or checked.exact:  # Rows that steps computed are not bit for bit those of a prefill.
            cache, num_cached = None, 0
        run = runner.run(
            self.lm,
            self.drafter,
            [Row(prompt, seed % 2**32)],
            checked,
            kept_cache=cache,
            num_cached=num_cached,
            kept_drafter_state=self._drafter_state,
        )
        *_, last = run
        result, state = last.results[0], last.state
        self._cache = state.cache
        self._cached_tokens = np.asarray(state.tokens)[0, : int(state.lengths[0]) - 1].tolist()
        if self.drafter.renew is not None:
            self._drafter_state = state.drafter
        self.messages = [*messages, {"role": "assistant", "content": result.text}]
        return result

    def reset(self, *, keep_databases: bool = True) -> None:
        """Starts a new chat; what the drafter learned stays, unless keep_databases is False."""
        self.messages, self._cache, self._cached_tokens = [], None, []
        if not keep_databases:
            self._drafter_state = None

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the chat and what the drafter learned (not the cache, which the next turn fills again)."""
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        leaves = jax.tree.leaves(self._drafter_state)
        facts = {
            "drafter": self.drafter.name,
            "tokenizer": self.lm.tokenizer.fingerprint,
            "messages": self.messages,
            "num_leaves": len(leaves),
        }
        with open(path / "drafter.npz.part", "wb") as file:
            np.savez(file, *[np.asarray(leaf) for leaf in leaves])
        (path / "session.json.part").write_text(json.dumps(facts, indent=1))
        os.replace(path / "drafter.npz.part", path / "drafter.npz")
        os.replace(path / "session.json.part", path / "session.json")

    @classmethod
    def open(cls, lm: LM, folder: str | os.PathLike, *, drafter: str | Drafter | None = None) -> Session:
        """Opens a saved session, with the same model and a drafter made with the same options.

        Raises:
          ValueError: there is none in the folder, or it was saved with another tokenizer or drafter.
        """
        path = pathlib.Path(folder)
        if not (path / "session.json").is_file():
            raise ValueError(f"{path} holds no saved session (no session.json)")
        facts = json.loads((path / "session.json").read_text())
        session = cls(lm, drafter=drafter)
        for what, found, given in (
            ("drafter", facts["drafter"], session.drafter.name),
            ("tokenizer", facts["tokenizer"], lm.tokenizer.fingerprint),
        ):
            if found != given:
                raise ValueError(f"the session in {path} was saved with {what} {found}, not {given}")
        session.messages = facts["messages"]
        if facts["num_leaves"]:
            state = runner.fresh_drafter_state(lm, session.drafter)
            expected, structure = jax.tree.flatten(state)
            with np.load(path / "drafter.npz") as arrays:
                leaves = [arrays[f"arr_{i}"] for i in range(facts["num_leaves"])]
            if [x.shape for x in expected] != [x.shape for x in leaves]:
                raise ValueError(f"the drafter's state in {path} has other shapes: it was saved with other options")
            session._drafter_state = jax.tree.unflatten(structure, leaves)
        return session
