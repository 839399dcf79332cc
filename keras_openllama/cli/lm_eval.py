"""`keras-openllama lm-eval`: lm-evaluation-harness with the model `keras_openllama`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from keras_openllama.cli.command import command
from keras_openllama.cli.paths import require_adapters, require_preset
from keras_openllama.cli.process import PROGRAM, choose_backend

DESCRIPTION = """\
Run the command line of lm-evaluation-harness, with the model `keras_openllama`.

All arguments are those of the harness, see `%(prog)s run --help`. Its
commands `ls` and `validate` are available, too. The environment variable KERAS_BACKEND
selects the backend of Keras.
"""

EXAMPLES = f"""\
examples:
  %(prog)s --model keras_openllama --model_args preset=3b_v2 --tasks hellaswag
  %(prog)s --model keras_openllama \\
      --model_args preset=runs/nano,dtype=float32 --batch_size 16 --tasks piqa,arc_easy
  %(prog)s ls tasks

arguments of the model (--model_args):
  preset=…      a preset, a directory, a training run, a GGUF file, hf://user/repo, or
                hf://user/repo/file.gguf
  dtype=…       float32 (default) or bfloat16
  revision=…    branch, tag or commit on the Hugging Face Hub
  adapters=…    LoRA adapters to load
  max_length=N, max_gen_toks=N, add_bos=False
  data=N, fsdp=N, model=N   sizes of the device mesh (JAX)
Arguments of the harness's model `hf`, such as pretrained=user/repo, peft=… and
trust_remote_code=True, are understood, ignored where they have no effect here, or
rejected with what to do instead.
--batch_size N is the number of sequences of 512 tokens per batch (default: 8)

For the published table, with plots and resumption, see
{PROGRAM} evaluate --help
"""


@command("lm-eval", extra="eval")
def main(arguments: list[str], prog: str) -> int | None:
    """Runs the command."""
    if arguments in ([], ["-h"], ["--help"]):
        print(_help(prog))
        return None
    check_arguments(arguments)
    choose_backend(None)
    from lm_eval.__main__ import cli_evaluate

    import keras_openllama.evaluation  # noqa: F401  (It registers the model.)
    from keras_openllama.evaluation import squad_metrics

    words = list(arguments)
    has_batch_size = any(word.startswith(("--batch_size", "-b")) for word in words)
    if words[0] not in ("ls", "validate") and not has_batch_size:
        words += ["--batch_size", "auto"]  # The default of the harness is 1.
    before, sys.argv = sys.argv, ["lm-eval", *words]
    try:
        with squad_metrics.provide_squad_metrics():
            cli_evaluate()
    finally:
        sys.argv = before


def check_arguments(arguments: Sequence[str]) -> None:
    """Raises an error for a model or a task that does not exist.

    The harness would report it after many seconds.

    Args:
        arguments: The arguments of the harness.

    Raises:
        ValueError: See `paths.require_preset` and `task_names.check_task_names`.

    Example:
        >>> check_arguments(["--model_args", "preset=nano,dtype=float32"])
    """
    from keras_openllama.evaluation.task_names import check_task_names

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_args", "-a", nargs="*", default=[])
    parser.add_argument("--tasks", "-t", nargs="*", default=[])
    parser.add_argument("--include_path")
    parser.add_argument("--config", "-C")
    known, _ = parser.parse_known_args(arguments)
    model = dict(
        argument.strip().partition("=")[::2]
        for word in known.model_args
        for argument in word.split(",")
    )
    if "preset" in model:
        require_preset("preset", model["preset"], model.get("revision"))
    require_adapters("adapters", model.get("adapters"))
    names = [name for word in known.tasks for name in word.split(",")]
    # The harness also takes patterns, files and directories.
    names = [name for name in names if re.fullmatch(r"[\w.-]+", name)]
    names = [name for name in names if not os.path.exists(name)]
    if known.config is None:  # It may name another directory of tasks.
        check_task_names(names, known.include_path)


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
