"""`keras-openllama lm-eval`: lm-evaluation-harness that knows our models."""

import argparse
import sys

from keras_openllama.cli.process import PROGRAM, choose_backend

DESCRIPTION = """\
Runs the command line of lm-evaluation-harness, with the model `keras_openllama`.

All that follows is the harness's own; `ls` and `validate` are commands of it, too.
KERAS_BACKEND chooses what Keras computes with.
"""

EXAMPLES = f"""\
examples:
  {PROGRAM} lm-eval --model keras_openllama --model_args preset=3b_v2 --tasks hellaswag
  {PROGRAM} lm-eval --model keras_openllama \\
      --model_args preset=runs/nano,dtype=float32 --batch_size 16 --tasks piqa,arc_easy
  {PROGRAM} lm-eval ls tasks

arguments of the model (--model_args):
  preset=…      a preset, a directory, a training run, or hf://user/repo
  dtype=…       float32 (default), bfloat16
  revision=…, max_length=N, max_gen_toks=N, add_bos=False, data=N, fsdp=N, model=N
--batch_size N counts rows of 512 tokens, which requests share (8)

The published table, with pictures and resumption: python train/evaluate.py --help
"""


def add(commands, parents=(), **options):
    """Adds the command to argparse's subparsers; `options` are of `add_parser`.

    All of its words are the harness's, those with dashes too, and so none of `parents`.
    """
    parser = commands.add_parser(
        "lm-eval",
        help="run lm-evaluation-harness on a model",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        usage=f"{PROGRAM} lm-eval …",
        prefix_chars="+",
        add_help=False,
        **options,
    )
    parser.set_defaults(command=run, traceback=False, help=parser.format_help)
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="…",
        help="what `lm-eval` takes: `lm-eval run --help`",
    )


def run(options):
    """Runs the command; returns the exit code."""
    if options.arguments in ([], ["-h"], ["--help"]):
        print(options.help())
        return 0
    choose_backend(None)
    import keras_openllama.evaluation  # noqa: F401, I001  (It registers the model.)
    from keras_openllama.evaluation import squad_metrics
    from lm_eval.__main__ import cli_evaluate

    words = list(options.arguments)
    sized = any(word.startswith(("--batch_size", "-b")) for word in words)
    if words[0] not in ("ls", "validate") and not sized:
        words += ["--batch_size", "auto"]  # The harness's own default is 1.
    before, sys.argv = sys.argv, ["lm-eval", *words]
    try:
        with squad_metrics.provided():
            cli_evaluate()
    finally:
        sys.argv = before
    return 0
