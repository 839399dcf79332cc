"""A target appears when it is whole, or not at all."""

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
from keras_openllama.utils.staging import check_target, staged

pytestmark = pytest.mark.backend_free


def write(path, text="new"):
    (path / "config.json").write_text(json.dumps({"model_type": text}))


def read(path):
    return json.loads((path / "config.json").read_text())["model_type"]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_directory_appears_at_the_end(tmp_path):
    with staged(tmp_path / "a" / "out") as path:
        write(path)
        assert not (tmp_path / "a" / "out").exists()
    assert names(tmp_path / "a") == ["out"]
    assert read(tmp_path / "a" / "out") == "new"
    # As readable to others as any new directory.
    (tmp_path / "b").mkdir()
    assert (tmp_path / "a" / "out").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_file_appears_at_the_end(tmp_path):
    with staged(tmp_path / "out", single_file=True) as path:
        path.write_text("new")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_what_failed(tmp_path, error):
    with pytest.raises(error), staged(tmp_path / "out") as path:
        write(path)
        raise error
    assert names(tmp_path) == []


def test_what_exists_is_refused_unless_forced(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    write(target, "old")
    with pytest.raises(FileExistsError, match=f"{target} exists.*--force"):
        with staged(target):
            pass
    options = {"force": True, "foreign_content": foreign_content}
    with pytest.raises(FileExistsError, match=f"{target} exists"):
        check_target(target, force=True)  # Nobody says what may be replaced.
    with pytest.raises(ValueError), staged(target, **options) as path:
        write(path)
        raise ValueError
    assert read(target) == "old"
    with staged(target, **options) as path:
        write(path)
    assert read(target) == "new"
    assert names(tmp_path) == ["out"]


def test_a_file_is_replaced_by_a_file(tmp_path):
    (tmp_path / "out").write_text("old")
    with pytest.raises(FileExistsError), staged(tmp_path / "out", single_file=True):
        pass
    with staged(tmp_path / "out", single_file=True, force=True) as path:
        path.write_text("new")
    assert (tmp_path / "out").read_text() == "new"


def test_an_empty_directory_is_nothing_to_lose(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as path:
        write(path)
    assert names(tmp_path / "out") == ["config.json"]


def test_only_a_models_directory_is_replaced(tmp_path):
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


def test_a_place_where_nothing_can_be_put_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"the current directory.*a directory in it"):
        check_target(".")
    with pytest.raises(OSError, match="mount point"):
        check_target("/proc")


def test_what_came_meanwhile_stays(tmp_path):
    with pytest.raises(FileExistsError), staged(tmp_path / "out") as path:
        write(path)
        (tmp_path / "out").mkdir()
        write(tmp_path / "out", "theirs")
    assert read(tmp_path / "out") == "theirs"
    assert names(tmp_path) == ["out"]


def test_directories_that_were_made_for_nothing_are_removed(tmp_path):
    with pytest.raises(ValueError), staged(tmp_path / "a" / "b" / "out"):
        raise ValueError
    assert names(tmp_path) == []


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
    """A process in the middle of writing to `tmp_path / "out"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "out")], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait()


def test_what_a_killed_process_left_is_removed_by_the_next(writer, tmp_path):
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not (tmp_path / "out").exists()
    assert len(names(tmp_path)) == 1  # Hidden, beside the target.
    assert names(tmp_path)[0].startswith(".out.unfinished-")
    with staged(tmp_path / "out") as path:
        write(path)
    assert names(tmp_path) == ["out"]


def test_what_another_process_is_writing_is_left_alone(writer, tmp_path):
    with staged(tmp_path / "out") as path:
        write(path)
    assert len(names(tmp_path)) == 2
    assert writer.poll() is None


def test_a_directory_that_was_about_to_be_replaced_is_put_back(tmp_path):
    # As after a kill between the two renamings.
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
