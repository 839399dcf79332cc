"""Parser, exit codes and one-line errors, which all commands share.

A command is a module with `main(arguments=None, prog="keras-openllama NAME")`, which
returns the exit code. At import it loads nothing slow, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from keras_openllama.cli.optional_imports import hide_from_keras
from keras_openllama.cli.process import (
    PROGRAM,
    one_line,
    owns_process,
    print_unencodable_as_question_marks,
    use_large_pages,
)

_TRACEBACK = "--traceback"


class CommandParser(argparse.ArgumentParser):
    """A parser that does not reflow its texts, and accepts `--traceback`.

    The description and the epilog may contain `%(prog)s`, the command as the user typed
    it. A literal percent sign is written twice.

    Args:
        prog: The command as the user typed it.
        **options: Arguments of `argparse.ArgumentParser`.

    Example:
        >>> CommandParser("keras-openllama plot").parse_args(["--traceback"])
        Namespace(traceback=True)
    """

    def __init__(self, prog: str, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=prog, **options)
        self.add_argument(
            _TRACEBACK,
            action="store_true",
            default=False,
            help="print a traceback if the command fails, for bug reports",
        )


def add_renamed_argument(
    group: argparse._ActionsContainer, old: str, new: str, **options: Any
) -> argparse.Action:
    """Adds a flag, and its old name as an alias that `--help` does not list.

    The alias prints a warning on stderr, once per command line.

    Args:
        group: The parser, or one of its argument groups.
        old: The old name, such as `"--alone"`.
        new: The new name, such as `"--no-alternatives"`. The value is stored under
            this name, unless `dest` is given.
        **options: Further arguments of `add_argument`, the same for both names.

    Returns:
        The action of the new name.

    Example:
        >>> parser = CommandParser("prog")
        >>> _ = add_renamed_argument(parser, "--beside", "--compare-with", nargs="+")
        >>> parser.parse_args(["--compare-with", "LLaMA 7B"]).compare_with
        ['LLaMA 7B']
    """
    action = group.add_argument(new, **options)

    class OldName(type(action)):
        warned = False

        def __call__(self, parser, namespace, values, option_string=None):
            if not self.warned:
                print(
                    f"{parser.prog}: warning: {old} was renamed to {new}, and a later "
                    "version will not accept the old name.",
                    file=sys.stderr,
                )
                self.warned = True
            super().__call__(parser, namespace, values, option_string)

    alias = {"dest": action.dest, "action": OldName, "help": argparse.SUPPRESS}
    group.add_argument(old, **options | alias)
    return action


class CommandMain(Protocol):
    """The `main` of a command, as `command` decorates it."""

    def __call__(self, arguments: Sequence[str] | None = None, prog: str = ...) -> int:
        """Runs the command with arguments, by default those of the process."""


def command(
    name: str, extra: str | None = None, large_pages: bool = False
) -> Callable[[Callable[[list[str], str], int | None]], CommandMain]:
    """Decorates the `main` of a command: errors become exit codes.

    The decorated function takes the arguments and `prog`, and returns the exit code or
    `None`. An error that the user can correct (`ValueError`, `OSError`, `ImportError`)
    becomes one line on stderr and exit code 2. Ctrl-C gives exit code 130. A closed
    pipe (`| head`) is not an error.

    Args:
        name: The command after `keras-openllama`.
        extra: The extra of the package with the dependencies of the command.
        large_pages: Whether to restart the process with large memory pages.

    Returns:
        A decorator. The function that it returns takes `arguments=None`, by default
        those of the process, and `prog="keras-openllama NAME"`.

    Example:
        >>> @command("hello")
        ... def main(arguments, prog):
        ...     print(f"{prog} {arguments}")
        >>> main(["world"])
        keras-openllama hello ['world']
        0
    """

    def decorate(run_command):
        @functools.wraps(run_command)
        def main(arguments=None, prog=f"{PROGRAM} {name}"):
            print_unencodable_as_question_marks()
            arguments = sys.argv[1:] if arguments is None else list(arguments)
            if owns_process(arguments):
                hide_from_keras()
                if large_pages:
                    use_large_pages()
            try:
                return run_command(arguments, prog) or 0
            except BrokenPipeError:
                # Otherwise Python reports the closed pipe again when it flushes stdout
                # at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0
            except KeyboardInterrupt:
                print(file=sys.stderr)
                return 130
            except (ValueError, OSError, ImportError) as error:
                if _TRACEBACK in arguments:
                    raise
                print(f"{prog}: error: {_message(error, extra)}", file=sys.stderr)
                return 2

        return main

    return decorate


def _message(error, extra):
    """The error in one line; for a missing package, how to install it."""
    missing = getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and str(error).startswith("No module"):
        wanted = f"{PROGRAM}[{extra}]" if extra else PROGRAM
        return f"{missing} is not installed. Install it with: pip install '{wanted}'"
    return one_line(error)
