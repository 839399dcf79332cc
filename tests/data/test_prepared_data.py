"""Damage to a prepared dataset is detected, and the error names the file."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from token_data import prepare_sources
from tokenizer_models import trained_model

from keras_openllama import OpenLlamaTokenizer
from keras_openllama.data.prepared_data import PreparedData, tokens_per_block
from keras_openllama.data.token_records import DamagedFileError

pytestmark = pytest.mark.backend_free

COUNTS = {"web": 300, "code": 100, "books": 40}
SHARD = "tokens/web/1.0.0/tokens-train.array_record-00001-of-00005"
LENGTHS = "tokens/code/1.0.0/validation.lengths"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared")
    return prepare_sources(directory, COUNTS, validation_fraction=0.1, unit_bytes=4000)


@pytest.fixture
def path(original, tmp_path):
    """A copy of the data, to be damaged."""
    return Path(shutil.copytree(original.directory, tmp_path / "data"))


def flip(path, place, bit=0):
    with open(path, "r+b") as file:
        file.seek(place)
        [byte] = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def all_documents(data, source="web", split="train"):
    documents = data.documents(source, split)
    read = documents.read_many(range(len(documents)))
    return [(tokens.tolist(), num_bytes) for tokens, num_bytes in read]


def assert_open_fails(path, error, *words):
    """Asserts that the dataset cannot be opened, and the words of the message."""
    with pytest.raises(error) as raised:
        PreparedData.open(str(path))
    for word in words:
        assert str(word) in str(raised.value)


# --- Valid data ---


def test_open_reads_a_copy_of_a_dataset(path, original):
    data = PreparedData.open(str(path))
    assert data.sources == [*COUNTS]
    data.verify_checksums()
    for source in COUNTS:
        for split in ("train", "validation"):
            copied = all_documents(data, source, split)
            assert copied == all_documents(original, source, split)
            assert copied


def test_documents_support_random_access_and_pickling(path):
    documents = PreparedData.open(str(path)).documents("web", "train")
    expected = all_documents(PreparedData.open(str(path)))
    assert len(documents) == len(expected) > 200
    numbers = np.random.default_rng(0).permutation(len(documents))
    for number, (tokens, size) in zip(
        numbers, documents.read_many(numbers), strict=True
    ):
        assert (tokens.tolist(), size) == expected[number]
    # As in a worker process.
    tokens, size = pickle.loads(pickle.dumps(documents))[7]
    assert (tokens.tolist(), size) == expected[7]


def test_documents_lengths_match_the_documents(original):
    for source in COUNTS:
        documents = original.documents(source, "train")
        lengths = [
            len(tokens) for tokens, _ in documents.read_many(range(len(documents)))
        ]
        assert documents.lengths.tolist() == lengths
        assert documents.tokens_per_block().sum() == sum(lengths)


def test_tokens_per_block_does_not_overflow():
    lengths = np.full(5000, 1 << 31, "uint32")
    assert tokens_per_block(lengths).sum() == 5000 << 31
    assert tokens_per_block(lengths[:0]).tolist() == []


def test_verify_checksums_reports_every_byte(path):
    sizes = []
    PreparedData.open(str(path)).verify_checksums(sizes.append)
    files = [file for file in path.glob("tokens/*/*/*") if file.suffix != ".json"]
    assert sum(sizes) == sum(file.stat().st_size for file in files)


def test_documents_error_names_a_missing_source_or_split(original):
    with pytest.raises(ValueError, match=r"no source 'wbe'\. It has: web, code, books"):
        original.documents("wbe")
    with pytest.raises(ValueError, match=r"train, validation\. Received: split='test'"):
        original.documents("web", "test")
    with pytest.raises(IndexError):
        original.documents("web", "train")[COUNTS["web"]]


# --- The manifest ---


def test_open_rejects_a_directory_without_a_manifest(path):
    (path / "manifest.json").unlink()
    assert_open_fails(path, FileNotFoundError, path, "no manifest.json", "prepare-data")
    assert_open_fails(path / "nowhere", FileNotFoundError, path / "nowhere")


def test_open_rejects_a_truncated_manifest(path):
    manifest = path / "manifest.json"
    data = manifest.read_bytes()
    for size in range(0, len(data), 101):
        manifest.write_bytes(data[:size])
        assert_open_fails(path, ValueError, manifest, "is damaged")


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"{'format': 1}", b"\0" * 999])
def test_open_rejects_a_manifest_of_garbage(content, path):
    (path / "manifest.json").write_bytes(content)
    assert_open_fails(path, ValueError, path / "manifest.json", "is damaged")


@pytest.mark.parametrize("content", ["[]", "null", '{"format": 1}'])
def test_open_rejects_a_manifest_without_the_required_keys(content, path):
    (path / "manifest.json").write_text(content)
    assert_open_fails(path, ValueError, path / "manifest.json")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_open_rejects_a_manifest_of_another_format(version, path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["format"] = version
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert_open_fails(
        path, ValueError, path / "manifest.json", f"has format {version!r}"
    )


# --- Shards ---


@pytest.mark.parametrize("name", [SHARD, LENGTHS])
def test_open_rejects_a_missing_file(name, path):
    (path / name).unlink()
    assert_open_fails(
        path, DamagedFileError, path / name, "is missing, but should have"
    )


@pytest.mark.parametrize("name", [SHARD, LENGTHS])
@pytest.mark.parametrize("change", [-1, -4, 4])
def test_open_rejects_a_file_of_another_size(name, change, path):
    size = (path / name).stat().st_size
    os.truncate(path / name, size + change)
    words = f"has {size + change} bytes, but should have {size} bytes"
    assert_open_fails(path, DamagedFileError, path / name, words)


def test_open_rejects_a_missing_source(path):
    shutil.rmtree(path / "tokens" / "books")
    assert_open_fails(path, DamagedFileError, path / "tokens" / "books", "is missing")


def test_read_many_detects_a_flipped_byte(path, original):
    expected = all_documents(original)
    shard = path / SHARD
    used = len(shard.read_bytes().rstrip(b"\0"))
    refusals = 0
    # The start and the end of the file hold the positions of chunks.
    for place in range(100, used, 97):
        flip(shard, place)
        data = PreparedData.open(str(path))
        try:
            # Metadata of the format may change without effect.
            assert all_documents(data) == expected
        except DamagedFileError as error:
            assert str(shard) in str(error)
            assert "prepare the data again" in str(error)
            refusals += 1
        flip(shard, place)
    assert refusals > 50
    assert all_documents(PreparedData.open(str(path))) == expected


def test_read_many_reads_the_shards_that_are_not_damaged(path, original):
    shard = path / SHARD
    shard.write_bytes(bytes(shard.stat().st_size))
    documents = PreparedData.open(str(path)).documents("web", "train")
    first = original.split_info("web", "train")["shards"][0]["documents"]
    expected = all_documents(original)
    found = documents.read_many(range(first))
    assert [(tokens.tolist(), size) for tokens, size in found] == expected[:first]
    with pytest.raises(DamagedFileError, match="should have") as error:
        documents[first]
    assert str(shard) in str(error.value)


def test_read_many_rejects_a_shard_with_another_number_of_documents(path):
    data = PreparedData.open(str(path))
    other = data.split_info("code", "train")["shards"][0]
    shard = path / SHARD
    assert shard.stat().st_size == other["size"]  # Otherwise `open` detects it.
    shutil.copy(path / "tokens" / "code" / "1.0.0" / other["file"], shard)
    count = data.split_info("web", "train")["shards"][1]["documents"]
    with pytest.raises(DamagedFileError) as error:
        all_documents(PreparedData.open(str(path)))
    words = f"{shard} has {other['documents']} records, but should have {count}"
    assert words in str(error.value)


def test_verify_checksums_detects_swapped_shards(path):
    directory = path / Path(SHARD).parent
    first, second = sorted(directory.glob("tokens-train*"))[:2]
    contents = first.read_bytes(), second.read_bytes()
    assert len(contents[0]) == len(contents[1])  # Otherwise `open` detects it.
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(DamagedFileError) as error:
        PreparedData.open(str(path)).verify_checksums()
    assert str(first) in str(error.value) and str(second) in str(error.value)


def test_verify_checksums_names_exactly_the_damaged_shards(path):
    shards = sorted(path.glob("tokens/*/*/*.array_record*"))
    damaged = [shards[1], shards[-1]]
    for shard in damaged:
        flip(shard, 200, bit=7)
    with pytest.raises(DamagedFileError) as error:
        PreparedData.open(str(path)).verify_checksums()
    named = [shard for shard in shards if str(shard) in str(error.value)]
    assert named == damaged


def test_verify_checksums_detects_a_flipped_bit_in_padding(path):
    shard = path / SHARD
    flip(shard, shard.stat().st_size - 1)
    with pytest.raises(DamagedFileError, match="Checksums do not match"):
        PreparedData.open(str(path)).verify_checksums()


def test_verify_checksums_names_damaged_lengths(path):
    flip(path / LENGTHS, 1)
    with pytest.raises(DamagedFileError) as error:
        PreparedData.open(str(path)).verify_checksums()
    assert str(path / LENGTHS) in str(error.value)


# --- The tokenizer ---


def test_check_tokenizer_rejects_another_tokenizer(original):
    tokenizer = OpenLlamaTokenizer(original.tokenizer_proto())
    original.check_tokenizer(tokenizer.fingerprint)
    other = OpenLlamaTokenizer(trained_model(keep_spaces=False))
    with pytest.raises(ValueError, match="prepared with another tokenizer") as error:
        original.check_tokenizer(other.fingerprint)
    assert original.directory in str(error.value)
    assert tokenizer.fingerprint[:12] in str(error.value)
    assert other.fingerprint[:12] in str(error.value)


def test_tokenizer_proto_rejects_a_changed_file(path):
    data = PreparedData.open(str(path))
    file = path / "tokenizer.model"
    flipped = bytearray(file.read_bytes())
    flipped[1000] ^= 1
    for content in (flipped, trained_model(keep_spaces=False)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is not the tokenizer that") as error:
            data.tokenizer_proto()
        assert str(file) in str(error.value)
    file.unlink()
    with pytest.raises(OSError, match="No such file") as error:
        data.tokenizer_proto()
    assert str(file) in str(error.value)
