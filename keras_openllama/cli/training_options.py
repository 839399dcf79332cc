"""What `pretrain` and `finetune` share: devices, hosts, profile, and exit codes."""

import contextlib
import os
import sys
import threading
import traceback

from keras_openllama.config import MESH_AXES
from keras_openllama.runs.device_settings import mesh_of


def add_run_options(parser):
    """Adds `--mesh`, `--accept-changes`, `--profile` and those of hosts."""
    parser.add_argument(
        "--mesh",
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


def parse_mesh(parser, text):
    """The mesh of `--mesh`, with all axes; `None` without it."""
    try:
        return text and {**dict.fromkeys(MESH_AXES, 1), **mesh_of(text)}
    except ValueError as error:
        parser.error(str(error))


def parse_profile(parser, text):
    """First and last step from such as `10:15`."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        parser.error(f"--profile takes such as 10:15. Received: {text!r}")
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
def checking_arguments():
    """Turns errors of opening a run into `WrongArgument`."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError:  # Which is a RuntimeError, too.
        raise
    except (RuntimeError, ValueError) as error:
        raise WrongArgument(str(error)) from error


def exit_code(command, options, function):
    """Calls a function that trains, and returns the command's exit code.

    Args:
        command: string, for messages.
        options: the parsed arguments.
        function: without arguments; returns the signal that stopped it, or `None`.
    """
    from keras_openllama.runs import interruption

    try:
        stopped = function()
    except Exception as error:
        return _fail(command, error, options.host_timeout)
    if not stopped:
        return 0
    tell(f"Stopped by {stopped}; all is saved. Run the same command to resume.")
    return interruption.STOPPED


def _fail(command, error, host_timeout):
    """Says what has ended a run; returns the exit code."""
    import jax

    from keras_openllama.runs import interruption
    from keras_openllama.runs.checkpoint_manager import CheckpointError

    codes = {
        WrongArgument: 2,
        CheckpointError: interruption.NOT_WRITTEN,
        OSError: interruption.NOT_WRITTEN,
        interruption.Diverged: interruption.DIVERGED,
        interruption.DataNotRead: 1,
    }
    code = next((c for kind, c in codes.items() if isinstance(error, kind)), None)
    if code is None:  # Unforeseen: out of memory, another host gone, …
        traceback.print_exception(error)
        code = 1
    print(f"{command}: {error}", file=sys.stderr, flush=True)
    if code != 2 and error.__context__ is not error.__cause__:
        print(f"{command}: before that: {error.__context__}", file=sys.stderr)
    if jax.process_count() > 1:
        # If it is this host's trouble alone, JAX would wait for the others to end, and
        # they for this one.
        timer = threading.Timer(host_timeout, os._exit, [code])
        timer.daemon = True
        timer.start()
    return code


def tell(text):
    """Prints on the first host."""
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)
