"""A prepared data set: its manifest, and its documents by number."""

import collections
import hashlib
import itertools
import json
import threading

import numpy as np

from keras_openllama.data import mixture, token_records
from keras_openllama.data.shuffling import BLOCK
from keras_openllama.utils import files

FORMAT = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.model"
_PARTS = ("format", "tokenizer", "mixture", "sources")
# Open shards of one source. Those of a shuffled group are read by turns, and it spans
# as many as it has blocks.
_OPEN_SHARDS = 64


def read_manifest(directory):
    """The manifest of a prepared data set, a dict.

    Raises:
        OSError: if there is none.
        ValueError: if it is damaged, or of another version of the format.
    """
    path = files.join(directory, MANIFEST_FILE)
    try:
        manifest = json.loads(files.read_bytes(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{directory} has no {MANIFEST_FILE}: it is no prepared data set, or one "
            "whose preparation has not ended. Run prepare-data again."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {error}. Prepare the data anew."
        ) from error
    if not isinstance(manifest, dict) or not {*_PARTS} <= {*manifest}:
        raise ValueError(
            f"{path} is no manifest of prepared data: it lacks some of "
            f"{', '.join(_PARTS)}. Prepare the data anew."
        )
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {manifest['format']!r}, and this version reads "
            f"{FORMAT}. Prepare the data anew, or use the version that made it."
        )
    return manifest


class PreparedData:
    """What `preparation.prepare` wrote; `open` reads it.

    Args:
        directory: string, local or remote.
        manifest: dict, see `read_manifest`.

    Attributes:
        directory, manifest: the arguments.
        sources: names of the sources, a list.
        mixture: `mixture.Mixture`, as it was chosen; sources may be missing.

    Example:

    ```python
    data = PreparedData.open("data")
    tokens, num_bytes = data.documents("wikipedia", "train")[0]
    ```
    """

    def __init__(self, directory, manifest):
        self.directory, self.manifest = str(directory), manifest
        self.sources = list(manifest["sources"])
        self.mixture = mixture.from_json(manifest["mixture"])

    @classmethod
    def open(cls, directory):
        """Opens a prepared data set.

        Raises:
            OSError: if there is no such data set.
            ValueError: if a file of it is missing, damaged or cut short; it is named.
        """
        data = cls(directory, read_manifest(directory))
        data._check_sizes()
        return data

    def __repr__(self):
        return f"PreparedData({self.directory!r})"

    def proto(self):
        """The bytes of the tokenizer's SentencePiece model."""
        path = files.join(self.directory, TOKENIZER_FILE)
        proto = files.read_bytes(path)
        found = hashlib.sha256(proto).hexdigest()
        if found != self.manifest["tokenizer"]["sha256"]:
            raise ValueError(
                f"{path} is not the tokenizer that this data was prepared with "
                f"(SHA-256 {found[:12]}…). Copy it again from where it was prepared."
            )
        return proto

    def check_tokenizer(self, fingerprint):
        """Raises a `ValueError` unless a model's tokenizer is that of this data.

        Args:
            fingerprint: string, `OpenLlamaTokenizer.fingerprint`.
        """
        ours = self.manifest["tokenizer"]["sha256"]
        if fingerprint != ours:
            raise ValueError(
                f"{self.directory} was prepared with another tokenizer (SHA-256 "
                f"{ours[:12]}…) than the model's ({fingerprint[:12]}…). Prepare the "
                "data with the model's tokenizer."
            )

    def path_of(self, source):
        """Directory of a source's files."""
        return files.join(self.directory, self._entry(source)["directory"])

    def split(self, source, split):
        """What the manifest says of a split: documents, tokens, bytes, shards."""
        splits = self._entry(source)["splits"]
        if split not in splits:
            raise ValueError(
                f"`split` takes one of {', '.join(splits)}. Received: split={split!r}"
            )
        return splits[split]

    def _entry(self, source):
        if source not in self.manifest["sources"]:
            raise ValueError(
                f"{self.directory} has no source {source!r}. It has: "
                f"{', '.join(self.sources)}."
            )
        return self.manifest["sources"][source]

    def documents(self, source, split="train"):
        """The documents of a source, by number: `Documents`."""
        tokenizer = self.manifest["tokenizer"]
        return Documents(
            self.path_of(source),
            split,
            self.split(source, split)["shards"],
            token_records.token_dtype(tokenizer["vocabulary_size"]),
        )

    def files(self):
        """Yields the path, the size and the SHA-256 of each file."""
        for source in self.sources:
            for split, sums in self.manifest["sources"][source]["splits"].items():
                yield (
                    files.join(self.path_of(source), lengths_file(split)),
                    4 * sums["documents"],
                    sums["lengths_sha256"],
                )
                for shard in sums["shards"]:
                    path = files.join(self.path_of(source), shard["file"])
                    yield path, shard["size"], shard["sha256"]

    def _check_sizes(self):
        for path, size, _ in self.files():
            found = token_records.size_of(path)
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes"
                raise token_records.DamagedFile(
                    f"{path} {state}, but should have {size} bytes. Copy it again from "
                    "where it was prepared, or prepare the data anew."
                )

    def verify(self, progress=lambda size: None):
        """Reads every file and compares its SHA-256.

        Args:
            progress: called with the bytes read since the last call.

        Raises:
            ValueError: if a file is damaged; all such are named.
        """
        damaged = []
        for path, size, checksum in self.files():
            if files.sha256(path) != checksum:
                damaged.append(path)
            progress(size)
        if damaged:
            raise token_records.DamagedFile(
                f"The content of {', '.join(damaged)} is not what was prepared. Copy "
                "it again from where it was prepared, or prepare the data anew."
            )


def lengths_file(split):
    """Name of the file with the tokens of each document: little-endian uint32."""
    return f"{split}.lengths"


class Documents:
    """The documents of a split of a source, by number.

    The index is 4 bytes a document, mapped where the file is local. Shards are opened
    at need.

    Args:
        directory: string, directory of the source.
        split: string.
        shards: list of dicts of the manifest.
        dtype: dtype of the stored ids.

    Attributes:
        lengths: uint32 array `(documents,)`, tokens of each.
    """

    def __init__(self, directory, split, shards, dtype):
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
        # Workers open files of their own.
        kept = {**self.__dict__}
        for name in ("_readers", "_lock", "lengths"):
            del kept[name]
        return kept

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self):
        return int(self._starts[-1])

    def _read_lengths(self):
        path = files.join(self._directory, lengths_file(self._split))
        if len(self) == 0:
            return np.zeros(0, "<u4")
        if files.is_remote(path):
            return np.frombuffer(files.read_bytes(path), "<u4")
        return np.memmap(path, "<u4", "r")

    def block_totals(self):
        """Tokens of each block of consecutive documents: int64 `(blocks,)`."""
        return block_totals(self.lengths)

    def __getitem__(self, number):
        """Tokens (array `(length,)`) and UTF-8 bytes of a document."""
        [document] = self.read([number])
        return document

    def read(self, numbers):
        """The documents of some numbers: a list of pairs of tokens and bytes.

        Raises:
            DamagedFile: if a shard is.
        """
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        documents = [None] * len(numbers)
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard).tolist()
            inside = [int(numbers[i] - self._starts[shard]) for i in places]
            for place, record in zip(places, self._read(shard, inside), strict=True):
                documents[place] = token_records.decode(record, self._dtype)
        return documents

    def _read(self, shard, numbers):
        path = files.join(self._directory, self._shards[shard]["file"])
        with self._lock:
            reader = self._readers.pop(shard, None)
            if reader is None:
                count = self._shards[shard]["documents"]
                reader = token_records.open_reader(path, count)
                while len(self._readers) >= _OPEN_SHARDS:
                    self._readers.popitem(last=False)
            self._readers[shard] = reader
        try:
            return reader.read(numbers)
        except RuntimeError as error:
            raise token_records.DamagedFile(
                f"{path} is damaged: {error}. Copy it again from where it was "
                "prepared, or prepare the data anew."
            ) from error


def block_totals(lengths):
    """Sums of blocks of `BLOCK` values each, the last may be shorter: int64."""
    starts = np.arange(0, len(lengths), BLOCK)
    if not len(starts):
        return np.zeros(0, "int64")
    return np.add.reduceat(lengths, starts, dtype="int64")
