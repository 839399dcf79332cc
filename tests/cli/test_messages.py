"""Error messages and warnings in the words of the command line."""

import errno
import os
import subprocess
import sys
import warnings

import pytest

from keras_openllama.__main__ import COMMANDS, main
from keras_openllama.cli.command import CommandParser, add_renamed_argument, command

pytestmark = pytest.mark.backend_free

PROG = "keras-openllama hello"


def parser():
    parser = CommandParser(PROG, argument_names={"vocabulary_size": "--vocab-size"})
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--content")
    add_renamed_argument(parser, "--amount", "--content-size")
    return parser


def error_of(capsys, *arguments):
    """The error of parsing arguments, without the name of the command."""
    with pytest.raises(SystemExit) as exit:
        parser().parse_args(arguments)
    assert exit.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == f"usage: see '{PROG} --help'"
    return error.removeprefix(f"{PROG}: error: ")


def message_of(capsys, error):
    """What a command prints that raises an error."""

    @command("hello", extra="train")
    def fails(arguments, prog):
        parser().parse_args(arguments)
        raise error

    assert fails(["x"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line.rstrip().removeprefix(f"{PROG}: error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: SOURCE"),
        (
            ["x", "--contnt=1"],
            "unrecognized arguments: --contnt=1. Did you mean --cont",
        ),
        (["x", "-dtype", "1"], "arguments: -dtype 1. Did you mean --dtype?"),
        (["x", "--amont", "1"], "unrecognized arguments: --amont 1."),
        (["x", "y z"], "unrecognized arguments: y z. Quote a text with spaces."),
        (["x", "--source", "y"], "SOURCE is written without a flag."),
        (["x", "--dtype", "bfloat"], "Did you mean bfloat16? Received: 'bfloat'"),
        (
            ["x", "--dtype", "int8"],
            "--dtype must be one of float32, bfloat16. Received",
        ),
        (["x", "--content"], "--content: expected one argument"),
    ],
    ids=str,
)
def test_command_parser_explains_errors_in_two_lines(arguments, message, capsys):
    assert message in error_of(capsys, *arguments)


def test_command_parser_does_not_suggest_old_names(capsys):
    assert "--amount" not in error_of(capsys, "x", "--amont", "1").partition(".")[2]


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"lm-eval"}))
def test_every_command_explains_an_unknown_flag_without_its_usage(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--no-such-flag"])
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == f"usage: see 'keras-openllama {name} --help'"
    assert error.startswith(f"keras-openllama {name}: error: ")


@pytest.mark.parametrize(
    ("raised", "printed"),
    [
        (
            "`vocabulary_size` must be positive. Received: vocabulary_size=0",
            "--vocab-size must be positive. Received: --vocab-size 0",
        ),
        ("`source` has `dtype`. Received: source=1, dtype='a', other=2", None),
        ("`preprocessor.content` is unset", "--content is unset"),
        ("`content[3]` is empty", "--content is empty"),
        (
            "`unknown` stays. Received: unknown=1",
            "`unknown` stays. Received: unknown=1",
        ),
        ("pass `other` (--vocab-size)", "pass --vocab-size"),
        ("replace it with force=True (--content)", "replace it with --content"),
        ("a\n  b", "a b"),
    ],
)
def test_command_names_flags_instead_of_arguments(raised, printed, capsys):
    expected = printed or "SOURCE has --dtype. Received: SOURCE 1, --dtype 'a', other=2"
    assert message_of(capsys, ValueError(raised)) == expected


def test_command_describes_errors_of_the_system(capsys):
    error = OSError(errno.EACCES, os.strerror(errno.EACCES), "runs/mine")
    assert message_of(capsys, error) == "runs/mine: Permission denied"
    assert message_of(capsys, MemoryError("too much")) == (
        "There is not enough memory. too much"
    )


def test_command_prints_warnings_in_one_line_with_flags(capsys):
    @command("hello")
    def warns(arguments, prog):
        parser().parse_args(arguments)
        warnings.warn("`vocabulary_size` is\nlarge", stacklevel=1)

    assert warns(["x"]) == 0
    assert capsys.readouterr().err == "keras-openllama: --vocab-size is large\n"


@pytest.mark.parametrize("program", [["--help"], ["presets"], ["finetune", "--help"]])
def test_a_closed_pipe_ends_a_command_without_a_message(program):
    process = subprocess.Popen(
        [sys.executable, "-m", "keras_openllama", *program],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


INTERRUPTED_WHILE_IT_READS = """
import os, signal, sys
class Stdin:
    def read(self):
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
sys.stdin = Stdin()
from keras_openllama.__main__ import main
sys.exit(main(["generate", "-"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Needs POSIX signals.")
def test_interrupt_ends_a_command_without_a_traceback():
    process = [sys.executable, "-c", INTERRUPTED_WHILE_IT_READS]
    found = subprocess.run(process, capture_output=True, text=True)
    assert found.returncode == 130
    assert found.stderr == "\n"
