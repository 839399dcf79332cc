"""Draw the loss of pretraining runs, also while they are going on.

    python train/plot.py runs/nano                             # into loss.png
    python train/plot.py runs/3b_v2 runs/7b_v2 --output loss.svg
    python train/plot.py runs/nano --x hours --smooth 50

Each run is a directory that train/pretrain.py writes (its --output), with metrics.jsonl
in it. A run is a colour: every step faint, the exponential average over --smooth steps
as a line, and validation as points if it evaluated. The first steps may leave the
picture at the top.

The same numbers, and more of them, are in TensorBoard: tensorboard --logdir runs
"""

import argparse
import sys

from keras_openllama.runs import loss_plot


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's directory; several in one axes"
    )
    parser.add_argument(
        "--output",
        default="loss.png",
        metavar="FILE",
        help="where the picture goes, .png or .svg (default: %(default)s)",
    )
    parser.add_argument(
        "--smooth",
        type=int,
        metavar="N",
        help="steps that the line averages over; 1 draws each step as it is "
        "(default: a hundredth of the longest run)",
    )
    parser.add_argument(
        "--x",
        choices=loss_plot.X_AXES,
        default=loss_plot.X_AXES[0],
        help="what the loss is drawn against; hours are those of waiting for data, "
        "computing and saving checkpoints, without restarts (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    try:
        runs = loss_plot.read_runs(options.runs)
        loss_plot.draw(runs, options.output, options.x, options.smooth)
    except (OSError, ValueError) as error:
        sys.exit(f"plot: {error}")
    for run in runs:
        last = run.records[-1]
        tokens = f", {last['tokens']:,} tokens" if "tokens" in last else ""
        print(f"{run.name}: step {last['step']:,}{tokens}, loss {last['loss']:.4f}")
    print(f"drawn: {options.output}")
