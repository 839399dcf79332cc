"""What `pretrain` and `finetune` share: devices, hosts, profile, and exit codes."""

import argparse
import contextlib
import os
import sys
import threading
import traceback

from keras_openllama.cli.process import START, one_line
from keras_openllama.config import MESH_AXES
from keras_openllama.runs.device_settings import parse_mesh


def add_run_options(parser):
    """Adds `--mesh`, `--accept-changes`, `--profile` and those of hosts."""
    parser.add_argument(
        "--mesh",
        type=_mesh,
        default=None,
        metavar="AXIS=N,…",
        help="such as data=4,fsdp=64 (JAX; axes: data, fsdp, model; default: the "
        "recipe's, or all devices along fsdp)",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        default=False,
        help="resume a run with other settings than it began with",
    )
    parser.add_argument(
        "--profile",
        type=_profile,
        default=None,
        metavar="A:B",
        help="record steps A to B with JAX's profiler, below the run's directory",
    )
    hosts = parser.add_argument_group(
        "hosts",
        "JAX finds those of a TPU pod, of srun, of mpirun, and with jax[k8s] of a "
        "Kubernetes job by itself; elsewhere give all three, on each host",
    )
    hosts.add_argument("--coordinator", default=None, metavar="HOST:PORT")
    hosts.add_argument("--num-processes", type=int, default=None, metavar="N")
    hosts.add_argument("--process-id", type=int, default=None, metavar="I")
    hosts.add_argument(
        "--host-timeout",
        type=int,
        default=60,
        metavar="SECONDS",
        help="a host that is silent for so long ends the others (default: %(default)s)",
    )


def _mesh(text):
    """The mesh of `--mesh`, with all axes."""
    try:
        return {**dict.fromkeys(MESH_AXES, 1), **parse_mesh(text)}
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _profile(text):
    """First and last step from such as `10:15`."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"takes such as 10:15. Received: {text!r}")
    return int(first), int(last)


def join_hosts(parser, options):
    """Joins the hosts of a run before anything touches a device."""
    import jax

    named = options.coordinator, options.num_processes, options.process_id
    try:
        jax.distributed.initialize(
            *named, heartbeat_timeout_seconds=options.host_timeout
        )
    except (RuntimeError, ValueError) as error:
        # What JAX says where it finds no other hosts, or was used before.
        alone = "coordinator_address should be defined", "must be called before any JAX"
        if any(value is not None for value in named) or not any(
            text in str(error) for text in alone
        ):
            parser.error(
                "The hosts could not be joined. --coordinator, --num-processes and "
                f"--process-id go together. {error}"
            )
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        parser.error(
            f"JAX sees {jax.process_count()} processes, and has not joined them. Give "
            "--coordinator, --num-processes and --process-id."
        )


class WrongArgument(Exception):
    """An argument does not fit the devices, the data, or the run in the directory."""


@contextlib.contextmanager
def open_trainer(options, open_run):
    """Opens a run by the flags of its command, and says in the end where its curve is.

    Args:
        options: the parsed arguments; `output` is the run's directory.
        open_run: function of `trainer.RunOptions` that returns a context manager, such
            as `pretraining.open_run`.

    Yields:
        `trainer.Trainer`.

    Raises:
        WrongArgument: for a `RuntimeError` or `ValueError` of `open_run`.
    """
    from keras_openllama.runs.trainer import PICTURE, RunOptions

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
    tell(f"The curve of the loss is in {os.path.join(options.output, PICTURE)}.")


@contextlib.contextmanager
def _checking_arguments():
    """Turns errors of opening a run into `WrongArgument`."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError:  # Which is a RuntimeError, too.
        raise
    except (RuntimeError, ValueError) as error:
        raise WrongArgument(str(error)) from error


def exit_code(prog, options, function):
    """Calls a function that trains, and returns the command's exit code.

    Args:
        prog: string, the command as the user typed it.
        options: the parsed arguments.
        function: without arguments; returns the signal that stopped it, or `None`.
    """
    from keras_openllama.runs import interruption

    try:
        stopped = function()
    except Exception as error:
        return _fail(prog, error, options)
    if not stopped:
        return 0
    tell(f"Stopped by {stopped}; all is saved. Run the same command to resume.")
    return interruption.STOPPED


def _fail(prog, error, options):
    """Says what has ended a run; returns the exit code."""
    import jax

    from keras_openllama.runs import interruption
    from keras_openllama.runs.checkpoint_manager import CheckpointError

    codes = {
        WrongArgument: 2,
        CheckpointError: interruption.WRITE_FAILED,
        OSError: interruption.WRITE_FAILED,
        interruption.DivergedError: interruption.DIVERGED,
        interruption.DataReadError: 1,
    }
    code = next((c for kind, c in codes.items() if isinstance(error, kind)), None)
    # Unforeseen: out of memory, another host gone, …
    if code is None or options.traceback:
        traceback.print_exception(error)
    code = code or 1
    print(f"{prog}: error: {one_line(error)}", file=sys.stderr, flush=True)
    if code != 2 and error.__context__ is not error.__cause__:
        print(f"{prog}: before that: {one_line(error.__context__)}", file=sys.stderr)
    if jax.process_count() > 1:
        # If it is this host's trouble alone, JAX would wait for the others to end, and
        # they for this one.
        timer = threading.Timer(options.host_timeout, os._exit, [code])
        timer.daemon = True
        timer.start()
    return code


def tell(text):
    """Prints on the first host."""
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)
