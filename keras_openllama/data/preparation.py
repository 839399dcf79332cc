"""Preparation of a dataset: from text sources to tokenized shards and a manifest."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

import keras_openllama
from keras_openllama.data import mixture as mixtures
from keras_openllama.data.dataset_builder import (
    SUMMARY_FILE,
    UNFINISHED,
    TokenDatasetBuilder,
    source_directory,
    source_fingerprint,
)
from keras_openllama.data.prepared_data import (
    FORMAT,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    PreparedData,
    read_manifest,
)
from keras_openllama.data.text_sources import SourceError, find_units, ignored_files
from keras_openllama.data.tokenizing import TokenizationSettings, cached_processor
from keras_openllama.loading.load import find_source
from keras_openllama.text.sentencepiece_model import keeps_spaces
from keras_openllama.utils import files, locks
from keras_openllama.utils.types import PathLike
from keras_openllama.utils.validation import check_integer

_BY_TOKENS = "by tokens"  # Name of the default mixture.
_MAX_LISTED = 10  # Files that a line lists.


def prepare_dataset(
    sources: dict[str, list[str]],
    tokenizer: PathLike,
    output: str,
    mixture: str | None = None,
    text_fields: dict[str, str] | None = None,
    workers: int | None = None,
    beam_flags: list[str] | None = None,
    report: Callable[[str], object] = print,
    unit_bytes: int | None = None,
    **settings: Any,
) -> PreparedData:
    """Tokenizes sources into a dataset for training.

    After an interruption, the same call resumes: it reuses all finished shards. Another
    call can add sources to a finished dataset.

    Args:
        sources: dict by source name of lists of specs, see `text_sources.find_units`.
        tokenizer: a preset, a directory with a `tokenizer.model`, or a SentencePiece
            file.
        output: directory to write, local or remote.
        mixture: `"v1"`, `"v2"` or the path of a JSON file. `None` weights each source
            by its number of tokens.
        text_fields: name of the text field by source. Defaults to those of the mixture.
        workers: number of processes on this machine. Defaults to the number of cores.
        beam_flags: flags for another Beam runner, see `beam_pipeline.tokenize_units`.
        report: called with lines of text.
        unit_bytes: approximate bytes of input per shard, see `text_sources.find_units`.
        **settings: arguments of `tokenizing.TokenizationSettings`.

    Returns:
        The prepared dataset.

    Raises:
        SourceError: if a source is missing or damaged. All other units are finished
            first.
        ValueError: if `output` holds another dataset, or an argument is invalid.
        OSError: if `output` cannot be written.

    Example:
        >>> data = prepare_dataset(
        ...     {"wikipedia": ["wiki*.jsonl.gz"]}, "open_llama_3b_v2", "data"
        ... )  # doctest: +SKIP
    """
    for name, value in (("workers", workers), ("unit_bytes", unit_bytes)):
        if value is not None:
            check_integer(name, value)
    proto = load_tokenizer_proto(tokenizer)
    cached_processor(proto)  # Raises for an invalid model, before writing anything.
    known = mixtures.load_mixture(mixture) if mixture else None
    text_fields = dict(text_fields or {})
    before = read_manifest(output) if _has_manifest(output) else None
    if before and known is None and before["mixture"]["name"] != _BY_TOKENS:
        known = mixtures.mixture_from_json(before["mixture"])
    _check_names(sources, before, known, text_fields)
    plans = {}
    for name, specs in sources.items():
        about = known.sources.get(name, {}) if known else {}
        plans[name] = (
            find_units(
                name,
                specs,
                **({} if unit_bytes is None else {"unit_bytes": unit_bytes}),
            ),
            TokenizationSettings(
                proto, text_fields.get(name, about.get("text_field")), **settings
            ),
        )
    with _locked(output):
        _put_tokenizer(output, proto)
        damaged = []
        for name, (units, options) in plans.items():
            size = sum(unit.num_bytes for unit in units)
            report(
                f"{name}: {tqdm.format_sizeof(size)}B of input in {len(units)} units"
            )
            _report_ignored(name, sources[name], report)
            try:
                _prepare_source(output, units, options, workers, beam_flags, report)
            except SourceError as error:
                damaged.append(str(error))
        if damaged:
            raise SourceError("\n".join(damaged))
        _write_manifest(output, proto, known, plans, before)
        if files.exists(unfinished := files.join(output, UNFINISHED)):
            files.remove_directory(unfinished)
    return PreparedData.open(output)


def _report_ignored(name, specs, report):
    ignored = [path for spec in specs for path in ignored_files(spec)]
    if ignored:
        listed = ", ".join(ignored[:_MAX_LISTED])
        more = "…" if len(ignored) > _MAX_LISTED else ""
        report(
            f"{name}: {len(ignored)} files beside JSONL and Parquet are ignored: "
            f"{listed}{more}"
        )


def load_tokenizer_proto(tokenizer: PathLike) -> bytes:
    """Loads the SentencePiece model of a tokenizer.

    Args:
        tokenizer: a preset, a directory with a `tokenizer.model`, or a SentencePiece
            file.

    Returns:
        The bytes of the model.

    Raises:
        OSError: if the file does not exist.
        ValueError: if there is no such preset, or the tokenizer has added tokens that
            plain text can contain.

    Example:
        >>> len(load_tokenizer_proto("open_llama_nano")) > 0
        True
    """
    tokenizer = str(tokenizer)
    inside = files.join(tokenizer, TOKENIZER_FILE)
    if files.is_directory(tokenizer) and files.exists(inside):
        return files.read_bytes(inside)
    if tokenizer.endswith(".model"):
        return files.read_bytes(tokenizer)
    source = find_source(tokenizer, argument="tokenizer")
    added = source.tokenizer_settings().get("added_tokens", ())
    words = [token["content"] for token in added if not token.get("special", True)]
    if words:
        raise ValueError(
            f"The tokenizer {tokenizer!r} has added tokens that are not special: "
            f"{', '.join(words)}. Data are prepared with SentencePiece alone, which "
            "splits them. Use the tokenizer without them: pass its tokenizer.model."
        )
    return source.tokenizer_proto()


def _check_names(sources, before, mixture, text_fields):
    if not sources:
        raise SourceError(
            "`sources` must name at least one source (--source NAME=PATHS)."
        )
    unknown = sorted({*text_fields} - {*sources})
    if unknown:
        raise ValueError(
            "Text fields must name sources of this call: "
            f"{', '.join(sources)}. Received: {', '.join(map(repr, unknown))}"
        )
    if mixture:
        # Raises for a source that the mixture does not have.
        mixture.restricted_to({*sources, *(before["sources"] if before else ())})


@contextlib.contextmanager
def _locked(output):
    """Allows one process at a time. Detects other processes on this machine only."""
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
    found, expected = (
        hashlib.sha256(data).hexdigest() for data in (files.read_bytes(path), proto)
    )
    if found != expected:
        raise ValueError(
            f"{output} was prepared with another tokenizer (SHA-256 {found[:12]}…, not "
            f"{expected[:12]}…). Choose another --output, or delete this directory."
        )


def _prepare_source(output, units, settings, workers, beam_flags, report):
    name = units[0].source
    directory = source_directory(output, name)
    if files.exists(directory):
        summary = json.loads(files.read_bytes(files.join(directory, SUMMARY_FILE)))
        if summary["fingerprint"] != source_fingerprint(units, settings):
            raise ValueError(
                f"{directory} was prepared from other files or with other settings. "
                "Choose another --output, or delete this directory."
            )
        report(f"{name}: already prepared")
        return
    TokenDatasetBuilder(units, settings, output, workers, beam_flags).prepare()
    summary = json.loads(files.read_bytes(files.join(directory, SUMMARY_FILE)))
    for split, sums in summary["splits"].items():
        report(
            f"{name}: {sums['documents']:,} documents, {sums['tokens']:,} tokens for "
            f"{split}"
        )
    for reason, count in summary["skipped"].items():
        report(f"{name}: {count:,} documents skipped: {reason}")


def _write_manifest(output, proto, mixture, plans, before):
    processor = cached_processor(proto)
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
        mixture = mixtures.mixture_from_weights(
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
