"""`keras-openllama plot`: plots the loss of training runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from keras_openllama.cli import arguments as types
from keras_openllama.cli.command import CommandParser, command
from keras_openllama.cli.paths import require_output_file
from keras_openllama.config import LOSS_X_AXES

DESCRIPTION = """\
Plot the loss of training runs, finished or in progress.

    %(prog)s runs/nano                             # writes loss.png
    %(prog)s runs/3b_v2 runs/7b_v2 --output loss.svg
    %(prog)s runs/nano --x hours --smooth 50

RUN is the directory of a run (--output of `pretrain` or `finetune`) with its
metrics.jsonl. Each run has one color: the loss of every step faintly, its exponential
moving average over --smooth steps as a line, and the validation loss as points. The
loss of the first steps may exceed the plot.

TensorBoard shows the same metrics and others: tensorboard --logdir runs
"""


def parse_arguments(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    """Parses the arguments of the command."""
    parser = CommandParser(prog, description=DESCRIPTION)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="directories of runs, for one plot"
    )
    parser.add_argument(
        "--output",
        default="loss.png",
        metavar="FILE",
        help="file of the plot, .png or .svg (default: %(default)s)",
    )
    parser.add_argument(
        "--smooth",
        type=types.positive_int,
        metavar="N",
        help="number of steps to average over; 1 disables smoothing (default: a "
        "hundredth of the longest run)",
    )
    parser.add_argument(
        "--x",
        choices=LOSS_X_AXES,
        default=LOSS_X_AXES[0],
        help="the x axis; hours include waiting for data and saving checkpoints, but "
        "not restarts (default: %(default)s)",
    )
    return parser.parse_args(arguments)


@command("plot", extra="train")
def main(arguments: list[str], prog: str) -> int | None:
    """Runs the command."""
    options = parse_arguments(arguments, prog)
    from keras_openllama.runs import loss_plot
    from keras_openllama.utils.plots import FORMATS

    require_output_file("--output", options.output, FORMATS)
    runs = loss_plot.read_runs(options.runs)
    loss_plot.save_loss_plot(runs, options.output, options.x, options.smooth)
    for run in runs:
        last = run.records[-1]
        tokens = f", {last['tokens']:,} tokens" if "tokens" in last else ""
        print(f"{run.name}: step {last['step']:,}{tokens}, loss {last['loss']:.4f}")
    print(f"Plot: {options.output}")
