"""`keras-openllama train-tokenizer`: a SentencePiece tokenizer like OpenLLaMA's."""

import argparse
import contextlib
import json
import re
import signal

import keras_openllama
from keras_openllama.cli.command import CommandParser, command
from keras_openllama.cli.process import PROGRAM
from keras_openllama.cli.source_options import add_source_options
from keras_openllama.config import TOKENIZER_STYLES
from keras_openllama.data import document_reader, text_sources
from keras_openllama.utils import files

DESCRIPTION = """\
Train a tokenizer: SentencePiece BPE with byte fallback, laid out as OpenLLaMA's.

    %(prog)s --output tokenizers/mine --mixture v2 \\
        --input refinedweb='refinedweb/*.parquet' \\
        --input starcoder='starcoder/**/*.parquet' wikipedia=redpajama/wikipedia

SOURCE is NAME=PATHS as in `prepare-data`, or PATHS alone, which is then the source
`text`. PATHS is a file, a pattern in quotes, a directory, or tfds:NAME[/CONFIG][@SPLIT]
for a data set of TensorFlow Datasets. Read are JSON lines (.jsonl, .json, plain or .gz
or .zst), Parquet, and text: in a directory without any of these each file is a
document.

The whole input is read once, and a random sample of its documents is trained on: of
each source as many bytes of --sample-bytes as its weight in --mixture says, evenly
without one. The same documents and the same --seed give the same tokenizer, whatever
the order of files and the number of cores. One document in 50 of the sample is held
out, to report bytes per token on.

--style v1 merges runs of spaces into one, so it is unfit for code; v2 keeps them.

Training on 1 GB takes about five minutes on two cores, and 8 GB of memory. DIR then has
tokenizer.model, tokenizer.vocab (the pieces, a line each), report.json and report.png.
"""

MODEL_FILE = "tokenizer.model"
_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def number_of_bytes(text):
    """`"500M"` as 500,000,000: bytes with one of the suffixes k, M and G, or none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)b?", text.strip(), re.IGNORECASE)
    number = int(float(match[1]) * _MULTIPLES[match[2].lower()]) if match else 0
    if number < 1:
        raise argparse.ArgumentTypeError(
            f"takes a number of bytes such as 1G, 500M or 20000, not {text!r}"
        )
    return number


def parse_arguments(arguments, prog):
    """The options of the command line."""
    parser = CommandParser(
        prog,
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
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=32_000,
        metavar="N",
        help="number of pieces (default: %(default)s)",
    )
    parser.add_argument(
        "--style",
        choices=TOKENIZER_STYLES,
        default="v2",
        help="whether runs of spaces are merged or kept (default: %(default)s)",
    )
    add_source_options(parser, without_mixture="all the same")
    parser.add_argument(
        "--sample-bytes",
        type=number_of_bytes,
        default=10**9,
        metavar="SIZE",
        help="text to train on, such as 500M (default: 1G)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="another number draws another sample (default: %(default)s)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the tokenizer that DIR has"
    )
    return parser.parse_args(arguments)


def named(arguments):
    """`text_sources.parse_sources`, where PATHS without NAME= are the source `text`."""
    return text_sources.parse_sources(
        [
            argument if re.match(r"[^/=]*=", argument) else f"text={argument}"
            for argument in arguments
        ]
    )


def make_room(output, force):
    """Makes the directory before hours of reading, and refuses one in use."""
    if files.exists(files.join(output, MODEL_FILE)) and not force:
        raise ValueError(
            f"{output} has a {MODEL_FILE} already. Choose another --output, or replace "
            "it with --force."
        )
    files.make_directory(output)


def plan(options):
    """What to read: weights, or `None`, and fields and units, dicts by source."""
    specs = named(options.input)
    fields = {name: given[-1] for name, given in named(options.text_field).items()}
    if unknown := sorted({*fields} - {*specs}):
        raise ValueError(
            f"--text-field names {', '.join(unknown)}, which --input does not. Its "
            f"sources: {', '.join(specs)}."
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


def read_sample(options):
    """Reads all sources, and says what was kept: dict of `Sample` by source."""
    from keras_openllama.data import tokenizer_training as training
    from keras_openllama.utils.progress import progress_bar

    weights, fields, units = plan(options)
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
    for name, kept in samples.items():
        print(describe(name, kept), flush=True)
    return samples


def describe(name, kept):
    """A line or more on what was kept of a source."""
    size = kept.to_json()
    training_bytes = size["training"]["bytes"] / 1e6
    text = (
        f"{name}: {kept.documents:,} documents, {kept.num_bytes / 1e6:,.2f} MB; "
        f"{size['training']['documents']:,} to train on, {training_bytes:,.2f} MB; "
        f"{size['held_out']['documents']:,} held out"
    )
    if kept.num_bytes < kept.share:
        text += f"; its share of the sample would be {kept.share / 1e6:,.0f} MB"
    for reason, count in kept.skipped.items():
        text += f"\n{name}: {count:,} documents skipped: {reason}"
    return text


@contextlib.contextmanager
def interruptible():
    """Lets Ctrl-C end the process at once: Python would wait for SentencePiece."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def train(options):
    """Reads, trains, reports, and writes the directory."""
    from keras_openllama.data import tokenizer_report as reporting
    from keras_openllama.data import tokenizer_training as training

    training.check_vocabulary_size(options.vocab_size)
    make_room(options.output, options.force)
    samples = read_sample(options)
    size = sum(kept.to_json()["training"]["bytes"] for kept in samples.values())
    print(
        f"SentencePiece trains {options.vocab_size:,} pieces on {size / 1e6:,.1f} MB. "
        "It says nothing until it is done; a GB takes some minutes.",
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
        "sources": {name: kept.to_json() for name, kept in samples.items()},
        **reporting.measure_tokenizers(
            samples, {"this tokenizer": proto, **reporting.installed_tokenizers()}
        ),
    }
    print("\n" + reporting.format_table(report), flush=True)
    # The model comes last: where it is, the rest is.
    for name, data in {
        "tokenizer.vocab": training.format_vocabulary(proto).encode(),
        "report.json": (json.dumps(report, indent=1) + "\n").encode(),
        "report.png": reporting.draw_chart(report),
        MODEL_FILE: proto,
    }.items():
        files.write_bytes(files.join(options.output, name), data)


@command("train-tokenizer", extra="train")
def main(arguments, prog):
    """Runs the command; returns the exit code."""
    options = parse_arguments(arguments, prog)
    train(options)
    path = files.join(options.output, MODEL_FILE)
    print(f"{options.output} has the tokenizer and the report. Use it:")
    print(f"    {PROGRAM} prepare-data --tokenizer {options.output} ...")
    print(f'    OpenLlamaTokenizer("{path}")')
