"""What all commands share: their parser, their exit codes, and errors in one line.

A command is a module with `main(arguments=None, prog="keras-openllama NAME")`, which
returns the exit code. At its top it imports nothing that takes long, so that `--help`
answers at once.
"""

import argparse
import functools
import os
import sys
from typing import Any

from keras_openllama.cli.optional_imports import hide_from_keras
from keras_openllama.cli.process import (
    PROGRAM,
    one_line,
    owns_process,
    use_large_pages,
)

_TRACEBACK = "--traceback"


class CommandParser(argparse.ArgumentParser):
    """A parser that keeps the lines of its texts, and takes `--traceback`.

    In the description and the epilog `%(prog)s` is the command as the user typed it,
    and so a percent sign is written twice.
    """

    def __init__(self, prog, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=prog, **options)
        self.add_argument(
            _TRACEBACK,
            action="store_true",
            default=False,
            help="show where an error comes from, for a bug report",
        )


def add_renamed_argument(
    group: argparse._ActionsContainer, old: str, new: str, **options: Any
) -> argparse.Action:
    """Adds a flag, and its old name as an alias that `--help` does not list.

    The alias prints a warning on stderr, once per command line.

    Args:
        group: the parser, or one of its argument groups.
        old: the old name, such as `"--alone"`.
        new: the new name, such as `"--no-alternatives"`. The value is stored under
            this name, unless `dest` is given.
        **options: further arguments of `add_argument`, the same for both names.

    Returns:
        The action of the new name.

    Example:

    >>> parser = CommandParser("prog")
    >>> action = add_renamed_argument(parser, "--beside", "--compare-with", nargs="+")
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


def command(name, extra=None, large_pages=False):
    """Decorates the `main` of a command, so that every command ends the same way.

    The function takes a list of arguments and `prog`, and returns the exit code or
    `None`. An error that the user can correct (`ValueError`, `OSError`, `ImportError`)
    becomes one line on stderr and exit code 2; Ctrl-C is 130; a reader that has closed
    the pipe (`| head`) is no error.

    Args:
        name: string, the command after `keras-openllama`.
        extra: string, the extra of the package that brings what the command imports.
        large_pages: bool, whether the process is restarted with large memory pages.

    Returns:
        A decorator. The function that it returns takes `arguments=None`, those of the
        process, and `prog="keras-openllama NAME"`.
    """

    def decorate(run):
        @functools.wraps(run)
        def main(arguments=None, prog=f"{PROGRAM} {name}"):
            arguments = sys.argv[1:] if arguments is None else list(arguments)
            if owns_process(arguments):
                hide_from_keras()
                if large_pages:
                    use_large_pages()
            try:
                return run(arguments, prog) or 0
            except BrokenPipeError:
                # Python would complain about the same pipe again when it flushes at
                # exit.
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
    """The error in one line; for a package that is not installed, what installs it."""
    missing = getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and str(error).startswith("No module"):
        wanted = f"{PROGRAM}[{extra}]" if extra else PROGRAM
        return f"{missing} is not installed: pip install '{wanted}' brings it."
    return one_line(error)
