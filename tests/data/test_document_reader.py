"""Documents come out as they went in, and what is damaged is named or counted."""

import contextlib
import gzip
import io
import json
import os
import random
import tempfile
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import real_text
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keras_openllama.data import document_reader, text_sources
from keras_openllama.data.document_reader import Skipped
from keras_openllama.data.text_sources import SourceError
from keras_openllama.utils import files

pytestmark = pytest.mark.backend_free

TEXTS = [
    *real_text.prose()[:30],
    "Zürich 🗻 \u2028 \x85 \x00",
    '"quoted" \\n',
    "\r\n x",
]
LINE = b'{"text": "good"}\n'


def read(
    path, field=None, limit=document_reader.MAX_DOCUMENT_BYTES, unit_bytes=1 << 20
):
    """All documents of a path, part by part."""
    units = text_sources.find_units("web", [str(path)], unit_bytes)
    return [
        text
        for unit in units
        for text in document_reader.read_documents(unit, field, limit)
    ]


def jsonl(texts, field="text", newline="\n"):
    """Bytes of JSON lines."""
    return "".join(json.dumps({field: text}) + newline for text in texts).encode()


def written(path, data):
    path.write_bytes(data)
    return path


@contextlib.contextmanager
def refused(path, *words):
    """What is within raises a `SourceError` that names the source and the file."""
    with pytest.raises(SourceError) as error:
        yield
    for word in ("'web'", str(path), *words):
        assert word in str(error.value)


def zstd(data):
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def in_members(compress, data, size=10_000):
    """Compressed in pieces that are put one after the other."""
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    return b"".join(map(compress, pieces))


# --- JSON lines ---


@pytest.mark.parametrize(
    "name, pack",
    [
        ("a.jsonl", bytes),
        ("a.json", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.GZ", lambda data: in_members(gzip.compress, data)),
        ("a.jsonl.zst", zstd),
        ("a.ndjson.zstd", lambda data: in_members(zstd, data)),
        ("a.jsonl.zst", lambda data: zstandard.compress(data, 19)),
    ],
)
def test_documents_of_json_lines_are_what_was_written(name, pack, tmp_path):
    path = written(tmp_path / name, pack(jsonl(TEXTS)))
    assert read(path) == TEXTS
    assert read(path, unit_bytes=1000) == TEXTS


def test_text_that_is_not_escaped_is_the_same(tmp_path):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    assert read(written(tmp_path / "a.jsonl", "\n".join(lines).encode())) == TEXTS


LINES = st.lists(st.text(max_size=12).map(lambda text: f"x{text}"), max_size=8)
ENDS = st.sampled_from(["\n", "\r\n", "\n\n", " \n", "\n \r\n"])


@settings(max_examples=100, deadline=None)
@given(LINES, ENDS, st.booleans(), st.integers(1, 40))
@example(["a", "b", "c"], "\n", True, 1)
@example(["a", "b", "c"], "\r\n", False, 1)
@example(["a" * 90, "b", "c" * 90], "\n", True, 1)
def test_each_line_is_in_one_part_wherever_the_parts_end(texts, end, final, unit_bytes):
    data = jsonl(texts, newline=end)
    if not final:
        data = data.removesuffix(end.encode())
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.write(data)
        file.flush()
        assert read(file.name, unit_bytes=unit_bytes) == texts


def test_a_part_has_the_lines_that_begin_in_it(tmp_path):
    texts = [f"chapter {number}" for number in range(100)]
    path = written(tmp_path / "a.jsonl", jsonl(texts))
    starts = np.cumsum([0, *(len(jsonl([text])) for text in texts)])
    for unit in text_sources.find_units("web", [str(path)], 300):
        expected = [
            text
            for text, start in zip(texts, starts, strict=False)
            if unit.start <= start < unit.stop
        ]
        assert list(document_reader.read_documents(unit)) == expected


@pytest.mark.parametrize(
    "value, field, expected",
    [
        ({"content": "b", "text": "a"}, None, "a"),
        ({"content": "b"}, None, "b"),
        ({"content": "b", "text": None}, None, "b"),
        ({"content": "b", "text": "a"}, "content", "b"),
        ({"body": "c", "text": "a"}, "body", "c"),
        ({"content": "b", "text": "a"}, "body", document_reader.NO_TEXT),
        ({"body": "c"}, None, document_reader.NO_TEXT),
    ],
)
def test_the_field_is_the_named_one_or_text_or_content(
    value, field, expected, tmp_path
):
    path = written(tmp_path / "a.jsonl", json.dumps(value).encode())
    [found] = read(path, field)
    assert found == expected
    assert isinstance(found, Skipped) == (expected == document_reader.NO_TEXT)


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "cut sho', "not JSON"),
        (b"{'text': 'python'}", "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b"[" * 15_000, "not JSON"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "not JSON"),
        (b"\0" * 100, "not JSON"),
        (b'["text"]', "JSON, but not an object"),
        (b'"text"', "JSON, but not an object"),
        (b"null", "JSON, but not an object"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"text": "half a pair: \\ud83d"}', "not UTF-8"),
        (b'{"title": "a"}', "no text field"),
        (b'{"text": 5}', "no text field"),
        (b'{"text": ["a"]}', "no text field"),
        (b'{"text": ""}', "empty"),
        (b'{"text": " \\n\\t\\u00a0"}', "empty"),
        (b'{"text": "' + b"x" * 10_001 + b'"}', "too long"),
        (b'{"text": "' + b"x" * 30_000 + b'"}', "too long"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_damaged_line_is_skipped_with_its_reason(name, line, reason, tmp_path):
    data = LINE + line + b"\n" + LINE
    data = gzip.compress(data) if name.endswith("gz") else data
    found = read(written(tmp_path / name, data), limit=10_000)
    assert found == ["good", reason, "good"]
    assert isinstance(found[1], Skipped)


def test_every_reason_but_empty_is_a_fault():
    reasons = {
        getattr(document_reader, name)
        for name in dir(document_reader)
        if name.isupper()
    }
    reasons = {value for value in reasons if isinstance(value, str)}
    assert {*document_reader.FAULTS} == reasons - {document_reader.EMPTY}


def test_a_document_of_the_limit_is_kept_and_one_byte_more_is_not(tmp_path):
    texts = ["x" * 100, "x" * 101, "é" * 50, "é" * 51]
    data = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
    found = read(written(tmp_path / "a.jsonl", data.encode()), limit=100)
    assert found == [texts[0], "too long", texts[2], "too long"]


def test_how_text_is_escaped_does_not_make_it_too_long(tmp_path):
    path = written(tmp_path / "a.jsonl", jsonl(["ж" * 500]))
    assert read(path, limit=1000) == ["ж" * 500]


@pytest.fixture(scope="module")
def long_line(tmp_path_factory):
    """A file with a line of 50 MB between two good ones."""
    path = tmp_path_factory.mktemp("long") / "a.jsonl"
    with open(path, "wb") as file:
        file.write(LINE + b'{"text": "')
        for _ in range(50):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + LINE)
    return path


def test_a_line_of_50_megabytes_is_skipped_and_never_held(long_line):
    tracemalloc.start()
    try:
        assert read(long_line, limit=10_000, unit_bytes=1 << 30) == [
            "good",
            "too long",
            "good",
        ]
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_line_of_50_megabytes_is_skipped_once_by_all_the_parts_it_spans(long_line):
    assert len(text_sources.find_units("web", [str(long_line)], 1 << 22)) == 12
    expected = ["good", "too long", "good"]
    assert read(long_line, limit=10_000, unit_bytes=1 << 22) == expected


def test_a_line_of_50_megabytes_is_read_if_that_is_allowed(long_line):
    first, long, last = read(long_line, limit=50_000_000)
    assert (first, len(long), last) == ("good", 50_000_000, "good")


def test_an_empty_file_has_no_documents(tmp_path):
    assert read(written(tmp_path / "a.jsonl", b"")) == []
    assert read(written(tmp_path / "b.jsonl", b"\n \r\n\n")) == []
    assert read(written(tmp_path / "c.jsonl.gz", gzip.compress(b""))) == []
    assert read(written(tmp_path / "d.jsonl.zst", zstd(b""))) == []


# --- Compressed files that are damaged ---

PACKS = {"a.jsonl.gz": gzip.compress, "a.jsonl.zst": zstd}


@pytest.mark.parametrize("name", PACKS)
def test_a_compressed_file_that_is_cut_short_anywhere_is_refused(name, tmp_path):
    data = PACKS[name](jsonl(TEXTS[:3]))
    for size in [0, *range(2, 40), *range(40, len(data) - 20, 97), len(data) - 4]:
        path = written(tmp_path / name, data[:size])
        with refused(path, "cannot be read to its end", "cut short"):
            read(path)


@pytest.mark.parametrize("name", PACKS)
def test_the_second_of_two_members_may_not_be_cut_short(name, tmp_path):
    first = PACKS[name](LINE)
    for size in (1, 3, 5, len(first) - 1):
        path = written(tmp_path / name, first + first[:size])
        with refused(path):
            read(path)


@pytest.mark.parametrize("name", PACKS)
def test_a_flipped_byte_never_gives_other_text(name, tmp_path):
    data = PACKS[name](jsonl(TEXTS))
    places = [*range(20), *random.Random(0).sample(range(len(data)), 100)]
    refusals = 0
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path = written(tmp_path / name, flipped)
        try:
            # A few bits of the header, such as gzip's time, tell nothing of the text.
            assert read(path) == TEXTS
        except SourceError as error:
            assert str(path) in str(error)
            refusals += 1
    assert refusals > 100


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("content", [b"", LINE, b"<html>404</html>"])
def test_what_is_not_compressed_though_its_name_says_so_is_refused(
    name, content, tmp_path
):
    path = written(tmp_path / name, content)
    with refused(path, "cannot be read to its end"):
        read(path)


def test_bytes_behind_the_end_are_refused(tmp_path):
    path = written(tmp_path / "a.jsonl.gz", gzip.compress(LINE) + LINE)
    with refused(path):
        read(path)


def gzip_of_size(data, size):
    """A gzip file whose header holds as long a name as makes it that large."""

    def pack(name):
        buffer = io.BytesIO()
        with gzip.GzipFile(name, "wb", fileobj=buffer, mtime=0) as file:
            file.write(data)
        return buffer.getvalue()

    return pack("x" * (size - len(pack("x")) + 1))


def test_a_member_may_begin_with_the_last_byte_of_what_is_read_at_once(tmp_path):
    first = gzip_of_size(LINE, (1 << 17) - 1)
    assert len(first) == (1 << 17) - 1
    path = written(tmp_path / "a.jsonl.gz", first + gzip.compress(LINE))
    assert read(path) == ["good", "good"]


def test_a_missing_file_is_refused(tmp_path):
    for name, data in (("a.jsonl", LINE), ("b.jsonl.gz", gzip.compress(LINE))):
        path = written(tmp_path / name, data)
        [unit] = text_sources.find_units("web", [str(path)])
        path.unlink()
        with refused(path, "No such file"):
            list(document_reader.read_documents(unit))


# --- Parquet ---


def write_column(path, column, name="text", **options):
    table = pyarrow.table({"id": range(len(column)), name: column})
    pyarrow.parquet.write_table(table, path, **options)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_a_column_of_any_kind_of_strings_is_read(kind, codec, tmp_path):
    texts = [*TEXTS, None, "", " \n", "x" * 100_001]
    values = texts
    if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        values = [text if text is None else text.encode() for text in texts]
    column = pyarrow.array(values, kind)
    path = tmp_path / "a.parquet"
    write_column(path, column, compression=codec, row_group_size=7)
    expected = [*TEXTS, "no text field", "empty", "empty", "too long"]
    for unit_bytes in (1, 1 << 20):
        found = read(path, limit=100_000, unit_bytes=unit_bytes)
        assert found == expected
        assert [isinstance(text, Skipped) for text in found[-5:]] == [False] + [
            True
        ] * 4


def test_bytes_that_are_no_text_are_skipped(tmp_path):
    column = pyarrow.array([b"good", b"caf\xe9", b"good"])
    path = write_column(tmp_path / "a.parquet", column)
    assert read(path) == ["good", "not UTF-8", "good"]


def test_the_column_is_the_named_one_or_text_or_content(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"body": ["c"], "content": ["b"], "text": ["a"]})
    pyarrow.parquet.write_table(table, path)
    assert [read(path), read(path, "content"), read(path, "body")] == [
        ["a"],
        ["b"],
        ["c"],
    ]
    pyarrow.parquet.write_table(table.drop_columns("text"), path)
    assert read(path) == ["b"]


@pytest.mark.parametrize(
    "name, column, field",
    [("body", ["a"], None), ("text", ["a"], "body"), ("text", [1], None)],
)
def test_a_file_without_the_column_is_refused(name, column, field, tmp_path):
    path = write_column(tmp_path / "a.parquet", column, name)
    wanted = repr(field) if field else "'text' or 'content'"
    with refused(path, f"named {wanted}", f"id, {name}", "--text-field"):
        read(path, field)


def damaged_after_planning(path, data):
    """The documents of a Parquet file that changes once its parts are made."""
    units = text_sources.find_units("web", [str(path)])
    path.write_bytes(data)
    return [text for unit in units for text in document_reader.read_documents(unit)]


def test_a_parquet_file_that_cannot_be_read_any_more_is_refused(tmp_path):
    for damage in (lambda data: b"", lambda data: data[:-9], lambda data: data[9:]):
        path = write_column(tmp_path / "a.parquet", TEXTS)
        with refused(path, "cannot be read to its end"):
            damaged_after_planning(path, damage(path.read_bytes()))
    path = write_column(tmp_path / "a.parquet", TEXTS)
    [unit] = text_sources.find_units("web", [str(path)])
    path.unlink()
    with refused(path, "No such file"):
        list(document_reader.read_documents(unit))


def test_a_page_of_garbage_is_refused(tmp_path):
    path = write_column(tmp_path / "a.parquet", TEXTS, compression="zstd")
    data = bytearray(path.read_bytes())
    data[1000:2000] = random.Random(0).randbytes(1000)
    with refused(path, "cannot be read to its end"):
        damaged_after_planning(path, data)


def test_a_page_that_is_not_what_its_checksum_says_is_refused(tmp_path):
    path = write_column(
        tmp_path / "a.parquet",
        ["a long string that is stored as it is"],
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    data = path.read_bytes().replace(b"long string", b"lang string")
    with refused(path):
        damaged_after_planning(path, data)


# --- Text files ---


def test_each_text_file_is_a_document_byte_for_byte(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:02}.txt").write_bytes(text.encode())
    assert read(tmp_path) == TEXTS
    assert read(tmp_path, unit_bytes=1000) == TEXTS


def test_text_files_that_are_no_documents_are_skipped_with_their_reasons(tmp_path):
    contents = [b"good", b"caf\xe9", b"", b"\n", b"x" * 100, b"x" * 101, b"\x1f\x8b\0"]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.txt").write_bytes(content)
    assert read(tmp_path, limit=100) == [
        "good",
        "not UTF-8",
        "empty",
        "empty",
        "x" * 100,
        "too long",
        "not UTF-8",
    ]


def test_a_text_file_that_has_gone_is_refused(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
    [unit] = text_sources.find_units("web", [str(tmp_path)])
    (tmp_path / "b").unlink()
    with refused(tmp_path / "b", "cannot be read"):
        list(document_reader.read_documents(unit))


# --- TensorFlow Datasets ---


@pytest.fixture
def tfds_directory(tmp_path):
    return real_text.write_tfds(tmp_path, {"train": [*TEXTS, "", "x" * 100_001]})


def test_documents_of_tensorflow_datasets_are_what_was_written(tfds_directory):
    found = read(f"tfds:{tfds_directory}", limit=100_000)
    assert sorted(found) == sorted([*TEXTS, "empty", "too long"])
    assert read(f"tfds:{tfds_directory}", "number") == [document_reader.NO_TEXT] * 35
    with refused(tfds_directory, "no feature named 'body'", "It has: ", "number"):
        read(f"tfds:{tfds_directory}", "body")


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_file_of_tensorflow_datasets_is_refused(damage, tfds_directory):
    [name] = [name for name in os.listdir(tfds_directory) if "tfrecord" in name]
    path = f"{tfds_directory}/{name}"
    data = bytearray(files.read_bytes(path))
    data[len(data) // 2] ^= 1
    os.unlink(path)
    if damage != "missing":
        files.write_bytes(path, data if damage == "flip" else data[:5000])
    with refused(tfds_directory):
        read(f"tfds:{tfds_directory}")


# --- Remote files ---


def put(name, data):
    """Writes a file that only TensorFlow's file systems have."""
    import tensorflow as tf

    tf.io.gfile.makedirs("ram://reading")
    path = f"ram://reading/{name}"
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(data)
    return path


def test_remote_files_are_read_as_local_ones_are(tmp_path):
    data = jsonl(TEXTS)
    parquet = write_column(tmp_path / "a.parquet", TEXTS, row_group_size=5)
    assert read(put("a.jsonl", data)) == TEXTS
    assert read(put("b.jsonl", data), unit_bytes=777) == TEXTS
    assert read(put("a.jsonl.gz", gzip.compress(data))) == TEXTS
    assert read(put("a.jsonl.zst", zstd(data))) == TEXTS
    assert read(put("a.parquet", parquet.read_bytes()), unit_bytes=777) == TEXTS
    assert read(put("a.txt", TEXTS[0].encode())) == TEXTS[:1]


def test_damaged_remote_files_are_refused_as_local_ones_are():
    import tensorflow as tf

    path = put("cut.jsonl.gz", gzip.compress(jsonl(TEXTS))[:-9])
    with refused(path, "cut short"):
        read(path)
    path = put("bad.parquet", b"no Parquet" * 9)
    with refused(path, "not a readable Parquet file"):
        read(path)
    for name in ("gone.jsonl", "gone.txt"):
        path = put(name, LINE)
        [unit] = text_sources.find_units("web", [path])
        tf.io.gfile.remove(path)
        with refused(path):
            list(document_reader.read_documents(unit))


# --- Progress ---


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_progress_adds_up_to_the_size_of_the_input(name, tmp_path):
    data = jsonl(TEXTS)
    data = gzip.compress(data) if name.endswith("gz") else data
    path = written(tmp_path / name, data)
    done = []
    for unit in text_sources.find_units("web", [str(path)], 10_000):
        list(document_reader.read_documents(unit, progress=done.append))
    assert sum(done) == len(data)
