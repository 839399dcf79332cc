"""`keras-openllama convert`: converts a model from one format into another."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Sequence

from keras_openllama import presets
from keras_openllama.checkpoints.export_config import ExportConfig, missing_preset_error
from keras_openllama.checkpoints.formats import (
    DTYPES,
    EASYLM_CONTENTS,
    FORMATS,
    GGUF_QUANTIZATIONS,
    KERAS_QUANTIZATIONS,
    MAX_SHARD_SIZE,
)
from keras_openllama.cli.calibration_options import (
    add_calibration,
    check_calibration,
    convert_calibrated,
)
from keras_openllama.cli.command import CommandParser, command
from keras_openllama.cli.paths import require_preset
from keras_openllama.cli.presets import BYTE_UNITS, with_unit
from keras_openllama.cli.process import (
    choose_backend,
    quiet_tensorflow,
)
from keras_openllama.utils.file_types import is_gguf_file

DESCRIPTION = """\
Convert the model SOURCE to another format and write it to DEST. Memory holds a few
tensors at a time, whatever the size of the model, except with --calibration. DEST is
created atomically: it appears when it is complete.

SOURCE is a preset's name, hf://user/repo, a directory in the format of transformers or
KerasHub, a run that trains all weights or one of its checkpoints, a GGUF file (also
hf://user/repo/file.gguf), or a file of EasyLM, whose architecture and tokenizer come
from --preset. Formats:
  transformers   a directory: safetensors, configuration, tokenizer, model card
  easylm         a file: a stream of parameters as EasyLM loads it
  keras          a directory, as `save_to_preset` writes it
  gguf           a file of llama.cpp, in the type of --quantization
"""

EXAMPLES = """\
examples:
  Convert a model that you fine-tuned in Keras for transformers or vLLM:
    %(prog)s my_finetuned_model my_model_hf --to transformers

  List the files and sizes without writing them:
    %(prog)s my_finetuned_model my_model_hf --to transformers --dry-run

  Convert a model for llama.cpp, with weights of 8 bits:
    %(prog)s open_llama_3b_v2 3b_v2.gguf --to gguf --quantization q8_0

  Quantize a model to 4 bits by GPTQ, which loses less with texts like yours:
    %(prog)s open_llama_3b_v2 3b_v2_int4 --to keras --quantization int4 \\
        --calibration articles.jsonl

  Convert a published model for EasyLM, which loads it as params::3b_v2.msgpack:
    %(prog)s open_llama_3b_v2 3b_v2.msgpack --to easylm --dtype bfloat16

  Convert a checkpoint of EasyLM, with a whole train state or with parameters only:
    %(prog)s streaming_train_state 3b_v2_hf --to transformers \\
        --preset open_llama_3b_v2
"""


def parse_arguments(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    """Parses the arguments of the command."""
    parser = CommandParser(
        prog,
        argument_names={"tokenizer": "--no-tokenizer"},
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("source", metavar="SOURCE", help="the model to convert")
    parser.add_argument("target", metavar="DEST", help="the file or directory to write")
    parser.add_argument(
        "--to", required=True, choices=FORMATS, help="the format to write"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the written weights (default: that of SOURCE); not for gguf",
    )
    parser.add_argument(
        "--quantization",
        choices=(*GGUF_QUANTIZATIONS, *KERAS_QUANTIZATIONS),
        help="type of the written weights. For gguf: "
        f"{', '.join(GGUF_QUANTIZATIONS)} (default: f16); for keras: "
        f"{' or '.join(KERAS_QUANTIZATIONS)} (default: as in SOURCE)",
    )
    parser.add_argument(
        "--preset",
        help="for a file of EasyLM: the model with the same architecture and "
        "tokenizer: a preset's name, a directory or hf://user/repo",
    )
    parser.add_argument(
        "--revision",
        help="branch, tag or commit on the Hugging Face Hub (default: the main branch)",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="for transformers: maximum size of a weights file (default: "
        f"{MAX_SHARD_SIZE})",
    )
    parser.add_argument(
        "--content",
        choices=EASYLM_CONTENTS,
        help="for easylm: EasyLM's name of the content (default: params)",
    )
    parser.add_argument(
        "--no-tokenizer",
        action="store_true",
        help="do not write the tokenizer",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace DEST if it is a file or the directory of a model",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the files and their sizes without writing them (SOURCE is "
        "downloaded nevertheless)",
    )
    add_calibration(parser)
    options = parser.parse_args(arguments)
    check_calibration(parser, options)
    return options


@contextlib.contextmanager
def _exit_on_sigterm():
    """Makes `kill` remove unfinished files, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may set signal handlers.
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def export_config(options: argparse.Namespace) -> ExportConfig:
    """Returns what the flags say about the files to write, checked.

    Raises:
        ValueError: If flags contradict each other.
    """
    return ExportConfig(
        options.target,
        options.to,
        dtype=options.dtype,
        quantization=options.quantization,
        max_shard_size=options.max_shard_size,
        content=options.content,
        tokenizer=not options.no_tokenizer,
        force=options.force,
    )


def check_paths(options: argparse.Namespace, config: ExportConfig) -> None:
    """Rejects an unknown model and an invalid target, before Keras is imported.

    Args:
        options: The parsed arguments.
        config: What to write.

    Raises:
        ValueError: If a model does not exist.
        OSError: If the target exists, or cannot be written.
    """
    config.check_target()
    is_file = os.path.isfile(options.source) and not presets.find(options.source)
    if is_file and not is_gguf_file(options.source):
        _check_easylm_file(options)
    else:
        require_preset("SOURCE", options.source, options.revision)
    if options.preset is not None:
        require_preset("--preset", options.preset)


def _check_easylm_file(options):
    if options.preset is None:
        raise missing_preset_error(options.source)
    if not os.path.getsize(options.source):
        raise ValueError(f"SOURCE: {options.source} is empty. Download it again.")


@command("convert")
def main(arguments: list[str], prog: str) -> int | None:
    """Runs the command."""
    options = parse_arguments(arguments, prog)
    config = export_config(options)
    check_paths(options, config)
    choose_backend(None)
    with _exit_on_sigterm():
        with quiet_tensorflow():
            from keras_openllama.convert import convert

        files = convert(
            options.source,
            preset=options.preset,
            revision=options.revision,
            # Before a calibration, which takes long, this checks all options.
            dry_run=options.dry_run or options.calibration is not None,
            **dataclasses.asdict(config),
        )
        if options.calibration and not options.dry_run:
            convert_calibrated(options)
    if options.dry_run:
        for file in files:
            print(f"{file.size:>16,}  {file.name or options.target}")
    total = with_unit(sum(file.size for file in files), BYTE_UNITS)
    verb = "Would write" if options.dry_run else "Wrote"
    count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
    print(f"{verb} {options.target}: {count}, {total}")
