"""Targets are created atomically."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from keras_openllama.checkpoints.model_files import foreign_content
from keras_openllama.utils import staging
from keras_openllama.utils.staging import check_target, scratch_directory, staged

pytestmark = pytest.mark.backend_free


def write(path, text="new"):
    (path / "config.json").write_text(json.dumps({"model_type": text}))


def read(path):
    return json.loads((path / "config.json").read_text())["model_type"]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_staged_creates_a_directory_at_the_end(tmp_path):
    with staged(tmp_path / "a" / "out") as path:
        write(path)
        assert not (tmp_path / "a" / "out").exists()
    assert names(tmp_path / "a") == ["out"]
    assert read(tmp_path / "a" / "out") == "new"
    # With the permissions of any new directory.
    (tmp_path / "b").mkdir()
    assert (tmp_path / "a" / "out").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_staged_creates_a_file_at_the_end(tmp_path):
    with staged(tmp_path / "out", single_file=True) as path:
        path.write_text("new")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_staged_removes_everything_after_an_error(tmp_path, error):
    with pytest.raises(error), staged(tmp_path / "out") as path:
        write(path)
        raise error
    assert names(tmp_path) == []


def test_staged_replaces_a_directory_only_with_force(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    write(target, "old")
    with pytest.raises(FileExistsError, match=f"{target} exists.*--force"):
        with staged(target):
            pass
    options = {"force": True, "foreign_content": foreign_content}
    with pytest.raises(FileExistsError, match=f"{target} exists"):
        check_target(target, force=True)  # Without `foreign_content`.
    with pytest.raises(ValueError), staged(target, **options) as path:
        write(path)
        raise ValueError
    assert read(target) == "old"
    with staged(target, **options) as path:
        write(path)
    assert read(target) == "new"
    assert names(tmp_path) == ["out"]


def test_staged_replaces_a_file_only_with_force(tmp_path):
    (tmp_path / "out").write_text("old")
    with pytest.raises(FileExistsError), staged(tmp_path / "out", single_file=True):
        pass
    with staged(tmp_path / "out", single_file=True, force=True) as path:
        path.write_text("new")
    assert (tmp_path / "out").read_text() == "new"


def test_staged_replaces_an_empty_directory(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as path:
        write(path)
    assert names(tmp_path / "out") == ["config.json"]


def test_check_target_rejects_directories_with_foreign_content(tmp_path):
    check_target = functools.partial(
        staging.check_target, foreign_content=foreign_content
    )
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds 'thesis\.tex'"):
        check_target(tmp_path / "home", force=True)
    write(tmp_path / "home")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="neither a file nor a directory"):
        check_target(tmp_path / "pipe", single_file=True, force=True)
    (tmp_path / "model" / "assets" / "photos").mkdir(parents=True)
    write(tmp_path / "model")
    with pytest.raises(FileExistsError, match="holds 'assets/photos'"):
        check_target(tmp_path / "model", force=True)
    with pytest.raises(FileExistsError, match=r"holds 'thesis\.tex'"):
        check_target(tmp_path / "home", force=True)
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text('{"auths": {}}')
    with pytest.raises(FileExistsError, match=r"no config\.json of a model"):
        check_target(tmp_path / "docker", force=True)
    with pytest.raises(IsADirectoryError):
        check_target(tmp_path / "home", single_file=True, force=True)
    with pytest.raises(NotADirectoryError, match="thesis"):
        check_target(tmp_path / "home" / "thesis.tex", force=True)


def test_check_target_rejects_the_current_directory_and_mount_points(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"the current directory.*a directory in it"):
        check_target(".")
    with pytest.raises(OSError, match="mount point"):
        check_target("/proc")


def test_staged_does_not_replace_a_target_created_in_the_meantime(tmp_path):
    with pytest.raises(FileExistsError), staged(tmp_path / "out") as path:
        write(path)
        (tmp_path / "out").mkdir()
        write(tmp_path / "out", "theirs")
    assert read(tmp_path / "out") == "theirs"
    assert names(tmp_path) == ["out"]


def test_staged_removes_created_parents_after_an_error(tmp_path):
    with pytest.raises(ValueError), staged(tmp_path / "a" / "b" / "out"):
        raise ValueError
    assert names(tmp_path) == []


def test_scratch_directory_is_removed_and_those_of_others_stay(tmp_path):
    with scratch_directory(tmp_path) as first, scratch_directory(tmp_path) as second:
        (second / "weights").write_text("large")
        assert first.is_dir()
        assert first != second
    assert names(tmp_path) == []


def test_scratch_directory_of_a_host_with_a_longer_name_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node-1")
    with scratch_directory(tmp_path) as other:
        name = other.name
    (tmp_path / name).mkdir()  # As of a machine whose locks are not seen here.
    monkeypatch.setattr(socket, "gethostname", lambda: "node")
    with scratch_directory(tmp_path):
        pass
    assert names(tmp_path) == [name]


PROGRAM = """
import sys, time
from keras_openllama.utils.staging import staged
with staged(sys.argv[1]) as path:
    (path / "config.json").write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is writing to `tmp_path / "out"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "out")], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait()


def test_staged_removes_what_a_killed_process_left(writer, tmp_path):
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not (tmp_path / "out").exists()
    assert len(names(tmp_path)) == 1  # Hidden, next to the target.
    assert names(tmp_path)[0].startswith(".out.unfinished-")
    with staged(tmp_path / "out") as path:
        write(path)
    assert names(tmp_path) == ["out"]


def test_staged_leaves_the_files_of_other_processes_alone(writer, tmp_path):
    with staged(tmp_path / "out") as path:
        write(path)
    assert len(names(tmp_path)) == 2
    assert writer.poll() is None


def test_staged_restores_a_directory_after_an_interrupted_replacement(tmp_path):
    # The state after a kill between the two renames.
    left = tmp_path / f".out.unfinished-{socket.gethostname()}-1"
    (left / "replaced").mkdir(parents=True)
    write(left / "replaced", "old")
    with pytest.raises(FileExistsError), staged(tmp_path / "out"):
        pass
    assert read(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk" / "out", tmp_path / "out")
    with staged(tmp_path / "out") as path:
        write(path)
    assert names(tmp_path / "disk") == ["out"]
    assert (tmp_path / "out").is_symlink()


def test_staged_files_replaces_files_only_if_the_block_succeeds(tmp_path):
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "mine.txt").touch()
    with pytest.raises(OSError, match=r"model cannot be written: Disk full. It was"):
        with staging.staged_files(tmp_path, tmp_path / "model") as unfinished:
            (unfinished / "config.json").write_text("half")
            raise OSError(28, "Disk full")
    assert (tmp_path / "config.json").read_text() == "old"
    with staging.staged_files(tmp_path) as unfinished:
        (unfinished / "config.json").write_text("new")
        (unfinished / "assets").mkdir()
        (unfinished / "assets" / "vocabulary").touch()
    assert (tmp_path / "config.json").read_text() == "new"
    found = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))]
    assert found == ["assets", "assets/vocabulary", "config.json", "mine.txt"]
