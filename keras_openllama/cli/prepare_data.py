"""`keras-openllama prepare-data`: tokenizes text into a data set to train on."""

import logging

from keras_openllama.cli.command import CommandParser, command
from keras_openllama.cli.process import PROGRAM
from keras_openllama.cli.source_options import add_source_options
from keras_openllama.data.document_reader import MAX_DOCUMENT_BYTES
from keras_openllama.data.text_sources import UNIT_BYTES, parse_sources

DESCRIPTION = f"""\
Prepare data to train on: tokenize sources of text into a directory.

    %(prog)s --mixture v2 --tokenizer 3b_v2 --output data \\
        --source refinedweb='refinedweb/*.parquet' \\
        --source starcoder='starcoder/**/*.parquet' \\
        --source wikipedia=redpajama/wikipedia --source arxiv=redpajama/arxiv

PATHS is a file, a pattern in quotes, a directory, or tfds:NAME[/CONFIG][@SPLIT] for a
data set of TensorFlow Datasets; --source may name the same source several times. Read
are JSON lines (.jsonl, .json, plain or .gz or .zst), Parquet, and text: in a directory
without any of these each file is a document. Paths may be remote (gs://bucket/...),
the output too.

Each document is tokenized once, between <s> and </s>. Damaged documents are skipped and
counted; a damaged file is refused by name. A share of the documents, chosen by the hash
of their text, is set aside for validation. What a run that was interrupted has finished
is kept: run the same command again. Sources can be added by a later command.

One machine uses all its cores. More than one: give any flags of an Apache Beam runner
behind a double dash, such as

    %(prog)s --source ... --output gs://bucket/data -- \\
        --runner=DataflowRunner --project=PROJECT --region=REGION \\
        --temp_location=gs://bucket/tmp --sdk_container_image=IMAGE_WITH_KERAS_OPENLLAMA

Look at the result: {PROGRAM} inspect-data data
"""


def parse_arguments(arguments, prog):
    """The options of the command line, with `beam_flags`."""
    parser = CommandParser(
        prog,
        description=DESCRIPTION,
        usage="%(prog)s --source NAME=PATHS ... --tokenizer PRESET|DIR --output DIR "
        "[options] [-- BEAM FLAGS]",
    )
    parser.add_argument(
        "--source",
        action="append",
        required=True,
        metavar="NAME=PATHS",
        help="a source and where its text is; may be given several times",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="PRESET|DIR",
        help="a preset such as open_llama_3b_v2 or open_llama_nano, a directory with "
        "a tokenizer.model (`train-tokenizer` writes one), or such a file",
    )
    parser.add_argument("--output", required=True, help="directory to write")
    add_source_options(parser, without_mixture="by number of tokens")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.001,
        metavar="SHARE",
        help="share of the documents that is set aside (default: %(default)s)",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=int,
        default=MAX_DOCUMENT_BYTES,
        metavar="BYTES",
        help="longer documents are skipped (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-bytes",
        type=int,
        default=UNIT_BYTES,
        metavar="BYTES",
        help="input that becomes one shard, where a file can be divided (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes on this machine (default: one for each core)",
    )
    own, dashes, beam_flags = _split_at_dashes(arguments)
    options = parser.parse_args(own)
    if dashes and not beam_flags:
        parser.error("Nothing follows the double dash. Give flags of a Beam runner.")
    options.beam_flags = beam_flags
    return options


def _split_at_dashes(arguments):
    if "--" not in arguments:
        return arguments, False, []
    place = arguments.index("--")
    return arguments[:place], True, arguments[place + 1 :]


@command("prepare-data", extra="train")
def main(arguments, prog):
    """Runs the command; returns the exit code."""
    options = parse_arguments(arguments, prog)
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)  # TensorFlow Datasets' chatter.
    sources = parse_sources(options.source)
    fields = {
        name: field
        for name, fields in parse_sources(options.text_field).items()
        for field in fields
    }
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
    except RuntimeError as error:  # Of Beam: a runner that there is not, or failed.
        raise ValueError(str(error)) from error
    tokens = sum(data.split_info(name, "train")["tokens"] for name in data.sources)
    print(f"{tokens:,} tokens to train on are in {options.output}. Look at them with:")
    print(f"    {PROGRAM} inspect-data {options.output}")
