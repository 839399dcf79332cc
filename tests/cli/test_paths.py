"""Checks of paths before a command starts its work."""

import os
from types import SimpleNamespace

import pytest

from keras_openllama.cli.convert import check_paths
from keras_openllama.cli.paths import (
    require_directory,
    require_file,
    require_output_directory,
    require_output_file,
    require_preset,
)

pytestmark = pytest.mark.backend_free


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A directory with a file, a directory of data, and others without permissions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "data").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "data" / "a.jsonl").write_text("{}")
    for name in ("secret.txt", "locked"):
        (tmp_path / name).mkdir() if name == "locked" else (tmp_path / name).touch()
    denied = {str(tmp_path / "secret.txt"), str(tmp_path / "locked")}
    access = os.access  # The superuser has all permissions.
    monkeypatch.setattr(
        os,
        "access",
        lambda p, mode: os.path.abspath(p) not in denied and access(p, mode),
    )
    return tmp_path


@pytest.mark.parametrize(
    ("check", "path", "message"),
    [
        (require_file, "none.json", "--x: the file none.json does not exist"),
        (require_file, ".", "--x: . is a directory. Name a file."),
        (require_file, "data", "such as data/a.jsonl or data/*.jsonl"),
        (require_file, "secret.txt", "--x: you have no permission to read secret.txt"),
        (require_directory, "none", "--x: the directory none does not exist"),
        (require_directory, "file.txt", "--x: file.txt is a file"),
        (require_directory, "locked", "no permission to read locked"),
        (require_preset, "nanno", "Did you mean 'open_llama_nano'?"),
        (require_preset, "", "must be one of open_llama_13b"),
        (require_preset, "file.txt", "It is a file"),
        (require_preset, "data", "--x: config.json is missing from the directory data"),
        (require_output_directory, "file.txt", "--x: file.txt is a file"),
        (require_output_directory, "file.txt/a/b", "--x: file.txt is a file"),
        (require_output_directory, "locked/a/b", "no permission to write in locked"),
        (require_output_file, "data", "--x: data is a directory"),
        (require_output_file, "none/a.png", "the directory of none/a.png does not"),
        (require_output_file, "locked/a.png", "no permission to write in locked"),
    ],
)
def test_require_reports_paths_that_cannot_be_used(check, path, message, tree):
    with pytest.raises(ValueError) as error:
        check("--x", path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("check", "path"),
    [
        (require_file, "file.txt"),
        (require_directory, "data"),
        (require_directory, "gs://bucket/data"),
        (require_preset, "3b_v2"),
        (require_preset, "model"),
        (require_preset, "hf://user/repo"),
        (require_output_directory, "data/new/run"),
        (require_output_directory, "data"),
        (require_output_directory, "gs://bucket/run"),
        (require_output_file, "new.png"),
        (require_output_file, "file.txt"),
    ],
)
def test_require_accepts_paths_that_can_be_used(check, path, tree):
    check("--x", path)


def test_require_output_file_names_the_suffixes():
    with pytest.raises(
        ValueError, match=r"--x must end in .png or .svg. Received: 'a'"
    ):
        require_output_file("--x", "a", (".png", ".svg"))
    require_output_file("--x", "a.PNG", (".png", ".svg"))


def test_require_preset_takes_a_tokenizer_where_no_model_is_needed(tree):
    (tree / "model" / "config.json").unlink()
    (tree / "model" / "tokenizer.json").write_text('{"registered_name": "x"}')
    require_preset("--tokenizer", "model", tokenizer=True)
    with pytest.raises(ValueError, match="has a tokenizer and no model"):
        require_preset("--preset", "model")


def test_convert_prefers_a_preset_to_a_file_of_its_name(tree):
    (tree / "nano").write_text("x")
    options = SimpleNamespace(source="nano", preset=None, revision=None)
    check_paths(options, SimpleNamespace(check_target=lambda: None))
