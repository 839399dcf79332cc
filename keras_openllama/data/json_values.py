"""The values of JSON files, each with its line: JSON Lines, arrays and the like."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from keras_openllama.data.decompression import read_decompressed
from keras_openllama.text.messages import is_message
from keras_openllama.utils.text_files import without_mark
from keras_openllama.utils.types import PathLike

# Keys of an object that holds all examples of a file.
_LIST_KEYS = ("data", "examples", "train", "rows", "instances")
_SEPARATORS = " \t\r\n,"


class LocatedValue(NamedTuple):
    """A value of a JSON file.

    Attributes:
        line: Number of the line on which it begins, from 1.
        value: The value; `None` if it is damaged.
        error: What is wrong with it, or `None`.
    """

    line: int
    value: Any
    error: str | None = None


def read_json_values(path: PathLike) -> list[LocatedValue]:
    r"""Reads the values of a file of JSON Lines, or the elements of a JSON array.

    Objects may also follow one another on several lines each, or be in a list under a
    key such as `"data"`. A file may be compressed by gzip or zstd.

    Args:
        path: Path of the file.

    Returns:
        The values. A damaged line of JSON Lines is one of them, with an error.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is damaged as a whole; the message names it.

    Example:
        >>> _ = open("a.json", "w").write('[\n{"text": "a"},\n{"text": "b"}\n]')
        >>> [(value.line, value.value) for value in read_json_values("a.json")]
        [(2, {'text': 'a'}), (3, {'text': 'b'})]
    """
    data = without_mark(read_decompressed(path), path)
    # What is not UTF-8 becomes lone surrogates, and is an error of its line.
    text = data.decode("utf-8", "surrogateescape")
    text = text.replace("\n\ufeff", "\n")  # Files that were concatenated.
    lines = [(i, s) for i, s in enumerate(text.split("\n"), 1) if s.strip()]
    if not lines:
        return []
    first = _parse(*lines[0])
    if len(lines) > 1 and first.error is None:
        return _check_surrogates([_parse(*line) for line in lines])
    try:
        values = list(_scan(text))
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise ValueError(
                f"{path}, line {error.lineno}: not valid JSON: {error.msg}. The file "
                "may be truncated."
            ) from None
        values = [_parse(*line) for line in lines]
        if len(values) > 1 and all(value.error for value in values):
            raise ValueError(
                f"{path} is neither JSON Lines nor a JSON array: none of its "
                f"{len(values)} lines is valid JSON."
            ) from None
        return _check_surrogates(values)
    return _check_surrogates(_elements(values, text))


def _parse(number, line):
    try:
        return LocatedValue(number, json.loads(line))
    except json.JSONDecodeError as error:
        where = f"{error.msg} (character {error.pos})"
        return LocatedValue(number, None, f"not valid JSON: {where}")
    except RecursionError:
        return LocatedValue(number, None, "not valid JSON: too many brackets")


def _scan(text, position=0):
    """Yields the JSON values that follow one another, and the offset of each."""
    decoder = json.JSONDecoder()
    while True:
        while position < len(text) and text[position] in _SEPARATORS:
            position += 1
        if position == len(text):
            return
        value, after = decoder.raw_decode(text, position)
        yield position, value
        position = after


def _elements(values, text):
    """The values, or the elements of a list that holds all of them."""
    offset, whole = values[0]
    if len(values) == 1:
        if isinstance(whole, Mapping):
            found = [key for key in _LIST_KEYS if _has_objects(whole.get(key))]
            if found and not any(map(is_message, whole[found[0]])):
                key = json.dumps(found[0])
                offset = text.index("[", text.index(key) + len(key))
                whole = whole[found[0]]
        if _has_objects(whole) and not all(map(is_message, whole)):
            values = list(itertools.islice(_scan(text, offset + 1), len(whole)))
    lines, line, before = [], 1, 0
    for offset, value in values:
        line += text.count("\n", before, offset)
        before = offset
        lines.append(LocatedValue(line, value))
    return lines


def _has_objects(value):
    return isinstance(value, list) and any(
        isinstance(x, (Mapping, list)) for x in value
    )


def _check_surrogates(values):
    """Marks values with text that is not valid Unicode."""
    return [value if _is_unicode(value.value) else _damaged(value) for value in values]


def _damaged(located):
    return LocatedValue(located.line, None, "not valid UTF-8, or half of a character")


def _is_unicode(value):
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
