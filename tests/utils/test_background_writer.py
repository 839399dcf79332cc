"""The background writer writes all data and raises all errors."""

import threading

import pytest

from keras_openllama.utils.background_writer import open_in_background

pytestmark = pytest.mark.backend_free


def test_open_in_background_executes_calls_in_order(tmp_path):
    with open_in_background(tmp_path / "file") as file:
        file.truncate(100)
        file.seek(10)
        for number in range(50):
            file.write(bytes([number]))
    written = (tmp_path / "file").read_bytes()
    assert written == bytes(10) + bytes(range(50)) + bytes(40)


def test_open_in_background_raises_errors_of_the_thread():
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        with open_in_background("/dev/full") as file:
            for _ in range(100):
                file.write(bytes(1 << 20))
    # An error of the last write is raised at the end of the block.
    with pytest.raises(OSError, match="No space left"):
        with open_in_background("/dev/full") as file:
            file.write(bytes(1 << 20))
    assert threading.active_count() == before


def test_open_in_background_ends_the_thread_after_an_error_of_the_caller(tmp_path):
    before = threading.active_count()
    with pytest.raises(ValueError, match="mine"):
        with open_in_background(tmp_path / "file") as file:
            file.write(bytes(1 << 20))
            raise ValueError("mine")
    assert threading.active_count() == before
