"""One unit of a source tokenized into one shard of each split."""

import array
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import time
from collections import Counter

import numpy as np

from keras_openllama.data import document_reader, token_records
from keras_openllama.data.text_sources import SourceError, hash_of
from keras_openllama.text.sentencepiece_model import load_processor
from keras_openllama.utils import files

SPLITS = ("train", "validation")
# Text that is tokenized at once: enough that SentencePiece's call costs nothing.
_BATCH_BYTES = 1 << 18
_HASH_RANGE = 1 << 32
# Documents after which a unit of nothing but faults is given up.
_SAMPLE = 1000
_SECONDS_BETWEEN_REPORTS = 0.5


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides about the prepared documents, beside the input.

    Attributes:
        proto: bytes of the SentencePiece model.
        text_field: string, or `None` for the usual ones.
        validation_fraction: float, part of the documents that is set aside.
        max_document_bytes: int, above which a document is skipped.
        max_skipped: float, share of damaged documents above which work is given up.
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
                    f"`{name}` is a share from 0 to 1. Received: {getattr(self, name)}"
                )

    @property
    def fingerprint(self):
        """String that changes when the prepared documents would."""
        decisive = [
            hashlib.sha256(self.proto).hexdigest(),
            self.text_field,
            self.validation_fraction,
            self.max_document_bytes,
        ]
        return hash_of(decisive)


def split_of(text_bytes, validation_fraction):
    """The split that a document belongs to: equal texts are always in the same one.

    Args:
        text_bytes: bytes of the document.
        validation_fraction: float.
    """
    digest = hashlib.blake2b(text_bytes, digest_size=4).digest()
    below = int.from_bytes(digest, "little") < validation_fraction * _HASH_RANGE
    return "validation" if below else "train"


def shard_name(unit, split):
    """Name of the file of a unit's shard, while a source is unfinished."""
    return f"{unit.number:05}.{split}.array_record"


def lengths_name(unit, split):
    """Name of the file with the tokens of each of the shard's documents."""
    return f"{unit.number:05}.{split}.lengths"


def receipt_name(unit):
    """Name of the file that says that a unit is finished."""
    return f"{unit.number:05}.json"


def progress_name(unit):
    """Name of the file with bytes done and the worker's process."""
    return f"{unit.number:05}.progress"


def read_receipt(unit, directory):
    """The receipt of a finished unit; `None` where there is none, or it is stale.

    Stale is one whose input has changed, or whose shard is not there as it was.
    """
    try:
        receipt = json.loads(
            files.read_bytes(files.join(directory, receipt_name(unit)))
        )
    except (OSError, ValueError):
        return None
    whole = receipt["unit"] == unit.identity and all(
        token_records.size_of(files.join(directory, shard_name(unit, split)))
        == receipt["splits"][split]["size"]
        and token_records.size_of(files.join(directory, lengths_name(unit, split)))
        == 4 * receipt["splits"][split]["documents"]
        for split in SPLITS
    )
    return receipt if whole else None


def tokenize_unit(unit, settings, directory):
    """Writes a unit's shards, and then its receipt.

    Args:
        unit: `text_sources.Unit`.
        settings: `Settings`.
        directory: string, where to.

    Returns:
        The receipt, a dict: `"splits"` with documents, tokens, bytes, size and SHA-256
        of each shard, and `"skipped"`, numbers of documents by reason.

    Raises:
        SourceError: if the input is damaged, or most of its documents are.
        OSError: if the output cannot be written.
    """
    skipped, seen = Counter(), 0
    with contextlib.ExitStack() as stack:
        shards = {
            split: stack.enter_context(
                _Shard(unit, split, directory, processor_of(settings.proto))
            )
            for split in SPLITS
        }
        report = _Report(unit, directory)
        stack.callback(report.remove)
        for document in document_reader.documents(
            unit, settings.text_field, settings.max_document_bytes, report
        ):
            seen += 1
            if isinstance(document, document_reader.Skipped):
                skipped[str(document)] += 1
                if seen >= _SAMPLE:
                    check_skipped(unit.label, seen, skipped, settings.max_skipped)
                continue
            data = document.encode()
            split = split_of(data, settings.validation_fraction)
            shards[split].add(document, len(data))
        for shard in shards.values():
            shard.finish()
    receipt = {
        "unit": unit.identity,
        "input": unit.label,
        "splits": {split: shard.summary for split, shard in shards.items()},
        "skipped": dict(sorted(skipped.items())),
    }
    path = files.join(directory, receipt_name(unit))
    files.write_bytes(path, json.dumps(receipt).encode())
    return receipt


def check_skipped(what, seen, skipped, max_skipped):
    """Raises a `SourceError` if too many of the documents are damaged.

    Args:
        what: string, what they are of.
        seen: int, documents in all.
        skipped: dict of numbers by reason.
        max_skipped: float, the share that is allowed.
    """
    faults = {
        name: skipped[name] for name in document_reader.FAULTS if skipped.get(name)
    }
    damaged = sum(faults.values())
    if damaged > max_skipped * seen:
        reasons = ", ".join(f"{name}: {count}" for name, count in faults.items())
        raise SourceError(
            f"{what}: {damaged} of {seen} documents would be skipped ({reasons}), more "
            f"than the share of {max_skipped:g} that --max-skipped allows. Is the text "
            "in another field (--text-field)? Else mend the input, or allow more."
        )


@functools.lru_cache(maxsize=1)
def processor_of(proto):
    """The SentencePiece processor of a model, once a process."""
    return load_processor(proto, "the tokenizer")


class _Shard:
    """A shard being written: tokenizes in batches, and keeps count."""

    def __init__(self, unit, split, directory, processor):
        self._path = files.join(directory, shard_name(unit, split))
        self._lengths_path = files.join(directory, lengths_name(unit, split))
        self._processor = processor
        self._typecode = token_records.token_dtype(processor.vocab_size()).char
        self._ends = processor.bos_id(), processor.eos_id()
        self._texts, self._sizes, self._pending = [], [], 0
        self._lengths, self._num_bytes = [], 0
        self.summary = None

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._unfinished = stack.enter_context(files.atomic_write(self._path))
            self._writer = stack.enter_context(token_records.writer(self._unfinished))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def add(self, text, num_bytes):
        self._texts.append(text)
        self._sizes.append(num_bytes)
        self._pending += num_bytes
        if self._pending >= _BATCH_BYTES:
            self._write_pending()

    def _write_pending(self):
        bos, eos = self._ends
        for ids, num_bytes in zip(
            self._processor.encode(self._texts, num_threads=1), self._sizes, strict=True
        ):
            # <s> before and </s> after each document, as EasyLM does.
            tokens = array.array(self._typecode, (bos,))
            tokens.fromlist(ids)  # Faster than NumPy takes a list.
            tokens.append(eos)
            self._writer.write(token_records.encode(tokens, num_bytes))
            self._lengths.append(len(tokens))
        self._num_bytes += self._pending
        self._texts, self._sizes, self._pending = [], [], 0

    def finish(self):
        """Writes what is pending, closes the file, checks it, and sums it up."""
        if self._texts:
            self._write_pending()
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
    """Tells the process that shows the progress bar how far the unit is."""

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
        # Torn writes do no harm: what cannot be read is not shown.
        with open(self._path, "w", encoding="utf-8") as file:
            file.write(f"{int(self._done)} {os.getpid()}")

    def remove(self):
        if not self._silent:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
