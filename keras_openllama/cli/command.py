"""Parser, exit codes and one-line errors, which all commands share.

A command is a module with `main(arguments=None, prog="keras-openllama NAME")`, which
returns the exit code. At import it loads nothing slow, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from keras_openllama.cli.messages import (
    describe_error,
    forget_flag_names,
    one_line,
    show_warning,
    use_flag_names,
    with_flags,
)
from keras_openllama.cli.process import (
    PROGRAM,
    owns_process,
    print_unencodable_as_question_marks,
    tolerate_closed_stdout,
    use_large_pages,
)

_TRACEBACK = "--traceback"


class CommandParser(argparse.ArgumentParser):
    """A parser that does not reflow its texts, and accepts `--traceback`.

    The description and the epilog may contain `%(prog)s`, the command as the user typed
    it. A literal percent sign is written twice. Errors are one line, which suggests the
    nearest flag or value, and one that points to `--help`.

    Args:
        prog: The command as the user typed it.
        argument_names: Flags by argument of the functions that the command calls, for
            their error messages, where the names differ: `{"target": "DEST"}`.
        **options: Arguments of `argparse.ArgumentParser`.

    Example:
        >>> CommandParser("keras-openllama plot").parse_args(["--traceback"])
        Namespace(traceback=True)
    """

    def __init__(
        self, prog: str, argument_names: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=prog, **options)
        self._argument_names = argument_names
        self.add_argument(
            _TRACEBACK,
            action="store_true",
            default=False,
            help="print a traceback if the command fails, for bug reports",
        )

    def parse_args(
        self,
        args: Sequence[str] | None = None,
        namespace: argparse.Namespace | None = None,
    ) -> argparse.Namespace:
        """Parses arguments; later messages of the command name its flags."""
        use_flag_names(self, self._argument_names)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Prints an error in two lines, without the usage, and exits with code 2."""
        message = _explain(self, one_line(message))
        self.exit(
            2, f"usage: see '{self.prog} --help'\n{self.prog}: error: {message}\n"
        )


def _explain(parser, message):
    """The message of an argparse error with the nearest flag or value."""
    if match := re.fullmatch(r"unrecognized arguments: ((\S+).*)", message):
        return f"{message}.{_unknown_argument_hint(parser, match[2])}"
    choices = r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)"
    if match := re.fullmatch(choices, message):
        known = re.findall(r"[\w.+-]+", match[3])
        hint = _did_you_mean(match[2], known)
        return f"{match[1]} must be one of {', '.join(known)}.{hint} Received: " + (
            repr(match[2])
        )
    message = re.sub(r"^argument (\S+): must", r"\1 must", message)
    return with_flags(message.removeprefix("argument "))


def _unknown_argument_hint(parser, word):
    name = word.partition("=")[0].lstrip("-")
    actions = [a for a in parser._actions if a.help != argparse.SUPPRESS]
    positional = {a.dest: a.metavar for a in actions if not a.option_strings}
    if not word.startswith("-"):
        return " Quote a text with spaces." if positional else ""
    if name in positional:
        return f" {positional[name]} is written without a flag."
    return _did_you_mean(f"--{name}", [f for a in actions for f in a.option_strings])


def _did_you_mean(word, known):
    nearest = difflib.get_close_matches(word.lower(), known, n=1)
    return f" Did you mean {nearest[0]}?" if nearest else ""


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
    becomes one line on stderr and exit code 2, as does a lack of memory. Ctrl-C gives
    exit code 130. A closed pipe (`| head`) is not an error. Warnings are one line.

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
            forget_flag_names()
            arguments = sys.argv[1:] if arguments is None else list(arguments)
            if large_pages and owns_process(arguments):
                use_large_pages()
            try:
                with tolerate_closed_stdout(), warnings.catch_warnings():
                    warnings.showwarning = show_warning
                    return run_command(arguments, prog) or 0
                return 0
            except KeyboardInterrupt:
                print(file=sys.stderr)
                return 130
            except (ValueError, OSError, ImportError, MemoryError) as error:
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
    return describe_error(error)
