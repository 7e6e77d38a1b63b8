"""The container of every database: a safetensors file whose metadata says what it holds and lets a damaged one be told.

    8 bytes      length of the header
    header       JSON: dtype, shape and place of each array; under `__metadata__` the facts below
    arrays       little-endian, mapped into memory as they are

Facts: `format` and `version`, `kind` of database, `tokenizer` fingerprint, `settings` it was built with, `counts` of what it
holds (the last two in JSON), `crc32` of each array, and `facts_crc32` over all of these and the arrays' dtypes and shapes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

FORMAT = "hd_jax database"
VERSION = "1"
MAX_VERIFIED_BYTES = 256 * 2**20  # `open` checks the checksums of this much without being asked
_DTYPES = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
_MAX_HEADER_BYTES = 2**24


class DatabaseError(ValueError):
    """A database file that is of another kind, version or tokenizer, or damaged."""


@dataclasses.dataclass(frozen=True)
class DatabaseFile:
    """What `open` found. The arrays are read-only maps of the file."""

    settings: dict[str, Any]
    counts: dict[str, int]
    arrays: dict[str, np.ndarray]


def save(
    path: str | os.PathLike[str],
    kind: str,
    *,
    fingerprint: str,
    settings: Mapping[str, Any],
    counts: Mapping[str, int],
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Writes a database beside its place and renames it.

    Args:
      path: the file; its folder exists.
      kind: of database.
      fingerprint: of the tokenizer that its token ids belong to.
      settings: it was built with, for JSON.
      counts: of what it holds.
      arrays: int32 or int64, by name.

    Raises:
      ValueError: an array of another dtype.
      OSError: the file cannot be written.
    """
    path = Path(path)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "tokenizer": fingerprint,
        "settings": json.dumps(dict(settings), sort_keys=True),
        "counts": json.dumps(dict(counts), sort_keys=True),
        "crc32": json.dumps({name: _crc32(array) for name, array in arrays.items()}, sort_keys=True),
    }
    names = {dtype: name for name, dtype in _DTYPES.items()}
    for name, array in arrays.items():
        if array.dtype not in names:
            raise ValueError(f"array {name!r} is {array.dtype}; a database holds int32 and int64")
    shapes = {name: [names[array.dtype], *array.shape] for name, array in arrays.items()}
    facts["facts_crc32"] = _facts_crc32(facts, shapes)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # as for any new file; save_file's would be for its owner alone
        save_file(arrays, beside, metadata=facts)
        beside.chmod(mode)
        os.replace(beside, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def open(path: str | os.PathLike[str], kind: str, fingerprint: str | None, *, verify: bool = False) -> DatabaseFile:
    """Maps a database into memory.

    Args:
      path: the file.
      kind: that it must be of.
      fingerprint: of the tokenizer in use, whose token ids the database must hold; None leaves that unchecked.
      verify: read all arrays and check their checksums, however large; those of small files are always checked.

    Raises:
      DatabaseError: the file is no such database, of another kind, version or tokenizer, cut short, or altered.
    """
    path = Path(path)
    header, facts, start = _read_header(path)
    try:
        shapes = {name: [entry["dtype"], *entry["shape"]] for name, entry in header.items()}
        places = {name: (entry["data_offsets"][0], entry["data_offsets"][1]) for name, entry in header.items()}
        if facts["facts_crc32"] != _facts_crc32(facts, shapes):
            raise DatabaseError(f"{path} is altered: its header does not match its checksum; build it again")
        arrays = _map_arrays(path, start, shapes, places)
        checksums = json.loads(facts["crc32"])
        settings, counts = json.loads(facts["settings"]), json.loads(facts["counts"])
    except (KeyError, TypeError, IndexError) as error:
        raise DatabaseError(f"{path} is altered: its header is not as it was written ({error!r}); build it again") from error
    if facts["kind"] != kind:
        raise DatabaseError(f"{path} holds a database of kind {facts['kind']!r}, not {kind!r}")
    if fingerprint not in (None, facts["tokenizer"]):
        raise DatabaseError(
            f"{path} was built with another tokenizer (fingerprint {facts['tokenizer']}, in use is {fingerprint}): "
            "build it again with this model's tokenizer"
        )
    if verify or sum(array.nbytes for array in arrays.values()) <= MAX_VERIFIED_BYTES:
        for name, array in arrays.items():
            if _crc32(array) != checksums[name]:
                raise DatabaseError(f"{path} is altered: array {name!r} does not match its checksum; build it again")
    return DatabaseFile(settings, counts, arrays)


def kind_of(path: str | os.PathLike[str]) -> str:
    """The kind of database that a file says it holds.

    Raises:
      DatabaseError: the file is no database of this project and version.
    """
    return str(_read_header(Path(path))[1].get("kind"))


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """The arrays' entries of a safetensors header, the facts, and where the arrays start."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            raise DatabaseError(f"{path} is not a database file: it does not start with the length of a header")
        if size < 8 + length:
            raise DatabaseError(f"{path} is truncated: {size} bytes, but its header alone ends at {8 + length}; build it again")
        text = file.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise DatabaseError(f"{path} is not a database file, or altered: its header is not JSON ({error})") from error
    facts = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise DatabaseError(f"{path} is not a database file: its header does not say {FORMAT!r}")
    if facts.get("version") != VERSION:
        raise DatabaseError(f"{path} has format version {facts.get('version')}; this program reads {VERSION}: build it again")
    return header, facts, 8 + length


def _map_arrays(path: Path, start: int, shapes: dict[str, list], places: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    arrays, end = {}, 0
    for name, (first, last) in sorted(places.items(), key=lambda item: item[1]):
        dtype, shape = _DTYPES[shapes[name][0]], tuple(shapes[name][1:])
        if first != end or last - first != dtype.itemsize * int(np.prod(shape)):
            raise DatabaseError(f"{path} is altered: array {name!r} is not where its shape puts it; build it again")
        end = last
    size = path.stat().st_size - start
    if size != end:
        fault = "truncated" if size < end else "altered"
        raise DatabaseError(f"{path} is {fault}: its arrays take {end} bytes, the file has {size}; build it again")
    for name, (first, last) in places.items():
        dtype, shape = _DTYPES[shapes[name][0]], tuple(shapes[name][1:])
        # An empty file region cannot be mapped.
        is_empty = first == last
        # A plain array over the map: np.memmap itself slows every small slice.
        arrays[name] = np.zeros(shape, dtype) if is_empty else np.asarray(np.memmap(path, dtype, "r", start + first, shape))
    return arrays


def _crc32(array: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"


def _facts_crc32(facts: Mapping[str, str], shapes: Mapping[str, list]) -> str:
    checked = {name: value for name, value in facts.items() if name != "facts_crc32"}
    return f"{zlib.crc32(json.dumps([checked, dict(shapes)], sort_keys=True).encode()):08x}"
