"""`keras-openllama convert`: a model from one format into another."""

import contextlib
import signal
import sys
import threading
import warnings

from keras_openllama.checkpoints.formats import (
    DTYPES,
    EASYLM_CONTENTS,
    FORMATS,
    MAX_SHARD_SIZE,
)
from keras_openllama.cli.command import CommandParser, command
from keras_openllama.cli.presets import BYTES, scaled
from keras_openllama.cli.process import (
    choose_backend,
    quiet_tensorflow,
    show_warning,
)

DESCRIPTION = """\
Writes the model SOURCE at DEST in another format. Memory holds a few tensors at a
time, whatever the size of the model. DEST appears when it is whole, or not at all.

SOURCE is a preset's name, hf://user/repo, a directory in transformers' or KerasHub's
format, a pretraining run or one of its checkpoints, or a file of EasyLM, whose
architecture and tokenizer --preset tells. Formats:
  transformers   a directory: safetensors, configuration, tokenizer, model card
  easylm         a file: a stream of parameters as EasyLM loads it
  keras          a directory, as `save_to_preset` writes it
"""

EXAMPLES = """\
examples:
  A model that you fine-tuned in Keras, for transformers, vLLM or llama.cpp:
    %(prog)s my_finetuned_model my_model_hf --to transformers

  What that would write, and how many bytes:
    %(prog)s my_finetuned_model my_model_hf --to transformers --dry-run

  A published model for EasyLM, which then loads params::3b_v2.msgpack:
    %(prog)s open_llama_3b_v2 3b_v2.msgpack --to easylm --dtype bfloat16

  A checkpoint of EasyLM's training, whole train state or parameters alone:
    %(prog)s streaming_train_state 3b_v2_hf --to transformers \\
        --preset open_llama_3b_v2
"""


def parse_arguments(arguments, prog):
    """The options of the command line."""
    parser = CommandParser(prog, description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("source", metavar="SOURCE", help="the model to convert")
    parser.add_argument("target", metavar="DEST", help="where to write it")
    parser.add_argument(
        "--to", required=True, choices=FORMATS, help="the format to write"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what the weights are written in (that of SOURCE)",
    )
    parser.add_argument(
        "--preset",
        help="for a file of EasyLM: the model whose weights it has, by name, directory "
        "or hf://user/repo",
    )
    parser.add_argument(
        "--revision", help="the branch, tag or commit to download from the Hub"
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="for transformers: what one file of weights holds at most "
        f"({MAX_SHARD_SIZE})",
    )
    parser.add_argument(
        "--content",
        choices=EASYLM_CONTENTS,
        help="for easylm: EasyLM's name for what the file holds (params)",
    )
    parser.add_argument(
        "--no-tokenizer",
        action="store_true",
        help="leave the tokenizer out",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace DEST if it is a model's directory or a file",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the files and their sizes, and write nothing (SOURCE is downloaded "
        "all the same)",
    )
    return parser.parse_args(arguments)


@contextlib.contextmanager
def _ended_by_sigterm():
    """Lets `kill` leave as little behind as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may say what a signal does.
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@command("convert")
def main(arguments, prog):
    """Runs the command; returns the exit code."""
    options = parse_arguments(arguments, prog)
    choose_backend(None)
    with _ended_by_sigterm(), warnings.catch_warnings():
        warnings.showwarning = show_warning
        with quiet_tensorflow():
            from keras_openllama.convert import convert

        files = convert(
            options.source,
            options.target,
            options.to,
            preset=options.preset,
            revision=options.revision,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            content=options.content,
            tokenizer=not options.no_tokenizer,
            force=options.force,
            dry_run=options.dry_run,
        )
    if options.dry_run:
        for file in files:
            print(f"{file.size:>16,}  {file.name or options.target}")
    total = scaled(sum(file.size for file in files), BYTES)
    verb = "Would write" if options.dry_run else "Wrote"
    count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
    print(f"{verb} {options.target}: {count}, {total}")
