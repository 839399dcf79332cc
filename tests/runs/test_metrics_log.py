"""RunLog and its readers: resumed runs, killed processes and full disks."""

import contextlib
import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from keras_openllama.runs import metrics_log, tensorboard_events
from keras_openllama.runs.metrics_log import RunLog

pytestmark = pytest.mark.backend_free


def record(step):
    """A record with numbers that need full precision."""
    return {
        "step": step,
        "loss": 10 / 3 / step,
        "learning_rate": 3e-4,
        "tokens": step << 22,
        "tokens_per_second": 1e5,
        "data_seconds": 0.1,
        "goodput": 0.9,
        "skipped": False,
    }


def validation(step):
    numbers = {"loss": 2 / 3, "perplexity": math.exp(2 / 3), "bits_per_byte": 1 / 7}
    return {"step": step, "tokens": step << 22, **numbers, "sources": {"web": numbers}}


def steps(directory, first, last, from_step):
    """Writes the log of a run; every second step has a validation and a sample."""
    with RunLog(directory, from_step) as log:
        for step in range(first, last + 1):
            log.write_record(record(step))
            if step % 2 == 0:
                log.write_record({"kind": "validation", **validation(step)})
                log.write_sample(
                    "sea", step, f"The sea at {step}\n\nstep 1, not an entry\n"
                )


def contents(directory):
    names = (metrics_log.METRICS, metrics_log.VALIDATION, metrics_log.SAMPLES)
    return {name: (Path(directory) / name).read_bytes() for name in names}


def events(directory):
    """Lists of the events of each file, in the order that TensorBoard reads them."""
    found = []
    for path in sorted((Path(directory) / metrics_log.TENSORBOARD).iterdir()):
        data, place, entries = path.read_bytes(), 0, []
        while place < len(data):
            [size] = struct.unpack_from("<Q", data, place)
            entries.append(Event.FromString(data[place + 12 : place + 12 + size]))
            place += 12 + size + 4
        found.append(entries)
    return found


def scalars(events):
    return {
        (event.step, value.tag): value.simple_value
        for event in events
        for value in event.summary.value
        if not value.HasField("tensor")
    }


@contextlib.contextmanager
def full_disk(size):
    """Limits the size of every file of this process, in bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_read_metrics_returns_records_bit_exactly(tmp_path):
    steps(tmp_path, 1, 4, from_step=0)
    assert metrics_log.read_metrics(tmp_path) == [record(step) for step in range(1, 5)]
    assert metrics_log.read_validation(tmp_path) == [validation(2), validation(4)]


def test_write_sample_indents_and_escapes_texts(tmp_path):
    with RunLog(tmp_path, 0) as log:
        log.write_sample("sea", 7, "The sea\n  was \udcff calm.")
        log.write_sample("sky", 7, "")
    assert (tmp_path / metrics_log.SAMPLES).read_text().splitlines() == [
        *("step 7, sea", "    The sea", "      was \\udcff calm.", ""),
        *("step 7, sky", "    ", ""),
    ]


def test_write_record_converts_array_scalars(tmp_path):
    import jax

    loss = np.float32(2.3)
    with RunLog(tmp_path, 0) as log:
        log.write_record(
            {
                "step": np.int64(1),
                "loss": loss,
                "grad_norm": jax.numpy.float32(0.5),
                "skipped": np.bool_(True),
                "mfu": None,
            }
        )
    [got] = metrics_log.read_metrics(tmp_path)
    assert got == {"step": 1, "loss": float(loss), "grad_norm": 0.5, "skipped": True}


def test_non_finite_numbers_are_strings_in_the_file_and_floats_when_read(tmp_path):
    values = {"loss": math.nan, "grad_norm": math.inf, "param_norm": -math.inf}
    with RunLog(tmp_path, 0) as log:
        log.write_record({"step": 1, **values})
        log.write_record({"kind": "validation", "step": 1, "sources": {"web": values}})

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    line = json.loads(
        (tmp_path / metrics_log.METRICS).read_text(), parse_constant=refuse
    )
    assert line == {
        "step": 1,
        "loss": "NaN",
        "grad_norm": "Infinity",
        "param_norm": "-Infinity",
    }
    [got] = metrics_log.read_metrics(tmp_path)
    [evaluated] = metrics_log.read_validation(tmp_path)
    for numbers in (got, evaluated["sources"]["web"]):
        assert math.isnan(numbers["loss"])
        assert (numbers["grad_norm"], numbers["param_norm"]) == (math.inf, -math.inf)


def test_run_log_of_a_resumed_run_equals_that_of_an_uninterrupted_one(tmp_path):
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    steps(uninterrupted, 1, 10, from_step=0)
    steps(resumed, 1, 7, from_step=0)
    steps(resumed, 5, 10, from_step=4)
    assert contents(resumed) == contents(uninterrupted)


def test_run_log_from_step_0_discards_everything(tmp_path):
    steps(tmp_path / "once", 1, 3, from_step=0)
    steps(tmp_path / "twice", 1, 6, from_step=0)
    steps(tmp_path / "twice", 1, 3, from_step=0)
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


@pytest.mark.parametrize("cut", [1, 2, 20, 100])
def test_run_log_drops_incomplete_lines_of_a_killed_process(tmp_path, cut):
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    steps(uninterrupted, 1, 6, from_step=0)
    steps(killed, 1, 4, from_step=0)
    with RunLog(killed, 4):
        pass
    for name, data in contents(killed).items():
        # The first bytes of what was being written when the process was killed.
        torn = {metrics_log.SAMPLES: b"step 5, sea\n    The sea"}.get(name, data)[:cut]
        (killed / name).write_bytes(data + torn)
    assert (
        metrics_log.read_metrics(killed) == metrics_log.read_metrics(uninterrupted)[:4]
    )
    steps(killed, 5, 6, from_step=4)
    assert contents(killed) == contents(uninterrupted)


def test_read_metrics_ignores_a_last_line_of_zeros(tmp_path):
    steps(tmp_path, 1, 2, from_step=0)
    with open(tmp_path / metrics_log.METRICS, "ab") as file:
        file.write(bytes(64) + b"\n")
    assert len(metrics_log.read_metrics(tmp_path)) == 2


def test_records_survive_sigkill(tmp_path):
    program = (
        "import os, sys\n"
        "from keras_openllama.runs.metrics_log import RunLog\n"
        "log = RunLog(sys.argv[1], 0)\n"
        "for step in range(1, 6): log.write_record({'step': step, 'loss': 1.5})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
    assert run.returncode == -signal.SIGKILL
    assert [r["step"] for r in metrics_log.read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("bad", [b"{'step': 1}\n", b"[1]\n", b'{"loss": 1}\n', b"\n"])
def test_an_invalid_line_in_the_middle_raises_with_its_number(tmp_path, bad):
    steps(tmp_path, 1, 3, from_step=0)
    path = tmp_path / metrics_log.METRICS
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, bad, *rest]))
    for opening in (metrics_log.read_metrics, lambda directory: RunLog(directory, 3)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is not a JSON"):
            opening(tmp_path)


def test_run_log_rejects_an_invalid_entry_of_samples(tmp_path):
    (tmp_path / metrics_log.SAMPLES).write_text("step 1, sea\n    The\n\nmy notes\n\n")
    with pytest.raises(ValueError, match=r"samples\.txt, entry 2, does not start"):
        RunLog(tmp_path, 1)


def test_read_metrics_raises_without_metrics(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no metrics\.jsonl\. Pass the dir"
    ):
        metrics_log.read_metrics(tmp_path)
    assert metrics_log.read_validation(tmp_path) == []


def test_run_log_rejects_a_remote_directory():
    with pytest.raises(ValueError, match="directory='gs://bucket/run' is remote"):
        RunLog("gs://bucket/run", 0)


def test_run_log_warns_of_missing_steps(tmp_path, caplog):
    steps(tmp_path, 1, 3, from_step=0)
    assert not caplog.records
    with RunLog(tmp_path, 5) as log:
        assert (log.last_step, log.last_validation_step) == (3, 2)
    [message] = caplog.messages
    assert "ends at step 3, but the run resumes from step 5" in message


def test_write_record_requires_increasing_steps(tmp_path):
    with RunLog(tmp_path, 0) as log:
        log.write_record({"step": 2})
        with pytest.raises(ValueError, match=r"step=2, but .*metrics\.jsonl already"):
            log.write_record({"step": 2})
        log.write_record({"kind": "validation", "step": 0})
    with RunLog(tmp_path, 0) as log:
        assert (log.last_step, log.last_validation_step) == (None, 0)
        with pytest.raises(ValueError, match=r"step=0, but .*validation\.jsonl"):
            log.write_record({"kind": "validation", "step": 0})


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"loss": 1.0}, "must be an int. Received: step=None"),
        ({"step": 1.0}, "must be an int. Received: step=1.0"),
        (
            {"step": 1, "kind": "test"},
            "must be 'validation', or missing. Received: kind='test'",
        ),
    ],
)
def test_write_record_rejects_invalid_records(tmp_path, bad, message):
    with RunLog(tmp_path, 0) as log:
        with pytest.raises(ValueError, match=message):
            log.write_record(bad)
    assert metrics_log.read_metrics(tmp_path) == []


def test_write_sample_requires_a_single_line_tag(tmp_path):
    with (
        RunLog(tmp_path, 0) as log,
        pytest.raises(ValueError, match="must be a single line"),
    ):
        log.write_sample("a\nb", 1, "text")


def test_tensorboard_events_have_the_same_numbers(tmp_path):
    with RunLog(tmp_path, 0) as log:
        log.write_record({**record(1), "mfu": 0.349, "loss": math.nan})
        log.write_record({"kind": "validation", **validation(1)})
        log.write_sample("sea", 1, "The # sea\nwas calm.")
    [entries] = events(tmp_path)
    assert entries[0].file_version == "brain.Event:2"
    got = scalars(entries)
    assert math.isnan(got.pop((1, "train/loss")))
    loss, perplexity, bits = np.float32([2 / 3, math.exp(2 / 3), 1 / 7])
    assert got == {
        (1, "train/learning_rate"): np.float32(3e-4),
        (1, "train/tokens"): 1 << 22,
        (1, "train/skipped"): 0,
        (1, "speed/tokens_per_second"): 1e5,
        (1, "speed/mfu"): np.float32(0.349),
        (1, "time/data_seconds"): np.float32(0.1),
        (1, "time/goodput"): np.float32(0.9),
        (1, "validation/tokens"): 1 << 22,
        (1, "validation/loss"): loss,
        (1, "validation/perplexity"): perplexity,
        (1, "validation/bits_per_byte"): bits,
        (1, "validation/loss/web"): loss,
        (1, "validation/perplexity/web"): perplexity,
        (1, "validation/bits_per_byte/web"): bits,
    }
    [text] = [value for e in entries for value in e.summary.value if value.tensor.dtype]
    assert text.tag == "samples/sea/text_summary"
    assert text.metadata.plugin_data.plugin_name == "text"
    assert list(text.tensor.string_val) == [b"    The # sea\n    was calm."]


def test_tensorboard_discards_repeated_steps_after_a_resume(tmp_path):
    steps(tmp_path, 1, 7, from_step=0)
    steps(tmp_path, 5, 6, from_step=4)  # Within the same second.
    first, second = events(tmp_path)
    starts = [
        [e.step for e in file if e.session_log.status == SessionLog.START]
        for file in (first, second)
    ]
    assert starts == [[1], [5]]
    assert {step for step, _ in scalars(second)} == {5, 6}


def test_sync_flushes_events(tmp_path):
    with RunLog(tmp_path, 0) as log:
        log.write_record(record(1))
        log.sync()
        [entries] = events(tmp_path)
        assert (1, "train/loss") in scalars(entries)


def test_events_are_flushed_periodically(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard_events, "_TENSORBOARD_SECONDS", 0.0)
    with RunLog(tmp_path, 0) as log:
        log.write_record(record(1))
        [entries] = events(tmp_path)
        assert (1, "train/loss") in scalars(entries)


def test_write_record_raises_on_a_full_disk(tmp_path):
    steps(tmp_path, 1, 100, from_step=0)
    size = (tmp_path / metrics_log.METRICS).stat().st_size
    with RunLog(tmp_path, 100) as log:
        with full_disk(size + 10), pytest.raises(OSError) as error:
            log.write_record(record(101))
        assert error.value.filename.endswith(metrics_log.METRICS)
    # Ten bytes of the line were written.
    assert (tmp_path / metrics_log.METRICS).stat().st_size == size + 10
    assert len(metrics_log.read_metrics(tmp_path)) == 100
    steps(tmp_path, 101, 101, from_step=100)
    assert len(metrics_log.read_metrics(tmp_path)) == 101


def test_write_record_raises_if_only_tensorboard_hits_a_full_disk(tmp_path):
    log = RunLog(tmp_path, 0)
    with full_disk(16_384), pytest.raises(OSError) as error:
        for step in range(1, 1000):
            log.write_record({"step": step, **{f"{n}": 1 for n in range(10)}})
    assert error.value.filename.endswith(metrics_log.TENSORBOARD)
    log.close()


def test_run_log_preserves_the_files_if_it_cannot_be_opened_on_a_full_disk(tmp_path):
    steps(tmp_path, 1, 100, from_step=0)
    before = contents(tmp_path)
    with full_disk(1000), pytest.raises(OSError):
        RunLog(tmp_path, 90)
    assert contents(tmp_path) == before
    assert [name for name in os.listdir(tmp_path) if "unfinished" in name] == []


def test_run_log_does_not_import_torch(tmp_path):
    program = (
        "import sys\n"
        "from keras_openllama.runs.metrics_log import RunLog\n"
        "RunLog(sys.argv[1], 0).close()\n"
        "assert 'torch' not in sys.modules and 'jax' not in sys.modules\n"
        "import torch\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True)
