"""What `prepare-data` and `train-tokenizer` share: flags about sources of text."""


def add_source_options(parser, without_mixture):
    """Adds `--mixture`, `--text-field` and `--max-skipped`.

    Args:
        parser: `CommandParser`.
        without_mixture: string, what the weights are without `--mixture`.
    """
    parser.add_argument(
        "--mixture",
        metavar="v1|v2|FILE",
        help="weights of the sources: a name, or a JSON file as in presets/mixtures; "
        f"its sources that are not given are left out (default: {without_mixture})",
    )
    parser.add_argument(
        "--text-field",
        action="append",
        default=[],
        metavar="NAME=FIELD",
        help="field of a source that holds the text (default: the mixture's, else "
        "text or content)",
    )
    parser.add_argument(
        "--max-skipped",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of damaged documents above which the source is refused (default: "
        "%(default)s)",
    )
