"""How every program here starts: absl flags, and one clear line with exit status 2 for bad input."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses the flags and runs `main`; a ValueError or OSError becomes one line on stderr and exit status 2."""

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except flags.Error as error:
            _fail(error)
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}: options are given as --name=value")
        return rest

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(argv)
        except (ValueError, OSError) as error:
            _fail(error)

    # absl shows what is logged at INFO level; JAX tells there which kinds of device it did not find.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    app.run(guarded, flags_parser=parse)


def _fail(error: object) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
