"""Reading of documents: exact texts, and damage that is named or counted."""

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


def read_all(
    path, field=None, max_bytes=document_reader.MAX_DOCUMENT_BYTES, unit_bytes=1 << 20
):
    """All documents of a path, unit by unit."""
    units = text_sources.find_units("web", [str(path)], unit_bytes)
    return [
        text
        for unit in units
        for text in document_reader.read_documents(unit, field, max_bytes)
    ]


def jsonl(texts, field="text", newline="\n"):
    """Bytes of JSON lines."""
    return "".join(json.dumps({field: text}) + newline for text in texts).encode()


def write_file(path, data):
    path.write_bytes(data)
    return path


@contextlib.contextmanager
def raises_source_error(path, *words):
    """Expects a `SourceError` that names the source and the file."""
    with pytest.raises(SourceError) as error:
        yield
    for word in ("'web'", str(path), *words):
        assert word in str(error.value)


def zstd(data):
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def in_members(compress, data, size=10_000):
    """Compresses pieces of the data and concatenates them."""
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
def test_read_documents_of_jsonl_returns_the_texts(name, pack, tmp_path):
    path = write_file(tmp_path / name, pack(jsonl(TEXTS)))
    assert read_all(path) == TEXTS
    assert read_all(path, unit_bytes=1000) == TEXTS


def test_read_documents_of_jsonl_accepts_unescaped_text(tmp_path):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    assert (
        read_all(write_file(tmp_path / "a.jsonl", "\n".join(lines).encode())) == TEXTS
    )


LINES = st.lists(st.text(max_size=12).map(lambda text: f"x{text}"), max_size=8)
ENDS = st.sampled_from(["\n", "\r\n", "\n\n", " \n", "\n \r\n"])


@settings(max_examples=100, deadline=None)
@given(LINES, ENDS, st.booleans(), st.integers(1, 40))
@example(["a", "b", "c"], "\n", True, 1)
@example(["a", "b", "c"], "\r\n", False, 1)
@example(["a" * 90, "b", "c" * 90], "\n", True, 1)
def test_read_documents_reads_each_line_in_exactly_one_unit(
    texts, end, final, unit_bytes
):
    data = jsonl(texts, newline=end)
    if not final:
        data = data.removesuffix(end.encode())
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.write(data)
        file.flush()
        assert read_all(file.name, unit_bytes=unit_bytes) == texts


def test_read_documents_of_a_unit_reads_the_lines_that_start_in_it(tmp_path):
    texts = [f"chapter {number}" for number in range(100)]
    path = write_file(tmp_path / "a.jsonl", jsonl(texts))
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
def test_read_documents_selects_the_text_field(value, field, expected, tmp_path):
    good = {"text": "good", field or "text": "good"}
    lines = [json.dumps(line) for line in (value, good)]
    path = write_file(tmp_path / "a.jsonl", "\n".join(lines).encode())
    found, _ = read_all(path, field)
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
def test_read_documents_skips_a_damaged_line_with_its_reason(
    name, line, reason, tmp_path
):
    data = LINE + line + b"\n" + LINE
    data = gzip.compress(data) if name.endswith("gz") else data
    found = read_all(write_file(tmp_path / name, data), max_bytes=10_000)
    assert found == ["good", reason, "good"]
    assert isinstance(found[1], Skipped)


def test_faults_are_all_reasons_except_empty():
    reasons = {
        getattr(document_reader, name)
        for name in dir(document_reader)
        if name.isupper()
    }
    reasons = {value for value in reasons if isinstance(value, str)}
    assert {*document_reader.FAULTS} == reasons - {document_reader.EMPTY}


def test_read_documents_skips_documents_above_max_bytes(tmp_path):
    texts = ["x" * 100, "x" * 101, "é" * 50, "é" * 51]
    data = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
    found = read_all(write_file(tmp_path / "a.jsonl", data.encode()), max_bytes=100)
    assert found == [texts[0], "too long", texts[2], "too long"]


def test_read_documents_counts_max_bytes_without_escapes(tmp_path):
    path = write_file(tmp_path / "a.jsonl", jsonl(["ж" * 500]))
    assert read_all(path, max_bytes=1000) == ["ж" * 500]


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


def test_read_documents_skips_a_line_of_50_megabytes_without_loading_it(long_line):
    tracemalloc.start()
    try:
        assert read_all(long_line, max_bytes=10_000, unit_bytes=1 << 30) == [
            "good",
            "too long",
            "good",
        ]
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_read_documents_skips_a_line_that_spans_units_once(long_line):
    assert len(text_sources.find_units("web", [str(long_line)], 1 << 22)) == 12
    expected = ["good", "too long", "good"]
    assert read_all(long_line, max_bytes=10_000, unit_bytes=1 << 22) == expected


def test_read_documents_reads_a_line_of_50_megabytes_below_max_bytes(long_line):
    first, long, last = read_all(long_line, max_bytes=50_000_000)
    assert (first, len(long), last) == ("good", 50_000_000, "good")


def test_read_documents_of_an_empty_file_yields_nothing(tmp_path):
    assert read_all(write_file(tmp_path / "a.jsonl", b"")) == []
    assert read_all(write_file(tmp_path / "b.jsonl", b"\n \r\n\n")) == []
    assert read_all(write_file(tmp_path / "c.jsonl.gz", gzip.compress(b""))) == []
    assert read_all(write_file(tmp_path / "d.jsonl.zst", zstd(b""))) == []


# --- Compressed files that are damaged ---

PACKS = {"a.jsonl.gz": gzip.compress, "a.jsonl.zst": zstd}


@pytest.mark.parametrize("name", PACKS)
def test_read_documents_rejects_a_truncated_compressed_file(name, tmp_path):
    data = PACKS[name](jsonl(TEXTS[:3]))
    for size in [0, *range(2, 40), *range(40, len(data) - 20, 97), len(data) - 4]:
        path = write_file(tmp_path / name, data[:size])
        with raises_source_error(path, "could not be read completely", "truncated"):
            read_all(path)


@pytest.mark.parametrize("name", PACKS)
def test_read_documents_rejects_a_truncated_second_member(name, tmp_path):
    first = PACKS[name](LINE)
    for size in (1, 3, 5, len(first) - 1):
        path = write_file(tmp_path / name, first + first[:size])
        with raises_source_error(path):
            read_all(path)


@pytest.mark.parametrize("name", PACKS)
def test_read_documents_never_returns_wrong_text_of_a_corrupt_file(name, tmp_path):
    data = PACKS[name](jsonl(TEXTS))
    places = [*range(20), *random.Random(0).sample(range(len(data)), 100)]
    refusals = 0
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path = write_file(tmp_path / name, flipped)
        try:
            # A few bits of the header, such as gzip's time, do not affect the text.
            assert read_all(path) == TEXTS
        except SourceError as error:
            assert str(path) in str(error)
            refusals += 1
    assert refusals > 100


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("content", [b"", LINE, b"<html>404</html>"])
def test_read_documents_rejects_uncompressed_content_in_a_compressed_file(
    name, content, tmp_path
):
    path = write_file(tmp_path / name, content)
    problem = "neither a gzip nor a zstd file" if content else "it is truncated"
    with raises_source_error(path, "could not be read completely", problem):
        read_all(path)


def test_read_documents_of_zstd_accepts_a_frame_without_content(tmp_path):
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    path = write_file(tmp_path / "a.jsonl.zst", skippable + zstd(LINE))
    assert len(read_all(path)) == 1


def test_read_documents_rejects_trailing_bytes(tmp_path):
    path = write_file(tmp_path / "a.jsonl.gz", gzip.compress(LINE) + LINE)
    with raises_source_error(path):
        read_all(path)


def gzip_of_size(data, size):
    """A gzip file, padded to a size by the file name in its header."""

    def pack(name):
        buffer = io.BytesIO()
        with gzip.GzipFile(name, "wb", fileobj=buffer, mtime=0) as file:
            file.write(data)
        return buffer.getvalue()

    return pack("x" * (size - len(pack("x")) + 1))


def test_read_documents_of_gzip_accepts_a_member_at_the_end_of_a_chunk(tmp_path):
    first = gzip_of_size(LINE, (1 << 17) - 1)
    assert len(first) == (1 << 17) - 1
    path = write_file(tmp_path / "a.jsonl.gz", first + gzip.compress(LINE))
    assert read_all(path) == ["good", "good"]


def test_read_documents_rejects_a_missing_file(tmp_path):
    for name, data in (("a.jsonl", LINE), ("b.jsonl.gz", gzip.compress(LINE))):
        path = write_file(tmp_path / name, data)
        [unit] = text_sources.find_units("web", [str(path)])
        path.unlink()
        with raises_source_error(path, "No such file"):
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
def test_read_documents_of_parquet_accepts_every_string_type(kind, codec, tmp_path):
    texts = [*TEXTS, None, "", " \n", "x" * 100_001]
    values = texts
    if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        values = [text if text is None else text.encode() for text in texts]
    column = pyarrow.array(values, kind)
    path = tmp_path / "a.parquet"
    write_column(path, column, compression=codec, row_group_size=7)
    expected = [*TEXTS, "no text field", "empty", "empty", "too long"]
    for unit_bytes in (1, 1 << 20):
        found = read_all(path, max_bytes=100_000, unit_bytes=unit_bytes)
        assert found == expected
        assert [isinstance(text, Skipped) for text in found[-5:]] == [False] + [
            True
        ] * 4


def test_read_documents_of_parquet_skips_invalid_utf8(tmp_path):
    column = pyarrow.array([b"good", b"caf\xe9", b"good"])
    path = write_column(tmp_path / "a.parquet", column)
    assert read_all(path) == ["good", "not UTF-8", "good"]


def test_read_documents_of_parquet_selects_the_column(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"body": ["c"], "content": ["b"], "text": ["a"]})
    pyarrow.parquet.write_table(table, path)
    assert [read_all(path), read_all(path, "content"), read_all(path, "body")] == [
        ["a"],
        ["b"],
        ["c"],
    ]
    pyarrow.parquet.write_table(table.drop_columns("text"), path)
    assert read_all(path) == ["b"]


@pytest.mark.parametrize(
    "name, column, field",
    [("body", ["a"], None), ("text", ["a"], "body"), ("text", [1], None)],
)
def test_read_documents_of_parquet_rejects_a_file_without_the_column(
    name, column, field, tmp_path
):
    path = write_column(tmp_path / "a.parquet", column, name)
    expected = repr(field) if field else "'text' or 'content'"
    with raises_source_error(path, f"named {expected}", f"id, {name}", "--text-field"):
        read_all(path, field)


def damaged_after_planning(path, data):
    """The documents of a Parquet file that changes after its division into units."""
    units = text_sources.find_units("web", [str(path)])
    path.write_bytes(data)
    return [text for unit in units for text in document_reader.read_documents(unit)]


def test_read_documents_of_parquet_rejects_a_file_damaged_since_planning(tmp_path):
    for damage in (lambda data: b"", lambda data: data[:-9], lambda data: data[9:]):
        path = write_column(tmp_path / "a.parquet", TEXTS)
        with raises_source_error(path, "could not be read completely"):
            damaged_after_planning(path, damage(path.read_bytes()))
    path = write_column(tmp_path / "a.parquet", TEXTS)
    [unit] = text_sources.find_units("web", [str(path)])
    path.unlink()
    with raises_source_error(path, "No such file"):
        list(document_reader.read_documents(unit))


def test_read_documents_of_parquet_rejects_a_page_of_garbage(tmp_path):
    path = write_column(tmp_path / "a.parquet", TEXTS, compression="zstd")
    data = bytearray(path.read_bytes())
    data[1000:2000] = random.Random(0).randbytes(1000)
    with raises_source_error(path, "could not be read completely"):
        damaged_after_planning(path, data)


def test_read_documents_of_parquet_verifies_page_checksums(tmp_path):
    path = write_column(
        tmp_path / "a.parquet",
        ["a long string that is stored as it is"],
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    data = path.read_bytes().replace(b"long string", b"lang string")
    with raises_source_error(path):
        damaged_after_planning(path, data)


# --- Files from other systems ---

JSONL = b'{"text": "one"}\r\n{"text": "two"}\r\n'


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + JSONL, ["one", "two"]),
        ("a.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + JSONL), ["one", "two"]),
        ("a.txt", b"\xef\xbb\xbfone\r\ntwo", ["one\ntwo"]),
        ("joined.jsonl", JSONL[:17] + b"\xef\xbb\xbf" + JSONL[17:], ["one", "two"]),
    ],
)
def test_read_documents_ignores_a_byte_order_mark(name, data, expected, tmp_path):
    path = write_file(tmp_path / name, data)
    assert read_all(path) == expected
    assert read_all(path, unit_bytes=10) == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (JSONL.decode().encode("utf-16"), "UTF-16"),
        (JSONL.decode().encode("utf-16-le"), "UTF-16LE"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
    ],
    ids=["UTF-16", "UTF-16 without a mark", "Git LFS"],
)
def test_read_documents_rejects_a_file_that_is_not_utf8_text(
    name, data, problem, tmp_path
):
    path = write_file(tmp_path / name, data)
    with raises_source_error(path, problem):
        read_all(path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n"


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt.gz"]
)
def test_a_git_lfs_pointer_among_good_files_is_named(name, tmp_path):
    good = tmp_path / "good.jsonl"
    write_file(good, LINE * 1000)
    path = write_file(tmp_path / name, POINTER)
    with raises_source_error(path, "Git LFS pointer", "git lfs pull"):
        for unit in text_sources.find_units("web", [str(good), str(path)]):
            list(document_reader.read_documents(unit))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<html>\n<body>Not found</body>\n</html>\n", "not JSON: 3"),
        (b'[\n{"text": "a"},\n{"text": "b"}\n]\n', "a JSON array"),
        (b'[{"text": "a"}, {"text": "b"}]', "a JSON array"),
        (LINE + b'{"title": "a"}\n' * 2, "2 of 3 documents .*no text field: 2"),
        (b"\x89PNG\xff" * 50, "not UTF-8: 1"),
    ],
)
def test_read_documents_names_a_file_that_is_damaged_as_a_whole(data, reason, tmp_path):
    path = write_file(tmp_path / "a.jsonl", data)
    with pytest.raises(text_sources.SourceError, match=f"{path} is damaged.*{reason}"):
        read_all(path)


def test_read_documents_reads_compressed_text_files(tmp_path):
    path = write_file(tmp_path / "a.txt.gz", gzip.compress(b"The sea"))
    assert read_all(path) == ["The sea"]
    write_file(path, path.read_bytes()[:-5])
    with raises_source_error(path, "truncated"):
        read_all(path)


# --- Text files ---


def test_read_documents_of_text_files_changes_nothing_but_windows_line_ends(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:02}.txt").write_bytes(text.encode())
    expected = [text.replace("\r\n", "\n") for text in TEXTS]
    assert expected != TEXTS
    assert read_all(tmp_path) == expected
    assert read_all(tmp_path, unit_bytes=1000) == expected


def test_read_documents_of_text_files_skips_with_reasons(tmp_path):
    contents = [b"good", b"caf\xe9", b"", b"\n", b"x" * 100, b"x" * 101, b"\x1f\x8b\0"]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.txt").write_bytes(content)
    assert read_all(tmp_path, max_bytes=100) == [
        "good",
        "not UTF-8",
        "empty",
        "empty",
        "x" * 100,
        "too long",
        "not UTF-8",
    ]


def test_read_documents_rejects_a_text_file_deleted_since_planning(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
    [unit] = text_sources.find_units("web", [str(tmp_path)])
    (tmp_path / "b").unlink()
    with raises_source_error(tmp_path / "b", "could not be read"):
        list(document_reader.read_documents(unit))


# --- TensorFlow Datasets ---


@pytest.fixture
def tfds_directory(tmp_path):
    return real_text.write_tfds(tmp_path, {"train": [*TEXTS, "", "x" * 100_001]})


def test_read_documents_of_tfds_returns_the_texts(tfds_directory):
    found = read_all(f"tfds:{tfds_directory}", max_bytes=100_000)
    assert sorted(found) == sorted([*TEXTS, "empty", "too long"])
    with raises_source_error(tfds_directory, "35 of 35 documents", "--text-field"):
        read_all(f"tfds:{tfds_directory}", "number")
    with raises_source_error(
        tfds_directory, "no feature named 'body'", "It has: ", "number"
    ):
        read_all(f"tfds:{tfds_directory}", "body")


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_read_documents_of_tfds_rejects_a_damaged_file(damage, tfds_directory):
    [name] = [name for name in os.listdir(tfds_directory) if "tfrecord" in name]
    path = f"{tfds_directory}/{name}"
    data = bytearray(files.read_bytes(path))
    data[len(data) // 2] ^= 1
    os.unlink(path)
    if damage != "missing":
        files.write_bytes(path, data if damage == "flip" else data[:5000])
    with raises_source_error(tfds_directory):
        read_all(f"tfds:{tfds_directory}")


# --- Remote files ---


def write_remote(name, data):
    """Writes a file to a file system that only TensorFlow has."""
    import tensorflow as tf

    tf.io.gfile.makedirs("ram://reading")
    path = f"ram://reading/{name}"
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(data)
    return path


def test_read_documents_reads_remote_files(tmp_path):
    data = jsonl(TEXTS)
    parquet = write_column(tmp_path / "a.parquet", TEXTS, row_group_size=5)
    assert read_all(write_remote("a.jsonl", data)) == TEXTS
    assert read_all(write_remote("b.jsonl", data), unit_bytes=777) == TEXTS
    assert read_all(write_remote("a.jsonl.gz", gzip.compress(data))) == TEXTS
    assert read_all(write_remote("a.jsonl.zst", zstd(data))) == TEXTS
    assert (
        read_all(write_remote("a.parquet", parquet.read_bytes()), unit_bytes=777)
        == TEXTS
    )
    assert read_all(write_remote("a.txt", TEXTS[0].encode())) == TEXTS[:1]


def test_read_documents_rejects_damaged_remote_files():
    import tensorflow as tf

    path = write_remote("cut.jsonl.gz", gzip.compress(jsonl(TEXTS))[:-9])
    with raises_source_error(path, "truncated"):
        read_all(path)
    path = write_remote("bad.parquet", b"no Parquet" * 9)
    with raises_source_error(path, "not a readable Parquet file"):
        read_all(path)
    for name in ("gone.jsonl", "gone.txt"):
        path = write_remote(name, LINE)
        [unit] = text_sources.find_units("web", [path])
        tf.io.gfile.remove(path)
        with raises_source_error(path):
            list(document_reader.read_documents(unit))


# --- Progress ---


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_read_documents_reports_progress_up_to_the_size_of_the_input(name, tmp_path):
    data = jsonl(TEXTS)
    data = gzip.compress(data) if name.endswith("gz") else data
    path = write_file(tmp_path / name, data)
    done = []
    for unit in text_sources.find_units("web", [str(path)], 10_000):
        list(document_reader.read_documents(unit, progress=done.append))
    assert sum(done) == len(data)
