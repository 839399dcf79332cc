"""The encoding of text files that other systems wrote."""

from __future__ import annotations

import codecs

# UTF-32 first: its mark for little-endian begins with that of UTF-16.
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_MIN_CHARACTERS = 4  # Fewer do not show the encoding.


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file is a Git LFS pointer, by its first bytes.

    Example:
        >>> is_lfs_pointer(b"version https://git-lfs.github.com/spec/v1")
        True
    """
    return start.startswith(b"version https://git-lfs")


def check_not_lfs_pointer(start: bytes, name: object) -> None:
    """Checks that a file is itself there, and not a Git LFS pointer to it.

    Args:
        start: The first bytes of the file.
        name: Name of the file, for the error message.

    Raises:
        ValueError: If it is a pointer.
    """
    if is_lfs_pointer(start):
        raise ValueError(
            f"{name} is a Git LFS pointer: `git lfs pull` gets the file itself."
        )


def without_mark(start: bytes, name: object) -> bytes:
    """Removes the byte-order mark of UTF-8.

    Args:
        start: At least 32 bytes from the start of a text file, or all of it.
        name: Name of the file, for the error message.

    Returns:
        The bytes after the mark.

    Raises:
        ValueError: If the bytes show that the file is not UTF-8, or a Git LFS pointer.

    Example:
        >>> without_mark("text".encode("utf-16"), "a.txt")
        Traceback (most recent call last):
        ...
        ValueError: a.txt is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8.
    """
    check_not_lfs_pointer(start, name)
    for mark, encoding in _OTHER_ENCODINGS.items():
        if start.startswith(mark):
            raise _encoding_error(name, encoding)
    for first, encoding in enumerate(("UTF-16BE", "UTF-16LE")):
        # Without a mark: every second byte of the first 16 characters is zero.
        high, low = start[first:32:2], start[1 - first : 32 : 2]
        if len(high) >= _MIN_CHARACTERS and not any(high) and all(low):
            raise _encoding_error(name, encoding)
    return start.removeprefix(codecs.BOM_UTF8)


def _encoding_error(name, encoding):
    return ValueError(
        f"{name} is {encoding}, not UTF-8. Convert it: iconv -f {encoding} -t UTF-8."
    )


def decode_text(data: bytes, name: object) -> str:
    r"""Decodes a file of UTF-8 text, without a byte-order mark at its start.

    Args:
        data: The content of the file.
        name: Name of the file, for the error message.

    Returns:
        The text.

    Raises:
        ValueError: If it is not UTF-8, or a Git LFS pointer.

    Example:
        >>> decode_text(b"\xef\xbb\xbfThe sea", "sea.txt")
        'The sea'
    """
    data = without_mark(data, name)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 (byte {error.start}). Convert it with iconv."
        ) from None
