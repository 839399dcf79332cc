"""Flags and exit codes of `pretrain` and `finetune`: devices, hosts, profile."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from keras_openllama.cli import arguments as types
from keras_openllama.cli.messages import describe_error
from keras_openllama.cli.process import START, discard_stdout
from keras_openllama.config import MESH_AXES

if TYPE_CHECKING:
    from keras_openllama.runs.trainer import RunOptions, Trainer


def add_run_options(parser: argparse.ArgumentParser, default_mesh: str) -> None:
    """Adds `--mesh`, `--accept-changes`, `--profile` and the flags for several hosts.

    Args:
        parser: The parser of the command.
        default_mesh: Description of the mesh without `--mesh`, for `--help`.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_run_options(parser, "one device")
        >>> parser.parse_args(["--mesh", "fsdp=4"]).mesh
        {'data': 1, 'fsdp': 4, 'model': 1}
    """
    parser.add_argument(
        "--mesh",
        type=_mesh,
        default=None,
        metavar="AXIS=N,…",
        help="device mesh, such as data=4,fsdp=64. Axes: data (replicas), fsdp "
        "(sharded weights), model (tensor parallelism). JAX only (default: "
        f"{default_mesh})",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        default=False,
        help="resume a run with changed settings that affect the results, such as the "
        "learning rate. Settings that decide what a step reads or which variables "
        "there are, such as batch size, sequence length and seed, can never change; "
        "--save-every, micro-batches and the like can always change",
    )
    parser.add_argument(
        "--profile",
        type=_profile,
        default=None,
        metavar="A:B",
        help="profile steps A to B, such as 10:15, with JAX's profiler; the trace is "
        "written into the run's directory. JAX only",
    )
    hosts = parser.add_argument_group(
        "several hosts",
        "JAX detects the hosts of a TPU pod, of srun, of mpirun, and with jax[k8s] of\n"
        "a Kubernetes job. Elsewhere give the first three flags on each host",
    )
    hosts.add_argument(
        "--coordinator",
        default=None,
        metavar="HOST:PORT",
        help="address of the first process",
    )
    hosts.add_argument(
        "--num-processes",
        type=types.positive_int,
        default=None,
        metavar="N",
        help="number of processes of the run",
    )
    hosts.add_argument(
        "--process-id",
        type=types.non_negative_int,
        default=None,
        metavar="I",
        help="index of this process, from 0",
    )
    hosts.add_argument(
        "--host-timeout",
        type=types.positive_int,
        default=60,
        metavar="SECONDS",
        help="the run ends if a host does not respond for this long (default: "
        "%(default)s)",
    )


def _mesh(text):
    """Parses the value of `--mesh`; returns the sizes of all axes."""
    return {**dict.fromkeys(MESH_AXES, 1), **types.mesh(text)}


def _profile(text):
    """Parses the value of `--profile`, such as `10:15`."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise argparse.ArgumentTypeError(
            f"must be FIRST:LAST, such as 10:15. Received: {text!r}"
        )
    return int(first), int(last)


def initialize_distributed(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> None:
    """Connects the hosts of a run with `jax.distributed`, before JAX uses a device.

    Args:
        parser: Parser that reports an error and exits.
        options: The parsed arguments.
    """
    import jax

    flags = options.coordinator, options.num_processes, options.process_id
    try:
        jax.distributed.initialize(
            *flags, heartbeat_timeout_seconds=options.host_timeout
        )
    except (RuntimeError, ValueError) as error:
        # JAX's messages if it detects no other hosts, or was used before.
        single_host = (
            "coordinator_address should be defined",
            "must be called before any JAX",
        )
        if any(value is not None for value in flags) or not any(
            text in str(error) for text in single_host
        ):
            parser.error(_connection_error(flags, error))
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        parser.error(
            f"JAX detects {jax.process_count()} processes, but did not connect them. "
            "Give --coordinator, --num-processes and --process-id."
        )
    require_devices(options.mesh)


def require_devices(mesh: Mapping[str, int] | None) -> None:
    """Raises `ValueError` if a mesh has not as many devices as JAX."""
    import jax

    count = jax.device_count()
    if mesh is None or math.prod(mesh.values()) == count:
        return
    given = ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1)
    raise ValueError(
        f"--mesh: the product of the sizes must be {count}, the number of devices of "
        f"JAX. Remove --mesh to use all of them. Received: {given!r}"
    )


def _connection_error(flags, error):
    """Describes an error of `jax.distributed.initialize`, and what to do."""
    coordinator, num_processes, process_id = flags
    names = ("--coordinator", "--num-processes", "--process-id")
    missing = [name for name, value in zip(names, flags, strict=True) if value is None]
    if all(value is None for value in flags):
        return (
            "The hosts that JAX detects could not be connected. Check that the command "
            f"was started on every host. {error}"
        )
    if missing:
        return (
            "--coordinator, --num-processes and --process-id must be given together. "
            f"Missing: {', '.join(missing)}."
        )
    return (
        f"Process {process_id} of {num_processes} could not be connected to "
        f"--coordinator {coordinator}. Check the address, and that every process was "
        f"started. {error}"
    )


class InvalidArgumentError(Exception):
    """An argument does not fit the devices, the data, or the run in the directory."""


@contextlib.contextmanager
def open_trainer(
    options: argparse.Namespace,
    open_run: Callable[[RunOptions], AbstractContextManager[Trainer]],
) -> Iterator[Trainer]:
    """Opens a run by the flags of its command; prints the path of its plot at the end.

    Args:
        options: The parsed arguments; `output` is the run's directory.
        open_run: Function of `trainer.RunOptions` that returns a context manager, such
            as `pretraining.open_run`.

    Yields:
        The trainer.

    Raises:
        InvalidArgumentError: If `open_run` raises a `RuntimeError` or `ValueError`.
    """
    from keras_openllama.runs.trainer import LOSS_PLOT, RunOptions

    run_options = RunOptions(
        options.output,
        mesh=options.mesh,
        accept_changes=options.accept_changes,
        profile=options.profile,
        start_time=START,
    )
    with contextlib.ExitStack() as stack:
        with _checking_arguments():
            trainer = stack.enter_context(open_run(run_options))
        yield trainer
    print_on_process_0(f"Loss plot: {os.path.join(options.output, LOSS_PLOT)}")


@contextlib.contextmanager
def _checking_arguments():
    """Raises errors of opening a run as `InvalidArgumentError`."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError:  # It is a `RuntimeError`, too.
        raise
    except (RuntimeError, ValueError) as error:
        raise InvalidArgumentError(str(error)) from error


def run_training(
    prog: str, options: argparse.Namespace, train: Callable[[], str | None]
) -> int:
    """Calls a function that trains, and reports its errors.

    Args:
        prog: The command as the user typed it.
        options: The parsed arguments.
        train: Function without arguments. It returns the signal that stopped it, or
            `None`.

    Returns:
        The exit code of the command.
    """
    from keras_openllama.runs import interruption

    try:
        stopped = train()
    except Exception as error:
        return _report_error(prog, error, options)
    if not stopped:
        return 0
    print_on_process_0(
        f"Stopped by {stopped}. The run is saved: run the same command to resume."
    )
    return interruption.STOPPED


def _report_error(prog, error, options):
    """Prints the error that ended a run; returns the exit code."""
    import jax

    from keras_openllama.runs import interruption
    from keras_openllama.runs.checkpoint_manager import CheckpointError

    codes = {
        InvalidArgumentError: 2,
        CheckpointError: interruption.WRITE_FAILED,
        OSError: interruption.WRITE_FAILED,
        interruption.DivergedError: interruption.DIVERGED,
        interruption.DataReadError: 1,
    }
    code = next((c for kind, c in codes.items() if isinstance(error, kind)), None)
    if isinstance(error, BrokenPipeError):
        discard_stdout()
    # Unexpected: a lost host, …
    if (code is None and not _is_out_of_memory(error)) or options.traceback:
        traceback.print_exception(error)
    code = code or 1
    print(f"{prog}: error: {describe_error(error)}", file=sys.stderr, flush=True)
    if code != 2 and error.__context__ is not error.__cause__:
        earlier = describe_error(error.__context__)
        print(f"{prog}: earlier error: {earlier}", file=sys.stderr)
    if jax.process_count() > 1:
        # If only this host failed, JAX would wait for the other hosts to end, and they
        # for this one.
        timer = threading.Timer(options.host_timeout, os._exit, [code])
        timer.daemon = True
        timer.start()
    return code


def _is_out_of_memory(error):
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def print_on_process_0(text: str) -> None:
    """Prints a line on process 0 of a run only."""
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)
