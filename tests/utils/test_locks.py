"""Locks have one holder, and end with their block or process."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from keras_openllama.utils.locks import locked, try_lock

pytestmark = pytest.mark.backend_free

BUSY = RuntimeError("another process holds the lock")


def test_locked_raises_if_the_lock_is_held(tmp_path):
    path = tmp_path / "lock"
    with locked(path, BUSY), open(path) as other:
        assert try_lock(other.fileno()) is False
        with pytest.raises(RuntimeError, match="another process"), locked(path, BUSY):
            pytest.fail("two holders of the lock")


def test_locked_releases_the_lock_after_errors_too(tmp_path):
    path = tmp_path / "lock"
    with pytest.raises(ValueError, match="mine"), locked(path, BUSY):
        raise ValueError("mine")
    with locked(path, BUSY):
        pass
    with locked(path, BUSY):
        pass


def test_locked_accepts_a_directory(tmp_path):
    with locked(tmp_path, BUSY):
        assert list(tmp_path.iterdir()) == []
        with (
            pytest.raises(RuntimeError, match="another process"),
            locked(tmp_path, BUSY),
        ):
            pass


def test_locked_releases_the_lock_when_the_process_ends(tmp_path):
    path = tmp_path / "lock"
    script = """if True:
        import sys
        from keras_openllama.utils.locks import locked
        with locked(sys.argv[1], RuntimeError()):
            print("locked", flush=True)
            sys.stdin.read()
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", script, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(RuntimeError, match="another process"), locked(path, BUSY):
            pass
        holder.kill()
    with locked(path, BUSY):
        pass


def test_locked_runs_without_a_lock_if_the_file_system_has_none(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)
    done = []
    with locked(tmp_path, BUSY):
        done.append("block")
        descriptor = os.open(tmp_path, os.O_RDONLY)
        assert try_lock(descriptor) is None
        os.close(descriptor)
    assert done == ["block"]
