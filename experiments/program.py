"""How every program here starts: absl flags, and one clear line with exit status 2 for bad input."""

from __future__ import annotations

import logging
import os
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


def whole_numbers(name: str, least: int = 1, most: int | None = None) -> list[int]:
    """The numbers of a list flag, in its order.

    Raises:
      ValueError: there is none, one is no whole number or not from `least` to `most`, or one is named twice.
    """
    texts: list[str] = flags.FLAGS[name].value or []
    shown = f"--{name}={','.join(texts)}"
    if not texts or not all(text.strip().isdecimal() for text in texts):
        raise ValueError(f"{shown}: whole numbers are needed, as in --{name}=1,4,16")
    found = [int(text) for text in texts]
    if min(found) < least or (most is not None and max(found) > most) or len(set(found)) < len(found):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{shown}: different numbers {span} are needed")
    return found


def define_mesh_flags() -> None:
    """Defines --mesh, and the flags of a run by several processes; see `join_processes`."""
    flags.DEFINE_string("mesh", None, "Devices: data=2,model=4 splits batches in 2 and the model in 4; by default one device.")
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of process 0, the same for all processes of a run on several hosts; or auto, where the cluster (Slurm, "
        "Open MPI, Kubernetes, Cloud TPU) tells. By default JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID "
        "of the environment.",
    )
    flags.DEFINE_integer("num_processes", None, "Of the run.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Of this process, from 0.", lower_bound=0)


def join_processes() -> None:
    """Joins this process to the others of its run, by the flags or the environment; nothing where neither names any.

    Raises:
      ValueError: something is missing that no cluster tells, or out of range.
    """
    import jax  # Late, so that flag errors come at once.

    def given(name: str) -> str | None:
        value = flags.FLAGS[name].value
        return os.environ.get(f"JAX_{name.upper()}") if value is None else str(value)

    address, count, index = given("coordinator_address"), given("num_processes"), given("process_id")
    if address is None and count is None and index is None:
        return
    try:
        jax.distributed.initialize(
            None if address == "auto" else address, int(count) if count else None, int(index) if index else None
        )
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"the processes of this run cannot be joined ({error}): each needs --coordinator_address=HOST:PORT, "
            f"--num_processes and --process_id, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def _fail(error: object) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
