"""Flags of `prepare-data` and `train-tokenizer` about text sources."""

from __future__ import annotations

import argparse

from keras_openllama.cli import arguments as types


def add_source_options(parser: argparse.ArgumentParser, without_mixture: str) -> None:
    """Adds `--mixture`, `--text-field` and `--max-skipped`.

    Args:
        parser: Parser of the command.
        without_mixture: The default weights, for `--help`.
    """
    parser.add_argument(
        "--mixture",
        metavar="v1|v2|FILE",
        help="weights of the sources: a name, or a JSON file like those of "
        "presets/mixtures. Sources of the mixture that are not given are ignored "
        f"(default: {without_mixture})",
    )
    parser.add_argument(
        "--text-field",
        action="append",
        default=[],
        metavar="NAME=FIELD",
        help="field with the text of a source's documents (default: the field that the "
        "mixture names, else text or content)",
    )
    parser.add_argument(
        "--max-skipped",
        type=types.share,
        default=0.01,
        metavar="SHARE",
        help="largest accepted fraction of damaged documents in a source; with more, "
        "the command fails (default: %(default)s)",
    )
