"""Prepared data that is not what was prepared is refused, and the file is named."""

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
from keras_openllama.data.token_records import DamagedFile

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


def refused(path, error, *words):
    """The data cannot be opened, and the message says all of the words."""
    with pytest.raises(error) as raised:
        PreparedData.open(str(path))
    for word in words:
        assert str(word) in str(raised.value)


# --- Sound data ---


def test_a_copy_elsewhere_is_the_same_data(path, original):
    data = PreparedData.open(str(path))
    assert data.sources == [*COUNTS]
    data.verify_checksums()
    for source in COUNTS:
        for split in ("train", "validation"):
            ours, theirs = (all_documents(d, source, split) for d in (data, original))
            assert ours == theirs
            assert ours


def test_documents_are_the_same_one_by_one_in_any_order_and_in_another_process(path):
    documents = PreparedData.open(str(path)).documents("web", "train")
    expected = all_documents(PreparedData.open(str(path)))
    assert len(documents) == len(expected) > 200
    numbers = np.random.default_rng(0).permutation(len(documents))
    for number, (tokens, size) in zip(
        numbers, documents.read_many(numbers), strict=True
    ):
        assert (tokens.tolist(), size) == expected[number]
    # As a worker gets them.
    tokens, size = pickle.loads(pickle.dumps(documents))[7]
    assert (tokens.tolist(), size) == expected[7]


def test_the_lengths_are_those_of_the_documents(original):
    for source in COUNTS:
        documents = original.documents(source, "train")
        lengths = [
            len(tokens) for tokens, _ in documents.read_many(range(len(documents)))
        ]
        assert documents.lengths.tolist() == lengths
        assert documents.tokens_per_block().sum() == sum(lengths)


def test_totals_of_blocks_do_not_overflow():
    lengths = np.full(5000, 1 << 31, "uint32")
    assert tokens_per_block(lengths).sum() == 5000 << 31
    assert tokens_per_block(lengths[:0]).tolist() == []


def test_verify_reports_every_byte(path):
    sizes = []
    PreparedData.open(str(path)).verify_checksums(sizes.append)
    files = [file for file in path.glob("tokens/*/*/*") if file.suffix != ".json"]
    assert sum(sizes) == sum(file.stat().st_size for file in files)


def test_what_it_does_not_have_is_refused_by_name(original):
    with pytest.raises(ValueError, match=r"no source 'wbe'\. It has: web, code, books"):
        original.documents("wbe")
    with pytest.raises(ValueError, match=r"train, validation\. Received: split='test'"):
        original.documents("web", "test")
    with pytest.raises(IndexError):
        original.documents("web", "train")[COUNTS["web"]]


# --- The manifest ---


def test_a_directory_without_a_manifest_is_refused(path):
    (path / "manifest.json").unlink()
    refused(path, FileNotFoundError, path, "no manifest.json", "prepare-data")
    refused(path / "nowhere", FileNotFoundError, path / "nowhere")


def test_a_manifest_that_is_cut_short_anywhere_is_refused(path):
    manifest = path / "manifest.json"
    whole = manifest.read_bytes()
    for size in range(0, len(whole), 101):
        manifest.write_bytes(whole[:size])
        refused(path, ValueError, manifest, "is damaged")


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"{'format': 1}", b"\0" * 999])
def test_a_manifest_of_garbage_is_refused(content, path):
    (path / "manifest.json").write_bytes(content)
    refused(path, ValueError, path / "manifest.json", "is damaged")


@pytest.mark.parametrize("content", ["[]", "null", '{"format": 1}'])
def test_a_manifest_of_something_else_is_refused(content, path):
    (path / "manifest.json").write_text(content)
    refused(path, ValueError, path / "manifest.json")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_manifest_of_another_format_is_refused(version, path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["format"] = version
    (path / "manifest.json").write_text(json.dumps(manifest))
    refused(path, ValueError, path / "manifest.json", f"has format {version!r}")


# --- Shards ---


@pytest.mark.parametrize("name", [SHARD, LENGTHS])
def test_a_missing_file_is_refused(name, path):
    (path / name).unlink()
    refused(path, DamagedFile, path / name, "is missing, but should have")


@pytest.mark.parametrize("name", [SHARD, LENGTHS])
@pytest.mark.parametrize("change", [-1, -4, 4])
def test_a_file_of_another_size_is_refused(name, change, path):
    size = (path / name).stat().st_size
    os.truncate(path / name, size + change)
    words = f"has {size + change} bytes, but should have {size} bytes"
    refused(path, DamagedFile, path / name, words)


def test_a_missing_source_is_refused(path):
    shutil.rmtree(path / "tokens" / "books")
    refused(path, DamagedFile, path / "tokens" / "books", "is missing")


def test_a_flipped_byte_in_a_document_is_noticed_when_it_is_read(path, original):
    expected = all_documents(original)
    shard = path / SHARD
    used = len(shard.read_bytes().rstrip(b"\0"))
    refusals = 0
    # The first bytes say where chunks are, and so does the end of the file.
    for place in range(100, used, 97):
        flip(shard, place)
        data = PreparedData.open(str(path))
        try:
            # Names of the format beside a document may change without harm.
            assert all_documents(data) == expected
        except DamagedFile as error:
            assert str(shard) in str(error)
            assert "prepare the data anew" in str(error)
            refusals += 1
        flip(shard, place)
    assert refusals > 50
    assert all_documents(PreparedData.open(str(path))) == expected


def test_the_other_shards_of_a_damaged_one_are_read(path, original):
    shard = path / SHARD
    shard.write_bytes(bytes(shard.stat().st_size))
    documents = PreparedData.open(str(path)).documents("web", "train")
    first = original.split_info("web", "train")["shards"][0]["documents"]
    expected = all_documents(original)
    found = documents.read_many(range(first))
    assert [(tokens.tolist(), size) for tokens, size in found] == expected[:first]
    with pytest.raises(DamagedFile, match="should have") as error:
        documents[first]
    assert str(shard) in str(error.value)


def test_a_shard_of_another_number_of_documents_is_refused_when_it_is_opened(path):
    data = PreparedData.open(str(path))
    other = data.split_info("code", "train")["shards"][0]
    shard = path / SHARD
    assert shard.stat().st_size == other["size"]  # Else it is found sooner.
    shutil.copy(path / "tokens" / "code" / "1.0.0" / other["file"], shard)
    count = data.split_info("web", "train")["shards"][1]["documents"]
    with pytest.raises(DamagedFile) as error:
        all_documents(PreparedData.open(str(path)))
    words = f"{shard} has {other['documents']} records, but should have {count}"
    assert words in str(error.value)


def test_a_shard_in_the_place_of_another_is_noticed(path):
    directory = path / Path(SHARD).parent
    first, second = sorted(directory.glob("tokens-train*"))[:2]
    contents = first.read_bytes(), second.read_bytes()
    assert len(contents[0]) == len(contents[1])  # Else it is found sooner.
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(DamagedFile) as error:
        PreparedData.open(str(path)).verify_checksums()
    assert str(first) in str(error.value) and str(second) in str(error.value)


def test_verify_names_every_damaged_shard_and_no_other(path):
    shards = sorted(path.glob("tokens/*/*/*.array_record*"))
    damaged = [shards[1], shards[-1]]
    for shard in damaged:
        flip(shard, 200, bit=7)
    with pytest.raises(DamagedFile) as error:
        PreparedData.open(str(path)).verify_checksums()
    named = [shard for shard in shards if str(shard) in str(error.value)]
    assert named == damaged


def test_verify_notices_a_flipped_bit_in_the_padding_of_a_shard(path):
    shard = path / SHARD
    flip(shard, shard.stat().st_size - 1)
    with pytest.raises(DamagedFile, match="is not what was prepared"):
        PreparedData.open(str(path)).verify_checksums()


def test_verify_names_lengths_that_are_damaged(path):
    flip(path / LENGTHS, 1)
    with pytest.raises(DamagedFile) as error:
        PreparedData.open(str(path)).verify_checksums()
    assert str(path / LENGTHS) in str(error.value)


# --- The tokenizer ---


def test_the_tokenizer_is_the_one_that_made_the_data(original):
    tokenizer = OpenLlamaTokenizer(original.tokenizer_proto())
    original.check_tokenizer(tokenizer.fingerprint)
    other = OpenLlamaTokenizer(trained_model(keep_spaces=False))
    with pytest.raises(ValueError, match="prepared with another tokenizer") as error:
        original.check_tokenizer(other.fingerprint)
    assert original.directory in str(error.value)
    assert tokenizer.fingerprint[:12] in str(error.value)
    assert other.fingerprint[:12] in str(error.value)


def test_a_changed_tokenizer_is_refused_by_its_file(path):
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
