"""A prepared dataset: its manifest, and random access to its documents."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from keras_openllama.data import mixture, token_records
from keras_openllama.data.shuffling import BLOCK
from keras_openllama.utils import files
from keras_openllama.utils.types import PathLike

FORMAT = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.model"
_PARTS = ("format", "tokenizer", "mixture", "sources")
# Maximum number of open shards per source. Reading a shuffled group alternates between
# at most as many shards as the group has blocks.
_MAX_OPEN_SHARDS = 64


def read_manifest(directory: str) -> dict[str, Any]:
    """Reads the manifest of a prepared dataset.

    Args:
        directory: directory of the dataset, local or remote.

    Returns:
        The manifest.

    Raises:
        OSError: if there is no manifest.
        ValueError: if it is damaged, or has another format version.
    """
    path = files.join(directory, MANIFEST_FILE)
    try:
        manifest = json.loads(files.read_bytes(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{directory} has no {MANIFEST_FILE}: it is not a prepared dataset, or its "
            "preparation has not finished. Run prepare-data again."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {error}. Prepare the data again."
        ) from error
    if not isinstance(manifest, dict) or not {*_PARTS} <= {*manifest}:
        raise ValueError(
            f"{path} is not a manifest of prepared data: it must have the keys "
            f"{', '.join(_PARTS)}. Prepare the data again."
        )
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {manifest['format']!r}, but this version reads format "
            f"{FORMAT}. Prepare the data again, or use the version that wrote it."
        )
    return manifest


class PreparedData:
    """A dataset that `preparation.prepare_dataset` wrote. `open` opens it.

    Args:
        directory: directory of the dataset, local or remote.
        manifest: see `read_manifest`.

    Attributes:
        directory: the argument.
        manifest: the argument.
        sources: names of the sources.
        mixture: the `mixture.Mixture` chosen at preparation. It may have sources that
            the dataset does not have.

    Example:
        >>> data = PreparedData.open("data")  # doctest: +SKIP
        >>> documents = data.documents("wikipedia", "train")  # doctest: +SKIP
        >>> tokens, num_bytes = documents[0]  # doctest: +SKIP
    """

    def __init__(self, directory: PathLike, manifest: dict[str, Any]):
        self.directory, self.manifest = str(directory), manifest
        self.sources = list(manifest["sources"])
        self.mixture = mixture.mixture_from_json(manifest["mixture"])

    @classmethod
    def open(cls, directory: PathLike) -> PreparedData:
        """Opens a prepared dataset.

        Args:
            directory: directory of the dataset, local or remote.

        Returns:
            The dataset.

        Raises:
            OSError: if there is no such dataset.
            ValueError: if a file is missing, damaged or truncated; the message names
                it.
        """
        data = cls(directory, read_manifest(directory))
        data._check_sizes()
        return data

    def __repr__(self):
        return f"PreparedData({self.directory!r})"

    def tokenizer_proto(self) -> bytes:
        """Reads the tokenizer's SentencePiece model and verifies its checksum."""
        path = files.join(self.directory, TOKENIZER_FILE)
        proto = files.read_bytes(path)
        found = hashlib.sha256(proto).hexdigest()
        if found != self.manifest["tokenizer"]["sha256"]:
            raise ValueError(
                f"{path} is not the tokenizer that this dataset was prepared with "
                f"(SHA-256 {found[:12]}…). Restore it from the original dataset."
            )
        return proto

    def check_tokenizer(self, fingerprint: str) -> None:
        """Checks that a model's tokenizer is the one of this dataset.

        Args:
            fingerprint: see `OpenLlamaTokenizer.fingerprint`.

        Raises:
            ValueError: if it is another tokenizer.
        """
        expected = self.manifest["tokenizer"]["sha256"]
        if fingerprint != expected:
            raise ValueError(
                f"{self.directory} was prepared with another tokenizer (SHA-256 "
                f"{expected[:12]}…) than the model's ({fingerprint[:12]}…). Prepare "
                "the data with the model's tokenizer."
            )

    def source_path(self, source: str) -> str:
        """Returns the directory of a source's files."""
        return files.join(self.directory, self._entry(source)["directory"])

    def split_info(self, source: str, split: str) -> dict[str, Any]:
        """Returns the manifest's entry for a split.

        Args:
            source: name of the source.
            split: `"train"` or `"validation"`.

        Returns:
            Dict of `"documents"`, `"tokens"` and `"bytes"`, ints; `"shards"`, a list of
            dicts; and `"lengths_sha256"`.

        Raises:
            ValueError: if there is no such source or split.
        """
        splits = self._entry(source)["splits"]
        if split not in splits:
            raise ValueError(
                f"`split` must be one of {', '.join(splits)}. Received: split={split!r}"
            )
        return splits[split]

    def _entry(self, source):
        if source not in self.manifest["sources"]:
            raise ValueError(
                f"{self.directory} has no source {source!r}. It has: "
                f"{', '.join(self.sources)}."
            )
        return self.manifest["sources"][source]

    def documents(self, source: str, split: str = "train") -> Documents:
        """Opens the documents of a source.

        Args:
            source: name of the source.
            split: `"train"` or `"validation"`.

        Returns:
            The documents, by index.

        Raises:
            ValueError: if there is no such source or split.
        """
        tokenizer = self.manifest["tokenizer"]
        return Documents(
            self.source_path(source),
            split,
            self.split_info(source, split)["shards"],
            token_records.token_dtype(tokenizer["vocabulary_size"]),
        )

    def iter_files(self) -> Iterator[tuple[str, int, str]]:
        """Yields the path, the size in bytes and the SHA-256 of each file."""
        for source in self.sources:
            for split, sums in self.manifest["sources"][source]["splits"].items():
                yield (
                    files.join(self.source_path(source), lengths_file_name(split)),
                    4 * sums["documents"],
                    sums["lengths_sha256"],
                )
                for shard in sums["shards"]:
                    path = files.join(self.source_path(source), shard["file"])
                    yield path, shard["size"], shard["sha256"]

    def _check_sizes(self):
        for path, size, _ in self.iter_files():
            found = token_records.file_size(path)
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes"
                raise token_records.DamagedFileError(
                    f"{path} {state}, but should have {size} bytes. Restore it from "
                    "the original dataset, or prepare the data again."
                )

    def verify_checksums(
        self, progress: Callable[[int], object] = lambda size: None
    ) -> None:
        """Reads every file and compares its SHA-256.

        Args:
            progress: called with the number of bytes read since the last call.

        Raises:
            ValueError: if files are damaged; the message names all of them.
        """
        damaged = []
        for path, size, checksum in self.iter_files():
            if files.sha256(path) != checksum:
                damaged.append(path)
            progress(size)
        if damaged:
            raise token_records.DamagedFileError(
                f"Checksums do not match: {', '.join(damaged)}. Restore the files from "
                "the original dataset, or prepare the data again."
            )


def lengths_file_name(split: str) -> str:
    """Name of the file with the number of tokens per document: little-endian uint32."""
    return f"{split}.lengths"


class Documents:
    """The documents of a source and split, by index.

    The index takes 4 bytes per document and is memory-mapped if the file is local.
    Shards are opened on demand.

    Args:
        directory: directory of the source.
        split: `"train"` or `"validation"`.
        shards: entries of the manifest.
        dtype: dtype of the stored token ids.

    Attributes:
        lengths: uint32 array `(documents,)`, the number of tokens of each document.
    """

    def __init__(
        self, directory: str, split: str, shards: list[dict[str, Any]], dtype: DTypeLike
    ):
        self._directory, self._split = directory, split
        self._shards, self._dtype = shards, dtype
        counts = [shard["documents"] for shard in shards]
        self._starts = np.array([0, *itertools.accumulate(counts)], "int64")
        self._open()

    def _open(self):
        self._readers = collections.OrderedDict()
        self._lock = threading.Lock()
        self.lengths = self._read_lengths()

    def __getstate__(self):
        # Each worker process opens the files itself.
        state = {**self.__dict__}
        for name in ("_readers", "_lock", "lengths"):
            del state[name]
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self):
        return int(self._starts[-1])

    def _read_lengths(self):
        path = files.join(self._directory, lengths_file_name(self._split))
        if len(self) == 0:
            return np.zeros(0, "<u4")
        if files.is_remote(path):
            return np.frombuffer(files.read_bytes(path), "<u4")
        return np.memmap(path, "<u4", "r")

    def tokens_per_block(self) -> np.ndarray:
        """Tokens of each block of consecutive documents: int64 `(blocks,)`."""
        return tokens_per_block(self.lengths)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        """Token ids `(length,)` of a document, and its size in UTF-8 bytes."""
        [document] = self.read_many([number])
        return document

    def read_many(
        self, numbers: Sequence[int] | np.ndarray
    ) -> list[tuple[np.ndarray, int]]:
        """Reads several documents.

        Args:
            numbers: indices of the documents, in any order.

        Returns:
            For each document its token ids `(length,)`, and its size in UTF-8 bytes.

        Raises:
            DamagedFileError: if a shard is damaged.
        """
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        documents = [None] * len(numbers)
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard).tolist()
            inside = [int(numbers[i] - self._starts[shard]) for i in places]
            records = self._read_records(shard, inside)
            for place, record in zip(places, records, strict=True):
                documents[place] = token_records.decode_record(record, self._dtype)
        return documents

    def _read_records(self, shard, numbers):
        path = files.join(self._directory, self._shards[shard]["file"])
        with self._lock:
            reader = self._readers.pop(shard, None)
            if reader is None:
                count = self._shards[shard]["documents"]
                reader = token_records.open_reader(path, count)
                while len(self._readers) >= _MAX_OPEN_SHARDS:
                    self._readers.popitem(last=False)
            self._readers[shard] = reader
        try:
            return reader.read(numbers)
        except RuntimeError as error:
            raise token_records.DamagedFileError(
                f"{path} is damaged: {error}. Restore it from the original dataset, or "
                "prepare the data again."
            ) from error


def tokens_per_block(lengths: np.ndarray) -> np.ndarray:
    """Sums the lengths of each block of `shuffling.BLOCK` documents.

    Args:
        lengths: ints `(documents,)`.

    Returns:
        int64 array `(blocks,)`. The last block may have fewer documents.

    Example:
        >>> tokens_per_block(np.full(1500, 2))
        array([2048,  952])
    """
    starts = np.arange(0, len(lengths), BLOCK)
    if not len(starts):
        return np.zeros(0, "int64")
    return np.add.reduceat(lengths, starts, dtype="int64")
