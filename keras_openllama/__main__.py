"""The command line: `keras-openllama`, or `python -m keras_openllama`.

Keras and its backend take seconds to import. The module of a command is imported when
the command is chosen, and imports Keras only when needed. So `--help` and `presets` are
fast, and `--backend` can still choose the backend.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from keras_openllama import __version__
from keras_openllama.cli.process import (
    PROGRAM,
    print_unencodable_as_question_marks,
    tolerate_closed_stdout,
)

# Name -> summary. The module `keras_openllama.cli.NAME` has the command's `main`.
COMMANDS = {
    "generate": "generate text from a prompt",
    "chat": "chat with a model in the terminal",
    "serve": "serve a model over HTTP: the API of OpenAI, and a page",
    "convert": "convert a model to the format of transformers, EasyLM or Keras",
    "presets": "list the models, and which are in the local cache",
    "train-tokenizer": "train a SentencePiece tokenizer",
    "prepare-data": "tokenize text files into a dataset for pretraining",
    "inspect-data": "show the contents of a prepared dataset",
    "pretrain": "pretrain a model, or estimate time and memory (--plan)",
    "finetune": "fine-tune a model on examples: LoRA adapters or all weights",
    "plot": "plot the loss of training runs",
    "evaluate": "evaluate tasks, perplexity and HumanEval; compare evaluations",
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

Run `{PROGRAM} COMMAND --help` for the options of a command and more examples.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The arguments after the program's name. `None` stands for those of
            the process.

    Returns:
        The exit code: 0 for success, 2 for an error that the user can correct, which
        is printed to stderr in one line. `COMMAND --help` lists the others.

    Example:
        >>> main(["presets"])
        NAME ...
        0
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with tolerate_closed_stdout():
            return _run(arguments)
        return 0
    except KeyboardInterrupt:  # While the module of the command is imported.
        print(file=sys.stderr)
        return 130


def _run(arguments):
    name = arguments[0] if arguments else None
    if name in COMMANDS:
        module = importlib.import_module(
            f"keras_openllama.cli.{name.replace('-', '_')}"
        )
        return module.main(arguments[1:], prog=f"{PROGRAM} {name}")
    print_unencodable_as_question_marks()
    parser = _parser()
    parser.parse_args(arguments[:1])  # --help, --version, another flag, or nothing.
    nearest = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"Did you mean {nearest[0]!r}?" if nearest else f"See {PROGRAM} --help."
    parser.error(f"Unknown command: {name!r}. {hint}")


def _parser():
    width = max(map(len, COMMANDS)) + 2
    listed = [f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items()]
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
