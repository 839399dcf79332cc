"""Tensors are read ahead in a thread, in the order of the files."""

import threading
import time

import numpy as np
import pytest

from keras_openllama.checkpoints.tensors import (
    MappedFile,
    MappedTensor,
    ReadAhead,
    contiguous_strides,
    extent,
    in_file_order,
)

pytestmark = pytest.mark.backend_free


@pytest.fixture
def tensors(tmp_path):
    """Nine tensors of one file, not in the file's order."""
    path = tmp_path / "numbers"
    path.write_bytes(np.arange(9 * 1000, dtype="float32").tobytes())
    file = MappedFile(path)
    return [
        MappedTensor(str(i), "float32", (10, 100), (100, 1), 4000 * i, file)
        for i in (3, 1, 4, 0, 5, 8, 2, 6, 7)
    ]


def test_tensors_come_in_the_order_of_the_file_where_asked(tensors):
    with ReadAhead(in_file_order(tensors)) as ahead:
        seen = []
        for stored in ahead:
            seen.append(stored.name)
            assert stored.array()[0, 0] == 1000 * int(stored.name)
            stored.drop()
            assert stored.array()[9, 99] == 1000 * int(stored.name) + 999
    assert seen == [str(i) for i in range(9)]


def test_leaving_early_ends_the_thread(tensors):
    before = threading.active_count()
    with ReadAhead(tensors):
        pass
    with ReadAhead(tensors) as ahead:
        next(iter(ahead))
    assert threading.active_count() == before


def test_reading_stays_a_few_tensors_ahead(tensors, monkeypatch):
    touched = []
    monkeypatch.setattr(MappedTensor, "touch", lambda self: touched.append(self.name))
    with ReadAhead(tensors) as ahead:
        time.sleep(0.2)
        assert touched == ["3", "1", "4", "0"]
        assert len(list(ahead)) == len(touched) == 9


def test_an_error_of_the_thread_reaches_the_reader(tensors, monkeypatch):
    def fail(self):
        if self.name == "2":
            raise OSError("the disk is gone")

    monkeypatch.setattr(MappedTensor, "touch", fail)
    with ReadAhead(tensors) as ahead, pytest.raises(OSError, match="disk is gone"):
        list(ahead)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 3), (3, 0)])
def test_contiguous_tensors_span_their_elements(shape):
    array = np.zeros(shape)
    strides = contiguous_strides(shape)
    assert extent(shape, strides) == array.size
    if array.size:
        assert strides == tuple(s // array.itemsize for s in array.strides)
