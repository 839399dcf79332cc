"""`keras-openllama plot`: the loss of runs as a picture."""

from keras_openllama.cli.command import CommandParser, command
from keras_openllama.config import LOSS_X_AXES

DESCRIPTION = """\
Draw the loss of pretraining runs, also while they are going on.

    %(prog)s runs/nano                             # into loss.png
    %(prog)s runs/3b_v2 runs/7b_v2 --output loss.svg
    %(prog)s runs/nano --x hours --smooth 50

Each run is a directory that `pretrain` or `finetune` writes (its --output), with
metrics.jsonl in it. A run is a colour: every step faint, the exponential average over
--smooth steps as a line, and validation as points if it evaluated. The first steps may
leave the picture at the top.

The same numbers, and more of them, are in TensorBoard: tensorboard --logdir runs
"""


def parse_arguments(arguments, prog):
    """The options of the command line."""
    parser = CommandParser(prog, description=DESCRIPTION)
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
        choices=LOSS_X_AXES,
        default=LOSS_X_AXES[0],
        help="what the loss is drawn against; hours are those of waiting for data, "
        "computing and saving checkpoints, without restarts (default: %(default)s)",
    )
    return parser.parse_args(arguments)


@command("plot", extra="train")
def main(arguments, prog):
    """Runs the command; returns the exit code."""
    options = parse_arguments(arguments, prog)
    from keras_openllama.runs import loss_plot

    runs = loss_plot.read_runs(options.runs)
    loss_plot.save_loss_plot(runs, options.output, options.x, options.smooth)
    for run in runs:
        last = run.records[-1]
        tokens = f", {last['tokens']:,} tokens" if "tokens" in last else ""
        print(f"{run.name}: step {last['step']:,}{tokens}, loss {last['loss']:.4f}")
    print(f"drawn: {options.output}")
