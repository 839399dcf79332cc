"""Mapped files are written to in memory only."""

import tempfile

import numpy as np
import pytest

from keras_openllama.utils import mapping
from keras_openllama.utils.mapping import large_files_directory, map_privately

pytestmark = pytest.mark.backend_free


def test_map_privately_never_changes_the_file(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(100)))
    with open(path, "rb") as file:
        memory = map_privately(file)
    array = np.frombuffer(memory, "uint8")
    assert array.tolist() == list(range(100))
    array += 1
    assert array[0] == 1
    del array
    memory.close()
    assert path.read_bytes() == bytes(range(100))


def test_large_files_directory_is_that_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert large_files_directory() == str(tmp_path)


def test_large_files_directory_is_on_the_disk_by_default(monkeypatch, tmp_path):
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mapping, "_ON_DISK", tmp_path)
    assert large_files_directory() == str(tmp_path)
    monkeypatch.setattr(mapping, "_ON_DISK", tmp_path / "missing")
    assert large_files_directory() == tempfile.gettempdir()
