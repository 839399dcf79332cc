"""Messages on stderr: in one line, and with flags instead of arguments of functions.

The functions that a command calls name their arguments in messages, such as
`max_new_tokens`. The user of the command knows the flag, `--max-new-tokens`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from typing import TextIO

from keras_openllama.cli.process import PROGRAM

# What the last parsed command line calls the arguments, by name.
_flags: dict[str, str] = {}

_ARGUMENT = re.compile(r"`(?:\w+\.)*(\w+)(?:\[\d+\])?`(?: \((--[\w-]+|[A-Z]+)\))?")
_VALUE = re.compile(r"(?<=Received: )(\w+)=|(?<=, )(\w+)=")
_SWITCH = re.compile(r"`?\w+=True`? \((--[\w-]+)\)")


def use_flag_names(
    parser: argparse.ArgumentParser, names: Mapping[str, str] | None = None
) -> None:
    """Lets messages name the flags of a parser.

    Args:
        parser: The parser of the command.
        names: Flags by argument, where the names differ: `{"target": "DEST"}`.
    """
    forget_flag_names()
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        metavar = action.metavar if isinstance(action.metavar, str) else action.dest
        _flags[action.dest] = max(action.option_strings, key=len, default=metavar)
    _flags.update(names or {})


def forget_flag_names() -> None:
    """Lets messages name arguments, until the next call of `use_flag_names`."""
    _flags.clear()


def with_flags(message: str) -> str:
    """Replaces names of arguments in a message by the flags of the command.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> _ = parser.add_argument("--top-k")
        >>> use_flag_names(parser)
        >>> with_flags("`top_k` must be a positive integer. Received: top_k=0")
        '--top-k must be a positive integer. Received: --top-k 0'
    """
    message = _SWITCH.sub(r"\1", message)
    message = _ARGUMENT.sub(lambda m: m[2] or _flags.get(m[1], m[0]), message)

    def value(match):
        flag = _flags.get(match[1] or match[2])
        return f"{flag} " if flag else match[0]

    return _VALUE.sub(value, message)


def one_line(message: object) -> str:
    """Returns a message without line breaks.

    Example:
        >>> one_line("one   line")
        'one line'
    """
    return " ".join(str(message).split())


def describe_error(error: BaseException) -> str:
    """Describes an error in one line, in the words of the command line.

    Example:
        >>> describe_error(FileNotFoundError(2, "No such file or directory", "a.txt"))
        'a.txt: No such file or directory'
    """
    if isinstance(error, MemoryError):
        return f"There is not enough memory. {one_line(error)}".rstrip()
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return with_flags(one_line(error))


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Prints a warning in one line without its source location.

    It replaces `warnings.showwarning` and has its arguments.
    """
    text = with_flags(one_line(message))
    print(f"{PROGRAM}: {text}", file=file or sys.stderr)
