"""Division of sources into units: deterministic, complete, without duplicates."""

import json
import os

import pytest
import real_text

from keras_openllama.data import document_reader, text_sources
from keras_openllama.data.text_sources import SourceError

pytestmark = pytest.mark.backend_free


def write_tree(directory, names, content="x"):
    """Writes files with some content."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return directory


def found(directory, spec):
    """What a spec finds, relative to a directory."""
    paths = text_sources.find_files("web", str(spec))
    return [os.path.relpath(path, directory) for path in paths]


def documents(units):
    return [text for unit in units for text in document_reader.read_documents(unit)]


def identities(units):
    return [unit.identity for unit in units]


# --- Command line ---


def test_parse_sources_groups_paths_by_source_in_order():
    given = ["web=a*.parquet", "code=x/y", "web=tfds:c4@train", "code=k=v.jsonl"]
    expected = {"web": ["a*.parquet", "tfds:c4@train"], "code": ["x/y", "k=v.jsonl"]}
    assert text_sources.parse_sources(given) == expected


@pytest.mark.parametrize(
    "argument",
    ["web", "web=", "=a.jsonl", "Web=a", "1web=a", "a-b=c", "a b=c", "../x=c"],
)
def test_parse_sources_rejects_malformed_arguments(argument):
    with pytest.raises(SourceError, match="NAME=PATHS") as error:
        text_sources.parse_sources(["code=a.jsonl", argument])
    assert f"Received: {argument!r}" in str(error.value)


# --- Files ---


def test_find_files_returns_a_file(tmp_path):
    write_tree(tmp_path, ["a.jsonl", "b.jsonl"])
    assert found(tmp_path, tmp_path / "a.jsonl") == ["a.jsonl"]


def test_find_files_prefers_a_file_over_a_pattern(tmp_path):
    write_tree(tmp_path, ["wiki[1].jsonl", "wiki1.jsonl"])
    assert found(tmp_path, tmp_path / "wiki[1].jsonl") == ["wiki[1].jsonl"]


def test_find_files_expands_patterns_in_order_at_any_depth(tmp_path):
    write_tree(tmp_path, ["b.jsonl", "a.jsonl", "c/d/e.jsonl", "c.txt"])
    assert found(tmp_path, tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert found(tmp_path, tmp_path / "**/*.jsonl") == [
        "a.jsonl",
        "b.jsonl",
        "c/d/e.jsonl",
    ]


def test_find_files_in_a_directory_returns_data_files_only(tmp_path):
    data = ["a.jsonl", "b.JSON.GZ", "c/d.ndjson.zst", "c/e.parquet", "f.jsonl.zstd"]
    write_tree(tmp_path, [*data, "README.md", "c/x.py", "a.jsonl.part", ".git/y.json"])
    assert found(tmp_path, tmp_path) == sorted(data)


def test_ignored_files_are_those_beside_data_files(tmp_path):
    write_tree(tmp_path / "mixed", ["a.jsonl", "b.parquet", "c.txt", "d/README.md"])
    write_tree(tmp_path / "text", ["a.txt", "b.md"])
    ignored = text_sources.ignored_files(str(tmp_path / "mixed"))
    assert ignored == [f"{tmp_path}/mixed/c.txt", f"{tmp_path}/mixed/d/README.md"]
    assert text_sources.ignored_files(str(tmp_path / "text")) == []
    assert text_sources.ignored_files(f"{tmp_path}/mixed/*") == []


@pytest.mark.parametrize("name", ["a.jsonl.xz", "b.zip", "c.tar.gz", "d.arrow"])
def test_find_files_names_formats_that_are_not_read(name, tmp_path):
    write_tree(tmp_path, ["a.txt", name])
    with pytest.raises(text_sources.SourceError, match=f"{name}: this format is not"):
        text_sources.find_files("web", str(tmp_path))


def test_find_files_in_a_directory_without_data_files_returns_all_files(tmp_path):
    text = ["a.py", "b/c.py", "b/d"]
    write_tree(tmp_path, [*text, ".hidden", ".git/config", "b/.x.py"])
    assert found(tmp_path, tmp_path) == text
    [unit] = text_sources.find_units("code", [str(tmp_path)])
    assert unit.format == "text"
    assert unit.label == f"{tmp_path}/a.py and 2 more files"


def test_find_files_accepts_a_pattern_of_directories(tmp_path):
    write_tree(tmp_path, ["shard1/a.jsonl", "shard2/b.jsonl", "shard2/README"])
    expected = ["shard1/a.jsonl", "shard2/b.jsonl"]
    assert found(tmp_path, tmp_path / "shard*") == expected


def test_find_files_of_overlapping_matches_has_no_duplicates(tmp_path):
    write_tree(tmp_path, ["tree/a.jsonl", "tree/sub/b.jsonl"])
    assert found(tmp_path, tmp_path / "tree/**") == ["tree/a.jsonl", "tree/sub/b.jsonl"]


def test_find_files_finds_remote_files():
    import tensorflow as tf

    root = "ram://find"
    for name in ("a.jsonl", "b.jsonl", "c/d.jsonl", ".git/e.jsonl", "README"):
        path = f"{root}/{name}"
        tf.io.gfile.makedirs(os.path.dirname(path))
        with tf.io.gfile.GFile(path, "w") as file:
            file.write(name)
    top = [f"{root}/a.jsonl", f"{root}/b.jsonl"]
    assert text_sources.find_files("web", f"{root}/a.jsonl") == top[:1]
    assert text_sources.find_files("web", f"{root}/*.jsonl") == top
    assert text_sources.find_files("web", root) == [*top, f"{root}/c/d.jsonl"]
    [unit] = text_sources.find_units("web", [f"{root}/a.jsonl"])
    assert unit.num_bytes == len("a.jsonl")
    with pytest.raises(SourceError, match="'ram://find/x' matches no files"):
        text_sources.find_units("web", [f"{root}/x"])


@pytest.mark.parametrize("spec", ["nowhere.jsonl", "*.parquet", "empty"])
def test_find_units_error_names_a_spec_without_matches(spec, tmp_path):
    write_tree(tmp_path, ["a.jsonl", "empty/.hidden"])
    path = str(tmp_path / spec)
    with pytest.raises(SourceError, match="matches no files") as error:
        text_sources.find_units("web", [str(tmp_path / "a.jsonl"), path])
    assert "'web'" in str(error.value) and repr(path) in str(error.value)


def test_find_units_error_names_a_broken_link(tmp_path):
    write_tree(tmp_path, ["a.jsonl"])
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(SourceError, match=r"'web': .*b\.jsonl could not be read"):
        text_sources.find_units("web", [str(tmp_path)])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet" * 100])
def test_find_units_error_names_an_invalid_parquet_file(content, tmp_path):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(SourceError, match=r"'web': .*a\.parquet is not a readable"):
        text_sources.find_units("web", [str(tmp_path)])


# --- Units ---


@pytest.fixture
def everything(tmp_path):
    """A source of every format, as specs, and how many documents it has."""
    write_tree(tmp_path / "text", [f"{i:02}.txt" for i in range(10)], "word " * 20)
    specs = [
        real_text.write_jsonl(tmp_path / "a.jsonl", ["json lines"] * 50),
        real_text.write_parquet(tmp_path / "b.parquet", ["parquet"] * 50, group=5),
        str(tmp_path / "text"),
        "tfds:" + real_text.write_tfds(tmp_path / "tfds", {"train": ["tfds"] * 50}),
    ]
    return specs, {"json lines": 50, "parquet": 50, "word " * 20: 10, "tfds": 50}


@pytest.mark.parametrize("unit_bytes", [200, 500, 1000, 1 << 20])
def test_find_units_covers_every_document_once(unit_bytes, everything):
    specs, expected = everything
    units = text_sources.find_units("web", specs, unit_bytes)
    texts = documents(units)
    assert {text: texts.count(text) for text in set(texts)} == expected
    assert [unit.number for unit in units] == list(range(len(units)))
    assert (len(units) == 4) == (unit_bytes == 1 << 20)


def test_find_units_is_deterministic(everything):
    specs, _ = everything
    assert text_sources.find_units("web", specs, 500) == text_sources.find_units(
        "web", specs, 500
    )
    different = identities(text_sources.find_units("web", specs, 200))
    assert len({*different}) == len(different) > 20


def test_find_units_divides_a_file_without_gap_or_overlap(tmp_path):
    path = real_text.write_jsonl(tmp_path / "a.jsonl", ["text"] * 999)
    size = os.path.getsize(path)
    units = text_sources.find_units("web", [path], 1000)
    assert len(units) == round(size / 1000)
    assert [unit.start for unit in units] == [0, *(unit.stop for unit in units[:-1])]
    assert units[-1].stop == size == sum(unit.num_bytes for unit in units)
    assert all(900 < unit.num_bytes < 1100 for unit in units)
    assert units[1].label == f"{path} (bytes {units[1].start} to {units[1].stop})"


def test_find_units_does_not_divide_compressed_files(tmp_path):
    for name in ("a.jsonl.gz", "b.json.zst", "c.ndjson.zstd"):
        (tmp_path / name).write_bytes(bytes(1000))
    units = text_sources.find_units("web", [str(tmp_path)], 10)
    assert [(unit.start, unit.stop) for unit in units] == [(0, None)] * 3
    assert units[0].label == f"{tmp_path}/a.jsonl.gz"


def test_find_units_groups_small_row_groups_and_text_files(tmp_path):
    path = real_text.write_parquet(tmp_path / "a.parquet", ["x"] * 70, group=10)
    size = text_sources.find_units("web", [path], 1)[0].num_bytes
    parts = [
        (u.start, u.stop) for u in text_sources.find_units("web", [path], 2 * size)
    ]
    assert parts == [(0, 2), (2, 4), (4, 6), (6, 7)]
    write_tree(tmp_path / "text", "abcde", "12345")
    units = text_sources.find_units("code", [str(tmp_path / "text")], 10)
    assert [len(unit.paths) for unit in units] == [2, 2, 1]


@pytest.mark.parametrize("name", ["a.jsonl", "b.parquet", "text/03.txt"])
def test_unit_identity_changes_for_units_of_a_changed_file_only(
    name, everything, tmp_path
):
    specs, _ = everything
    before = text_sources.find_units("web", specs, 1000)
    path = tmp_path / name
    stat = path.stat()
    # An edit may leave the size unchanged, so only the time differs.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = text_sources.find_units("web", specs, 1000)
    changed = {
        unit.number
        for unit, other in zip(before, after, strict=True)
        if unit.identity != other.identity
    }
    assert changed == {unit.number for unit in before if str(path) in unit.paths}
    assert changed


def test_unit_identity_changes_with_the_file_size(tmp_path):
    path = real_text.write_jsonl(tmp_path / "a.jsonl", ["text"] * 9)
    time = os.stat(path).st_mtime_ns
    before = text_sources.find_units("web", [path])
    with open(path, "a") as file:
        file.write(json.dumps({"text": "more"}))
    os.utime(path, ns=(time, time))
    assert identities(before) != identities(text_sources.find_units("web", [path]))


def test_unit_identity_depends_on_the_division(tmp_path):
    path = real_text.write_jsonl(tmp_path / "a.jsonl", ["text"] * 99)
    first = identities(text_sources.find_units("web", [path], 500))
    second = identities(text_sources.find_units("web", [path], 400))
    assert not {*first} & {*second}


# --- TensorFlow Datasets ---


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
    splits = {"train": [f"chapter {i}" for i in range(20)], "test": ["a", "b", "c"]}
    return real_text.write_tfds(tmp_path_factory.mktemp("tfds"), splits)


def test_find_units_of_tfds_defaults_to_the_train_split(tfds_directory):
    train = documents(text_sources.find_units("web", [f"tfds:{tfds_directory}"]))
    assert sorted(train) == sorted(f"chapter {i}" for i in range(20))
    assert train == documents(
        text_sources.find_units("web", [f"tfds:{tfds_directory}@train"])
    )
    test = documents(text_sources.find_units("web", [f"tfds:{tfds_directory}@test"]))
    assert sorted(test) == ["a", "b", "c"]


def test_find_units_of_tfds_divides_a_split_by_examples(tfds_directory):
    units = text_sources.find_units("web", [f"tfds:{tfds_directory}"], 200)
    assert len(units) > 2
    assert [unit.start for unit in units] == [0, *(unit.stop for unit in units[:-1])]
    assert units[-1].stop == 20
    assert units[0].label == f"tfds:{tfds_directory}@train (examples 0 to 5)"


def test_find_units_of_tfds_makes_no_empty_units(tfds_directory):
    units = text_sources.find_units("web", [f"tfds:{tfds_directory}@test"], 10)
    assert sorted(documents(units)) == ["a", "b", "c"]


@pytest.mark.parametrize("split, count", [("train[:10]", 10), ("train+test", 23)])
def test_find_units_of_tfds_reads_or_rejects_slices_of_splits(
    split, count, tfds_directory
):
    try:
        units = text_sources.find_units("web", [f"tfds:{tfds_directory}@{split}"])
    except SourceError as error:
        assert split in str(error)
    else:
        assert len(documents(units)) == count


@pytest.mark.parametrize("spec", ["no_such_data_set", "{directory}@holdout"])
def test_find_units_of_tfds_error_names_a_missing_dataset_or_split(
    spec, tfds_directory
):
    spec = "tfds:" + spec.format(directory=tfds_directory)
    with pytest.raises(
        SourceError, match="TensorFlow Datasets could not load"
    ) as error:
        text_sources.find_units("web", [spec])
    assert "'web'" in str(error.value) and repr(spec) in str(error.value)


def test_find_units_rejects_a_tfds_source_with_an_empty_split():
    with pytest.raises(text_sources.SourceError, match="'tfds:c4@' has no split"):
        text_sources.find_units("web", ["tfds:c4@"])
