"""Files that gzip or zstd compressed."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import BinaryIO

from keras_openllama.utils import files
from keras_openllama.utils.text_files import is_lfs_pointer
from keras_openllama.utils.types import PathLike

_COMPRESSED_CHUNK = 1 << 17  # Decompression grows it by an unknown factor.
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SKIPPABLE = b"\x2a\x4d\x18"  # Bytes 1 to 3 of a frame of zstd without content.


class Decompressed(io.RawIOBase):
    """The decompressed content of a gzip or zstd file; a truncated file raises.

    Args:
        file: The compressed file.
        progress: Called with the number of compressed bytes read since the last call.
    """

    def __init__(self, file: BinaryIO, progress: Callable[[int], object]):
        self._file, self._progress = file, progress
        self._input, self._output = b"", memoryview(b"")
        self._decompressor, self._is_empty = None, True

    def readable(self) -> bool:
        """Returns that the file is open for reading."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Reads into a buffer, as `io.RawIOBase.readinto`."""
        while not self._output:
            if not self._input:
                self._input = self._file.read(_COMPRESSED_CHUNK)
                self._progress(len(self._input))
            if not self._input:
                if self._decompressor is not None or self._is_empty:
                    raise OSError("it is truncated")
                return 0
            if self._decompressor is None:
                if len(self._input) == 1:  # The format shows in the first two bytes.
                    more = self._file.read(_COMPRESSED_CHUNK)
                    self._progress(len(more))
                    self._input += more
                self._decompressor, self._is_empty = self._new_decompressor(), False
            self._output = memoryview(self._decompressor.decompress(self._input))
            self._input = b""
            if self._decompressor.eof:  # Another member may follow.
                self._input = self._decompressor.unused_data
                self._decompressor = None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _new_decompressor(self):
        if self._is_empty and is_lfs_pointer(self._input):
            raise OSError(
                "it is a Git LFS pointer: `git lfs pull` gets the file itself"
            )
        if self._input[:2] == _GZIP:
            return zlib.decompressobj(zlib.MAX_WBITS | 16)
        is_zstd = self._input.startswith(_ZSTD) or self._input[1:4] == _SKIPPABLE
        if self._is_empty and not is_zstd and len(self._input) >= len(_ZSTD):
            raise OSError("it is neither a gzip nor a zstd file")
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj()


def zstd_error() -> type[Exception]:
    """Returns the exception of damaged zstd files."""
    import zstandard

    return zstandard.ZstdError


def read_decompressed(path: PathLike) -> bytes:
    """Reads a file, and decompresses it if it is compressed.

    Args:
        path: Path of the file.

    Returns:
        The content.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is damaged.

    Example:
        >>> import gzip
        >>> _ = open("a.jsonl.gz", "wb").write(gzip.compress(b'{"text": "a"}'))
        >>> read_decompressed("a.jsonl.gz")
        b'{"text": "a"}'
    """
    data = files.read_bytes(path)
    if not data.startswith((_GZIP, _ZSTD)):
        return data
    try:
        return io.BufferedReader(
            Decompressed(io.BytesIO(data), lambda size: None)
        ).read()
    except (OSError, zlib.error, zstd_error()) as error:
        raise ValueError(
            f"{path} could not be decompressed: {error}. Download it again."
        ) from error
