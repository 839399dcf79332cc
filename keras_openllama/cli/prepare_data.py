"""`keras-openllama prepare-data`: tokenizes text files into a dataset."""

from __future__ import annotations

import argparse
import glob
import logging
import os
from collections.abc import Mapping, Sequence

from keras_openllama.cli import arguments as types
from keras_openllama.cli.command import CommandParser, command
from keras_openllama.cli.paths import (
    require_file,
    require_output_directory,
    require_preset,
)
from keras_openllama.cli.process import PROGRAM
from keras_openllama.cli.source_options import add_source_options
from keras_openllama.data.document_reader import MAX_DOCUMENT_BYTES
from keras_openllama.data.text_sources import UNIT_BYTES, find_units, parse_sources
from keras_openllama.utils.files import is_remote

DESCRIPTION = f"""\
Prepare data for training: tokenize sources of text and write them to a directory.

    %(prog)s --mixture v2 --tokenizer 3b_v2 --output data \\
        --source refinedweb='refinedweb/*.parquet' \\
        --source starcoder='starcoder/**/*.parquet' \\
        --source wikipedia=redpajama/wikipedia --source arxiv=redpajama/arxiv

PATHS is a file, a quoted glob pattern, a directory, or tfds:NAME[/CONFIG][@SPLIT] for a
dataset of TensorFlow Datasets. A source may be given several times. File formats are
JSON lines (.jsonl, .json, optionally .gz or .zst), Parquet, and text: in a directory
without any of these formats, each file is a document. Paths and the output may be
remote (gs://bucket/...).

Each document is tokenized once, between <s> and </s>. Damaged documents are skipped and
counted; a damaged file is an error. A fraction of the documents, chosen by the hash of
their text, is held out for validation. Running the same command again resumes an
interrupted one. A later command can add sources.

On one machine, all cores are used. To use several, give the flags of an Apache Beam
runner after a double dash:

    %(prog)s --source ... --output gs://bucket/data -- \\
        --runner=DataflowRunner --project=PROJECT --region=REGION \\
        --temp_location=gs://bucket/tmp --sdk_container_image=IMAGE_WITH_KERAS_OPENLLAMA

Inspect the result with: {PROGRAM} inspect-data data
"""


def parse_arguments(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    """Parses the arguments of the command, `beam_flags` included."""
    parser = CommandParser(
        prog,
        argument_names={"unit_bytes": "--shard-bytes"},
        description=DESCRIPTION,
        usage="%(prog)s --source NAME=PATHS ... --tokenizer PRESET|DIR --output DIR "
        "[options] [-- BEAM FLAGS]",
    )
    parser.add_argument(
        "--source",
        action="append",
        required=True,
        metavar="NAME=PATHS",
        help="name of a source and the paths of its text; may be given several times",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="PRESET|DIR",
        help="a preset such as open_llama_3b_v2 or open_llama_nano, a directory with "
        "a tokenizer.model, such as the output of `train-tokenizer`, or that file",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="directory to write"
    )
    add_source_options(parser, without_mixture="proportional to the number of tokens")
    parser.add_argument(
        "--validation-fraction",
        type=types.share,
        default=0.001,
        metavar="FRACTION",
        help="fraction of the documents to hold out (default: %(default)s)",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=types.number_of_bytes,
        default=MAX_DOCUMENT_BYTES,
        metavar="SIZE",
        help="maximum size of a document; longer ones are skipped (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--shard-bytes",
        type=types.number_of_bytes,
        default=UNIT_BYTES,
        metavar="SIZE",
        help="input bytes of a shard, if its file can be split (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=types.positive_int,
        metavar="N",
        help="number of processes on this machine (default: one per core)",
    )
    own_arguments, has_dashes, beam_flags = _split_at_dashes(arguments)
    options = parser.parse_args(own_arguments)
    if has_dashes and not beam_flags:
        parser.error(
            "No arguments after the double dash. Give the flags of a Beam runner, or "
            "remove the dash."
        )
    options.beam_flags = beam_flags
    return options


def _split_at_dashes(arguments):
    if "--" not in arguments:
        return arguments, False, []
    index = arguments.index("--")
    return arguments[:index], True, arguments[index + 1 :]


def check_inputs(
    options: argparse.Namespace, sources: Mapping[str, Sequence[str]]
) -> None:
    """Raises an error for a missing file, tokenizer or mixture, before slow imports.

    Args:
        options: The parsed arguments.
        sources: Paths by source, as `parse_sources` returns them.

    Raises:
        ValueError: If the tokenizer or the mixture does not exist.
        SourceError: If a local path does not exist.
    """
    if options.tokenizer.endswith(".model") and not is_remote(options.tokenizer):
        require_file("--tokenizer", options.tokenizer)
    elif not is_remote(options.tokenizer):
        require_preset("--tokenizer", options.tokenizer, tokenizer=True)
    if options.mixture:
        from keras_openllama.data.mixture import load_mixture

        load_mixture(options.mixture)
    for name, paths in sources.items():
        for path in paths:
            is_path = not path.startswith("tfds:") and not glob.has_magic(path)
            if is_path and not is_remote(path) and not os.path.exists(path):
                find_units(name, [path])  # Raises the error.


@command("prepare-data", extra="train")
def main(arguments: list[str], prog: str) -> int | None:
    """Runs the command."""
    options = parse_arguments(arguments, prog)
    logging.basicConfig(format="%(message)s", force=True)
    # Suppresses the messages of TensorFlow Datasets.
    logging.getLogger("absl").setLevel(logging.ERROR)
    require_output_directory("--output", options.output)
    sources = parse_sources(options.source)
    fields = {
        name: field
        for name, fields in parse_sources(options.text_field).items()
        for field in fields
    }
    check_inputs(options, sources)
    from keras_openllama.data.preparation import prepare_dataset

    try:
        data = prepare_dataset(
            sources,
            options.tokenizer,
            options.output,
            mixture=options.mixture,
            text_fields=fields,
            workers=options.workers,
            beam_flags=options.beam_flags,
            unit_bytes=options.shard_bytes,
            validation_fraction=options.validation_fraction,
            max_skipped=options.max_skipped,
            max_document_bytes=options.max_document_bytes,
        )
    except RuntimeError as error:  # Beam: an unknown runner, or one that failed.
        raise ValueError(str(error)) from error
    tokens = sum(data.split_info(name, "train")["tokens"] for name in data.sources)
    print(f"{options.output} has {tokens:,} tokens for training. Inspect them with:")
    print(f"    {PROGRAM} inspect-data {options.output}")
