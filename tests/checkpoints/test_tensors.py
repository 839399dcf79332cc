"""`MappedTensor` maps files; `ReadAhead` reads tensors in a thread before their use."""

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
    """Nine tensors of one file, not sorted by offset."""
    path = tmp_path / "numbers"
    path.write_bytes(np.arange(9 * 1000, dtype="float32").tobytes())
    file = MappedFile(path)
    return [
        MappedTensor(str(i), "float32", (10, 100), (100, 1), 4000 * i, file)
        for i in (3, 1, 4, 0, 5, 8, 2, 6, 7)
    ]


def test_read_ahead_yields_tensors_in_file_order(tensors):
    with ReadAhead(in_file_order(tensors)) as ahead:
        seen = []
        for stored in ahead:
            seen.append(stored.name)
            assert stored.array()[0, 0] == 1000 * int(stored.name)
            stored.release()
            assert stored.array()[9, 99] == 1000 * int(stored.name) + 999
    assert seen == [str(i) for i in range(9)]


def test_read_ahead_stops_its_thread_when_the_block_is_left_early(tensors):
    before = threading.active_count()
    with ReadAhead(tensors):
        pass
    with ReadAhead(tensors) as ahead:
        next(iter(ahead))
    assert threading.active_count() == before


def test_read_ahead_reads_at_most_four_tensors_ahead(tensors, monkeypatch):
    prefetched = []
    monkeypatch.setattr(
        MappedTensor, "prefetch", lambda self: prefetched.append(self.name)
    )
    with ReadAhead(tensors) as ahead:
        time.sleep(0.2)
        assert prefetched == ["3", "1", "4", "0"]
        assert len(list(ahead)) == len(prefetched) == 9


def test_read_ahead_raises_the_errors_of_its_thread(tensors, monkeypatch):
    def fail(self):
        if self.name == "2":
            raise OSError("the disk is gone")

    monkeypatch.setattr(MappedTensor, "prefetch", fail)
    with ReadAhead(tensors) as ahead, pytest.raises(OSError, match="disk is gone"):
        list(ahead)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 3), (3, 0)])
def test_extent_of_a_contiguous_tensor_is_its_size(shape):
    array = np.zeros(shape)
    strides = contiguous_strides(shape)
    assert extent(shape, strides) == array.size
    if array.size:
        assert strides == tuple(s // array.itemsize for s in array.strides)
