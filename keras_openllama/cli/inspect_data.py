"""`keras-openllama inspect-data`: what a prepared data set holds."""

import logging
from pathlib import Path

from keras_openllama.cli.command import CommandParser, command
from keras_openllama.config import PACKINGS

DESCRIPTION = """\
Look into data that `prepare-data` has prepared.

    %(prog)s data                 # the manifest, and a picture
    %(prog)s data --step 1000     # what a batch of a run would be
    %(prog)s data --verify        # compare every checksum

Prints what each source holds and what was skipped, decodes a batch with the borders of
its documents, and draws the mixture, wanted and realised, beside the lengths of the
documents, into data.png (--picture).
"""


def parse_arguments(arguments, prog):
    """The options of the command line."""
    parser = CommandParser(prog, description=DESCRIPTION)
    parser.add_argument("directory", help="what `prepare-data` wrote")
    parser.add_argument(
        "--step",
        type=int,
        action="append",
        metavar="K",
        help="decode the batch of this step; may be given several times (default: 0)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=4,
        metavar="N",
        help="rows of a batch (default: %(default)s)",
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        default=2048,
        metavar="TOKENS",
        help="tokens in a row (default: %(default)s)",
    )
    parser.add_argument(
        "--packing",
        choices=PACKINGS,
        default=PACKINGS[0],
        help="join and cut documents, or pack them whole (default: %(default)s)",
    )
    parser.add_argument(
        "--mask-documents",
        action="store_true",
        help="let tokens see their own document only",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--mixture", metavar="v1|v2|FILE", help="in place of the data's own"
    )
    parser.add_argument("--split", choices=("train", "validation"), default="train")
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE.png",
        help="where the picture goes (default: DIRECTORY's name with .png, here)",
    )
    parser.add_argument(
        "--sampled-steps",
        type=int,
        default=200,
        metavar="N",
        help="steps from which the realised mixture is counted (default: %(default)s)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every shard, compare its SHA-256"
    )
    return parser.parse_args(arguments)


def verify(data):
    """Reads every file, and compares its checksum."""
    from keras_openllama.utils.progress import progress_bar

    total = sum(size for _, size, _ in data.iter_files())
    with progress_bar("Verifying", total) as bar:
        data.verify_checksums(bar.update)
    print(f"\nall {sum(1 for _ in data.iter_files())} files are as they were prepared")


def show(data, options):
    """Prints batches and the shares of sources, and draws the picture."""
    from keras_openllama.data import inspection
    from keras_openllama.data import mixture as mixtures
    from keras_openllama.data.token_stream import TokenStream
    from keras_openllama.text.sentencepiece_model import load_processor

    stream = TokenStream(
        data,
        options.sequence_length,
        options.rows,
        seed=options.seed,
        mixture=mixtures.load_mixture(options.mixture) if options.mixture else None,
        packing=options.packing,
        mask_documents=options.mask_documents,
        split=options.split,
        hosts=1,
        host=0,
    )
    processor = load_processor(data.tokenizer_proto(), data.directory)
    steps = options.step or [0]
    for step in steps:
        print("\n" + inspection.describe_batch(stream, step, processor))
    realised = inspection.measure_mixture(stream, steps[0], options.sampled_steps)
    print(f"\nshares of the tokens of {options.sampled_steps} steps, and wanted:")
    for name, share in realised.items():
        wanted = stream.mixture.weights_at(steps[0]).get(name, 0)
        print(f"    {name:<16}{share:>8.2%}{wanted:>9.2%}")
    picture = options.picture or Path(f"{Path(data.directory).resolve().name}.png")
    inspection.draw_overview(stream, realised, steps[0], picture)
    print(f"\ndrawn: {picture}")


@command("inspect-data", extra="train")
def main(arguments, prog):
    """Runs the command; returns the exit code."""
    options = parse_arguments(arguments, prog)
    logging.basicConfig(format="%(message)s", force=True)
    from keras_openllama.data.inspection import format_manifest
    from keras_openllama.data.prepared_data import PreparedData

    data = PreparedData.open(options.directory)
    print(format_manifest(data))
    if options.verify:
        verify(data)
    else:
        show(data, options)
