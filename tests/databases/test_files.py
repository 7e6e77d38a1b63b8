"""The container: what is written is read back, and whatever is wrong with a file is said."""

import json
import os

import numpy as np
import pytest

from hd_jax.databases import files
from hd_jax.databases.files import DatabaseError


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.database"
    arrays = {"tokens": np.arange(50, dtype=np.int32), "none": np.empty((0, 3), np.int32), "wide": np.ones((2, 3), np.int64)}
    files.save(path, "ngrams", fingerprint="abc", settings={"n": 5}, counts={"tokens": 50}, arrays=arrays)
    return path


def test_what_is_written_is_read_back(path):
    file = files.open(path, "ngrams", "abc", verify=True)
    assert file.settings == {"n": 5} and file.counts == {"tokens": 50} and set(file.arrays) == {"tokens", "none", "wide"}
    np.testing.assert_array_equal(file.arrays["tokens"], np.arange(50))
    assert isinstance(file.arrays["tokens"].base, np.memmap) and file.arrays["tokens"].dtype == np.int32
    assert file.arrays["none"].shape == (0, 3) and file.arrays["wide"].tolist() == [[1] * 3] * 2
    assert os.listdir(path.parent) == [path.name] and files.kind_of(path) == "ngrams"
    (path.parent / "plain").touch()
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode
    assert files.open(path, "ngrams", None).counts == {"tokens": 50}
    with pytest.raises(ValueError, match="read-only"):
        file.arrays["tokens"][0] = 1


def test_another_kind_tokenizer_or_version_is_refused(path, monkeypatch):
    with pytest.raises(DatabaseError, match="kind 'ngrams', not 'trigrams'"):
        files.open(path, "trigrams", "abc")
    with pytest.raises(DatabaseError, match=r"another tokenizer \(fingerprint abc, in use is abd\)"):
        files.open(path, "ngrams", "abd")
    monkeypatch.setattr(files, "VERSION", "2")
    with pytest.raises(DatabaseError, match="format version 1; this program reads 2"):
        files.open(path, "ngrams", "abc")


def test_every_truncation_is_refused(path):
    whole = path.read_bytes()
    for size in [0, 5, 8, 40, *range(60, len(whole), 53), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(DatabaseError, match=r"truncated|not a database file"):
            files.open(path, "ngrams", "abc")
    path.write_bytes(whole + b"\0")
    with pytest.raises(DatabaseError, match="altered"):
        files.open(path, "ngrams", "abc")


def test_every_altered_byte_is_refused(path):
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for index in [*range(0, header, 3), *range(header, len(whole))]:
        if whole[index : index + 1] == b" " and not whole[index:header].strip():
            continue  # the padding behind the header means nothing
        altered = bytearray(whole)
        altered[index] ^= 1 if index % 2 else 64
        path.write_bytes(altered)
        with pytest.raises(DatabaseError):
            files.open(path, "ngrams", "abc")


def test_large_arrays_are_checked_when_asked(path, monkeypatch):
    monkeypatch.setattr(files, "MAX_VERIFIED_BYTES", 10)
    altered = bytearray(path.read_bytes())
    altered[-1] ^= 1
    path.write_bytes(altered)
    files.open(path, "ngrams", "abc")
    with pytest.raises(DatabaseError, match="does not match its checksum"):
        files.open(path, "ngrams", "abc", verify=True)


def test_other_files_are_refused(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    save_file({"weight": np.ones(3, np.float32)}, path)
    with pytest.raises(DatabaseError, match="not a database file"):
        files.open(path, "ngrams", "abc")
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(DatabaseError, match="not a database file"):
        files.open(path, "ngrams", "abc")
    with pytest.raises(FileNotFoundError):
        files.open(tmp_path / "none", "ngrams", "abc")


def test_an_interrupted_write_leaves_nothing_and_keeps_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def interrupted(arrays, place, metadata):
        place.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.save(path, "ngrams", fingerprint="abc", settings={}, counts={}, arrays={"a": np.ones(1, np.int32)})
    assert os.listdir(path.parent) == [path.name] and path.read_bytes() == before


def test_what_cannot_be_written_is_said(tmp_path):
    facts = {"fingerprint": "abc", "settings": {}, "counts": {}}
    with pytest.raises(ValueError, match="array 'a' is float64; a database holds int32 and int64"):
        files.save(tmp_path / "a", "ngrams", **facts, arrays={"a": np.ones(1)})
    with pytest.raises(OSError, match="none"):
        files.save(tmp_path / "none" / "a", "ngrams", **facts, arrays={"a": np.ones(1, np.int32)})
