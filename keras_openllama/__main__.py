"""The command line: `keras-openllama`, or `python -m keras_openllama`.

Keras and its backend take seconds to import. A command's module is imported when the
command is chosen, and imports them when it needs them: `--help` and `presets` answer at
once, and `--backend` can still choose.
"""

import argparse
import difflib
import importlib
import sys

from keras_openllama import __version__
from keras_openllama.cli.process import PROGRAM

# Name -> what it does. The module `keras_openllama.cli.NAME` has its `main`.
COMMANDS = {
    "generate": "continue a prompt",
    "convert": "write a model in the format of transformers, EasyLM or Keras",
    "presets": "list the models and what is in the local cache",
    "train-tokenizer": "train a SentencePiece tokenizer",
    "prepare-data": "tokenize text into a data set to train on",
    "inspect-data": "show what a prepared data set holds",
    "pretrain": "pretrain a model by its recipe, or plan to",
    "finetune": "fine-tune a model on examples: adapters (LoRA) or all weights",
    "plot": "draw the loss of runs",
    "evaluate": "measure tasks, perplexity and HumanEval, beside published results",
    "lm-eval": "run lm-evaluation-harness on a model",
}

DESCRIPTION = "OpenLLaMA in Keras 3: generate, train, evaluate and convert."

EXAMPLES = f"""\
examples:
  {PROGRAM} generate "Once upon a time"
  {PROGRAM} generate "Q: What is the largest animal?" --preset open_llama_3b_v2
  {PROGRAM} convert my_finetuned_model my_model_hf --to transformers
  {PROGRAM} pretrain --preset nano
  {PROGRAM} finetune --preset nano --data pairs.jsonl --lora-rank 8
  {PROGRAM} evaluate --preset nano --perplexity book.txt

`{PROGRAM} COMMAND --help` explains a command.
"""


def main(arguments=None):
    """Runs the command line.

    Args:
        arguments: list of strings, the words after the program's name; those of the
            process when left out.

    Returns:
        int, the exit code: 0 when all went well, 2 for an error that the user can
        correct, which is then one line on stderr. `COMMAND --help` lists the others.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = arguments[0] if arguments else None
    if name in COMMANDS:
        module = importlib.import_module(
            f"keras_openllama.cli.{name.replace('-', '_')}"
        )
        return module.main(arguments[1:], prog=f"{PROGRAM} {name}")
    parser = _parser()
    parser.parse_args(arguments[:1])  # --help, --version, another flag, or nothing.
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"See {PROGRAM} --help."
    parser.error(f"There is no command {name!r}. {hint}")


def _parser():
    width = max(map(len, COMMANDS)) + 2
    listed = [f"  {name:<{width}}{does}" for name, does in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--help] [--version] COMMAND …",
        description="\n".join([DESCRIPTION, "", "commands:", *listed]),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"{PROGRAM} {__version__}"
    )
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
