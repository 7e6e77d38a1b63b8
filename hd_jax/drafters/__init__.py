"""The drafting methods by name. To add one: write its file, and name its maker here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from hd_jax.databases.collection import Databases
from hd_jax.drafters.aded import aded
from hd_jax.drafters.base import Drafter
from hd_jax.drafters.hd import hd
from hd_jax.drafters.hd_tree import hd_tree
from hd_jax.drafters.lookahead import lookahead
from hd_jax.drafters.none import none
from hd_jax.drafters.pld import pld
from hd_jax.drafters.recycling import recycling
from hd_jax.drafters.rest import rest
from hd_jax.drafters.suffix import suffix

# Makers take their options by keyword. One that has a parameter `databases` or `vocab_size` is given those of the model.
MAKERS: dict[str, Callable[..., Drafter]] = {
    "none": none,
    "pld": pld,
    "lookahead": lookahead,
    "rest": rest,
    "recycling": recycling,
    "suffix": suffix,
    "aded": aded,
    "hd": hd,
    "hd_tree": hd_tree,
}


def make(name: str, databases: Databases, options: dict[str, Any], *, vocab_size: int | None = None) -> Drafter:
    """A drafter by its method's name.

    Args:
      name: of the method.
      databases: of the model, for makers that ask for them.
      options: of the method.
      vocab_size: of the model's logits, for makers that ask for it and are not given another one; None where it is not known.

    Raises:
      ValueError: no such method, or no such option; the message lists those there are.
    """
    if name not in MAKERS:
        raise ValueError(f"unknown drafter {name!r}; there are: {', '.join(MAKERS)}")
    parameters = inspect.signature(MAKERS[name]).parameters
    known = set(parameters) - {"databases"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"drafter {name} has no option {', '.join(unknown)}; it has: {', '.join(sorted(known)) or 'none'}")
    for option, value in options.items():
        if str(parameters[option].annotation).startswith("int") and isinstance(value, float):
            raise ValueError(f"drafter {name}: {option} is a whole number, not {value}")
    if "databases" in parameters:
        options = {"databases": databases, **options}
    if "vocab_size" in parameters and vocab_size is not None:
        options = {"vocab_size": vocab_size, **options}
    try:
        return MAKERS[name](**options)
    except TypeError as error:
        raise ValueError(f"drafter {name}: {error}") from error
