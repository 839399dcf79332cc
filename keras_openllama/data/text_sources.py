"""Text sources: their files, and their division into units of work."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from keras_openllama.utils import files
from keras_openllama.utils.text_files import is_lfs_pointer

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# Heuristic: bytes of input per shard, if a file can be divided.
UNIT_BYTES = 256 << 20

TFDS_PREFIX = "tfds:"
_JSONL = re.compile(r"\.(jsonl|ndjson|json)(\.(gz|zst|zstd))?$", re.IGNORECASE)
_PARQUET = re.compile(r"\.parquet$", re.IGNORECASE)
# Archives, other compression and binary formats, which are not read.
_UNREADABLE = re.compile(
    r"\.(bz2|xz|lzma|lz4|br|zip|7z|rar|tgz|tbz2?|txz|tar(\.\w+)?"
    r"|arrow|feather|avro|npy|npz|h5|hdf5|pkl|db|sqlite3?)$",
    re.IGNORECASE,
)
_COMPRESSED = re.compile(r"\.(gz|zst|zstd)$", re.IGNORECASE)


class SourceError(ValueError):
    """A source or one of its files cannot be used; the message names it."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """The input that one worker reads and writes as one shard.

    Attributes:
        source: name of the source.
        number: index among the units of its source.
        format: `"jsonl"`, `"parquet"`, `"text"` or `"tfds"`.
        paths: paths of the files. Only text files have more than one.
        start: start of the part to read, in bytes of JSONL, row groups of Parquet, or
            examples of TFDS.
        stop: end of the part to read; `None` reads to the end.
        num_bytes: size of the input, for progress.
        identity: hash that changes if the input changes.
    """

    source: str
    number: int
    format: str
    paths: tuple[str, ...]
    start: int
    stop: int | None
    num_bytes: int
    identity: str

    @property
    def label(self) -> str:
        """Description of the unit for messages."""
        if len(self.paths) > 1:
            return f"{self.paths[0]} and {len(self.paths) - 1} more files"
        if self.stop is None:
            return self.paths[0]
        what = {"jsonl": "bytes", "parquet": "row groups", "tfds": "examples"}
        return f"{self.paths[0]} ({what[self.format]} {self.start} to {self.stop})"


def parse_sources(arguments: Iterable[str]) -> dict[str, list[str]]:
    """Groups `NAME=PATHS` arguments by name.

    Args:
        arguments: the arguments.

    Returns:
        Lists of paths by name.

    Raises:
        SourceError: if an argument has another form.

    Example:
        >>> parse_sources(["web=a.jsonl", "code=src", "web=b.jsonl"])
        {'web': ['a.jsonl', 'b.jsonl'], 'code': ['src']}
    """
    specs = {}
    for argument in arguments:
        name, equals, paths = argument.partition("=")
        if not equals or not paths or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise SourceError(
                "A source must be NAME=PATHS, such as wikipedia=data/wiki*.jsonl.gz, "
                "with a name of lowercase letters, digits and _. "
                f"Received: {argument!r}"
            )
        specs.setdefault(name, []).append(paths)
    return specs


def find_units(
    source: str, specs: Iterable[str], unit_bytes: int = UNIT_BYTES
) -> list[Unit]:
    r"""Finds a source's files and divides them into units.

    Args:
        source: name of the source.
        specs: each a file, a pattern, a directory, or
            `tfds:NAME[/CONFIG][:VERSION][@SPLIT]` or `tfds:DIRECTORY[@SPLIT]`. In a
            directory, JSONL and Parquet files are read. If there are none, each file is
            a document; it may be compressed.
        unit_bytes: approximate bytes of input per unit.

    Returns:
        The units. The same files always give the same list.

    Raises:
        SourceError: if a spec matches nothing, or a file cannot be read.

    Example:
        >>> _ = open("a.jsonl", "w").write('{"text": "A llama."}\n')
        >>> [unit] = find_units("web", ["*.jsonl"])
        >>> unit.format, unit.paths, unit.num_bytes
        ('jsonl', ('a.jsonl',), 21)
    """
    found = []
    for spec in specs:
        if spec.startswith(TFDS_PREFIX):
            found += _tfds_parts(source, spec, unit_bytes)
        else:
            found += _file_parts(source, spec, unit_bytes)
    if not found:
        raise SourceError(f"Source {source!r}: {', '.join(specs)} has no documents.")
    return [
        Unit(source, number, *part, identity=_identity(part))
        for number, part in enumerate(found)
    ]


def _identity(part):
    form, paths, start, stop, _ = part
    state = [
        # A TFDS dataset never changes.
        None if form == "tfds" else files.size_and_mtime(path)
        for path in paths
    ]
    return hash_of([form, paths, start, stop, state])


def hash_of(value: Any) -> str:
    """Short hash of a value that can be stored as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def find_files(source: str, spec: str) -> list[str]:
    """Finds the files of a spec.

    Args:
        source: name of the source, for errors.
        spec: a file, a pattern or a directory.

    Returns:
        Paths of the files.

    Raises:
        SourceError: if there are none, or one has a format that is not read.
    """
    found = []
    for path in [spec] if files.exists(spec) else files.glob(spec):
        if not files.is_directory(path):
            found.append(path)
            continue
        inside = files.list_files(path)
        found += [p for p in inside if format_of(p) != "text"] or inside
    if not found:
        raise SourceError(
            f"Source {source!r}: {spec!r} matches no files. Pass a file, a directory, "
            f"a pattern in quotes, or {TFDS_PREFIX}NAME."
        )
    unreadable = [path for path in found if _UNREADABLE.search(path)]
    if unreadable:
        raise SourceError(
            f"Source {source!r}: {', '.join(unreadable[:10])}: this format is not "
            "read. Extract or convert the files to JSONL (also .gz and .zst), Parquet "
            "or text, or pass a pattern without them."
        )
    # A pattern may match a directory and also its files.
    return list(dict.fromkeys(found))


def ignored_files(spec: str) -> list[str]:
    """Finds the files of a directory that are not read beside JSONL and Parquet.

    Args:
        spec: as for `find_files`.

    Returns:
        Paths of the files; empty if there is no JSONL or Parquet file.

    Example:
        >>> files.make_directory("data")
        >>> for name in ("part.jsonl", "README.md"):
        ...     files.write_bytes(f"data/{name}", b"")
        >>> ignored_files("data")
        ['data/README.md']
    """
    ignored = []
    if not spec.startswith(TFDS_PREFIX):
        for path in [spec] if files.exists(spec) else files.glob(spec):
            inside = files.list_files(path) if files.is_directory(path) else []
            others = [p for p in inside if format_of(p) == "text"]
            ignored += others if len(others) < len(inside) else []
    return ignored


def format_of(path: str) -> str:
    """Returns the format of a file according to its name.

    Example:
        >>> format_of("data/wiki.jsonl.gz"), format_of("README.md")
        ('jsonl', 'text')
    """
    name = os.path.basename(path)
    if _JSONL.search(name):
        return "jsonl"
    return "parquet" if _PARQUET.search(name) else "text"


def is_compressed(path: str) -> bool:
    """Returns whether a file is compressed according to its name."""
    return bool(_COMPRESSED.search(path))


def _file_parts(source, spec, unit_bytes):
    sized = []
    for path in find_files(source, spec):
        try:
            sized.append((path, files.size_and_mtime(path)[0]))
        except OSError as error:
            raise SourceError(
                f"Source {source!r}: {path} could not be read: {error}."
            ) from error
    parts = _text_parts(
        [item for item in sized if format_of(item[0]) == "text"], unit_bytes
    )
    for path, size in sized:
        if format_of(path) == "parquet":
            parts += _parquet_parts(source, path, unit_bytes)
        elif format_of(path) == "jsonl":
            parts += _jsonl_parts(path, size, unit_bytes)
    return parts


def _text_parts(sized, unit_bytes):
    """Groups many files into one part."""
    parts, paths, total = [], [], 0
    for path, size in sized:
        paths.append(path)
        total += size
        if total >= unit_bytes:
            parts.append(("text", tuple(paths), 0, None, total))
            paths, total = [], 0
    if paths:
        parts.append(("text", tuple(paths), 0, None, total))
    return parts


def _jsonl_parts(path, size, unit_bytes):
    """Divides the lines by the byte they start at. A compressed file is one part."""
    count = 1 if is_compressed(path) else max(1, round(size / unit_bytes))
    if count == 1:
        return [("jsonl", (path,), 0, None, size)]
    bounds = [size * i // count for i in range(count + 1)]
    return [
        ("jsonl", (path,), start, stop, stop - start)
        for start, stop in itertools.pairwise(bounds)
    ]


def _parquet_parts(source, path, unit_bytes):
    import pyarrow.parquet

    try:
        with files.open_binary(path) as file:
            metadata = pyarrow.parquet.ParquetFile(file).metadata
            sizes = [
                metadata.row_group(i).total_byte_size
                for i in range(metadata.num_row_groups)
            ]
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(
            f"Source {source!r}: {path} is not a readable Parquet file: "
            f"{_lfs_pointer(path) or error}. Download it again, or remove it from the "
            "source."
        ) from error
    parts, start, total = [], 0, 0
    for group, size in enumerate(sizes):
        total += size
        if total >= unit_bytes or group + 1 == len(sizes):
            parts.append(("parquet", (path,), start, group + 1, total))
            start, total = group + 1, 0
    return parts


def _lfs_pointer(path):
    """What to do with a Git LFS pointer; `None` for another file."""
    with contextlib.suppress(OSError), files.open_binary(path) as file:
        if is_lfs_pointer(file.read(64)):
            return "it is a Git LFS pointer, and `git lfs pull` gets the file itself"
    return None


def tfds_builder(spec: str) -> tuple[tfds.core.DatasetBuilder, str]:
    """Returns the TFDS builder of a `tfds:` spec, and the name of the split."""
    import tensorflow_datasets as tfds

    name, at, split = spec.removeprefix(TFDS_PREFIX).partition("@")
    if at and not split:
        raise SourceError(f"{spec!r} has no split after '@', such as '@train'.")
    if files.is_directory(name):
        return tfds.builder_from_directory(name), split or "train"
    return tfds.builder(name), split or "train"


def _tfds_parts(source, spec, unit_bytes):
    try:
        builder, split = tfds_builder(spec)
        builder.download_and_prepare()  # Does nothing if it is prepared.
        if split not in [*builder.info.splits]:  # TFDS would accept slices, too.
            raise ValueError(f"its splits are {', '.join(builder.info.splits)}")
        info = builder.info.splits[split]
    except Exception as error:  # TFDS raises errors of many kinds.
        raise SourceError(
            f"Source {source!r}: TensorFlow Datasets could not load {spec!r}: {error}"
        ) from error
    examples, size = info.num_examples, info.num_bytes
    if not examples:
        return []
    count = min(examples, max(1, round(size / unit_bytes)))
    bounds = [examples * i // count for i in range(count + 1)]
    # By its directory, so that all workers find the same dataset.
    name = f"{TFDS_PREFIX}{builder.data_path}@{split}"
    return [
        ("tfds", (name,), start, stop, size // count)
        for start, stop in itertools.pairwise(bounds)
    ]
