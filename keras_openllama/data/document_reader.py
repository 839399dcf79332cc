"""Reading of documents from source files: JSONL, Parquet, plain text and TFDS."""

import collections
import io
import json
import zlib
from collections.abc import Callable, Iterator

from keras_openllama.data.decompression import Decompressed, zstd_error
from keras_openllama.data.text_sources import (
    SourceError,
    Unit,
    is_compressed,
    tfds_builder,
)
from keras_openllama.utils import files
from keras_openllama.utils.text_files import without_mark

# Heuristic: longer documents are skipped. The longest books have about 10 MB.
MAX_DOCUMENT_BYTES = 32 << 20
# Default fields: RedPajama has `text`, RefinedWeb and StarCoder have `content`.
TEXT_FIELDS = ("text", "content")

# Reasons to skip a document.
EMPTY = "empty"
NOT_JSON = "not JSON"
NOT_OBJECT = "JSON, but not an object"
NOT_UTF8 = "not UTF-8"
NO_TEXT = "no text field"
TOO_LONG = "too long"
# Empty documents do not count as damaged: code has many empty files.
FAULTS = (NOT_JSON, NOT_OBJECT, NOT_UTF8, NO_TEXT, TOO_LONG)

# Heuristic: a file with a larger fraction of damaged documents is damaged as a whole.
_MAX_DAMAGED = 0.5
_CHUNK = 1 << 20  # More bytes than the other fields of a line.
_ESCAPED = 6  # Maximum bytes of JSON per byte of text: \u0001.


class Skipped(str):
    """Takes the place of a skipped document; the string is the reason."""

    __slots__ = ()


def read_documents(
    unit: Unit,
    text_field: str | None = None,
    max_bytes: int = MAX_DOCUMENT_BYTES,
    progress: Callable[[float], object] | None = None,
) -> Iterator[str | Skipped]:
    r"""Reads the documents of a unit, in order.

    Args:
        unit: the part of a source to read.
        text_field: name of the field that holds the text. `None` takes the first of
            `TEXT_FIELDS` that exists.
        max_bytes: size in UTF-8 bytes above which a document is skipped.
        progress: called with the number of input bytes read since the last call.

    Yields:
        The text of each document, or `Skipped` with a reason.

    Raises:
        SourceError: if a file is damaged or does not have the field, or most of its
            documents are damaged; the message names the file.

    Example:
        >>> from keras_openllama.data.text_sources import find_units
        >>> _ = open("a.jsonl", "w").write('{"text": "A llama."}\n{"text": ""}\n')
        >>> [unit] = find_units("web", ["a.jsonl"])
        >>> list(read_documents(unit))
        ['A llama.', 'empty']
    """
    fields = (text_field,) if text_field else TEXT_FIELDS
    read_unit = {
        "jsonl": _jsonl,
        "parquet": _parquet,
        "text": _text_files,
        "tfds": _tfds,
    }[unit.format]
    seen, faults = 0, collections.Counter()
    for document in read_unit(unit, fields, max_bytes, progress or (lambda n: None)):
        seen += 1
        if not isinstance(document, Skipped) and not document.strip():
            document = Skipped(EMPTY)
        if isinstance(document, Skipped) and document in FAULTS:
            faults[document] += 1
        yield document
    # A text file is one document; the fraction of damaged ones is limited elsewhere.
    if unit.format != "text" and faults.total() > _MAX_DAMAGED * seen:
        raise _damaged_file_error(unit, seen, faults)


def _damaged_file_error(unit, seen, faults):
    """The error of a file that is damaged as a whole, or of another format."""
    reasons = ", ".join(f"{reason}: {count}" for reason, count in faults.items())
    remedy = "Download it again, or remove it from the source."
    if faults[NO_TEXT]:
        remedy = "If the text is in another field, pass --text-field."
    elif unit.format == "jsonl":
        remedy = (
            "Each line must be a JSON object; `jq -c '.[]'` converts a JSON array. "
            + remedy
        )
    return SourceError(
        f"Source {unit.source!r}: {unit.label} is damaged as a whole, or of another "
        f"format: {faults.total()} of {seen} documents cannot be read ({reasons}). "
        f"{remedy}"
    )


def _without_mark(start, path, unit):
    try:
        return without_mark(start, path)
    except ValueError as error:
        raise SourceError(f"Source {unit.source!r}: {error}") from None


def _decoded(data, limit):
    if len(data) > limit:
        return Skipped(TOO_LONG)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return Skipped(NOT_UTF8)


# --- JSONL ---


def _jsonl(unit, fields, limit, progress):
    [path] = unit.paths
    try:
        with files.open_binary(path) as file:
            lines = _lines(file, unit, _ESCAPED * limit + _CHUNK, progress)
            for number, line in enumerate(lines):
                if line and number == unit.start == 0:
                    line = _without_mark(line, path, unit)
                if line is None:
                    yield Skipped(TOO_LONG)
                elif line.strip():
                    yield _json_document(line, fields, limit)
    except (OSError, zlib.error, zstd_error()) as error:
        raise SourceError(
            f"Source {unit.source!r}: {path} could not be read completely: {error}. "
            "Download it again, or remove it from the source."
        ) from error


def _json_document(line, fields, limit):
    line = _decoded(line, len(line))
    if isinstance(line, Skipped):
        return line
    try:
        # A mark may follow the first line: where files were concatenated.
        value = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return Skipped(NOT_JSON)
    if not isinstance(value, dict):
        return Skipped(NOT_OBJECT)
    for field in fields:
        text = value.get(field)
        if isinstance(text, str):
            break
    else:
        return Skipped(NO_TEXT)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # An escaped lone surrogate.
        return Skipped(NOT_UTF8)
    return Skipped(TOO_LONG) if size > limit else text


def _lines(file, unit, limit, progress):
    """Yields the lines that start in the unit's part of a file, `None` for a long one.

    A line is longer than its text because of escapes, so `limit` is higher than the
    limit of documents.
    """
    start, stop = unit.start, unit.stop
    if is_compressed(unit.paths[0]):
        lines = io.BufferedReader(Decompressed(file, progress), _CHUNK)
        progress = None
    else:
        lines = file
    position = start
    if start:
        # A line that starts before this part belongs to the previous part.
        lines.seek(start - 1)
        position = start - 1 + len(_skip_line(lines))
    while stop is None or position < stop:
        line = lines.readline(limit + 1)
        if not line:
            return
        size = len(line)
        if size > limit:
            if not line.endswith(b"\n"):
                size += len(_skip_line(lines))
            line = None
        position += size
        if progress:
            progress(size)
        yield line


class _Count:
    """Has the length of bytes that were discarded."""

    def __init__(self, size):
        self._size = size

    def __len__(self):
        return self._size


def _skip_line(lines):
    size = 0
    while part := lines.readline(_CHUNK):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return _Count(size)


# --- Parquet ---


def _parquet(unit, fields, limit, progress):
    import pyarrow
    import pyarrow.parquet

    [path] = unit.paths
    groups = range(unit.start, unit.stop)
    try:
        with files.open_binary(path) as file:
            parquet = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
            field = _column(unit, parquet.schema_arrow, fields)
            for group in groups:
                for batch in parquet.iter_batches(
                    batch_size=256, row_groups=[group], columns=[field]
                ):
                    for data in batch.column(0).cast(pyarrow.binary()).to_pylist():
                        if data is None:
                            yield Skipped(NO_TEXT)
                        else:
                            yield _decoded(data, limit)
                progress(unit.num_bytes // len(groups))
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(
            f"Source {unit.source!r}: {path} could not be read completely: {error}. "
            "Download it again, or remove it from the source."
        ) from error


def _column(unit, schema, fields):
    import pyarrow

    for field in fields:
        if field in schema.names:
            kind = schema.field(field).type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if any(
                is_kind(kind)
                for is_kind in (
                    pyarrow.types.is_string,
                    pyarrow.types.is_large_string,
                    pyarrow.types.is_string_view,
                    pyarrow.types.is_binary,
                    pyarrow.types.is_large_binary,
                )
            ):
                return field
    raise SourceError(
        f"Source {unit.source!r}: {unit.paths[0]} has no column of strings named "
        f"{' or '.join(map(repr, fields))}. It has: {', '.join(schema.names)}. Name "
        "the right one with --text-field."
    )


# --- Text files ---


def _text_files(unit, fields, limit, progress):
    for path in unit.paths:
        try:
            with files.open_binary(path) as file:
                content = (
                    Decompressed(file, lambda size: None)
                    if is_compressed(path)
                    else file
                )
                data = _read_at_most(content, limit + 1)
        except (OSError, zlib.error, zstd_error()) as error:
            raise SourceError(
                f"Source {unit.source!r}: {path} could not be read: {error}."
            ) from error
        progress(len(data))
        data = _without_mark(data, path, unit)
        yield _decoded(data.replace(b"\r\n", b"\n"), limit)


def _read_at_most(file, count):
    """Reads up to `count` bytes; `read(count)` itself would allocate them first."""
    data = b""
    while len(data) < count and (more := file.read(min(_CHUNK, count - len(data)))):
        data += more
    return data


# --- TensorFlow Datasets ---


def _tfds(unit, fields, limit, progress):
    [spec] = unit.paths
    builder, split = tfds_builder(spec)
    names = list(builder.info.features)
    field = next((field for field in fields if field in names), None)
    if field is None:
        raise SourceError(
            f"Source {unit.source!r}: {spec} has no feature named "
            f"{' or '.join(map(repr, fields))}. It has: {', '.join(names)}. Name the "
            "right one with --text-field."
        )
    mean_bytes = unit.num_bytes / max(1, unit.stop - unit.start)
    try:
        dataset = builder.as_dataset(split=f"{split}[{unit.start}:{unit.stop}]")
        for example in dataset.as_numpy_iterator():
            progress(mean_bytes)
            data = example[field]
            is_text = isinstance(data, bytes)
            yield _decoded(data, limit) if is_text else Skipped(NO_TEXT)
    except Exception as error:  # TFDS and TensorFlow raise errors of many kinds.
        raise SourceError(
            f"Source {unit.source!r}: {spec} could not be read completely: {error}. "
            "Prepare that dataset again, or remove it from the source."
        ) from error
