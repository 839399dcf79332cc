"""Pretrain a preset by its recipe, on whatever devices JAX has.

    %(prog)s --preset nano
        trains the small model in minutes, on text that every machine has
    %(prog)s --preset 3b_v3 --data DIR --output DIR
        the published recipe; the same command on each host of a pod
    %(prog)s --preset 7b_v2 --plan --topology v4:4x8x8
        compiles the step for TPUs that need not be there, and tells its memory and time

Running the same command again resumes the run, bit-exactly on the same devices. DIR of
--data is what `prepare-data` wrote. The run's directory holds metrics.jsonl,
validation.jsonl, samples.txt, loss.png, TensorBoard's events (`tensorboard --logdir
DIR`) and checkpoints, which `keras-openllama generate --preset DIR` and
`keras-openllama convert DIR …` take as they are.

Exit codes: 0 the run is complete; 75 a signal came (SIGTERM; on one host Ctrl-C, too),
all is saved and the same command resumes it; 70 too many steps in a row had a loss or
gradient that is not finite; 74 a checkpoint or the log could not be written; 2 an
argument is wrong, or does not fit the run that is there; 1 anything else, such as data
that cannot be read.
"""

import argparse
import logging
import math
import os
from pathlib import Path

from keras_openllama.cli.command import CommandParser, add_renamed_argument, command
from keras_openllama.cli.training_options import (
    add_run_options,
    exit_code,
    join_hosts,
    open_trainer,
    tell,
)
from keras_openllama.runs import recipe as recipes

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
    add_renamed_argument(
        plan,
        "--alone",
        "--no-alternatives",
        action="store_true",
        default=False,
        help="do not plan alternatives, each of which takes a minute to compile",
    )
    plan.add_argument(
        "--json", default=None, metavar="FILE", help="write the plan there, too"
    )
    add_run_options(parser)
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


def data_of(options, resolved):
    """The prepared data of a run."""
    from keras_openllama.data.prepared_data import PreparedData

    if options.data is not None:
        try:
            return PreparedData.open(options.data)
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

    place = os.path.join(options.output, "data")
    if jax.process_index() == 0:
        prepare_default_text(place, resolved.preset)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("text")
    return PreparedData.open(place)


@command("pretrain", extra="train", large_pages=True)
def main(arguments, prog):
    parser, options = parse_arguments(arguments, prog)
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        resolved = recipes.resolve_recipe(
            options.preset, file=options.config, overrides=overrides_of(parser, options)
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    mesh = options.mesh
    if options.show:
        there = (
            resolved.for_devices(math.prod(mesh.values()), mesh) if mesh else resolved
        )
        print(there.table())
        return 0
    if options.plan:
        return plan_run(parser, options, resolved)
    if options.output is None:
        options.output = f"runs/{resolved.preset.removeprefix('open_llama_')}"
    join_hosts(parser, options)
    return exit_code(prog, options, lambda: run(options, resolved))


def plan_run(parser, options, resolved):
    """Prints what the run would cost, and returns the exit code."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # A TPU that is there is left alone.
    import json

    from keras_openllama.planning import plan as planning

    if options.json and not Path(options.json).resolve().parent.is_dir():
        parser.error(f"--json: there is no directory for {options.json}")
    try:
        found = planning.plan(
            resolved,
            options.topology,
            options.mesh,
            alternatives=not options.no_alternatives,
        )
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    print(planning.table(found))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return 0 if found["fits"] else 2


def run(options, resolved):
    """Trains; returns the signal that stopped it, or `None`."""
    import jax

    from keras_openllama.runs import pretraining

    def open_run(run_options):
        data = data_of(options, resolved)
        tell(resolved.for_devices(jax.device_count(), options.mesh).table())
        return pretraining.open_run(resolved, data, run_options)

    with open_trainer(options, open_run) as trainer:
        stopped = trainer.train()
    if not stopped:
        output = options.output
        tell(
            "Generate from it, and export it:\n"
            f'    keras-openllama generate "The captain looked at" --preset {output}\n'
            f"    keras-openllama convert {output} {output}_hf --to transformers"
        )
    return stopped
