"""The command line: `keras-openllama`, or `python -m keras_openllama`.

Keras and its backend take seconds to import, so nothing here imports them before a
command needs them: `--help` and `presets` answer at once, and `--backend` can still
choose.
"""

import argparse
import os
import sys

from keras_openllama import __version__
from keras_openllama.cli import convert, generate, lm_eval, presets
from keras_openllama.cli.process import PROGRAM, one_line

DESCRIPTION = """\
OpenLLaMA in Keras 3: let a model write, convert or evaluate it, or see which there are.
"""

EXAMPLES = f"""\
examples:
  {PROGRAM} generate "Once upon a time"
  {PROGRAM} generate "Q: What is the largest animal?" --preset open_llama_3b_v2
  {PROGRAM} convert my_finetuned_model my_model_hf --to transformers
  {PROGRAM} lm-eval --model keras_openllama --model_args preset=nano --tasks piqa
  {PROGRAM} presets

`{PROGRAM} COMMAND --help` explains a command.
"""


def main(arguments=None):
    """Runs the command line.

    Args:
        arguments: list of strings, the words after the program's name; those of the
            process when left out.

    Returns:
        int, the exit code: 0 when all went well, 2 for an error that the user can
        put right, which is then one line on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. Python would complain about the
        # same pipe once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if options.traceback:
            raise
        print(f"{PROGRAM}: error: {one_line(error)}", file=sys.stderr)
        return 2


def _parser():
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--traceback",
        action="store_true",
        help="show where an error comes from, for a bug report",
    )
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=DESCRIPTION, epilog=EXAMPLES, **raw
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"{PROGRAM} {__version__}",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (generate, convert, lm_eval, presets):
        command.add(commands, parents=[common], **raw)
    return parser


if __name__ == "__main__":
    sys.exit(main())
