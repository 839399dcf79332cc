"""What a run writes to be watched; a resume, a kill and a full disk."""

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
    """A record, some digits of which only full precision keeps."""
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
    """A run, or a part of it: evaluates and writes a sample every second step."""
    with RunLog(directory, from_step) as log:
        for step in range(first, last + 1):
            log.write(record(step))
            if step % 2 == 0:
                log.write({"kind": "validation", **validation(step)})
                log.text("sea", step, f"The sea at {step}\n\nstep 1, not an entry\n")


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
    """No file of this process grows beyond some bytes: writing more fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_records_come_back_to_the_last_bit(tmp_path):
    steps(tmp_path, 1, 4, from_step=0)
    assert metrics_log.read(tmp_path) == [record(step) for step in range(1, 5)]
    assert metrics_log.read_validation(tmp_path) == [validation(2), validation(4)]


def test_samples_are_read_by_people(tmp_path):
    with RunLog(tmp_path, 0) as log:
        log.text("sea", 7, "The sea\n  was \udcff calm.")
        log.text("sky", 7, "")
    assert (tmp_path / metrics_log.SAMPLES).read_text().splitlines() == [
        *("step 7, sea", "    The sea", "      was \\udcff calm.", ""),
        *("step 7, sky", "    ", ""),
    ]


def test_scalars_of_arrays_are_numbers(tmp_path):
    import jax

    loss = np.float32(2.3)
    with RunLog(tmp_path, 0) as log:
        log.write(
            {
                "step": np.int64(1),
                "loss": loss,
                "grad_norm": jax.numpy.float32(0.5),
                "skipped": np.bool_(True),
                "mfu": None,
            }
        )
    [got] = metrics_log.read(tmp_path)
    assert got == {"step": 1, "loss": float(loss), "grad_norm": 0.5, "skipped": True}


def test_what_is_not_finite_is_a_string_in_the_file_and_a_float_to_the_reader(tmp_path):
    values = {"loss": math.nan, "grad_norm": math.inf, "param_norm": -math.inf}
    with RunLog(tmp_path, 0) as log:
        log.write({"step": 1, **values})
        log.write({"kind": "validation", "step": 1, "sources": {"web": values}})

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
    [got] = metrics_log.read(tmp_path)
    [evaluated] = metrics_log.read_validation(tmp_path)
    for numbers in (got, evaluated["sources"]["web"]):
        assert math.isnan(numbers["loss"])
        assert (numbers["grad_norm"], numbers["param_norm"]) == (math.inf, -math.inf)


def test_after_a_resume_the_files_are_those_of_an_uninterrupted_run(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    steps(whole, 1, 10, from_step=0)
    steps(resumed, 1, 7, from_step=0)
    steps(resumed, 5, 10, from_step=4)
    assert contents(resumed) == contents(whole)


def test_a_run_that_begins_again_forgets_everything(tmp_path):
    steps(tmp_path / "once", 1, 3, from_step=0)
    steps(tmp_path / "twice", 1, 6, from_step=0)
    steps(tmp_path / "twice", 1, 3, from_step=0)
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


@pytest.mark.parametrize("cut", [1, 2, 20, 100])
def test_a_kill_while_writing_leaves_nothing_behind(tmp_path, cut):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps(whole, 1, 6, from_step=0)
    steps(killed, 1, 4, from_step=0)
    with RunLog(killed, 4):
        pass
    for name, data in contents(killed).items():
        # What was being written when the process was killed, some bytes of it.
        torn = {metrics_log.SAMPLES: b"step 5, sea\n    The sea"}.get(name, data)[:cut]
        (killed / name).write_bytes(data + torn)
    assert metrics_log.read(killed) == metrics_log.read(whole)[:4]
    steps(killed, 5, 6, from_step=4)
    assert contents(killed) == contents(whole)


def test_zeros_that_a_crash_of_the_machine_left_at_the_end_are_a_torn_line(tmp_path):
    steps(tmp_path, 1, 2, from_step=0)
    with open(tmp_path / metrics_log.METRICS, "ab") as file:
        file.write(bytes(64) + b"\n")
    assert len(metrics_log.read(tmp_path)) == 2


def test_a_process_that_is_killed_loses_nothing_that_it_wrote(tmp_path):
    program = (
        "import os, sys\n"
        "from keras_openllama.runs.metrics_log import RunLog\n"
        "log = RunLog(sys.argv[1], 0)\n"
        "for step in range(1, 6): log.write({'step': step, 'loss': 1.5})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
    assert run.returncode == -signal.SIGKILL
    assert [r["step"] for r in metrics_log.read(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("bad", [b"{'step': 1}\n", b"[1]\n", b'{"loss": 1}\n', b"\n"])
def test_a_bad_line_in_the_middle_is_named(tmp_path, bad):
    steps(tmp_path, 1, 3, from_step=0)
    path = tmp_path / metrics_log.METRICS
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, bad, *rest]))
    for opening in (metrics_log.read, lambda directory: RunLog(directory, 3)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is no JSON"):
            opening(tmp_path)


def test_a_bad_entry_of_the_samples_is_named(tmp_path):
    (tmp_path / metrics_log.SAMPLES).write_text("step 1, sea\n    The\n\nmy notes\n\n")
    with pytest.raises(ValueError, match=r"samples\.txt, entry 2, does not begin"):
        RunLog(tmp_path, 1)


def test_a_directory_without_metrics_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no metrics\.jsonl; give the dir"):
        metrics_log.read(tmp_path)
    assert metrics_log.read_validation(tmp_path) == []


def test_a_remote_directory_is_refused():
    with pytest.raises(ValueError, match="directory='gs://bucket/run' is remote"):
        RunLog("gs://bucket/run", 0)


def test_steps_that_are_missing_are_said(tmp_path, caplog):
    steps(tmp_path, 1, 3, from_step=0)
    assert not caplog.records
    with RunLog(tmp_path, 5) as log:
        assert (log.last_step, log.last_validation_step) == (3, 2)
    [said] = caplog.messages
    assert "ends at step 3, but the run resumes from step 5" in said


def test_a_step_is_written_once_and_in_order(tmp_path):
    with RunLog(tmp_path, 0) as log:
        log.write({"step": 2})
        with pytest.raises(ValueError, match=r"step=2, but .*metrics\.jsonl already"):
            log.write({"step": 2})
        log.write({"kind": "validation", "step": 0})
    with RunLog(tmp_path, 0) as log:
        assert (log.last_step, log.last_validation_step) == (None, 0)
        with pytest.raises(ValueError, match=r"step=0, but .*validation\.jsonl"):
            log.write({"kind": "validation", "step": 0})


@pytest.mark.parametrize(
    "bad, said",
    [
        ({"loss": 1.0}, "step=None; give it one, an integer"),
        ({"step": 1.0}, "step=1.0; give it one, an integer"),
        ({"step": 1, "kind": "test"}, "kind='test'; it is 'validation', or left out"),
    ],
)
def test_a_bad_record_is_refused(tmp_path, bad, said):
    with RunLog(tmp_path, 0) as log:
        with pytest.raises(ValueError, match=said):
            log.write(bad)
    assert metrics_log.read(tmp_path) == []


def test_a_tag_is_one_line(tmp_path):
    with RunLog(tmp_path, 0) as log, pytest.raises(ValueError, match="not one line"):
        log.text("a\nb", 1, "text")


def test_tensorboard_shows_the_same_numbers(tmp_path):
    with RunLog(tmp_path, 0) as log:
        log.write({**record(1), "mfu": 0.349, "loss": math.nan})
        log.write({"kind": "validation", **validation(1)})
        log.text("sea", 1, "The # sea\nwas calm.")
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


def test_after_a_resume_tensorboard_forgets_the_steps_that_are_done_again(tmp_path):
    steps(tmp_path, 1, 7, from_step=0)
    steps(tmp_path, 5, 6, from_step=4)  # Within the same second.
    first, second = events(tmp_path)
    starts = [
        [e.step for e in file if e.session_log.status == SessionLog.START]
        for file in (first, second)
    ]
    assert starts == [[1], [5]]
    assert {step for step, _ in scalars(second)} == {5, 6}


def test_events_are_on_the_disk_before_a_checkpoint(tmp_path):
    with RunLog(tmp_path, 0) as log:
        log.write(record(1))
        log.sync()
        [entries] = events(tmp_path)
        assert (1, "train/loss") in scalars(entries)


def test_events_are_written_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard_events, "_TENSORBOARD_SECONDS", 0.0)
    with RunLog(tmp_path, 0) as log:
        log.write(record(1))
        [entries] = events(tmp_path)
        assert (1, "train/loss") in scalars(entries)


def test_a_full_disk_stops_the_run(tmp_path):
    steps(tmp_path, 1, 100, from_step=0)
    size = (tmp_path / metrics_log.METRICS).stat().st_size
    with RunLog(tmp_path, 100) as log:
        with full_disk(size + 10), pytest.raises(OSError) as error:
            log.write(record(101))
        assert error.value.filename.endswith(metrics_log.METRICS)
    # Ten bytes of the line came to the disk.
    assert (tmp_path / metrics_log.METRICS).stat().st_size == size + 10
    assert len(metrics_log.read(tmp_path)) == 100
    steps(tmp_path, 101, 101, from_step=100)
    assert len(metrics_log.read(tmp_path)) == 101


def test_a_full_disk_stops_the_run_if_only_tensorboard_meets_it(tmp_path):
    log = RunLog(tmp_path, 0)
    with full_disk(16_384), pytest.raises(OSError) as error:
        for step in range(1, 1000):
            log.write({"step": step, **{f"{n}": 1 for n in range(10)}})
    assert error.value.filename.endswith(metrics_log.TENSORBOARD)
    log.close()


def test_a_resume_that_finds_the_disk_full_keeps_the_log(tmp_path):
    steps(tmp_path, 1, 100, from_step=0)
    before = contents(tmp_path)
    with full_disk(1000), pytest.raises(OSError):
        RunLog(tmp_path, 90)
    assert contents(tmp_path) == before
    assert [name for name in os.listdir(tmp_path) if "unfinished" in name] == []


def test_torch_is_not_imported_for_tensorboard(tmp_path):
    program = (
        "import sys\n"
        "from keras_openllama.runs.metrics_log import RunLog\n"
        "RunLog(sys.argv[1], 0).close()\n"
        "assert 'torch' not in sys.modules and 'jax' not in sys.modules\n"
        "import torch\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True)
