"""Prepared data for the tests: small documents that name their source."""

import json

from tokenizer_models import trained_model

from keras_openllama.data.preparation import prepare_dataset

SOURCES = ("web", "code", "books")


def texts(source, count):
    """Distinct documents, with lengths that depend on the source."""
    words = {"web": 7, "code": 23, "books": 90}[source]
    return [
        f"{source} {number}: " + "token data " * (1 + number * 13 % words)
        for number in range(count)
    ]


def prepare_sources(directory, counts, mixture=None, **options):
    """Prepares a number of documents of each source.

    Args:
        directory: path; the sources go into it, and the data into its `data`.
        counts: dict of ints by source, of `SOURCES`.
        mixture: dict of weights by source.
        **options: arguments of `prepare_dataset`.

    Returns:
        `PreparedData`.
    """
    specs = {}
    for source, count in counts.items():
        path = directory / f"{source}.jsonl"
        lines = [json.dumps({"text": text}) for text in texts(source, count)]
        path.write_text("\n".join(lines))
        specs[source] = [str(path)]
    tokenizer = directory / "tokenizer.model"
    tokenizer.write_bytes(trained_model(keep_spaces=True))
    if mixture:
        path = directory / "mixture.json"
        sources = {name: {"weight": weight} for name, weight in mixture.items()}
        path.write_text(json.dumps({"name": "test", "sources": sources}))
        options["mixture"] = str(path)
    options = {
        "workers": 1,
        "unit_bytes": 1 << 16,
        "report": lambda line: None,
    } | options
    return prepare_dataset(specs, str(tokenizer), str(directory / "data"), **options)
