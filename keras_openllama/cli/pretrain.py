"""`keras-openllama pretrain`: pretrains a model, or plans to."""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_openllama.cli import arguments as types
from keras_openllama.cli.command import CommandParser, add_renamed_argument, command
from keras_openllama.cli.paths import (
    require_directory,
    require_file,
    require_output_directory,
    require_output_file,
)
from keras_openllama.cli.training_options import (
    add_run_options,
    initialize_distributed,
    open_trainer,
    print_on_process_0,
    run_training,
)
from keras_openllama.planning.topology import parse_topology
from keras_openllama.runs import recipe as recipes
from keras_openllama.utils.files import is_remote

if TYPE_CHECKING:
    from keras_openllama.data.prepared_data import PreparedData

DESCRIPTION = """\
Pretrain a preset by its recipe, on the devices that JAX has.

    %(prog)s --preset nano
        train the small model in minutes, on text from the Python installation
    %(prog)s --preset 3b_v3 --data DIR --output DIR
        train by its recipe; run the same command on each host of a pod
    %(prog)s --preset 7b_v2 --plan --topology v4:4x8x8
        compile the training step for TPUs, which need not be present, and estimate its
        memory and time

Running the same command again resumes the run, bit-exactly on the same mesh. DIR of
--data is the output of `prepare-data`. The run's directory holds metrics.jsonl,
validation.jsonl, samples.txt, loss.png, TensorBoard's events (`tensorboard --logdir
DIR`) and checkpoints, which `keras-openllama generate --preset DIR` and
`keras-openllama convert DIR …` read directly.

Exit codes:
  0   the run is complete
  1   any other error, such as unreadable data
  2   invalid argument, an argument that does not match the existing run, or a planned
      step that does not fit into memory
  70  too many consecutive steps had a non-finite loss or gradient, or the validation
      loss is not finite
  74  a checkpoint or the log could not be written
  75  stopped by a signal (SIGTERM; in a run of one process Ctrl-C, too); the run is
      saved, and the same command resumes it
  130 Ctrl-C before the first step, or in a run of several processes
"""

# Settings that have a flag; the others are set by --set.
_FLAGS = ("steps", "batch_size", "save_every", "seed", "precision", "mixture")
# Flags that only --plan uses.
_PLAN_FLAGS = ("topology", "no_alternatives", "no_plan_cache", "price", "json")
_TOPOLOGY = "v4:4x8x8"


def parse_arguments(
    arguments: Sequence[str], prog: str
) -> tuple[CommandParser, argparse.Namespace]:
    """Returns the parser of the command and the parsed arguments."""
    parser = CommandParser(
        prog,
        description=DESCRIPTION,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--preset", required=True, help="preset to train, such as 3b_v3 or nano"
    )
    parser.add_argument(
        "--data",
        default=None,
        metavar="DIR",
        help="prepared data (default for nano: text from the Python installation)",
    )
    parser.add_argument(
        "--output",
        default=None,
        metavar="DIR",
        help="directory of the run (default: runs/PRESET)",
    )
    recipe = parser.add_argument_group(
        "recipe", "settings that override those of the preset, see --show"
    )
    recipe.add_argument(
        "--steps", type=types.positive_int, metavar="N", help="training steps"
    )
    recipe.add_argument(
        "--batch-size", type=types.positive_int, metavar="N", help="sequences per step"
    )
    recipe.add_argument(
        "--save-every",
        type=types.positive_int,
        metavar="N",
        help="steps between checkpoints",
    )
    recipe.add_argument(
        "--seed", type=types.run_seed, metavar="N", help="seed of weights and data"
    )
    recipe.add_argument(
        "--precision",
        choices=("mixed_bfloat16", "float32"),
        help="dtype policy of the computation; weights are float32 in both",
    )
    recipe.add_argument(
        "--mixture", metavar="v1|v2|FILE", help="weights of the sources"
    )
    recipe.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override any setting, such as --set learning_rate=1e-4",
    )
    recipe.add_argument(
        "--config",
        default=None,
        metavar="FILE",
        help="YAML file of settings; flags take precedence",
    )
    recipe.add_argument(
        "--show",
        action="store_true",
        default=False,
        help="print the recipe and exit; with --mesh, for that number of chips",
    )
    plan = parser.add_argument_group(
        "plan", "estimate memory and time, without a TPU and without data"
    )
    plan.add_argument(
        "--plan",
        action="store_true",
        default=False,
        help="compile the training step and print the estimate instead of training",
    )
    plan.add_argument(
        "--topology",
        default=None,
        metavar="KIND:AxBxC",
        help="chips along each axis of a slice, not the name of a cloud: v4:2x2x1 to "
        f"v4:8x16x16, v5p:4x4x4, v5e:8x8, v6e:16x16 (default: {_TOPOLOGY}, sold "
        "as v4-512)",
    )
    add_renamed_argument(
        plan,
        "--alone",
        "--no-alternatives",
        action="store_true",
        default=False,
        help="plan the recipe's choice only; each alternative takes up to a minute to "
        "compile",
    )
    plan.add_argument(
        "--no-plan-cache",
        action="store_true",
        default=False,
        help="neither read nor save compiled steps in ~/.cache/keras_openllama/plans "
        "(or that of $XDG_CACHE_HOME); they make planning again a matter of seconds",
    )
    plan.add_argument(
        "--price",
        type=types.positive_number,
        default=None,
        metavar="DOLLARS",
        help="price of a chip-hour, such as 3.22; adds the expected price of the whole "
        "run to the plan",
    )
    plan.add_argument(
        "--json",
        default=None,
        metavar="FILE",
        help="also write the plan to FILE; docs/tpu.md lists the fields",
    )
    add_run_options(
        parser,
        "the recipe's mesh for this number of devices, else all devices along fsdp",
    )
    return parser, parser.parse_args(arguments)


def require_plan_for_its_flags(
    parser: CommandParser, options: argparse.Namespace
) -> None:
    """Rejects the flags of a plan without `--plan`, which would start a run."""
    for name in [] if options.plan else _PLAN_FLAGS:
        if getattr(options, name) not in (None, False):
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} belongs to a plan: add --plan, or remove {flag}.")


def recipe_overrides(
    parser: CommandParser, options: argparse.Namespace
) -> dict[str, Any]:
    """Returns the settings given on the command line, by name."""
    import yaml

    values = {name: getattr(options, name) for name in _FLAGS if hasattr(options, name)}
    for text in options.set:
        name, sign, value = text.partition("=")
        if not sign:
            parser.error(f"--set must be NAME=VALUE. Received: {text!r}")
        try:
            values[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            parser.error(f"--set {text}: the value is not valid YAML: {error}")
    return values


def require_data(options: argparse.Namespace, resolved: Any) -> None:
    """Rejects missing data, before JAX is imported.

    Args:
        options: The parsed arguments.
        resolved: The recipe, as `recipe.resolve_recipe` returns it.

    Raises:
        ValueError: If `--data` is missing, or is no prepared dataset.
    """
    if options.data is None and resolved.preset != "open_llama_nano":
        raise ValueError(
            f"{resolved.preset} requires --data, the output directory of:\n    "
            f"keras-openllama prepare-data --mixture {resolved.recipe.mixture} "
            f"--tokenizer {resolved.preset} --output DIR "
            "--source NAME=PATHS …"
        )
    if options.data is not None and not is_remote(options.data):
        from keras_openllama.data.prepared_data import read_manifest

        try:
            read_manifest(options.data)
        except OSError as error:
            raise ValueError(f"--data: {error}") from error


def open_data(options: argparse.Namespace, resolved: Any) -> PreparedData:
    """Opens the prepared data of a run; for nano, prepares the default text first.

    Args:
        options: The parsed arguments.
        resolved: The recipe, as `recipe.resolve_recipe` returns it.

    Raises:
        ValueError: If `--data` cannot be opened.
    """
    from keras_openllama.data.prepared_data import PreparedData

    if options.data is not None:
        try:
            return PreparedData.open(options.data)
        except OSError as error:
            raise ValueError(f"--data: {error}") from error
    import jax
    from jax.experimental import multihost_utils

    from keras_openllama.data.default_text import prepare_default_text

    directory = os.path.join(options.output, "data")
    if jax.process_index() == 0:
        prepare_default_text(directory, resolved.preset)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("text")
    return PreparedData.open(directory)


@command("pretrain", extra="train", large_pages=True)
def main(arguments: list[str], prog: str) -> int | None:
    """Runs the command."""
    parser, options = parse_arguments(arguments, prog)
    require_plan_for_its_flags(parser, options)
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)
    if options.config:
        require_file("--config", options.config)
    if options.data:
        require_directory("--data", options.data)
    if options.json:
        require_output_file("--json", options.json)
    if options.topology:
        parse_topology(options.topology)
    try:
        resolved = recipes.resolve_recipe(
            options.preset,
            file=options.config,
            overrides=recipe_overrides(parser, options),
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    mesh = options.mesh
    if options.show:
        recipe = (
            resolved.for_devices(math.prod(mesh.values()), mesh) if mesh else resolved
        )
        print(recipe.table())
        return 0
    if options.plan:
        return plan_run(parser, options, resolved)
    if options.output is None:
        options.output = f"runs/{resolved.preset.removeprefix('open_llama_')}"
    require_output_directory("--output", options.output)
    require_data(options, resolved)
    initialize_distributed(parser, options)
    return run_training(prog, options, lambda: pretrain(options, resolved))


def plan_run(parser: CommandParser, options: argparse.Namespace, resolved: Any) -> int:
    """Prints the estimate of a run, and returns the exit code."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # Does not occupy the TPU of this machine.
    import json

    from keras_openllama.planning import plan as planning
    from keras_openllama.planning.compilation_cache import CompilationCache

    try:
        found = planning.plan_pretraining(
            resolved,
            options.topology or _TOPOLOGY,
            options.mesh,
            alternatives=not options.no_alternatives,
            cache=None if options.no_plan_cache else CompilationCache(),
            report=lambda plan: print(
                planning.plan_table(plan, options.price), flush=True
            ),
        )
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    if options.price is not None:
        for end in ("", "_low", "_high"):
            hours = found[f"expected_chip_hours{end}"]
            found[f"expected_price{end}"] = options.price * hours
    if found["alternatives"]:
        print(f"\n{planning.comparison_table(found)}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return 0 if found["fits"] else 2


def pretrain(options: argparse.Namespace, resolved: Any) -> str | None:
    """Trains; returns the signal that stopped the run, or `None`."""
    import jax

    from keras_openllama.runs import pretraining

    def open_run(run_options):
        data = open_data(options, resolved)
        print_on_process_0(
            resolved.for_devices(jax.device_count(), options.mesh).table()
        )
        return pretraining.open_run(resolved, data, run_options)

    with open_trainer(options, open_run) as trainer:
        stopped = trainer.train()
    if not stopped:
        output = options.output
        print_on_process_0(
            "Generate from the model, or export it:\n"
            f'    keras-openllama generate "The captain looked at" --preset {output}\n'
            f"    keras-openllama convert {output} {output}_hf --to transformers"
        )
    return stopped
