"""`keras-openllama inspect-data`: shows the contents of a prepared dataset."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from keras_openllama.cli import arguments as types
from keras_openllama.cli.command import CommandParser, add_renamed_argument, command
from keras_openllama.cli.paths import require_directory, require_output_file
from keras_openllama.config import PACKINGS

if TYPE_CHECKING:
    from keras_openllama.data.prepared_data import PreparedData

DESCRIPTION = """\
Show the contents of a dataset that `prepare-data` wrote.

    %(prog)s data                 # print the manifest, and draw a plot
    %(prog)s data --step 1000     # decode the batch of step 1000
    %(prog)s data --verify        # verify the checksum of every shard

Prints the documents and tokens of each source and what was skipped, decodes a batch
with the boundaries of its documents, and draws the target and the actual mixture and
the lengths of the documents into DIRECTORY's name with .png (--picture).
"""


def parse_arguments(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    """Parses the arguments of the command."""
    parser = CommandParser(prog, description=DESCRIPTION)
    parser.add_argument(
        "directory", metavar="DIRECTORY", help="the output directory of `prepare-data`"
    )
    parser.add_argument(
        "--step",
        type=types.non_negative_int,
        action="append",
        metavar="K",
        help="decode the batch of this step; may be given several times (default: 0)",
    )
    add_renamed_argument(
        parser,
        "--rows",
        "--batch-size",
        type=types.positive_int,
        default=4,
        metavar="N",
        help="sequences of a batch (default: %(default)s)",
    )
    parser.add_argument(
        "--sequence-length",
        type=types.positive_int,
        default=2048,
        metavar="TOKENS",
        help="tokens of a sequence (default: %(default)s)",
    )
    parser.add_argument(
        "--packing",
        choices=PACKINGS,
        default=PACKINGS[0],
        help="concatenate documents and split them, or pack them by best fit (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--mask-documents",
        action="store_true",
        help="restrict attention to the document of each token",
    )
    parser.add_argument(
        "--seed",
        type=types.run_seed,
        default=0,
        help="seed of the run (default: %(default)s)",
    )
    parser.add_argument(
        "--mixture",
        metavar="v1|v2|FILE",
        help="weights of the sources (default: the mixture of the dataset)",
    )
    parser.add_argument(
        "--split",
        choices=("train", "validation"),
        default="train",
        help="split to decode batches of (default: %(default)s)",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE.png",
        help="file of the plot (default: DIRECTORY's name with .png, in the current "
        "directory)",
    )
    parser.add_argument(
        "--sampled-steps",
        type=types.positive_int,
        default=200,
        metavar="N",
        help="number of steps over which the actual mixture is measured (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every shard and verify its SHA-256 checksum",
    )
    return parser.parse_args(arguments)


def verify_checksums(data: PreparedData) -> None:
    """Reads every file and verifies its checksum."""
    from keras_openllama.utils.progress import progress_bar

    total = sum(size for _, size, _ in data.iter_files())
    with progress_bar("Verifying", total) as bar:
        data.verify_checksums(bar.update)
    print(
        f"\nThe checksums of all {sum(1 for _ in data.iter_files())} files are correct."
    )


def show_batches(data: PreparedData, options: argparse.Namespace) -> None:
    """Prints batches and the mixture, and draws the plot."""
    from keras_openllama.data import inspection
    from keras_openllama.data import mixture as mixtures
    from keras_openllama.data.token_stream import TokenStream
    from keras_openllama.text.sentencepiece_model import load_processor

    stream = TokenStream(
        data,
        options.sequence_length,
        options.batch_size,
        seed=options.seed,
        mixture=mixtures.load_mixture(options.mixture) if options.mixture else None,
        packing=options.packing,
        mask_documents=options.mask_documents,
        split=options.split,
        process_count=1,
        process_index=0,
    )
    processor = load_processor(data.tokenizer_proto(), data.directory)
    steps = options.step or [0]
    for step in steps:
        print("\n" + inspection.describe_batch(stream, step, processor))
    actual = inspection.measure_mixture(stream, steps[0], options.sampled_steps)
    print(f"\nMixture of the tokens of {options.sampled_steps} steps, and its target:")
    for name, share in actual.items():
        target = stream.mixture.weights_at(steps[0]).get(name, 0)
        print(f"    {name:<16}{share:>8.2%}{target:>9.2%}")
    inspection.draw_overview(stream, actual, steps[0], options.picture)
    print(f"\nPlot: {options.picture}")


@command("inspect-data", extra="train")
def main(arguments: list[str], prog: str) -> int | None:
    """Runs the command."""
    options = parse_arguments(arguments, prog)
    require_directory("DIRECTORY", options.directory)
    if options.picture is None:
        options.picture = Path(f"{Path(options.directory).resolve().name}.png")
    if not options.verify:
        from keras_openllama.utils.plots import FORMATS

        require_output_file("--picture", options.picture, FORMATS)
    logging.basicConfig(format="%(message)s", force=True)
    from keras_openllama.data.prepared_data import PreparedData

    data = PreparedData.open(options.directory)
    from keras_openllama.data.inspection import format_manifest

    print(format_manifest(data))
    if options.verify:
        verify_checksums(data)
    else:
        show_batches(data, options)
