"""What a thread writes is what was asked for; what it fails at is told."""

import threading

import pytest

from keras_openllama.utils.background_writer import open_in_background

pytestmark = pytest.mark.backend_free


def test_calls_happen_in_their_order(tmp_path):
    with open_in_background(tmp_path / "file") as file:
        file.truncate(100)
        file.seek(10)
        for number in range(50):
            file.write(bytes([number]))
    written = (tmp_path / "file").read_bytes()
    assert written == bytes(10) + bytes(range(50)) + bytes(40)


def test_an_error_reaches_the_writer_and_ends_the_thread():
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        with open_in_background("/dev/full") as file:
            for _ in range(100):
                file.write(bytes(1 << 20))
    # One that only the last part meets is told at the end.
    with pytest.raises(OSError, match="No space left"):
        with open_in_background("/dev/full") as file:
            file.write(bytes(1 << 20))
    assert threading.active_count() == before


def test_an_error_of_the_caller_ends_the_thread(tmp_path):
    before = threading.active_count()
    with pytest.raises(ValueError, match="mine"):
        with open_in_background(tmp_path / "file") as file:
            file.write(bytes(1 << 20))
            raise ValueError("mine")
    assert threading.active_count() == before
