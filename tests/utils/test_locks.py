"""A lock has one holder, and ends with its block or its process."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from keras_openllama.utils.locks import locked, try_lock

pytestmark = pytest.mark.backend_free

BUSY = RuntimeError("somebody else has it")


def test_a_lock_that_is_held_is_busy(tmp_path):
    path = tmp_path / "lock"
    with locked(path, BUSY), open(path) as other:
        assert try_lock(other.fileno()) is False
        with pytest.raises(RuntimeError, match="somebody else"), locked(path, BUSY):
            pytest.fail("two hold the lock")


def test_a_lock_ends_with_its_block_however_that_ends(tmp_path):
    path = tmp_path / "lock"
    with pytest.raises(ValueError, match="mine"), locked(path, BUSY):
        raise ValueError("mine")
    with locked(path, BUSY):
        pass
    with locked(path, BUSY):
        pass


def test_a_directory_is_locked_without_a_file_in_it(tmp_path):
    with locked(tmp_path, BUSY):
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(RuntimeError, match="somebody else"), locked(tmp_path, BUSY):
            pass


def test_a_lock_ends_with_its_process(tmp_path):
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
        with pytest.raises(RuntimeError, match="somebody else"), locked(path, BUSY):
            pass
        holder.kill()
    with locked(path, BUSY):
        pass


def test_where_the_file_system_has_no_locks_there_is_none(tmp_path, monkeypatch):
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
