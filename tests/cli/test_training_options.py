"""Flags and exit codes of `pretrain` and `finetune`."""

import contextlib
import types

import jax
import pytest

from keras_openllama.cli.command import CommandParser
from keras_openllama.cli.training_options import (
    InvalidArgumentError,
    add_run_options,
    initialize_distributed,
    open_trainer,
    run_training,
)
from keras_openllama.runs import interruption
from keras_openllama.runs.checkpoint_manager import CheckpointError

pytestmark = pytest.mark.backend_free

PROG = "keras-openllama pretrain"


def parsed(*arguments):
    parser = CommandParser(PROG)
    add_run_options(parser, "one device")
    options = parser.parse_args(arguments)
    options.output = "runs/mine"
    return options


# ----- Flags


def test_mesh_flag_has_all_axes():
    assert parsed().mesh is None
    assert parsed("--mesh", "fsdp=4").mesh == {"data": 1, "fsdp": 4, "model": 1}


def test_profile_flag_is_the_first_and_the_last_step():
    assert parsed().profile is None
    assert parsed("--profile", "10:15").profile == (10, 15)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("--mesh", value) for value in ("rows=2", "fsdp=0", "fsdp", "")],
        *[("--profile", value) for value in ("3:2", "0:1", "3", "a:b", "")],
    ],
)
def test_run_options_reject_invalid_values_by_flag(flag, value, capsys):
    with pytest.raises(SystemExit) as exit:
        parsed(flag, value)
    assert exit.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"{PROG}: error: {flag} must be ")
    assert error.endswith(f"Received: {value!r}")


# ----- Several hosts


def connection_error(capsys, monkeypatch, *arguments):
    """The message of the command if JAX cannot connect the hosts."""

    def refused(*flags, heartbeat_timeout_seconds):
        raise RuntimeError("deadline exceeded")

    monkeypatch.setattr(jax.distributed, "initialize", refused)
    with pytest.raises(SystemExit) as exit:
        initialize_distributed(CommandParser(PROG), parsed(*arguments))
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_incomplete_host_flags_are_named(capsys, monkeypatch):
    error = connection_error(capsys, monkeypatch, "--coordinator", "first:1234")
    assert error.endswith("together. Missing: --num-processes, --process-id.")


def test_complete_host_flags_are_not_called_incomplete(capsys, monkeypatch):
    flags = ("--coordinator", "first:1234", "--num-processes", "4", "--process-id", "2")
    error = connection_error(capsys, monkeypatch, *flags)
    assert "Process 2 of 4 could not be connected to --coordinator first:1234" in error
    assert "given together" not in error


def test_hosts_that_jax_detects_need_no_flags(capsys, monkeypatch):
    error = connection_error(capsys, monkeypatch)
    assert "started on every host. deadline exceeded" in error
    assert "--coordinator" not in error


# ----- Opening a run


@contextlib.contextmanager
def opened(run_options):
    yield types.SimpleNamespace(options=run_options)


def test_open_trainer_passes_the_flags(capsys):
    options = parsed("--mesh", "data=2", "--profile", "1:2", "--accept-changes")
    with open_trainer(options, opened) as trainer:
        found = trainer.options
        assert found.output == "runs/mine" and found.mesh == options.mesh
        assert found.profile == (1, 2) and found.accept_changes
        assert capsys.readouterr().out == ""
    assert "runs/mine/loss.png" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_open_trainer_raises_invalid_argument_if_opening_fails(kind):
    def refused(run_options):
        raise kind("no such data")

    with pytest.raises(InvalidArgumentError, match="no such data"):
        with open_trainer(parsed(), refused):
            pass


def test_open_trainer_does_not_change_errors_of_the_run(capsys):
    with pytest.raises(ValueError, match="mine"):
        with open_trainer(parsed(), opened):
            raise ValueError("mine")
    assert "loss.png" not in capsys.readouterr().out


# ----- Exit codes


def exit_code_of(error, *arguments):
    def run():
        raise error

    return run_training(PROG, parsed(*arguments), run)


def test_run_training_returns_the_code_of_a_complete_and_a_stopped_run(capsys):
    assert run_training(PROG, parsed(), lambda: None) == 0
    assert capsys.readouterr().out == ""
    assert run_training(PROG, parsed(), lambda: "SIGTERM") == interruption.STOPPED
    assert "Stopped by SIGTERM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgumentError("no mesh"), 2),
        (interruption.DataReadError("no data"), 1),
        (interruption.DivergedError("no loss"), 70),
        (CheckpointError("no room"), 74),
        (OSError("no disk"), 74),
    ],
)
def test_run_training_prints_known_errors_in_one_line(error, code, capsys):
    assert exit_code_of(error) == code
    assert capsys.readouterr().err == f"{PROG}: error: {error}\n"


def test_run_training_joins_the_lines_of_an_error(capsys):
    exit_code_of(InvalidArgumentError("Prepare it:\n    prepare-data"))
    assert capsys.readouterr().err == f"{PROG}: error: Prepare it: prepare-data\n"


def test_run_training_prints_a_traceback_of_unexpected_errors(capsys):
    assert exit_code_of(ZeroDivisionError("by zero")) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and error.endswith(f"{PROG}: error: by zero\n")


def test_run_training_prints_a_traceback_on_request(capsys):
    assert exit_code_of(InvalidArgumentError("no mesh"), "--traceback") == 2
    assert "Traceback" in capsys.readouterr().err


def test_run_training_prints_the_earlier_error_too(capsys):
    def run():
        try:
            raise interruption.DivergedError("no loss")
        finally:
            raise OSError("no disk")

    assert run_training(PROG, parsed(), run) == 74
    assert capsys.readouterr().err.splitlines() == [
        f"{PROG}: error: no disk",
        f"{PROG}: earlier error: no loss",
    ]
