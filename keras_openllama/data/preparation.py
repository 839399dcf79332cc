"""Preparing a data set: sources in, tokenized shards and a manifest out."""

import contextlib
import hashlib
import json

from tqdm import tqdm

import keras_openllama
from keras_openllama.data import mixture as mixtures
from keras_openllama.data.dataset_builder import (
    SUMMARY_FILE,
    UNFINISHED,
    Tokens,
    fingerprint,
    source_directory,
)
from keras_openllama.data.prepared_data import (
    FORMAT,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    PreparedData,
    read_manifest,
)
from keras_openllama.data.text_sources import SourceError, units
from keras_openllama.data.tokenizing import Settings, processor_of
from keras_openllama.loading.load import find_source
from keras_openllama.text.sentencepiece_model import keeps_spaces
from keras_openllama.utils import files, locks

_BY_TOKENS = "by tokens"  # Name of the mixture where none was chosen.


def prepare(
    sources,
    tokenizer,
    output,
    mixture=None,
    text_fields=None,
    workers=None,
    beam_flags=None,
    report=print,
    unit_bytes=None,
    **settings,
):
    """Tokenizes sources into a directory that training reads from.

    What an interrupted run has finished is kept: the same call goes on from there.
    Sources can be added to a finished directory by another call.

    Args:
        sources: dict by name of lists of specs, see `text_sources.units`.
        tokenizer: string, a preset, a directory with a `tokenizer.model`, or a
            SentencePiece file.
        output: string, directory to write, local or remote.
        mixture: string, `"v1"`, `"v2"` or the path of a JSON file. `None` weighs each
            source by its tokens.
        text_fields: dict by source of the field that holds the text. The mixture's
            unless given.
        workers: int, processes on this machine. Defaults to all cores.
        beam_flags: list of strings for another runner of Beam's, see
            `beam_pipeline.run`.
        report: called with lines of text.
        unit_bytes: int, input that becomes one shard, see `text_sources.units`.
        **settings: arguments of `tokenizing.Settings`.

    Returns:
        `prepared_data.PreparedData`.

    Raises:
        SourceError: if a source cannot be had, or is damaged; the rest is finished.
        ValueError: if `output` holds other data, or an argument is wrong.
        OSError: if it cannot be written.

    Example:

    ```python
    prepare({"wikipedia": ["wiki*.jsonl.gz"]}, "open_llama_3b_v2", "data")
    ```
    """
    for name, value in (("workers", workers), ("unit_bytes", unit_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is a number from 1 on. Received: {value}")
    proto = tokenizer_proto(tokenizer)
    processor_of(proto)  # Raises where it is none, before anything is written.
    known = mixtures.load(mixture) if mixture else None
    text_fields = dict(text_fields or {})
    before = read_manifest(output) if _has_manifest(output) else None
    if before and known is None and before["mixture"]["name"] != _BY_TOKENS:
        known = mixtures.from_json(before["mixture"])
    _check_names(sources, before, known, text_fields)
    plans = {}
    for name, specs in sources.items():
        about = known.sources.get(name, {}) if known else {}
        plans[name] = (
            units(name, specs, **({"unit_bytes": unit_bytes} if unit_bytes else {})),
            Settings(proto, text_fields.get(name, about.get("text_field")), **settings),
        )
    with _locked(output):
        _put_tokenizer(output, proto)
        damaged = []
        for name, (parts, options) in plans.items():
            size = sum(unit.num_bytes for unit in parts)
            report(
                f"{name}: {tqdm.format_sizeof(size)}B of input in {len(parts)} parts"
            )
            try:
                _prepare_source(output, parts, options, workers, beam_flags, report)
            except SourceError as error:
                damaged.append(str(error))
        if damaged:
            raise SourceError("\n".join(damaged))
        _write_manifest(output, proto, known, plans, before)
        if files.exists(unfinished := files.join(output, UNFINISHED)):
            files.remove_directory(unfinished)
    return PreparedData.open(output)


def tokenizer_proto(tokenizer):
    """The bytes of the SentencePiece model that a preset, directory or file has.

    Raises:
        ValueError, OSError: if there is none.
    """
    tokenizer = str(tokenizer)
    inside = files.join(tokenizer, TOKENIZER_FILE)
    if files.is_directory(tokenizer) and files.exists(inside):
        return files.read_bytes(inside)
    if tokenizer.endswith(".model"):
        return files.read_bytes(tokenizer)
    return files.read_bytes(find_source(tokenizer).tokenizer_file())


def _check_names(sources, before, mixture, text_fields):
    if not sources:
        raise SourceError("No source was given. Give at least one: NAME=PATHS.")
    unknown = sorted({*text_fields} - {*sources})
    if unknown:
        raise ValueError(
            f"A text field was given for {', '.join(map(repr, unknown))}, which is no "
            f"source of this call: {', '.join(sources)}."
        )
    if mixture:
        mixture.restricted_to({*sources, *(before["sources"] if before else ())})


@contextlib.contextmanager
def _locked(output):
    """One process at a time, as far as one machine can tell."""
    files.make_directory(output)
    if files.is_remote(output):
        yield
        return
    busy = OSError(
        f"Another process is preparing data in {output}. Wait for it, or choose "
        "another directory."
    )
    with locks.locked(output, busy):
        yield


def _put_tokenizer(output, proto):
    path = files.join(output, TOKENIZER_FILE)
    if not files.exists(path):
        files.write_bytes(path, proto)
        return
    there, wanted = (
        hashlib.sha256(data).hexdigest()
        for data in (
            files.read_bytes(path),
            proto,
        )
    )
    if there != wanted:
        raise ValueError(
            f"{output} was prepared with another tokenizer (SHA-256 {there[:12]}…, not "
            f"{wanted[:12]}…). Choose another --output, or remove it."
        )


def _prepare_source(output, parts, settings, workers, beam_flags, report):
    name = parts[0].source
    directory = source_directory(output, name)
    if files.exists(directory):
        summary = json.loads(files.read_bytes(files.join(directory, SUMMARY_FILE)))
        if summary["fingerprint"] != fingerprint(parts, settings):
            raise ValueError(
                f"{directory} was prepared from other files or with other settings. "
                "Choose another --output, or remove it."
            )
        report(f"{name}: is prepared already")
        return
    Tokens(parts, settings, output, workers, beam_flags).prepare()
    summary = json.loads(files.read_bytes(files.join(directory, SUMMARY_FILE)))
    for split, sums in summary["splits"].items():
        report(
            f"{name}: {sums['documents']:,} documents, {sums['tokens']:,} tokens for "
            f"{split}"
        )
    for reason, count in summary["skipped"].items():
        report(f"{name}: {count:,} documents skipped: {reason}")


def _write_manifest(output, proto, mixture, plans, before):
    processor = processor_of(proto)
    sources = dict(before["sources"]) if before else {}
    for name, (_, settings) in plans.items():
        directory = source_directory(output, name)
        summary = json.loads(files.read_bytes(files.join(directory, SUMMARY_FILE)))
        sources[name] = {
            "directory": directory.removeprefix(output.rstrip("/") + "/"),
            "text_field": settings.text_field,
            "validation_fraction": settings.validation_fraction,
            "max_document_bytes": settings.max_document_bytes,
            **summary,
        }
    if mixture is None:
        mixture = mixtures.from_weights(
            {
                name: source["splits"]["train"]["tokens"]
                for name, source in sources.items()
            },
            name=_BY_TOKENS,
        )
    manifest = {
        "format": FORMAT,
        "keras_openllama": keras_openllama.__version__,
        "tokenizer": {
            "file": TOKENIZER_FILE,
            "sha256": hashlib.sha256(proto).hexdigest(),
            "vocabulary_size": processor.vocab_size(),
            "start_token_id": processor.bos_id(),
            "end_token_id": processor.eos_id(),
            "keeps_spaces": keeps_spaces(processor),
        },
        "mixture": mixture.to_json(),
        "sources": sources,
    }
    data = json.dumps(manifest, indent=1).encode()
    files.write_bytes(files.join(output, MANIFEST_FILE), data)


def _has_manifest(output):
    return files.exists(files.join(output, MANIFEST_FILE))
