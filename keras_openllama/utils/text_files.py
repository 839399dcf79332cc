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


def find_problem(start: bytes) -> str | None:
    """Says what a file is that should be UTF-8 text, by its first bytes.

    Args:
        start: At least 32 bytes from the start of the file, or all of it.

    Returns:
        The end of a sentence about the file, with the remedy; `None` if the bytes look
        like UTF-8.

    Example:
        >>> find_problem("text".encode("utf-16"))
        'is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8'
        >>> find_problem(b"text") is None
        True
    """
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer: `git lfs pull` gets the file itself"
    for mark, name in _OTHER_ENCODINGS.items():
        if start.startswith(mark):
            return f"is {name}, not UTF-8. Convert it: iconv -f {name} -t UTF-8"
    return None


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
    problem = find_problem(data)
    if problem:
        raise ValueError(f"{name} {problem}.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 (byte {error.start}). Convert it with iconv."
        ) from None
