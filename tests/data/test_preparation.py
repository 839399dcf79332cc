"""All of the preparation: what comes out, and what stays when something goes wrong."""

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
from keras_openllama.data.text_sources import SourceError, units
from keras_openllama.data.tokenizing import TokenizationSettings, split_of

pytestmark = pytest.mark.backend_free

SCRIPT = ROOT / "train" / "prepare_data.py"
NANO = ROOT / "presets" / "open_llama_nano"
SOURCES = ("code", "prose", "web")
FRACTION = 0.2
UNIT_BYTES = 100_000
SECONDS = 60  # After which nothing more is expected of a process.


def run(sources, output, tokenizer="open_llama_nano", **options):
    """Prepares in this process, without a word."""
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
    """What tells whether files were written again."""
    stats = [os.stat(path) for path in paths]
    return sorted((stat.st_ino, stat.st_mtime_ns) for stat in stats)


def shards(output):
    """Published shards of an output that is finished."""
    return sorted(Path(output).glob("tokens/*/*/*.array_record*"))


def receipts(output):
    """Numbers of the parts that an unfinished output has finished."""
    return sorted(path.stem for path in Path(output).glob("unfinished/*/*.json"))


def finished_shards(output):
    """Shards of those parts."""
    [work] = Path(output, "unfinished").iterdir()
    return [
        path
        for number in receipts(output)
        for path in work.glob(f"{number}.*.array_record")
    ]


def assert_nothing_looks_finished(output):
    assert not list(Path(output).glob("tokens/*/1.0.0"))
    with pytest.raises(FileNotFoundError, match="preparation has not ended"):
        PreparedData.open(str(output))


# --- What comes out ---


@pytest.fixture(scope="module")
def texts():
    """The documents of the sources; some texts are there more than once."""
    prose, web = real_text.prose(), real_text.web()
    return {
        "code": real_text.code(),
        "prose": prose,
        "web": [*web, "", *web[:20], *prose[:20]],
    }


@pytest.fixture(scope="module")
def specs(texts, tmp_path_factory):
    """The same as files."""
    directory = tmp_path_factory.mktemp("sources")
    return {
        "code": [real_text.CODE],
        "prose": [real_text.write_jsonl(directory / "prose.jsonl", texts["prose"])],
        "web": [real_text.write_parquet(directory / "web.parquet", texts["web"])],
    }


@pytest.fixture(scope="module")
def output(specs, tmp_path_factory):
    """The same, prepared."""
    path = tmp_path_factory.mktemp("prepared") / "data"
    run(specs, path)
    return path


@pytest.fixture(scope="module")
def data(output):
    return PreparedData.open(str(output))


@pytest.fixture(scope="module")
def expected(texts):
    """Tokens and bytes of each document, by SentencePiece alone."""
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


def is_in_order(part, whole):
    whole = iter(whole)
    return all(item in whole for item in part)


@pytest.mark.parametrize("source", SOURCES)
def test_each_document_is_there_once_between_start_and_end(source, data, expected):
    train = documents_of(data, source, "train")
    validation = documents_of(data, source, "validation")
    assert train and validation
    found = collections.Counter(train + validation)
    assert found == collections.Counter(expected[source])
    assert is_in_order(train, expected[source])
    assert is_in_order(validation, expected[source])


def test_the_manifest_counts_what_is_there(data, output):
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


def test_the_manifest_has_the_size_and_checksum_of_each_shard(data, output):
    named = []
    for source in SOURCES:
        for split in ("train", "validation"):
            for shard in data.split_info(source, split)["shards"]:
                path = Path(data.source_path(source), shard["file"])
                assert path.stat().st_size == shard["size"]
                # By another program than Python's.
                found = subprocess.check_output(["sha256sum", path], text=True)
                assert found.split()[0] == shard["sha256"]
                named.append(path)
    assert sorted(named) == shards(output)
    assert len(data.split_info("code", "train")["shards"]) > 3


def test_the_manifest_tells_the_tokenizer_and_what_was_skipped(data, output, texts):
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


def test_without_a_mixture_sources_weigh_what_they_have_to_train_on(data):
    tokens = {source: data.split_info(source, "train")["tokens"] for source in SOURCES}
    weights = data.mixture.weights_at(0)
    assert weights == pytest.approx(
        {s: n / sum(tokens.values()) for s, n in tokens.items()}
    )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_tensorflow_datasets_alone_reads_the_same(source, split, data):
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


def test_ids_are_stored_as_small_as_they_can_be():
    for size, dtype in ((1 << 16, "<u2"), ((1 << 16) + 1, "<u4")):
        assert token_records.token_dtype(size) == dtype
        ids = np.array([0, 1, size - 1], dtype)
        found, num_bytes = token_records.decode_record(
            token_records.encode_record(ids, 1 << 40), dtype
        )
        assert found.tolist() == ids.tolist() and num_bytes == 1 << 40


def test_several_processes_write_the_same_files_as_one(specs, output, tmp_path):
    run(specs, tmp_path / "data", workers=2)
    assert contents(tmp_path / "data") == contents(output)


def test_a_runner_that_is_named_writes_the_same_files(specs, output, tmp_path):
    flags = ["--runner=BundleBasedDirectRunner"]
    run(specs, tmp_path / "data", workers=None, beam_flags=flags)
    assert contents(tmp_path / "data") == contents(output)


# --- Validation ---


def test_no_text_is_in_both_splits_and_equal_texts_are_together(data):
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


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5])
def test_validation_gets_its_share(share):
    count = 100_000
    documents = (f"document {number}".encode() for number in range(count))
    found = sum(split_of(text, share) == "validation" for text in documents)
    deviation = (count * share * (1 - share)) ** 0.5
    assert abs(found - count * share) < 4 * deviation


def test_validation_may_be_nothing_or_all():
    texts = [f"document {number}".encode() for number in range(1000)]
    assert {split_of(text, 0.0) for text in texts} == {"train"}
    assert {split_of(text, 1.0) for text in texts} == {"validation"}


def test_a_larger_share_keeps_what_a_smaller_one_set_aside():
    texts = [f"document {number}".encode() for number in range(10_000)]
    small, large = (
        {text for text in texts if split_of(text, share) == "validation"}
        for share in (0.01, 0.1)
    )
    assert small < large


def test_the_split_of_a_text_depends_on_nothing_else(data, specs, texts, tmp_path):
    path = tmp_path / "prose.jsonl"
    real_text.write_jsonl(path, reversed(texts["prose"]), "body")
    other = run(
        {"books": [str(path)]},
        tmp_path / "data",
        unit_bytes=1 << 30,
        text_fields={"books": "body"},
    )
    for split in ("train", "validation"):
        ours = documents_of(other, "books", split)
        assert ours[::-1] == documents_of(data, "prose", split)


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
    """A preparation in two processes one of which reads a file that never comes.

    That file is a pipe that nobody writes to: opening it takes for ever. Meanwhile the
    other process finishes parts.
    """

    def __init__(self, directory, specs):
        self.pipe = directory / "pipe.jsonl"
        os.mkfifo(self.pipe)
        self.sources = {"text": [*specs["prose"], *specs["code"], str(self.pipe)]}
        self.number = len(units("text", self.sources["text"], UNIT_BYTES)) - 1
        self.output = directory / "data"
        self.process = start(self.sources, self.output, "--workers=2")

    def wait(self):
        """Waits until it is stuck and has finished something; notes the state."""
        self.reader = wait_for(self._stuck_process, "the reading of the pipe")
        self.stamps = stamps(finished_shards(self.output))
        self.workers = psutil.Process(self.process.pid).children(recursive=True)

    def _stuck_process(self):
        assert self.process.poll() is None, self.process.communicate()[1]
        found = list(self.output.glob(f"unfinished/*/{self.number:05}.progress"))
        if not found or not receipts(self.output):
            return None
        return int(found[0].read_text().split()[1])

    def lose_reader(self):
        """Kills the process that is stuck."""
        self.wait()
        os.kill(self.reader, signal.SIGKILL)

    def mend(self):
        """Puts a file of text in the place of the pipe."""
        self.pipe.unlink()
        real_text.write_jsonl(self.pipe, ["It can be read now."])

    def close(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module", autouse=True)
def stuck(specs, tmp_path_factory):
    """One that is going to be killed, and one that loses a worker.

    Both take some seconds for that, while other tests run.
    """
    names = ("killed", "bereft")
    both = {name: Stuck(tmp_path_factory.mktemp(name), specs) for name in names}
    with ThreadPoolExecutor() as pool:
        both["loss"] = pool.submit(both["bereft"].lose_reader)
        yield both
    for name in names:
        both[name].close()


def are_gone(processes):
    return not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        for process in processes
    )


def assert_goes_on(stuck, tmp_path):
    """The next run keeps what is finished, and ends as if nothing had happened."""
    stuck.mend()
    data = run(stuck.sources, stuck.output)
    assert {*stuck.stamps} < {*stamps(shards(stuck.output))}
    run(stuck.sources, tmp_path / "data")
    assert contents(stuck.output) == contents(tmp_path / "data")
    assert data.split_info("text", "train")["documents"] > 50


def test_what_was_finished_before_a_kill_is_kept(stuck, tmp_path):
    killed = stuck["killed"]
    killed.wait()
    assert len(killed.workers) >= 2
    with pytest.raises(OSError, match=f"Another process .* in {killed.output}"):
        run(killed.sources, killed.output)
    killed.process.send_signal(signal.SIGKILL)
    killed.process.communicate()
    # Sooner than Beam's own workers notice, lest they write beside the next run.
    wait_for(lambda: are_gone(killed.workers), "the end of the workers", 5)
    assert_nothing_looks_finished(killed.output)
    assert_goes_on(killed, tmp_path)


def test_the_death_of_a_worker_is_told_and_the_rest_is_kept(stuck, tmp_path):
    bereft = stuck["bereft"]
    stuck["loss"].result()
    _, errors = bereft.process.communicate(timeout=SECONDS)
    assert bereft.process.returncode == 2
    assert f"error: A worker died while it read {bereft.pipe}" in errors
    assert "what is finished is kept" in errors and "Traceback" not in errors
    wait_for(lambda: are_gone(bereft.workers), "the end of the workers")
    assert_nothing_looks_finished(bereft.output)
    assert_goes_on(bereft, tmp_path)


@pytest.mark.slow
def test_the_death_of_a_worker_that_has_read_nothing_yet_is_told(specs, tmp_path):
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
def three(texts, tmp_path):
    """Three files of JSON lines, compressed."""
    paths = [tmp_path / f"{name}.jsonl.gz" for name in "abc"]
    for number, path in enumerate(paths):
        plain = real_text.write_jsonl(tmp_path / "x", texts["prose"][number::3])
        path.write_bytes(gzip.compress(Path(plain).read_bytes()))
        os.unlink(plain)
    return paths


def test_a_damaged_file_is_named_and_the_others_are_kept(three, specs, tmp_path):
    whole = three[1].read_bytes()
    three[1].write_bytes(whole[: len(whole) // 2])
    sources = {"cut": [str(tmp_path / "*.gz")], "whole": specs["prose"]}
    output = tmp_path / "data"
    with pytest.raises(SourceError, match=r"'cut': .*b\.jsonl\.gz cannot be read") as e:
        run(sources, output)
    assert "a.jsonl" not in str(e.value) and "c.jsonl" not in str(e.value)
    assert receipts(output) == ["00000", "00002"]
    before = stamps(finished_shards(output))
    other = stamps((output / "tokens" / "whole").rglob("*.array_record*"))
    assert len(before) == 4 and len(other) == 10
    with pytest.raises(FileNotFoundError, match="preparation has not ended"):
        PreparedData.open(str(output))
    three[1].write_bytes(whole)
    data = run(sources, output)
    assert {*before, *other} < {*stamps(shards(output))}
    for split in ("train", "validation"):
        assert sorted(documents_of(data, "cut", split)) == sorted(
            documents_of(data, "whole", split)
        )


def test_all_damaged_files_are_named_at_once(three, tmp_path):
    for path in three[1:]:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SourceError) as error:
        run({"cut": [str(tmp_path / "*.gz")]}, tmp_path / "data")
    for path, named in zip(three, [False, True, True], strict=True):
        assert (str(path) in str(error.value)) == named


@pytest.mark.parametrize("changed", ["file", "array_record", "lengths"])
def test_a_part_is_done_again_if_its_file_or_its_shard_has_changed(
    changed, three, tmp_path
):
    whole = three[2].read_bytes()
    three[2].write_bytes(whole[:-9])
    sources, output = {"cut": [str(tmp_path / "*.gz")]}, tmp_path / "data"
    with pytest.raises(SourceError, match=r"c\.jsonl\.gz"):
        run(sources, output)
    kept = [path for path in finished_shards(output) if path.name.startswith("00001")]
    before = stamps(kept)
    if changed == "file":
        three[0].write_bytes(gzip.compress(b'{"text": "changed"}'))
    else:
        [path] = output.glob(f"unfinished/*/00000.train.{changed}")
        os.truncate(path, path.stat().st_size - 4)
    three[2].write_bytes(whole)
    run(sources, output)
    assert {*before} < {*stamps(shards(output))}
    run(sources, tmp_path / "other")
    assert contents(output) == contents(tmp_path / "other")


def damaged_lines(path, good, bad):
    lines = [json.dumps({"text": f"document {number}"}) for number in range(good)]
    path.write_text("\n".join([*lines, *['{"title": "no text"}'] * bad]))
    return {"web": [str(path)]}


def test_damaged_documents_are_counted_up_to_a_share_and_refused_above(tmp_path):
    sources = damaged_lines(tmp_path / "a.jsonl", 95, 5)
    output = tmp_path / "data"
    message = r"'web': 5 of 100 documents would be skipped \(no text field: 5\)"
    with pytest.raises(SourceError, match=message):
        run(sources, output, max_skipped=0.049)
    assert_nothing_looks_finished(output)
    before = stamps(finished_shards(output))
    data = run(sources, output, max_skipped=0.05)
    assert data.manifest["sources"]["web"]["skipped"] == {"no text field": 5}
    assert stamps(shards(output)) == before


def test_a_file_of_nothing_but_faults_is_given_up_early(tmp_path):
    sources = damaged_lines(tmp_path / "a.jsonl", 0, 100_000)
    with pytest.raises(SourceError, match=r"a\.jsonl: 1000 of 1000 documents"):
        run(sources, tmp_path / "data", unit_bytes=1 << 30)


def test_empty_documents_are_no_damage(tmp_path):
    path = real_text.write_jsonl(tmp_path / "a.jsonl", ["a text", *[""] * 99])
    data = run({"code": [path]}, tmp_path / "data", validation_fraction=0)
    assert data.manifest["sources"]["code"]["skipped"] == {"empty": 99}
    assert data.split_info("code", "train")["documents"] == 1


def test_a_source_without_any_row_is_refused_by_name(tmp_path):
    import pyarrow.parquet

    path, schema = tmp_path / "a.parquet", pyarrow.schema([("text", pyarrow.string())])
    pyarrow.parquet.ParquetWriter(path, schema).close()
    with pytest.raises(SourceError, match="'web'"):
        run({"web": [str(path)]}, tmp_path / "data")


# --- A full disk ---


@pytest.fixture
def mount(tmp_path):
    with small_disk(tmp_path / "disk") as mount:
        yield mount


def room_for_all_parts(data, output):
    """Kilobytes that a source takes when nothing is missing but its publication."""
    paths = [
        output / "tokenizer.model",
        *Path(data.source_path("prose")).glob("*record*"),
    ]
    sizes = [path.stat().st_size for path in paths]
    for split in ("train", "validation"):
        sums = data.split_info("prose", split)["shards"]
        sizes += [4 * shard["documents"] for shard in sums]
    receipts = len(data.split_info("prose", "train")["shards"])
    # Memory is given out in pages; the last one is for a note of progress.
    return 4 * (sum(-(-size // 4096) for size in sizes) + receipts + 1)


@pytest.mark.parametrize("kilobytes, parts", [(40, 0), (100, 0), (600, 2), (None, 5)])
def test_a_full_disk_is_told_and_leaves_nothing_that_looks_finished(
    kilobytes, parts, specs, data, output, mount
):
    target = mount(kilobytes or room_for_all_parts(data, output)) / "data"
    sources = {"prose": specs["prose"]}
    with pytest.raises((OSError, RuntimeError), match="No space left on device"):
        run(sources, target)
    assert_nothing_looks_finished(target)
    assert len(receipts(target)) == parts
    before = stamps(finished_shards(target)) if parts else []
    mount(10_000)
    run(sources, target)
    assert {*before} <= {*stamps(shards(target))}
    for name, content in contents(target / "tokens").items():
        assert content == (output / "tokens" / name).read_bytes(), name


# --- The same output again ---


@pytest.fixture
def small(tmp_path):
    """A small source, prepared: its sources, and the output."""
    texts = [f"document {number}" for number in range(50)]
    path = real_text.write_jsonl(tmp_path / "small.jsonl", texts)
    run({"web": [path]}, tmp_path / "data")
    return {"web": [path]}, tmp_path / "data"


def test_the_same_call_again_does_nothing(small):
    sources, output = small
    before = contents(output), stamps(shards(output))
    lines = []
    run(sources, output, report=lines.append)
    assert lines[-1] == "web: is prepared already"
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
def test_other_settings_in_the_same_output_are_refused(options, small):
    sources, output = small
    before = contents(output)
    with pytest.raises(ValueError, match="from other files or with other settings"):
        run(sources, output, **options)
    assert contents(output) == before


def test_other_files_in_the_same_output_are_refused(small, tmp_path):
    sources, output = small
    before = contents(output)
    more = real_text.write_jsonl(tmp_path / "more.jsonl", ["more"])
    for files in ([*sources["web"], more], [more]):
        with pytest.raises(ValueError, match="from other files"):
            run({"web": files}, output)
    touch(sources["web"][0])
    with pytest.raises(ValueError, match="from other files"):
        run(sources, output)
    assert contents(output) == before


def test_another_tokenizer_in_the_same_output_is_refused(small, tmp_path):
    sources, output = small
    before = contents(output)
    other = train_tokenizer(tmp_path / "other" / "tokenizer.model", True)
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        run(sources, output, other)
    assert contents(output) == before


def test_a_source_can_be_added_later(small, specs, tmp_path):
    sources, output = small
    before = stamps(shards(output))
    added = {"prose": specs["prose"]}
    data = run(added, output)
    assert data.sources == ["web", "prose"]
    assert {*before} < {*stamps(shards(output))}
    assert {*data.mixture.names} == {"web", "prose"}
    run({**sources, **added}, tmp_path / "at once")
    assert contents(output) == contents(tmp_path / "at once")


# --- What it is called with ---


def test_a_tokenizer_is_a_preset_a_directory_or_a_file(small, tmp_path):
    sources, output = small
    shutil.copytree(NANO, tmp_path / "directory")
    shutil.copy(NANO / "tokenizer.model", tmp_path / "file.model")
    for name in ("nano", str(tmp_path / "directory"), str(tmp_path / "file.model")):
        target = tmp_path / f"by {Path(name).name}"
        run(sources, target, name)
        assert contents(target) == contents(output)


@pytest.mark.parametrize(
    "tokenizer, error, message",
    [
        ("nanoo", ValueError, "nanoo"),
        ("{0}/nowhere.model", OSError, "nowhere.model"),
        ("{0}/empty", (OSError, ValueError), "empty"),
        ("{0}/junk.model", ValueError, "are no SentencePiece model"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tokenizer, error, message, specs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.model").write_bytes(b"junk" * 99)
    with pytest.raises(error, match=message):
        run(specs, tmp_path / "data", tokenizer.format(tmp_path))


def test_the_right_tokenizer_may_follow_one_that_cannot_be_used(specs, tmp_path):
    (tmp_path / "junk.model").write_bytes(b"junk" * 99)
    with pytest.raises(ValueError, match="no SentencePiece model"):
        run({"prose": specs["prose"]}, tmp_path / "data", tmp_path / "junk.model")
    run({"prose": specs["prose"]}, tmp_path / "data")


def test_the_text_field_is_the_callers_or_the_mixtures(tmp_path):
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
        data = run(sources, tmp_path / field, validation_fraction=0, **options)
        assert data.split_info("web", "train")["bytes"] == len(value[field])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validation_fraction": 1.5}, "`validation_fraction` is a share"),
        ({"validation_fraction": float("nan")}, "`validation_fraction` is a share"),
        ({"max_skipped": -0.1}, "`max_skipped` is a share"),
        ({"text_fields": {"wbe": "text"}}, "text field was given for 'wbe'"),
        ({"mixture": "v9"}, "v9"),
        ({"mixture": "v1"}, "has no source 'web'"),
    ],
    ids=str,
)
def test_nonsense_is_refused_before_anything_is_written(options, message, tmp_path):
    path = real_text.write_jsonl(tmp_path / "a.jsonl", ["a text"])
    with pytest.raises((ValueError, OSError), match=message):
        run({"web": [path]}, tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_no_source_at_all_is_refused(tmp_path):
    with pytest.raises(SourceError, match="No source was given"):
        run({}, tmp_path / "data")


@pytest.mark.parametrize("name", ["workers", "unit_bytes"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_below_one_are_refused_by_name(name, value, tmp_path):
    path = real_text.write_jsonl(tmp_path / "a.jsonl", ["a text"])
    options = {name: value, "validation_fraction": 0}
    with pytest.raises(ValueError, match=f"{name}.*Received: {value}"):
        run({"web": [path]}, tmp_path / "data", **options)


def test_an_output_that_cannot_be_written_is_named(specs, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "data", "/proc/data"):
        with pytest.raises(OSError, match=str(path)):
            run(specs, path)


def test_only_what_decides_about_the_documents_changes_the_fingerprint():
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


def test_a_source_is_where_its_directory_says(data, output):
    for source in SOURCES:
        assert data.source_path(source) == source_directory(str(output), source)


# --- The script ---


@pytest.fixture
def script():
    root = logging.getLogger()
    handlers = list(root.handlers)
    yield prepare_data
    root.handlers[:] = handlers


def test_flags_of_a_runner_follow_a_double_dash(script):
    own = ["--source=a=b", "--tokenizer=nano", "--output=c"]
    flags = ["--runner=DataflowRunner", "--source=d"]
    options = script.parse_arguments([*own, "--", *flags], "p")
    assert (options.source, options.beam_flags) == (["a=b"], flags)
    assert script.parse_arguments(own, "p").beam_flags == []
    with pytest.raises(SystemExit):
        script.parse_arguments([*own, "--"], "p")


def test_the_script_does_the_same_and_says_how_much_there_is(
    script, specs, data, output, tmp_path, capsys
):
    script.main(command(specs, tmp_path / "data", "--workers=1")[2:])
    assert contents(tmp_path / "data") == contents(output)
    tokens = sum(data.split_info(source, "train")["tokens"] for source in SOURCES)
    assert f"\n{tokens:,} tokens to train on are in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--source=nothing"], "A source is NAME=PATHS"),
        (["--source=a=nowhere"], "'nowhere' matches no file"),
        (["--text-field=web=body"], "no column of strings named 'body'"),
        (["--text-field=wbe=body"], "no source of this call"),
        (["--max-document-bytes=1"], "too long: "),
        (["--mixture=v1"], "has no source"),
        (["--", "--runner=Nobodys"], "Nobodys"),
    ],
    ids=str,
)
def test_the_script_ends_with_a_line_that_says_what_is_wrong(
    flags, message, script, specs, tmp_path, capsys
):
    sources = {"web": specs["web"]}
    arguments = command(sources, tmp_path / "data", "--workers=1", *flags)[2:]
    assert script.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("keras-openllama prepare-data: error: ")
    assert message in said
