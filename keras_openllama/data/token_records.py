"""ArrayRecord files of tokenized documents.

A record is a `tf.train.Example` with the features `tokens` (the ids as little-endian
bytes) and `num_bytes` (the size of the text), which TensorFlow Datasets can read.
"""

import array
import contextlib
import errno
import os
from collections.abc import Iterator

import numpy as np
from array_record.python import array_record_module
from numpy.typing import DTypeLike
from tensorflow_datasets.proto import tf_example_generated_pb2

from keras_openllama.utils import files
from keras_openllama.utils.types import PathLike

# One record per chunk, for random access; the fastest level of zstd.
_OPTIONS = "group_size:1,zstd:1"
_NO_SPACE = os.strerror(errno.ENOSPC)


class DamagedFileError(ValueError):
    """A file of a prepared dataset does not match its manifest."""


def token_dtype(vocabulary_size: int) -> np.dtype:
    """Returns the smallest dtype for token ids: little-endian uint16 or uint32.

    Example:
        >>> token_dtype(32_000)
        dtype('uint16')
    """
    return np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")


def encode_record(tokens: np.ndarray | array.array, num_bytes: int) -> bytes:
    """Encodes a document as a record.

    Args:
        tokens: token ids `(length,)` with the dtype of `token_dtype`.
        num_bytes: size of the text in UTF-8 bytes.

    Returns:
        The bytes of the record.

    Example:
        >>> decode_record(encode_record(np.array([1, 5, 2], "<u2"), num_bytes=4), "<u2")
        (array([1, 5, 2], dtype=uint16), 4)
    """
    example = tf_example_generated_pb2.Example()
    feature = example.features.feature
    feature["tokens"].bytes_list.value.append(tokens.tobytes())
    feature["num_bytes"].int64_list.value.append(num_bytes)
    return example.SerializeToString(deterministic=True)


def decode_record(record: bytes, dtype: DTypeLike) -> tuple[np.ndarray, int]:
    """Decodes a record.

    Args:
        record: output of `encode_record`.
        dtype: dtype of the token ids, see `token_dtype`.

    Returns:
        Token ids `(length,)`, and the size of the text in UTF-8 bytes.
    """
    feature = tf_example_generated_pb2.Example.FromString(record).features.feature
    tokens = np.frombuffer(feature["tokens"].bytes_list.value[0], dtype)
    return tokens, feature["num_bytes"].int64_list.value[0]


@contextlib.contextmanager
def open_writer(path: PathLike) -> Iterator[array_record_module.ArrayRecordWriter]:
    """Context manager of a writer of records, with `write(record)`, to a local file.

    Args:
        path: file to write.

    Yields:
        The writer.

    Raises:
        OSError: if the file cannot be written, for example because the disk is full.
    """
    try:
        writer = array_record_module.ArrayRecordWriter(str(path), _OPTIONS)
        yield writer
        writer.close()
    except RuntimeError as error:
        if _NO_SPACE in str(error):
            raise OSError(errno.ENOSPC, _NO_SPACE, str(path)) from error
        raise OSError(errno.EIO, str(error), str(path)) from error


def open_reader(path: PathLike, count: int) -> array_record_module.ArrayRecordReader:
    """Opens a reader of records by index, with `read(indices)`.

    Args:
        path: local file, or `gs://…`.
        count: expected number of records.

    Returns:
        The reader.

    Raises:
        DamagedFileError: if the file is missing, damaged, or has another number of
            records.
    """
    reader = array_record_module.ArrayRecordReader(str(path))
    found = reader.num_records() if reader.ok() else None
    if found != count:
        state = "could not be read" if found is None else f"has {found} records"
        raise DamagedFileError(
            f"{path} {state}, but should have {count} records. Restore it from the "
            "original dataset, or prepare the data again."
        )
    return reader


def check_written(path: PathLike, count: int) -> None:
    """Checks the number of records of a new file.

    Args:
        path: the file.
        count: expected number of records.

    Raises:
        OSError: if the file is damaged or has another number of records.
    """
    try:
        open_reader(path, count)
    except DamagedFileError as error:
        raise OSError(errno.EIO, f"Writing failed: {error}", str(path)) from error


def file_size(path: str) -> int | None:
    """Returns the size of a file in bytes; `None` if there is no such file."""
    try:
        return files.size_and_mtime(path)[0]
    except OSError:
        return None
