"""What a source consists of: its files, and the units of work that they are read in."""

import dataclasses
import hashlib
import itertools
import json
import os
import re

from keras_openllama.utils import files

# Ours: bytes of input that become one shard, where a file can be divided.
UNIT_BYTES = 256 << 20

TFDS_PREFIX = "tfds:"
_JSONL = re.compile(r"\.(jsonl|ndjson|json)(\.(gz|zst|zstd))?$", re.IGNORECASE)
_PARQUET = re.compile(r"\.parquet$", re.IGNORECASE)
_COMPRESSED = re.compile(r"\.(gz|zst|zstd)$", re.IGNORECASE)


class SourceError(ValueError):
    """A source or one of its files that cannot be used; the message names it."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one worker reads at a stretch, and what becomes one shard.

    Attributes:
        source: string, name of the source.
        number: int, position among the units of its source.
        format: `"jsonl"`, `"parquet"`, `"text"` or `"tfds"`.
        paths: tuple of strings; one, but for a text tree.
        start, stop: ints, the part of it that is meant: bytes of JSONL, row groups of
            Parquet, examples of TFDS. `stop` is `None` where it is all of it.
        num_bytes: int, size of the input, for progress.
        identity: string that changes when the input does.
    """

    source: str
    number: int
    format: str
    paths: tuple
    start: int
    stop: int | None
    num_bytes: int
    identity: str

    @property
    def label(self):
        """What to call it in messages."""
        if len(self.paths) > 1:
            return f"{self.paths[0]} and {len(self.paths) - 1} more files"
        if self.stop is None:
            return self.paths[0]
        what = {"jsonl": "bytes", "parquet": "row groups", "tfds": "examples"}
        return f"{self.paths[0]} ({what[self.format]} {self.start} to {self.stop})"


def parse(arguments):
    """Sorts `NAME=PATHS` arguments by name.

    Args:
        arguments: list of strings.

    Returns:
        Dict of lists of strings.

    Raises:
        SourceError: if one has another form.
    """
    specs = {}
    for argument in arguments:
        name, equals, paths = argument.partition("=")
        if not equals or not paths or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise SourceError(
                "A source is NAME=PATHS, such as wikipedia=data/wiki*.jsonl.gz, with a "
                "name of small letters, digits and _. "
                f"Received: {argument!r}"
            )
        specs.setdefault(name, []).append(paths)
    return specs


def units(source, specs, unit_bytes=UNIT_BYTES):
    """Finds a source's files, and divides them.

    Args:
        source: string, its name.
        specs: list of strings, each a file, a pattern, a directory, or
            `tfds:NAME[/CONFIG][:VERSION][@SPLIT]` or `tfds:DIRECTORY[@SPLIT]`. In a
            directory JSONL and Parquet files are read; if it has none of these, each
            file is a document.
        unit_bytes: int, about how many bytes of input make a unit.

    Returns:
        List of `Unit`. The same files give the same list.

    Raises:
        SourceError: if a spec matches nothing, or a file cannot be read.
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
        None
        if form == "tfds"
        else files.size_and_mtime(path)  # Never changes once made
        for path in paths
    ]
    return hash_of([form, paths, start, stop, state])


def hash_of(value):
    """Short hash (string) of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def find_files(source, spec):
    """Paths that a spec means: a file, a pattern or a directory.

    Raises:
        SourceError: if there are none.
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
            f"Source {source!r}: {spec!r} matches no file. Give a file, a directory, a "
            f"pattern in quotes, or {TFDS_PREFIX}NAME."
        )
    # A pattern may match a directory and also what is in it.
    return list(dict.fromkeys(found))


def format_of(path):
    """Format of a file, by its name."""
    name = os.path.basename(path)
    if _JSONL.search(name):
        return "jsonl"
    return "parquet" if _PARQUET.search(name) else "text"


def is_compressed(path):
    """Whether a name ends as a compressed file's does."""
    return bool(_COMPRESSED.search(path))


def _file_parts(source, spec, unit_bytes):
    sized = []
    for path in find_files(source, spec):
        try:
            sized.append((path, files.size_and_mtime(path)[0]))
        except OSError as error:
            raise SourceError(
                f"Source {source!r}: {path} cannot be read: {error}."
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
    """Many files make one part."""
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
    """Lines that begin in the same stretch of bytes; a compressed file stays whole."""
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
            f"Source {source!r}: {path} is not a readable Parquet file: {error}. Fetch "
            "it again, or leave it out."
        ) from error
    parts, start, total = [], 0, 0
    for group, size in enumerate(sizes):
        total += size
        if total >= unit_bytes or group + 1 == len(sizes):
            parts.append(("parquet", (path,), start, group + 1, total))
            start, total = group + 1, 0
    return parts


def tfds_builder(spec):
    """The builder of a `tfds:` spec, and the name of the split."""
    import tensorflow_datasets as tfds

    name, _, split = spec.removeprefix(TFDS_PREFIX).partition("@")
    if files.is_directory(name):
        return tfds.builder_from_directory(name), split or "train"
    return tfds.builder(name), split or "train"


def _tfds_parts(source, spec, unit_bytes):
    try:
        builder, split = tfds_builder(spec)
        builder.download_and_prepare()  # Does nothing where it is prepared.
        if split not in [*builder.info.splits]:  # TFDS would take a part of one, too.
            raise ValueError(f"its splits are {', '.join(builder.info.splits)}")
        info = builder.info.splits[split]
    except Exception as error:  # TFDS raises errors of many kinds.
        raise SourceError(
            f"Source {source!r}: TensorFlow Datasets cannot give {spec!r}: {error}"
        ) from error
    examples, size = info.num_examples, info.num_bytes
    if not examples:
        return []
    count = min(examples, max(1, round(size / unit_bytes)))
    bounds = [examples * i // count for i in range(count + 1)]
    # By its directory: workers find the same wherever they look.
    name = f"{TFDS_PREFIX}{builder.data_path}@{split}"
    return [
        ("tfds", (name,), start, stop, size // count)
        for start, stop in itertools.pairwise(bounds)
    ]
