"""`prepare_dataset`: its output, and what survives failures."""

import collections
import gzip
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import real_text
import sentencepiece
from checkout import ROOT
from small_disk import small_disk
from tokenizer_models import train_tokenizer

from keras_openllama.cli import prepare_data
from keras_openllama.data import token_records
from keras_openllama.data.dataset_builder import source_directory
from keras_openllama.data.preparation import prepare_dataset
from keras_openllama.data.prepared_data import PreparedData
from keras_openllama.data.text_sources import SourceError, find_units
from keras_openllama.data.tokenizing import TokenizationSettings, split_of

pytestmark = pytest.mark.backend_free

SCRIPT = ROOT / "train" / "prepare_data.py"
NANO = ROOT / "presets" / "open_llama_nano"
SOURCES = ("code", "prose", "web")
FRACTION = 0.2
UNIT_BYTES = 100_000
SECONDS = 120  # Timeout of a process.


def prepare(sources, output, tokenizer="open_llama_nano", **options):
    """Prepares in this process, without output."""
    settings = {
        "workers": 1,
        "unit_bytes": UNIT_BYTES,
        "validation_fraction": FRACTION,
        "report": lambda line: None,
    }
    return prepare_dataset(sources, str(tokenizer), str(output), **(settings | options))


def contents(directory):
    """The bytes of all files below a directory, by name."""
    paths = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def stamps(paths):
    """Inodes and times, which change if files are written again."""
    stats = [os.stat(path) for path in paths]
    return sorted((stat.st_ino, stat.st_mtime_ns) for stat in stats)


def shards(output):
    """Published shards of a finished output."""
    return sorted(Path(output).glob("tokens/*/*/*.array_record*"))


def finished_units(output):
    """Numbers of the finished units of an unfinished output."""
    return sorted(path.stem for path in Path(output).glob("unfinished/*/*.json"))


def finished_shards(output):
    """Shards of the finished units."""
    [work] = Path(output, "unfinished").iterdir()
    return [
        path
        for number in finished_units(output)
        for path in work.glob(f"{number}.*.array_record")
    ]


def assert_not_finished(output):
    assert not list(Path(output).glob("tokens/*/1.0.0"))
    with pytest.raises(FileNotFoundError, match="preparation has not finished"):
        PreparedData.open(str(output))


# --- Output ---


@pytest.fixture(scope="module")
def texts():
    """The documents of the sources, with duplicates."""
    prose, web = real_text.prose(), real_text.web()
    return {
        "code": real_text.code(),
        "prose": prose,
        "web": [*web, "", *web[:20], *prose[:20]],
    }


@pytest.fixture(scope="module")
def specs(texts, tmp_path_factory):
    """Files with these documents."""
    directory = tmp_path_factory.mktemp("sources")
    return {
        "code": [real_text.CODE],
        "prose": [real_text.write_jsonl(directory / "prose.jsonl", texts["prose"])],
        "web": [real_text.write_parquet(directory / "web.parquet", texts["web"])],
    }


@pytest.fixture(scope="module")
def output(specs, tmp_path_factory):
    """The prepared dataset."""
    path = tmp_path_factory.mktemp("prepared") / "data"
    prepare(specs, path)
    return path


@pytest.fixture(scope="module")
def data(output):
    return PreparedData.open(str(output))


@pytest.fixture(scope="module")
def expected(texts):
    """Tokens and bytes of each document, computed with SentencePiece only."""
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(NANO / "tokenizer.model")
    )
    bos, eos = processor.bos_id(), processor.eos_id()
    return {
        source: [
            ((bos, *processor.encode(text), eos), len(text.encode("utf-8")))
            for text in documents
            if text.strip()
        ]
        for source, documents in texts.items()
    }


def documents_of(data, source, split):
    documents = data.documents(source, split)
    return [
        (tuple(ids.tolist()), size)
        for ids, size in documents.read_many(range(len(documents)))
    ]


def is_subsequence(part, sequence):
    sequence = iter(sequence)
    return all(item in sequence for item in part)


@pytest.mark.parametrize("source", SOURCES)
def test_prepare_dataset_writes_each_document_once_with_bos_and_eos(
    source, data, expected
):
    train = documents_of(data, source, "train")
    validation = documents_of(data, source, "validation")
    assert train and validation
    found = collections.Counter(train + validation)
    assert found == collections.Counter(expected[source])
    assert is_subsequence(train, expected[source])
    assert is_subsequence(validation, expected[source])


def test_manifest_counts_match_the_documents(data, output):
    for source in SOURCES:
        for split in ("train", "validation"):
            sums = data.split_info(source, split)
            documents = documents_of(data, source, split)
            assert sums["documents"] == len(documents)
            assert sums["tokens"] == sum(len(ids) for ids, _ in documents)
            assert sums["bytes"] == sum(size for _, size in documents)
            lengths = data.documents(source, split).lengths
            assert lengths.tolist() == [len(ids) for ids, _ in documents]
            for name in ("documents", "tokens", "bytes"):
                assert sums[name] == sum(shard[name] for shard in sums["shards"])


def test_manifest_has_the_size_and_checksum_of_each_shard(data, output):
    named = []
    for source in SOURCES:
        for split in ("train", "validation"):
            for shard in data.split_info(source, split)["shards"]:
                path = Path(data.source_path(source), shard["file"])
                assert path.stat().st_size == shard["size"]
                # An independent implementation.
                found = subprocess.check_output(["sha256sum", path], text=True)
                assert found.split()[0] == shard["sha256"]
                named.append(path)
    assert sorted(named) == shards(output)
    assert len(data.split_info("code", "train")["shards"]) > 3


def test_manifest_describes_the_tokenizer_and_skipped_documents(data, output, texts):
    tokenizer = data.manifest["tokenizer"]
    proto = (NANO / "tokenizer.model").read_bytes()
    assert (output / tokenizer["file"]).read_bytes() == proto
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert tokenizer["vocabulary_size"] == processor.vocab_size()
    ids = processor.piece_to_id("<s>"), processor.piece_to_id("</s>")
    assert (tokenizer["start_token_id"], tokenizer["end_token_id"]) == ids
    sources = data.manifest["sources"]
    blank = sum(not text.strip() for text in texts["web"])
    assert sources["web"]["skipped"] == {"empty": blank}
    assert sources["prose"]["skipped"] == {}


def test_default_mixture_weights_are_the_training_tokens(data):
    tokens = {source: data.split_info(source, "train")["tokens"] for source in SOURCES}
    weights = data.mixture.weights_at(0)
    assert weights == pytest.approx(
        {s: n / sum(tokens.values()) for s, n in tokens.items()}
    )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_prepared_source_is_readable_with_tensorflow_datasets_alone(
    source, split, data
):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(data.source_path(source))
    assert (
        builder.info.splits[split].num_examples
        == data.split_info(source, split)["documents"]
    )
    found = [
        (tuple(example["tokens"].tolist()), int(example["num_bytes"]))
        for example in builder.as_data_source(split)
    ]
    assert found == documents_of(data, source, split)


def test_token_dtype_is_the_smallest_for_the_vocabulary():
    for size, dtype in ((1 << 16, "<u2"), ((1 << 16) + 1, "<u4")):
        assert token_records.token_dtype(size) == dtype
        ids = np.array([0, 1, size - 1], dtype)
        found, num_bytes = token_records.decode_record(
            token_records.encode_record(ids, 1 << 40), dtype
        )
        assert found.tolist() == ids.tolist() and num_bytes == 1 << 40


def test_prepare_dataset_with_several_workers_writes_identical_files(
    specs, output, tmp_path
):
    prepare(specs, tmp_path / "data", workers=2)
    assert contents(tmp_path / "data") == contents(output)


def test_prepare_dataset_with_beam_flags_writes_identical_files(
    specs, output, tmp_path
):
    flags = ["--runner=BundleBasedDirectRunner"]
    prepare(specs, tmp_path / "data", workers=None, beam_flags=flags)
    assert contents(tmp_path / "data") == contents(output)


# --- Validation ---


def test_splits_share_no_texts(data):
    splits = collections.defaultdict(set)
    found = collections.Counter()
    for source in SOURCES:
        for split in ("train", "validation"):
            for ids, _ in documents_of(data, source, split):
                splits[ids].add(split)
                found[ids] += 1
    repeated = [ids for ids, count in found.items() if count > 1]
    assert {next(iter(splits[ids])) for ids in repeated} == {"train", "validation"}
    assert all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.5])
def test_split_of_selects_the_validation_fraction(fraction):
    count = 100_000
    documents = (f"document {number}".encode() for number in range(count))
    found = sum(split_of(text, fraction) == "validation" for text in documents)
    deviation = (count * fraction * (1 - fraction)) ** 0.5
    assert abs(found - count * fraction) < 4 * deviation


def test_split_of_accepts_fractions_0_and_1():
    texts = [f"document {number}".encode() for number in range(1000)]
    assert {split_of(text, 0.0) for text in texts} == {"train"}
    assert {split_of(text, 1.0) for text in texts} == {"validation"}


def test_split_of_with_a_larger_fraction_is_a_superset():
    texts = [f"document {number}".encode() for number in range(10_000)]
    small, large = (
        {text for text in texts if split_of(text, share) == "validation"}
        for share in (0.01, 0.1)
    )
    assert small < large


def test_split_depends_on_the_text_only(data, specs, texts, tmp_path):
    path = tmp_path / "prose.jsonl"
    real_text.write_jsonl(path, reversed(texts["prose"]), "body")
    other = prepare(
        {"books": [str(path)]},
        tmp_path / "data",
        unit_bytes=1 << 30,
        text_fields={"books": "body"},
    )
    for split in ("train", "validation"):
        reversed_documents = documents_of(other, "books", split)
        assert reversed_documents[::-1] == documents_of(data, "prose", split)


# --- Interruptions ---


def command(sources, output, *flags):
    arguments = [SCRIPT, "--tokenizer", "open_llama_nano", "--output", output]
    for name, paths in sources.items():
        for path in paths:
            arguments += ["--source", f"{name}={path}"]
    arguments += ["--validation-fraction", FRACTION, "--shard-bytes", UNIT_BYTES]
    return [sys.executable, *map(str, arguments), *flags]


def start(sources, output, *flags):
    return subprocess.Popen(
        command(sources, output, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "jax"},
    )


def wait_for(condition, what, seconds=SECONDS):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.02)
    return found


class Stuck:
    """A preparation in two processes, one of which blocks forever.

    It opens a pipe without a writer. Meanwhile the other process finishes units.
    """

    def __init__(self, directory, specs):
        self.pipe = directory / "pipe.jsonl"
        os.mkfifo(self.pipe)
        self.sources = {"text": [*specs["prose"], *specs["code"], str(self.pipe)]}
        self.number = len(find_units("text", self.sources["text"], UNIT_BYTES)) - 1
        self.output = directory / "data"
        self.process = start(self.sources, self.output, "--workers=2")

    def wait(self):
        """Waits until one process blocks and a unit is finished; saves the state."""
        self.reader = wait_for(self._stuck_process, "reading of the pipe")
        self.stamps = stamps(finished_shards(self.output))
        self.workers = psutil.Process(self.process.pid).children(recursive=True)

    def _stuck_process(self):
        assert self.process.poll() is None, self.process.communicate()[1]
        found = list(self.output.glob(f"unfinished/*/{self.number:05}.progress"))
        if not found or not finished_units(self.output):
            return None
        return int(found[0].read_text().split()[1])

    def kill_reader(self):
        """Kills the process that blocks."""
        self.wait()
        os.kill(self.reader, signal.SIGKILL)

    def repair(self):
        """Replaces the pipe by a text file."""
        self.pipe.unlink()
        real_text.write_jsonl(self.pipe, ["It can be read now."])

    def close(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module", autouse=True)
def stuck(specs, tmp_path_factory):
    """One preparation that will be killed, and one with a killed worker.

    Both take some seconds, while other tests run.
    """
    names = ("killed", "without_worker")
    both = {name: Stuck(tmp_path_factory.mktemp(name), specs) for name in names}
    with ThreadPoolExecutor() as pool:
        both["kill"] = pool.submit(both["without_worker"].kill_reader)
        yield both
    for name in names:
        both[name].close()


def have_ended(processes):
    return not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        for process in processes
    )


def assert_resumes(stuck, tmp_path):
    """Asserts that the next run reuses finished units, with an identical result."""
    stuck.repair()
    data = prepare(stuck.sources, stuck.output)
    assert {*stuck.stamps} < {*stamps(shards(stuck.output))}
    prepare(stuck.sources, tmp_path / "data")
    assert contents(stuck.output) == contents(tmp_path / "data")
    assert data.split_info("text", "train")["documents"] > 50


def test_prepare_dataset_resumes_after_a_kill(stuck, tmp_path):
    killed = stuck["killed"]
    killed.wait()
    assert len(killed.workers) >= 2
    with pytest.raises(OSError, match=f"Another process .* in {killed.output}"):
        prepare(killed.sources, killed.output)
    killed.process.send_signal(signal.SIGKILL)
    killed.process.communicate()
    # Beam's own workers would end later and could write while the next run does.
    wait_for(lambda: have_ended(killed.workers), "the end of the workers", 5)
    assert_not_finished(killed.output)
    assert_resumes(killed, tmp_path)


def test_prepare_dataset_reports_a_dead_worker_and_resumes(stuck, tmp_path):
    preparation = stuck["without_worker"]
    stuck["kill"].result()
    _, errors = preparation.process.communicate(timeout=SECONDS)
    assert preparation.process.returncode == 2
    assert f"error: A worker died while reading {preparation.pipe}" in errors
    assert "same command again to resume" in errors and "Traceback" not in errors
    wait_for(lambda: have_ended(preparation.workers), "the end of the workers")
    assert_not_finished(preparation.output)
    assert_resumes(preparation, tmp_path)


@pytest.mark.slow
def test_prepare_dataset_reports_the_early_death_of_a_worker(specs, tmp_path):
    process = start(specs, tmp_path / "data", "--workers=2")
    try:
        children = psutil.Process(process.pid).children
        wait_for(lambda: len(children()) >= 2, "the start of the workers")
        children()[0].kill()
        process.communicate(timeout=30)
        assert process.returncode == 2
    finally:
        process.kill()
        process.communicate()


# --- Damaged input ---


@pytest.fixture
def three_files(texts, tmp_path):
    """Three compressed JSON lines files."""
    paths = [tmp_path / f"{name}.jsonl.gz" for name in "abc"]
    for number, path in enumerate(paths):
        plain = real_text.write_jsonl(tmp_path / "x", texts["prose"][number::3])
        path.write_bytes(gzip.compress(Path(plain).read_bytes()))
        os.unlink(plain)
    return paths


def test_prepare_dataset_names_a_damaged_file_and_finishes_the_others(
    three_files, specs, tmp_path
):
    original = three_files[1].read_bytes()
    three_files[1].write_bytes(original[: len(original) // 2])
    sources = {"cut": [str(tmp_path / "*.gz")], "complete": specs["prose"]}
    output = tmp_path / "data"
    with pytest.raises(
        SourceError, match=r"'cut': .*b\.jsonl\.gz could not be read"
    ) as e:
        prepare(sources, output)
    assert "a.jsonl" not in str(e.value) and "c.jsonl" not in str(e.value)
    assert finished_units(output) == ["00000", "00002"]
    before = stamps(finished_shards(output))
    other = stamps((output / "tokens" / "complete").rglob("*.array_record*"))
    assert len(before) == 4 and len(other) == 10
    with pytest.raises(FileNotFoundError, match="preparation has not finished"):
        PreparedData.open(str(output))
    three_files[1].write_bytes(original)
    data = prepare(sources, output)
    assert {*before, *other} < {*stamps(shards(output))}
    for split in ("train", "validation"):
        assert sorted(documents_of(data, "cut", split)) == sorted(
            documents_of(data, "complete", split)
        )


def test_prepare_dataset_names_all_damaged_files(three_files, tmp_path):
    for path in three_files[1:]:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SourceError) as error:
        prepare({"cut": [str(tmp_path / "*.gz")]}, tmp_path / "data")
    for path, named in zip(three_files, [False, True, True], strict=True):
        assert (str(path) in str(error.value)) == named


@pytest.mark.parametrize("changed", ["file", "array_record", "lengths"])
def test_prepare_dataset_repeats_a_unit_with_changed_input_or_output(
    changed, three_files, tmp_path
):
    original = three_files[2].read_bytes()
    three_files[2].write_bytes(original[:-9])
    sources, output = {"cut": [str(tmp_path / "*.gz")]}, tmp_path / "data"
    with pytest.raises(SourceError, match=r"c\.jsonl\.gz"):
        prepare(sources, output)
    paths = [p for p in finished_shards(output) if p.name.startswith("00001")]
    before = stamps(paths)
    if changed == "file":
        three_files[0].write_bytes(gzip.compress(b'{"text": "changed"}'))
    else:
        [path] = output.glob(f"unfinished/*/00000.train.{changed}")
        os.truncate(path, path.stat().st_size - 4)
    three_files[2].write_bytes(original)
    prepare(sources, output)
    assert {*before} < {*stamps(shards(output))}
    prepare(sources, tmp_path / "other")
    assert contents(output) == contents(tmp_path / "other")


def damaged_lines(path, good, bad):
    lines = [json.dumps({"text": f"document {number}"}) for number in range(good)]
    path.write_text("\n".join([*lines, *['{"title": "no text"}'] * bad]))
    return {"web": [str(path)]}


def test_prepare_dataset_rejects_more_damaged_documents_than_max_skipped(tmp_path):
    sources = damaged_lines(tmp_path / "a.jsonl", 95, 5)
    output = tmp_path / "data"
    message = r"'web': 5 of 100 documents would be skipped \(no text field: 5\)"
    with pytest.raises(SourceError, match=message):
        prepare(sources, output, max_skipped=0.049)
    assert_not_finished(output)
    before = stamps(finished_shards(output))
    data = prepare(sources, output, max_skipped=0.05)
    assert data.manifest["sources"]["web"]["skipped"] == {"no text field": 5}
    assert stamps(shards(output)) == before


def test_prepare_dataset_names_a_damaged_file_among_many_good_documents(tmp_path):
    sources = damaged_lines(tmp_path / "a.jsonl", 1000, 0)
    sources["web"] += damaged_lines(tmp_path / "b.jsonl", 1, 2)["web"]
    with pytest.raises(SourceError, match=r"b\.jsonl is damaged as a whole"):
        prepare(sources, tmp_path / "data")


def test_prepare_dataset_reports_the_files_of_a_directory_that_it_ignores(tmp_path):
    (tmp_path / "web").mkdir()
    damaged_lines(tmp_path / "web" / "a.jsonl", 9, 0)
    (tmp_path / "web" / "notes.txt").write_text("The sea")
    lines = []
    sources = {"web": [str(tmp_path / "web")]}
    prepare(sources, tmp_path / "data", report=lines.append)
    [line] = [line for line in lines if "ignored" in line]
    assert line.startswith("web: 1 files beside") and "notes.txt" in line


def test_prepare_dataset_aborts_early_if_all_documents_are_damaged(tmp_path):
    sources = damaged_lines(tmp_path / "a.jsonl", 0, 100_000)
    with pytest.raises(SourceError, match=r"a\.jsonl: 1000 of 1000 documents"):
        prepare(sources, tmp_path / "data", unit_bytes=1 << 30)


def test_prepare_dataset_does_not_count_empty_documents_as_damaged(tmp_path):
    path = real_text.write_jsonl(tmp_path / "a.jsonl", ["a text", *[""] * 99])
    data = prepare({"code": [path]}, tmp_path / "data", validation_fraction=0)
    assert data.manifest["sources"]["code"]["skipped"] == {"empty": 99}
    assert data.split_info("code", "train")["documents"] == 1


def test_prepare_dataset_error_names_a_source_without_documents(tmp_path):
    import pyarrow.parquet

    path, schema = tmp_path / "a.parquet", pyarrow.schema([("text", pyarrow.string())])
    pyarrow.parquet.ParquetWriter(path, schema).close()
    with pytest.raises(SourceError, match="'web'"):
        prepare({"web": [str(path)]}, tmp_path / "data")


# --- A full disk ---


@pytest.fixture
def mount(tmp_path):
    with small_disk(tmp_path / "disk") as mount:
        yield mount


def kilobytes_before_publication(data, output):
    """Disk usage of a source whose units are all finished but not published."""
    paths = [
        output / "tokenizer.model",
        *Path(data.source_path("prose")).glob("*record*"),
    ]
    sizes = [path.stat().st_size for path in paths]
    for split in ("train", "validation"):
        sums = data.split_info("prose", split)["shards"]
        sizes += [4 * shard["documents"] for shard in sums]
    summaries = len(data.split_info("prose", "train")["shards"])
    # Files take whole pages. The last page is for a progress file.
    return 4 * (sum(-(-size // 4096) for size in sizes) + summaries + 1)


@pytest.mark.parametrize("kilobytes, count", [(40, 0), (100, 0), (600, 2), (None, 5)])
def test_prepare_dataset_on_a_full_disk_raises_and_resumes(
    kilobytes, count, specs, data, output, mount
):
    target = mount(kilobytes or kilobytes_before_publication(data, output)) / "data"
    sources = {"prose": specs["prose"]}
    with pytest.raises((OSError, RuntimeError), match="No space left on device"):
        prepare(sources, target)
    assert_not_finished(target)
    assert len(finished_units(target)) == count
    before = stamps(finished_shards(target)) if count else []
    mount(10_000)
    prepare(sources, target)
    assert {*before} <= {*stamps(shards(target))}
    for name, content in contents(target / "tokens").items():
        assert content == (output / "tokens" / name).read_bytes(), name


# --- Existing output ---


@pytest.fixture
def small(tmp_path):
    """A small prepared dataset: its sources, and its directory."""
    texts = [f"document {number}" for number in range(50)]
    path = real_text.write_jsonl(tmp_path / "small.jsonl", texts)
    prepare({"web": [path]}, tmp_path / "data")
    return {"web": [path]}, tmp_path / "data"


def test_prepare_dataset_again_changes_nothing(small):
    sources, output = small
    before = contents(output), stamps(shards(output))
    lines = []
    prepare(sources, output, report=lines.append)
    assert lines[-1] == "web: already prepared"
    assert (contents(output), stamps(shards(output))) == before
    assert not (output / "unfinished").exists()


def touch(path):
    os.utime(path, (0, 0))


@pytest.mark.parametrize(
    "options",
    [
        {"validation_fraction": 0.3},
        {"max_document_bytes": 1000},
        {"text_fields": {"web": "text"}},
        {"unit_bytes": 500},
    ],
    ids=str,
)
def test_prepare_dataset_rejects_other_settings_for_an_existing_output(options, small):
    sources, output = small
    before = contents(output)
    with pytest.raises(ValueError, match="from other files or with other settings"):
        prepare(sources, output, **options)
    assert contents(output) == before


def test_prepare_dataset_rejects_other_files_for_an_existing_output(small, tmp_path):
    sources, output = small
    before = contents(output)
    more = real_text.write_jsonl(tmp_path / "more.jsonl", ["more"])
    for files in ([*sources["web"], more], [more]):
        with pytest.raises(ValueError, match="from other files"):
            prepare({"web": files}, output)
    touch(sources["web"][0])
    with pytest.raises(ValueError, match="from other files"):
        prepare(sources, output)
    assert contents(output) == before


def test_prepare_dataset_rejects_another_tokenizer_for_an_existing_output(
    small, tmp_path
):
    sources, output = small
    before = contents(output)
    other = train_tokenizer(tmp_path / "other" / "tokenizer.model", True)
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        prepare(sources, output, other)
    assert contents(output) == before


def test_prepare_dataset_adds_a_source_to_an_existing_output(small, specs, tmp_path):
    sources, output = small
    before = stamps(shards(output))
    added = {"prose": specs["prose"]}
    data = prepare(added, output)
    assert data.sources == ["web", "prose"]
    assert {*before} < {*stamps(shards(output))}
    assert {*data.mixture.names} == {"web", "prose"}
    prepare({**sources, **added}, tmp_path / "at once")
    assert contents(output) == contents(tmp_path / "at once")


# --- Arguments ---


def test_prepare_dataset_accepts_a_preset_directory_or_file_as_tokenizer(
    small, tmp_path
):
    sources, output = small
    shutil.copytree(NANO, tmp_path / "directory")
    shutil.copy(NANO / "tokenizer.model", tmp_path / "file.model")
    for name in ("nano", str(tmp_path / "directory"), str(tmp_path / "file.model")):
        target = tmp_path / f"by {Path(name).name}"
        prepare(sources, target, name)
        assert contents(target) == contents(output)


@pytest.mark.parametrize(
    "tokenizer, error, message",
    [
        ("nanoo", ValueError, "nanoo"),
        ("{0}/nowhere.model", OSError, "nowhere.model"),
        ("{0}/empty", (OSError, ValueError), "empty"),
        ("{0}/junk.model", ValueError, "not a SentencePiece model"),
    ],
)
def test_prepare_dataset_rejects_an_invalid_tokenizer(
    tokenizer, error, message, specs, tmp_path
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.model").write_bytes(b"junk" * 99)
    with pytest.raises(error, match=message):
        prepare(specs, tmp_path / "data", tokenizer.format(tmp_path))


def test_prepare_dataset_succeeds_after_an_invalid_tokenizer(specs, tmp_path):
    (tmp_path / "junk.model").write_bytes(b"junk" * 99)
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        prepare({"prose": specs["prose"]}, tmp_path / "data", tmp_path / "junk.model")
    prepare({"prose": specs["prose"]}, tmp_path / "data")


def test_prepare_dataset_takes_the_text_field_from_arguments_or_mixture(tmp_path):
    path = tmp_path / "a.jsonl"
    value = {
        "text": "the first",
        "body": "the second one",
        "extra": "the third of them",
    }
    path.write_text(json.dumps(value))
    mixture = tmp_path / "mixture.json"
    about = {"web": {"weight": 1, "text_field": "body"}}
    mixture.write_text(json.dumps({"name": "ours", "sources": about}))
    sources = {"web": [str(path)]}
    ways = {
        "text": {},
        "body": {"mixture": str(mixture)},
        "extra": {"mixture": str(mixture), "text_fields": {"web": "extra"}},
    }
    for field, options in ways.items():
        data = prepare(sources, tmp_path / field, validation_fraction=0, **options)
        assert data.split_info("web", "train")["bytes"] == len(value[field])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validation_fraction": 1.5}, "`validation_fraction` must be from 0 to 1"),
        (
            {"validation_fraction": float("nan")},
            "`validation_fraction` must be from 0 to 1",
        ),
        ({"max_skipped": -0.1}, "`max_skipped` must be from 0 to 1"),
        ({"text_fields": {"wbe": "text"}}, "Text fields must name sources .* 'wbe'"),
        ({"mixture": "v9"}, "v9"),
        ({"mixture": "v1"}, "has no source 'web'"),
    ],
    ids=str,
)
def test_prepare_dataset_rejects_invalid_arguments_before_writing(
    options, message, tmp_path
):
    path = real_text.write_jsonl(tmp_path / "a.jsonl", ["a text"])
    with pytest.raises((ValueError, OSError), match=message):
        prepare({"web": [path]}, tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_prepare_dataset_rejects_an_empty_list_of_sources(tmp_path):
    with pytest.raises(SourceError, match="must name at least one source"):
        prepare({}, tmp_path / "data")


@pytest.mark.parametrize("name", ["workers", "unit_bytes"])
@pytest.mark.parametrize("value", [0, -1])
def test_prepare_dataset_error_names_a_number_below_one(name, value, tmp_path):
    path = real_text.write_jsonl(tmp_path / "a.jsonl", ["a text"])
    options = {name: value, "validation_fraction": 0}
    with pytest.raises(ValueError, match=f"Received: {name}={value}"):
        prepare({"web": [path]}, tmp_path / "data", **options)


def test_prepare_dataset_error_names_an_unwritable_output(specs, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "data", "/proc/data"):
        with pytest.raises(OSError, match=str(path)):
            prepare(specs, path)


def test_fingerprint_depends_only_on_settings_that_change_documents():
    base = TokenizationSettings(b"tokenizer")
    assert (
        base.fingerprint
        == TokenizationSettings(b"tokenizer", max_skipped=0.5).fingerprint
    )
    others = [
        TokenizationSettings(b"other"),
        TokenizationSettings(b"tokenizer", text_field="text"),
        TokenizationSettings(b"tokenizer", validation_fraction=0.5),
        TokenizationSettings(b"tokenizer", max_document_bytes=9),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_source_directory_is_the_path_of_a_source(data, output):
    for source in SOURCES:
        assert data.source_path(source) == source_directory(str(output), source)


# --- The command ---


@pytest.fixture
def cli():
    root = logging.getLogger()
    handlers = list(root.handlers)
    yield prepare_data
    root.handlers[:] = handlers


def test_prepare_data_takes_beam_flags_after_a_double_dash(cli):
    own = ["--source=a=b", "--tokenizer=nano", "--output=c"]
    flags = ["--runner=DataflowRunner", "--source=d"]
    options = cli.parse_arguments([*own, "--", *flags], "p")
    assert (options.source, options.beam_flags) == (["a=b"], flags)
    assert cli.parse_arguments(own, "p").beam_flags == []
    with pytest.raises(SystemExit):
        cli.parse_arguments([*own, "--"], "p")


def test_prepare_data_writes_identical_files_and_prints_the_tokens(
    cli, specs, data, output, tmp_path, capsys
):
    cli.main(command(specs, tmp_path / "data", "--workers=1")[2:])
    assert contents(tmp_path / "data") == contents(output)
    tokens = sum(data.split_info(source, "train")["tokens"] for source in SOURCES)
    assert f" has {tokens:,} tokens for training." in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--source=nothing"], "A source must be NAME=PATHS"),
        (["--source=a=nowhere"], "'nowhere' matches no files"),
        (["--text-field=web=body"], "no column of strings named 'body'"),
        (["--text-field=wbe=body"], "must name sources of this call"),
        (["--max-document-bytes=1"], "too long: "),
        (["--mixture=v1"], "has no source"),
        (["--", "--runner=Nobodys"], "Nobodys"),
    ],
    ids=str,
)
def test_prepare_data_reports_errors_in_one_line(
    flags, message, cli, specs, tmp_path, capsys
):
    sources = {"web": specs["web"]}
    arguments = command(sources, tmp_path / "data", "--workers=1", *flags)[2:]
    assert cli.main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("keras-openllama prepare-data: error: ")
    assert message in line
