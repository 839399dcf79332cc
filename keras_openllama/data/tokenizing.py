"""Tokenization of one unit of a source into one shard per split."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from keras_openllama.data import document_reader, token_records
from keras_openllama.data.document_encoder import DocumentEncoder
from keras_openllama.data.text_sources import SourceError, Unit, hash_of
from keras_openllama.text.sentencepiece_model import load_processor
from keras_openllama.utils import files

SPLITS = ("train", "validation")
_HASH_RANGE = 1 << 32
# Documents after which a unit with too many damaged ones is aborted.
_MIN_CHECKED = 1000
_SECONDS_BETWEEN_REPORTS = 0.5


@dataclasses.dataclass(frozen=True)
class TokenizationSettings:
    """Settings that determine the prepared documents, together with the input.

    Attributes:
        proto: bytes of the SentencePiece model.
        text_field: name of the text field; `None` takes the usual ones.
        validation_fraction: fraction of the documents for validation, from 0 to 1.
        max_document_bytes: size in UTF-8 bytes above which a document is skipped.
        max_skipped: maximum fraction of damaged documents, from 0 to 1.
    """

    proto: bytes
    text_field: str | None = None
    validation_fraction: float = 0.001
    max_document_bytes: int = document_reader.MAX_DOCUMENT_BYTES
    max_skipped: float = 0.01

    def __post_init__(self):
        for name in ("validation_fraction", "max_skipped"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"`{name}` must be from 0 to 1. Received: {getattr(self, name)}"
                )

    @property
    def fingerprint(self) -> str:
        """Hash of all settings that change the prepared documents."""
        decisive = [
            hashlib.sha256(self.proto).hexdigest(),
            self.text_field,
            self.validation_fraction,
            self.max_document_bytes,
        ]
        return hash_of(decisive)


def split_of(text_bytes: bytes, validation_fraction: float) -> str:
    """Returns the split of a document. Equal texts are always in the same split.

    Args:
        text_bytes: UTF-8 text of the document.
        validation_fraction: fraction of the documents for validation, from 0 to 1.

    Returns:
        `"train"` or `"validation"`.

    Example:
        >>> split_of(b"A llama hums.", validation_fraction=0.001)
        'train'
    """
    digest = hashlib.blake2b(text_bytes, digest_size=4).digest()
    below = int.from_bytes(digest, "little") < validation_fraction * _HASH_RANGE
    return "validation" if below else "train"


def shard_name(unit: Unit, split: str) -> str:
    """Name of the file of a unit's shard, while a source is unfinished."""
    return f"{unit.number:05}.{split}.array_record"


def lengths_name(unit: Unit, split: str) -> str:
    """Name of the file with the tokens per document of a unit's shard."""
    return f"{unit.number:05}.{split}.lengths"


def unit_summary_name(unit: Unit) -> str:
    """Name of the file that marks a unit as finished."""
    return f"{unit.number:05}.json"


def progress_name(unit: Unit) -> str:
    """Name of the file with the finished bytes and the worker's process id."""
    return f"{unit.number:05}.progress"


def read_unit_summary(unit: Unit, directory: str) -> dict[str, Any] | None:
    """Reads the summary of a finished unit.

    Args:
        unit: the unit.
        directory: directory of the unfinished source.

    Returns:
        The summary, see `tokenize_unit`. `None` if there is none, the input has
        changed, or a file of the unit is missing or has another size.
    """
    try:
        summary = json.loads(
            files.read_bytes(files.join(directory, unit_summary_name(unit)))
        )
    except (OSError, ValueError):
        return None
    is_valid = summary["unit"] == unit.identity and all(
        token_records.file_size(files.join(directory, shard_name(unit, split)))
        == summary["splits"][split]["size"]
        and token_records.file_size(files.join(directory, lengths_name(unit, split)))
        == 4 * summary["splits"][split]["documents"]
        for split in SPLITS
    )
    return summary if is_valid else None


def tokenize_unit(
    unit: Unit, settings: TokenizationSettings, directory: str
) -> dict[str, Any]:
    """Writes a unit's shards, and then its summary.

    Args:
        unit: the input.
        settings: tokenizer and filters.
        directory: directory to write to.

    Returns:
        The summary: `"splits"` with documents, tokens, bytes, size and SHA-256 of each
        shard, and `"skipped"`, the number of documents by reason.

    Raises:
        SourceError: if the input, or too large a fraction of its documents, is damaged.
        OSError: if the output cannot be written.
    """
    skipped, seen = Counter(), 0
    with contextlib.ExitStack() as stack:
        shards = {
            split: stack.enter_context(
                _Shard(unit, split, directory, cached_encoder(settings.proto))
            )
            for split in SPLITS
        }
        report = _Report(unit, directory)
        stack.callback(report.remove)
        for document in document_reader.read_documents(
            unit, settings.text_field, settings.max_document_bytes, report
        ):
            seen += 1
            if isinstance(document, document_reader.Skipped):
                skipped[str(document)] += 1
                if seen >= _MIN_CHECKED:
                    check_skipped(unit.label, seen, skipped, settings.max_skipped)
                continue
            data = document.encode()
            split = split_of(data, settings.validation_fraction)
            shards[split].add(document, len(data))
        for shard in shards.values():
            shard.finish()
    summary = {
        "unit": unit.identity,
        "input": unit.label,
        "splits": {split: shard.summary for split, shard in shards.items()},
        "skipped": dict(sorted(skipped.items())),
    }
    path = files.join(directory, unit_summary_name(unit))
    files.write_bytes(path, json.dumps(summary).encode())
    return summary


def check_skipped(
    what: str, seen: int, skipped: Mapping[str, int], max_skipped: float
) -> None:
    """Checks the fraction of damaged documents.

    Args:
        what: description of the input, for errors.
        seen: number of documents, with skipped ones.
        skipped: numbers of skipped documents by reason.
        max_skipped: maximum fraction of damaged documents, from 0 to 1.

    Raises:
        SourceError: if the fraction is larger.

    Example:
        >>> check_skipped("a.jsonl", 100, {"not JSON": 1, "empty": 9}, max_skipped=0.01)
    """
    faults = {
        name: skipped[name] for name in document_reader.FAULTS if skipped.get(name)
    }
    damaged = sum(faults.values())
    if damaged > max_skipped * seen:
        reasons = ", ".join(f"{name}: {count}" for name, count in faults.items())
        raise SourceError(
            f"{what}: {damaged} of {seen} documents would be skipped ({reasons}), more "
            f"than the fraction {max_skipped:g} that --max-skipped allows. If the text "
            "is in another field, pass --text-field. Otherwise repair the input, or "
            "increase --max-skipped."
        )


@functools.lru_cache(maxsize=1)
def cached_processor(proto: bytes) -> SentencePieceProcessor:
    """Loads a SentencePiece model, once per process."""
    return load_processor(proto, "the tokenizer")


@functools.lru_cache(maxsize=1)
def cached_encoder(proto: bytes) -> DocumentEncoder:
    """Creates an encoder, once per process: all units share what it remembers."""
    return DocumentEncoder(proto)


class _Shard:
    """A shard that is being written. Tokenizes documents and counts tokens."""

    def __init__(self, unit, split, directory, encoder):
        self._path = files.join(directory, shard_name(unit, split))
        self._lengths_path = files.join(directory, lengths_name(unit, split))
        self._encoder = encoder
        processor = encoder.processor
        self._dtype = token_records.token_dtype(processor.vocab_size())
        # <s> before and </s> after each document, as EasyLM does.
        ends = np.array([processor.bos_id(), processor.eos_id()], self._dtype)
        self._start, self._end = (token.tobytes() for token in ends)
        self._lengths, self._num_bytes = [], 0
        self.summary = None

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._unfinished = stack.enter_context(files.atomic_write(self._path))
            self._writer = stack.enter_context(
                token_records.open_writer(self._unfinished)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def add(self, text, num_bytes):
        data = self._start + self._encoder.encode(text) + self._end
        tokens = np.frombuffer(data, self._dtype)
        self._writer.write(token_records.encode_record(tokens, num_bytes))
        self._lengths.append(len(tokens))
        self._num_bytes += num_bytes

    def finish(self):
        """Closes and checks the file, sets the summary."""
        self._writer.close()
        token_records.check_written(self._unfinished, len(self._lengths))
        lengths = np.array(self._lengths, "<u4")
        files.write_bytes(self._lengths_path, lengths.tobytes())
        self.summary = {
            "documents": len(lengths),
            "tokens": int(lengths.sum(dtype="int64")),
            "bytes": self._num_bytes,
            "size": os.path.getsize(self._unfinished),
            "sha256": files.sha256(self._unfinished),
        }


class _Report:
    """Reports the progress of a unit to the process with the progress bar."""

    def __init__(self, unit, directory):
        self._path = files.join(directory, progress_name(unit))
        self._done, self._time = 0, 0.0
        self._silent = files.is_remote(directory)
        self(0)

    def __call__(self, count):
        self._done += count
        now = time.monotonic()
        if self._silent or now - self._time < _SECONDS_BETWEEN_REPORTS:
            return
        self._time = now
        # Partial writes are harmless: the reader ignores invalid content.
        with open(self._path, "w", encoding="utf-8") as file:
            file.write(f"{int(self._done)} {os.getpid()}")

    def remove(self):
        if not self._silent:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
