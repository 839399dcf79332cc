"""Pretrain a preset by its recipe, on whatever devices JAX has.

    %(prog)s --preset nano
        trains the small model in minutes, on text that every machine has
    %(prog)s --preset 3b_v3 --data DIR --output DIR
        the published recipe; the same command on each host of a pod
    %(prog)s --preset 7b_v2 --plan --topology v4:4x8x8
        compiles the step for TPUs that need not be there, and tells its memory and time

The same command again goes on where the run stopped, to the same bits on the same
devices. DIR of --data is what `prepare-data` wrote. The run's directory holds
metrics.jsonl, validation.jsonl, samples.txt, loss.png, TensorBoard's events
(`tensorboard --logdir DIR`) and checkpoints, which `keras-openllama generate --preset
DIR` and `keras-openllama convert DIR …` take as they are.

Exit codes: 0 the run is complete; 75 a signal came (SIGTERM; on one host Ctrl-C, too),
all is saved and the same command goes on; 70 too many steps in a row had a loss or
gradient that is not finite; 74 a checkpoint or the log could not be written; 2 an
argument is wrong, or does not fit the run that is there; 1 anything else, such as data
that cannot be read.
"""

import time

BEGAN = time.monotonic()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import logging  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from keras_openllama.cli.command import CommandParser, command  # noqa: E402
from keras_openllama.runs import recipe as recipes  # noqa: E402
from keras_openllama.utils.validation import AXES, mesh_of  # noqa: E402

# Flags with a name of their own; every other setting goes by --set.
_OWN = ("steps", "batch_size", "save_every", "seed", "precision", "mixture")


def parse_arguments(arguments, prog):
    parser = CommandParser(
        prog,
        description=__doc__,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--preset", required=True, help="preset to train, such as 3b_v3 or nano"
    )
    parser.add_argument(
        "--data",
        default=None,
        metavar="DIR",
        help="prepared data; nano has text of its own",
    )
    parser.add_argument(
        "--output",
        default=None,
        metavar="DIR",
        help="directory of the run (default: runs/PRESET)",
    )
    recipe = parser.add_argument_group(
        "recipe", "in place of the preset's; shown with --show"
    )
    recipe.add_argument("--steps", type=int, metavar="N", help="steps of the run")
    recipe.add_argument(
        "--batch-size", type=int, metavar="N", help="sequences of a step"
    )
    recipe.add_argument(
        "--save-every", type=int, metavar="N", help="steps between checkpoints"
    )
    recipe.add_argument("--seed", type=int, metavar="N", help="of weights and data")
    recipe.add_argument("--precision", choices=("mixed_bfloat16", "float32"))
    recipe.add_argument("--mixture", metavar="v1|v2|FILE", help="weights of sources")
    recipe.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any setting, such as --set learning_rate=1e-4",
    )
    recipe.add_argument(
        "--config",
        default=None,
        metavar="FILE",
        help="YAML file of settings; the command line goes before it",
    )
    recipe.add_argument(
        "--show",
        action="store_true",
        default=False,
        help="print the recipe and end; with --mesh, as so many chips run it",
    )
    parser.add_argument(
        "--mesh",
        default=None,
        metavar="AXIS=N,…",
        help="such as data=4,fsdp=64 (axes: data, fsdp, model; default: the recipe's)",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        default=False,
        help="go on with a run by other settings than it began with",
    )
    parser.add_argument(
        "--profile",
        default=None,
        metavar="A:B",
        help="record steps A to B with JAX's profiler, below the run's directory",
    )
    plan = parser.add_argument_group(
        "plan", "compile and price only, with no TPU, no data and next to no memory"
    )
    plan.add_argument("--plan", action="store_true", default=False)
    plan.add_argument(
        "--topology",
        default="v4:4x8x8",
        metavar="KIND:AxBxC",
        help="chips along each axis of a slice: v4:2x2x1 to v4:8x16x16, v5p:4x4x4, "
        "v5e:8x8, v6e:16x16 (default: %(default)s, a v4-512)",
    )
    plan.add_argument(
        "--alone",
        action="store_true",
        default=False,
        help="leave out neighbouring choices, each of which takes a minute to compile",
    )
    plan.add_argument(
        "--json", default=None, metavar="FILE", help="write the plan there, too"
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
    return parser, parser.parse_args(arguments)


def overrides_of(parser, options):
    """Settings that the command line gives, by name."""
    import yaml

    values = {name: getattr(options, name) for name in _OWN if hasattr(options, name)}
    for text in options.set:
        name, sign, value = text.partition("=")
        if not sign:
            parser.error(f"--set takes NAME=VALUE. Received: {text!r}")
        values[name.replace("-", "_")] = yaml.safe_load(value)
    return values


def profile_of(parser, text):
    """First and last step from such as `10:15`."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        parser.error(f"--profile takes such as 10:15. Received: {text!r}")
    return int(first), int(last)


def join_hosts(options):
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
            raise RuntimeError(
                "The hosts could not be joined. --coordinator, --num-processes and "
                f"--process-id go together. {error}"
            ) from error
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise RuntimeError(
            f"JAX sees {jax.process_count()} processes, and has not joined them. Give "
            "--coordinator, --num-processes and --process-id."
        )


def data_of(options, resolved, output):
    """The prepared data of a run."""
    from keras_openllama.data.prepared_data import PreparedData

    if options.data is not None:
        try:
            return PreparedData(options.data)
        except OSError as error:
            raise ValueError(f"--data: {error}") from error
    if resolved.preset != "open_llama_nano":
        raise ValueError(
            f"{resolved.preset} needs data. Prepare it first, and give its directory "
            "with --data:\n    keras-openllama prepare-data --mixture "
            f"{resolved.recipe.mixture} --tokenizer {resolved.preset} --output DIR "
            "--source NAME=PATHS …"
        )
    import jax
    from jax.experimental import multihost_utils

    from keras_openllama.data.default_text import prepare_default_text

    place = os.path.join(output, "data")
    if jax.process_index() == 0:
        prepare_default_text(place, resolved.preset)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("text")
    return PreparedData(place)


@command("pretrain", extra="train", large_pages=True)
def main(arguments, prog):
    parser, options = parse_arguments(arguments, prog)
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        mesh = options.mesh and {**dict.fromkeys(AXES, 1), **mesh_of(options.mesh)}
    except ValueError as error:
        parser.error(str(error))
    profile = profile_of(parser, options.profile)
    try:
        resolved = recipes.resolve(
            options.preset, file=options.config, overrides=overrides_of(parser, options)
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.show:
        there = resolved.on(math.prod(mesh.values()), mesh) if mesh else resolved
        print(there.table())
        return 0
    if options.plan:
        return plan_run(parser, options, resolved, mesh)
    output = options.output or f"runs/{resolved.preset.removeprefix('open_llama_')}"
    try:
        join_hosts(options)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    try:
        return run(options, resolved, output, mesh, profile)
    except Exception as error:
        return _fail(error, options)


def plan_run(parser, options, resolved, mesh):
    """Prints what the run would cost, and returns the exit code."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # A TPU that is there is left alone.
    import json

    from keras_openllama.planning import plan as planning

    if options.json and not Path(options.json).resolve().parent.is_dir():
        parser.error(f"--json: there is no directory for {options.json}")
    try:
        found = planning.plan(resolved, options.topology, mesh, alone=options.alone)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    print(planning.table(found))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["fits"] else 2


def run(options, resolved, output, mesh, profile):
    """Trains, and returns the exit code."""
    import jax

    from keras_openllama.runs import interruption
    from keras_openllama.runs.pretraining import Request, begun

    with contextlib.ExitStack() as stack:
        try:
            data = data_of(options, resolved, output)
            if jax.process_index() == 0:
                there = resolved.on(jax.device_count(), mesh)
                print(there.table(), flush=True)
            request = Request(
                resolved,
                data,
                output,
                mesh=mesh,
                accept_changes=options.accept_changes,
                profile=profile,
                began=BEGAN,
            )
            trained = stack.enter_context(begun(request))
        except jax.errors.JaxRuntimeError:  # Which is a RuntimeError, too.
            raise
        except (RuntimeError, ValueError) as error:
            raise WrongArgument(str(error)) from error
        stopped = trained.train()
    if jax.process_index() == 0:
        _tell(output, stopped)
    return interruption.STOPPED if stopped else 0


class WrongArgument(Exception):
    """What was asked for does not fit, or fits not what is there."""


def _fail(error, options):
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
    if code is None:  # Nothing that was foreseen: out of memory, another host gone, …
        traceback.print_exception(error)
        code = 1
    print(f"pretrain: {error}", file=sys.stderr, flush=True)
    if code != 2 and error.__context__ is not error.__cause__:
        print(f"pretrain: before that: {error.__context__}", file=sys.stderr)
    if jax.process_count() > 1:
        # If it is this host's trouble alone, JAX would wait for the others to end, and
        # they for this one.
        timer = threading.Timer(options.host_timeout, os._exit, [code])
        timer.daemon = True
        timer.start()
    return code


def _tell(output, stopped):
    print(f"The curve of the loss is in {os.path.join(output, 'loss.png')}.")
    if stopped:
        print(f"Stopped by {stopped}; all is saved. The same command goes on.")
        return
    print(
        "Generate from it, and export it:\n"
        f'    keras-openllama generate "The captain looked at" --preset {output}\n'
        f"    keras-openllama convert {output} {output}_hf --to transformers"
    )
