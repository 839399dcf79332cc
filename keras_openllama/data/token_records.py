"""Documents as ArrayRecord files: token ids, and the bytes of text that they came from.

A record is a `tf.train.Example` with the features `tokens` (the ids as little-endian
bytes) and `num_bytes`, as TensorFlow Datasets reads it too.
"""

import contextlib
import errno
import os

import numpy as np
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_generated_pb2

from keras_openllama.utils import files

# One record a chunk, so that one can be read alone; the fastest level of zstd.
_OPTIONS = "group_size:1,zstd:1"
_NO_SPACE = os.strerror(errno.ENOSPC)


class DamagedFile(ValueError):
    """A file of prepared data that is not what the manifest says; it is named."""


def token_dtype(vocabulary_size):
    """Smallest type that holds the ids: little-endian uint16, or uint32."""
    return np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")


def encode(tokens, num_bytes):
    """A document as the bytes of a record.

    Args:
        tokens: array `(length,)` of `token_dtype`, NumPy's or Python's.
        num_bytes: int, UTF-8 bytes of the text.
    """
    example = tf_example_generated_pb2.Example()
    feature = example.features.feature
    feature["tokens"].bytes_list.value.append(tokens.tobytes())
    feature["num_bytes"].int64_list.value.append(num_bytes)
    return example.SerializeToString(deterministic=True)


def decode(record, dtype):
    """Tokens (array `(length,)`) and number of bytes of a record."""
    feature = tf_example_generated_pb2.Example.FromString(record).features.feature
    tokens = np.frombuffer(feature["tokens"].bytes_list.value[0], dtype)
    return tokens, feature["num_bytes"].int64_list.value[0]


@contextlib.contextmanager
def writer(path):
    """A writer of records (`.write(bytes)`) to a local file.

    Raises:
        OSError: if the disk is full, say.
    """
    try:
        writer = array_record_module.ArrayRecordWriter(str(path), _OPTIONS)
        yield writer
        writer.close()
    except RuntimeError as error:
        if _NO_SPACE in str(error):
            raise OSError(errno.ENOSPC, _NO_SPACE, str(path)) from error
        raise OSError(errno.EIO, str(error), str(path)) from error


def open_reader(path, count):
    """A reader of records by number (`.read([numbers])`).

    Args:
        path: string, local or `gs://…`.
        count: int, how many records it must have.

    Raises:
        DamagedFile: if the file is missing, damaged, or has another number of records.
    """
    reader = array_record_module.ArrayRecordReader(str(path))
    found = reader.num_records() if reader.ok() else None
    if found != count:
        state = "cannot be read" if found is None else f"has {found} records"
        raise DamagedFile(
            f"{path} {state}, but should have {count} records. Copy it again from "
            "where it was prepared, or prepare the data anew."
        )
    return reader


def check_written(path, count):
    """Raises an `OSError` unless a file that was just written has so many records."""
    try:
        open_reader(path, count)
    except DamagedFile as error:
        raise OSError(errno.EIO, f"Written, but {error}", str(path)) from error


def size_of(path):
    """Bytes of a file; `None` if there is none."""
    try:
        return files.size_and_mtime(path)[0]
    except OSError:
        return None
