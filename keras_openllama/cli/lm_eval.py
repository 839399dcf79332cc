"""`keras-openllama lm-eval`: lm-evaluation-harness that knows our models."""

import argparse
import sys

from keras_openllama.cli.command import command
from keras_openllama.cli.process import PROGRAM, choose_backend

DESCRIPTION = """\
Runs the command line of lm-evaluation-harness, with the model `keras_openllama`.

All arguments are the harness's own: `%(prog)s run --help`. Its commands `ls` and
`validate` work, too. KERAS_BACKEND chooses what Keras computes with.
"""

EXAMPLES = f"""\
examples:
  %(prog)s --model keras_openllama --model_args preset=3b_v2 --tasks hellaswag
  %(prog)s --model keras_openllama \\
      --model_args preset=runs/nano,dtype=float32 --batch_size 16 --tasks piqa,arc_easy
  %(prog)s ls tasks

arguments of the model (--model_args):
  preset=…      a preset, a directory, a training run, or hf://user/repo
  dtype=…       float32 (default), bfloat16
  revision=…, max_length=N, max_gen_toks=N, add_bos=False, data=N, fsdp=N, model=N
--batch_size N counts rows of 512 tokens, which requests share (8)

The published table, with pictures and resumption: {PROGRAM} evaluate --help
"""


@command("lm-eval", extra="eval")
def main(arguments, prog):
    """Runs the command; returns the exit code."""
    if arguments in ([], ["-h"], ["--help"]):
        print(_help(prog))
        return
    choose_backend(None)
    from lm_eval.__main__ import cli_evaluate

    import keras_openllama.evaluation  # noqa: F401  (It registers the model.)
    from keras_openllama.evaluation import squad_metrics

    words = list(arguments)
    sized = any(word.startswith(("--batch_size", "-b")) for word in words)
    if words[0] not in ("ls", "validate") and not sized:
        words += ["--batch_size", "auto"]  # The harness's own default is 1.
    before, sys.argv = sys.argv, ["lm-eval", *words]
    try:
        with squad_metrics.provided():
            cli_evaluate()
    finally:
        sys.argv = before


def _help(prog):
    parser = argparse.ArgumentParser(
        prog,
        usage=f"{prog} …",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    return parser.format_help()
