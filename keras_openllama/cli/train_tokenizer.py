"""`keras-openllama train-tokenizer`: trains a SentencePiece tokenizer."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras_openllama
from keras_openllama.cli import arguments as types
from keras_openllama.cli.command import CommandParser, command
from keras_openllama.cli.paths import require_output_directory
from keras_openllama.cli.process import PROGRAM
from keras_openllama.cli.source_options import add_source_options
from keras_openllama.config import TOKENIZER_STYLES
from keras_openllama.data import document_reader, text_sources
from keras_openllama.utils import files

if TYPE_CHECKING:
    from keras_openllama.data.tokenizer_training import DocumentSample

DESCRIPTION = """\
Train a tokenizer like OpenLLaMA's: SentencePiece BPE with byte fallback.

    %(prog)s --output tokenizers/mine --mixture v2 \\
        --input refinedweb='refinedweb/*.parquet' \\
        --input starcoder='starcoder/**/*.parquet' wikipedia=redpajama/wikipedia

SOURCE is NAME=PATHS as in `prepare-data`, or PATHS alone for the source `text`. PATHS
is a file, a quoted glob pattern, a directory, or tfds:NAME[/CONFIG][@SPLIT] for a data
set of TensorFlow Datasets. File formats are JSON lines (.jsonl, .json, optionally .gz
or .zst), Parquet, and text: in a directory without any of these formats, each file is a
document.

The command reads the whole input once and trains on a random sample of its documents.
The weights of --mixture divide --sample-bytes among the sources; without it, they get
equal parts. The same documents and the same --seed give the same tokenizer, whatever
the order of files and the number of cores. One in 50 documents of the sample is held
out, to report the bytes per token.

--style v1 merges consecutive spaces, which makes it unsuitable for code; v2 preserves
them.

Training on 1 GB takes about five minutes and 8 GB of memory on two cores. It writes
tokenizer.model, tokenizer.vocab (one piece per line), report.json and report.png.
"""

MODEL_FILE = "tokenizer.model"


def parse_arguments(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    """Parses the arguments of the command."""
    parser = CommandParser(
        prog,
        argument_names={"vocabulary_size": "--vocab-size"},
        description=DESCRIPTION,
        usage="%(prog)s --input SOURCE ... --output DIR [options]",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="SOURCE",
        help="NAME=PATHS or PATHS; may be given several times, also for one source",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="directory to write"
    )
    parser.add_argument(
        "--vocab-size",
        type=types.positive_int,
        default=32_000,
        metavar="N",
        help="number of pieces (default: %(default)s)",
    )
    parser.add_argument(
        "--style",
        choices=TOKENIZER_STYLES,
        default="v2",
        help="whether to merge (v1) or preserve (v2) consecutive spaces (default: "
        "%(default)s)",
    )
    add_source_options(parser, without_mixture="equal")
    parser.add_argument(
        "--sample-bytes",
        type=types.number_of_bytes,
        default=10**9,
        metavar="SIZE",
        help="text to train on, such as 500M (default: 1G)",
    )
    parser.add_argument(
        "--seed",
        type=types.run_seed,
        default=0,
        metavar="N",
        help="seed of the random sample (default: %(default)s)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the tokenizer in DIR"
    )
    return parser.parse_args(arguments)


def parse_inputs(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Parses sources as `parse_sources`; PATHS without NAME= are source `text`.

    Example:
        >>> parse_inputs(["books.txt", "code=src", "more.txt"])
        {'text': ['books.txt', 'more.txt'], 'code': ['src']}
    """
    return text_sources.parse_sources(
        [
            argument if re.match(r"[^/=]*=", argument) else f"text={argument}"
            for argument in arguments
        ]
    )


def create_output(output: str, force: bool) -> None:
    """Creates the output directory, before hours of reading.

    Raises:
        ValueError: If it contains a tokenizer and `force` is not set.
    """
    if files.exists(files.join(output, MODEL_FILE)) and not force:
        raise ValueError(
            f"{output} already contains {MODEL_FILE}. Choose another --output, or "
            "replace it with --force."
        )
    files.make_directory(output)


def plan_reading(
    options: argparse.Namespace,
) -> tuple[dict[str, float] | None, dict[str, str | None], dict[str, list[Any]]]:
    """Returns what to read.

    Args:
        options: The parsed arguments.

    Returns:
        The weights by source (`None` without `--mixture`), the fields with the text by
        source, and the `text_sources.Unit`s of input by source.

    Raises:
        ValueError: If `--text-field` names a source that `--input` does not.
    """
    specs = parse_inputs(options.input)
    fields = {
        name: given[-1] for name, given in parse_inputs(options.text_field).items()
    }
    if unknown := sorted({*fields} - {*specs}):
        raise ValueError(
            f"--text-field names {', '.join(unknown)}, which are not sources of "
            f"--input. Sources: {', '.join(specs)}."
        )
    weights = None
    if options.mixture:
        from keras_openllama.data import mixture as mixtures

        mixture = mixtures.load_mixture(options.mixture).restricted_to(specs)
        weights = mixture.weights_at(0)
        fields = {
            name: fields.get(name, mixture.sources.get(name, {}).get("text_field"))
            for name in specs
        }
    units = {name: text_sources.find_units(name, specs[name]) for name in sorted(specs)}
    return weights, fields, units


def read_sample(options: argparse.Namespace) -> dict[str, DocumentSample]:
    """Reads all sources and prints their size; returns the sample of each source."""
    from keras_openllama.data import tokenizer_training as training
    from keras_openllama.utils.progress import progress_bar

    weights, fields, units = plan_reading(options)
    total = sum(unit.num_bytes for parts in units.values() for unit in parts)
    print(f"Reading {total / 1e6:,.1f} MB: {', '.join(units)}", flush=True)
    with progress_bar("Reading", total) as bar:
        documents = {
            name: (
                document
                for unit in parts
                for document in document_reader.read_documents(
                    unit, fields.get(name), progress=bar.update
                )
            )
            for name, parts in units.items()
        }
        samples = training.sample_documents(
            documents,
            weights,
            options.sample_bytes,
            options.seed,
            options.max_skipped,
        )
    for name, sample in samples.items():
        print(describe_sample(name, sample), flush=True)
    return samples


def describe_sample(name: str, sample: DocumentSample) -> str:
    """Describes the sample of a source in one or more lines."""
    size = sample.to_json()
    training_bytes = size["training"]["bytes"] / 1e6
    text = (
        f"{name}: {sample.documents:,} documents, {sample.num_bytes / 1e6:,.2f} MB; "
        f"{size['training']['documents']:,} for training, {training_bytes:,.2f} MB; "
        f"{size['held_out']['documents']:,} held out"
    )
    if sample.num_bytes < sample.share:
        text += f"; less than its share of the sample, {sample.share / 1e6:,.0f} MB"
    for reason, count in sample.skipped.items():
        text += f"\n{name}: {count:,} documents skipped: {reason}"
    return text


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Lets Ctrl-C end the process immediately, without waiting for SentencePiece."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def train_tokenizer(options: argparse.Namespace) -> None:
    """Reads the sample, trains the tokenizer and writes the directory."""
    from keras_openllama.data import tokenizer_report as reporting
    from keras_openllama.data import tokenizer_training as training

    training.check_vocabulary_size(options.vocab_size)
    create_output(options.output, options.force)
    samples = read_sample(options)
    size = sum(sample.to_json()["training"]["bytes"] for sample in samples.values())
    print(
        f"SentencePiece trains {options.vocab_size:,} pieces on {size / 1e6:,.1f} MB. "
        "It prints nothing until it is done; 1 GB takes some minutes.",
        flush=True,
    )
    with interruptible():
        proto = training.train_sentencepiece(
            training.training_lines(samples), options.vocab_size, options.style
        )
    report = {
        "keras_openllama": keras_openllama.__version__,
        "vocabulary_size": options.vocab_size,
        "style": options.style,
        "mixture": options.mixture,
        "sample_bytes": options.sample_bytes,
        "seed": options.seed,
        "sources": {name: sample.to_json() for name, sample in samples.items()},
        **reporting.measure_tokenizers(
            samples, {"this tokenizer": proto, **reporting.installed_tokenizers()}
        ),
    }
    print("\n" + reporting.format_table(report), flush=True)
    # The model is written last, so that it implies that the other files exist.
    for name, data in {
        "tokenizer.vocab": training.format_vocabulary(proto).encode(),
        "report.json": (json.dumps(report, indent=1) + "\n").encode(),
        "report.png": reporting.draw_chart(report),
        MODEL_FILE: proto,
    }.items():
        files.write_bytes(files.join(options.output, name), data)


@command("train-tokenizer", extra="train")
def main(arguments: list[str], prog: str) -> int | None:
    """Runs the command."""
    options = parse_arguments(arguments, prog)
    require_output_directory("--output", options.output)
    train_tokenizer(options)
    path = files.join(options.output, MODEL_FILE)
    print(f"Wrote the tokenizer and its report to {options.output}. Use it with:")
    print(f"    {PROGRAM} prepare-data --tokenizer {options.output} ...")
    print(f'    OpenLlamaTokenizer("{path}")')
