"""CheckpointManager: bit-exact restores despite kills, damage and full disks."""

import functools
import gc
import json
import logging
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkout import ROOT
from fake_devices import run_on_eight_devices
from small_disk import small_disk

from keras_openllama.runs import checkpoint_manager as module
from keras_openllama.runs.checkpoint_manager import CheckpointError, CheckpointManager
from keras_openllama.runs.jax_train_program import abstract_arrays
from keras_openllama.utils import files

pytestmark = [
    pytest.mark.backend_free,  # It is JAX, whatever Keras runs on.
    # See `swept`; and TensorStore's threads find their event loop closed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited"),
]

HERE = Path(__file__).parent  # Subprocesses import this module from here.
SECONDS = 60  # Timeout for other threads.
# Values that a cast to another dtype, or a comparison, would not preserve.
SPECIAL = (-0.0, np.inf, -np.inf, np.nan, 1e-40, 3.3895314e38, 1 + 2**-23)


def values(step, rows=16):
    """A state to save; every array has different bits at every step."""
    rng = np.random.default_rng(step)
    kernel = rng.standard_normal((rows, 8), "float32")
    special = np.array([*SPECIAL, step], "float32")
    bits = rng.integers(0, 1 << 16, (8, 16), "uint16")
    return {
        "model": {
            "layer_1/kernel": kernel,
            "layer_1/scale": special,
            "embeddings": bits.view(ml_dtypes.bfloat16),
        },
        "optimizer": {
            "iterations": np.array(step, "int32"),
            "layer_1/counts": rng.integers(-(1 << 31), 1 << 31, 24).astype("int32"),
        },
        "guard": {"mean_loss": np.array(1 / (step + 1), "float32")},
    }


def arrays(step, rows=16):
    return jax.device_put(values(step, rows))


def bits(tree):
    """Dtypes, shapes and bytes of arrays, for comparison."""
    return jax.tree.map(
        lambda a: (str(a.dtype), a.shape, np.asarray(a).tobytes()), tree
    )


def target_for(rows=16):
    """The argument of `restore_latest`."""
    return abstract_arrays(arrays(0, rows))


def save(directory, *steps, **options):
    """Saves some steps and closes."""
    checkpoints = CheckpointManager(directory, **options)
    for step in steps:
        checkpoints.save(step, arrays(step), {"tokens": 100 * step})
    checkpoints.close()
    return checkpoints


def restored_step(directory, rows=16):
    """The step that is restored; checks that its arrays are those of the step."""
    marker, found = CheckpointManager(directory).restore_latest(target_for(rows))
    assert bits(found) == bits(values(marker["step"], rows))
    return marker["step"]


def contents(directory):
    """The bytes of all files below a directory, by name."""
    paths = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def names(directory):
    return sorted(os.listdir(Path(directory, "checkpoints")))


@pytest.fixture
def swept():
    """Collects the coroutines that a failed Orbax leaves, which warn when collected.

    Collecting them in another test may crash Python 3.11 (gh-106905).
    """
    yield
    gc.collect()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run's directory with checkpoints of steps 1 and 2; tests copy it."""
    directory = tmp_path_factory.mktemp("two")
    save(directory, 1, 2)
    return directory


# --- Saving and restoring ---


def test_restore_latest_returns_the_newest_checkpoint_bit_exactly(tmp_path):
    save(tmp_path, 3, 20, 100)
    marker, found = CheckpointManager(tmp_path).restore_latest(target_for())
    assert (marker["step"], marker["tokens"]) == (100, 10_000)
    assert bits(found) == bits(values(100))
    assert bits(found) != bits(values(20))


def test_restore_latest_returns_none_without_checkpoints(tmp_path):
    assert CheckpointManager(tmp_path).restore_latest(target_for()) is None


def test_restore_latest_restores_a_part(two):
    part = {"guard": target_for()["guard"]}
    _, found = CheckpointManager(two).restore_latest(part)
    assert bits(found) == bits({"guard": values(2)["guard"]})


def test_restore_latest_calls_before_read_only_if_a_checkpoint_is_intact(
    two, tmp_path, monkeypatch
):
    calls, read = [], module.read_arrays
    monkeypatch.setattr(
        module, "read_arrays", lambda *args: calls.append("read") or read(*args)
    )

    def restore(directory):
        calls.clear()
        manager = CheckpointManager(directory)
        return manager.restore_latest(target_for(), lambda: calls.append("before"))

    assert restore(two) and calls == ["before", "read"]
    assert restore(tmp_path / "empty") is None and calls == []
    run = shutil.copytree(two, tmp_path / "run")
    for step in "12":
        truncate(run / "checkpoints" / step / "arrays" / "manifest.ocdbt")
    with pytest.raises(CheckpointError, match="are damaged"):
        restore(run)
    assert calls == []


def test_marker_has_size_and_checksum_of_each_file(two):
    path = two / "checkpoints" / "2"
    marker = json.loads((path / "checkpoint.json").read_text())
    there = {name for name in contents(path) if name != "checkpoint.json"}
    assert {*marker["files"]} == there and len(there) > 5
    for name, known in marker["files"].items():
        # Computed by an independent program.
        found = subprocess.check_output(["sha256sum", path / name], text=True)
        assert found.split()[0] == known["sha256"]
        assert (path / name).stat().st_size == known["bytes"]


def test_save_stores_info_in_the_marker_as_json(tmp_path):
    checkpoints = CheckpointManager(tmp_path)
    info = {"meshes": {8: "a", 16: "b"}, "pair": (1, 2.5), "none": None, "é": "ü"}
    checkpoints.save(1, arrays(1), info)
    checkpoints.close()
    marker, _ = checkpoints.restore_latest(target_for())
    for name, value in json.loads(json.dumps(info)).items():
        assert marker[name] == value


def target_with(path, shape):
    """`target_for` with another shape for one array, or one more array."""
    tree = abstract_arrays(arrays(0))
    sharding = tree["guard"]["mean_loss"].sharding
    tree["model"][path] = jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)
    return tree


@pytest.mark.usefixtures("swept")
@pytest.mark.parametrize("shape", [(8, 16), (15, 8), (17, 8)], ids=str)
def test_restore_latest_rejects_another_shape(shape, two):
    with pytest.raises(ValueError, match="not compatible with the stored shape"):
        CheckpointManager(two).restore_latest(target_with("layer_1/kernel", shape))


@pytest.mark.usefixtures("swept")
def test_restore_latest_names_an_array_that_was_not_saved(two):
    with pytest.raises(
        ValueError, match=r"2 has no arrays .*layer_2/kernel.*another mod"
    ):
        CheckpointManager(two).restore_latest(target_with("layer_2/kernel", (16, 8)))


# --- Background saves ---


class Gate:
    """Blocks calls of a function until opened, and records their threads."""

    def __init__(self, monkeypatch, owner, name):
        function = getattr(owner, name)
        self._open, self.reached = threading.Event(), threading.Event()
        self.open, self.threads = self._open.set, set()

        def blocked(*arguments, **options):
            self.threads.add(threading.current_thread())
            self.reached.set()
            assert self._open.wait(SECONDS)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, blocked)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(os, "rename"), (files, "sha256"), (os, "replace")],
    ids=["arrays", "checksums", "marker"],
)
def test_save_returns_before_files_are_written(owner, name, tmp_path, monkeypatch):
    gate = Gate(monkeypatch, owner, name)
    checkpoints = CheckpointManager(tmp_path)
    checkpoints.save(1, arrays(1), {})
    assert gate.reached.wait(SECONDS)
    checkpoints.raise_if_failed()  # Does not wait.
    assert checkpoints.steps() == []
    assert CheckpointManager(tmp_path).restore_latest(target_for()) is None
    gate.open()
    checkpoints.close()
    assert threading.main_thread() not in gate.threads
    assert restored_step(tmp_path) == 1


@functools.partial(jax.jit, donate_argnums=0)
def overwrite(state):
    """Overwrites the buffers of the arrays, as a train step does."""
    return jax.tree.map(lambda a: jnp.ones_like(a) - a, state)


def addresses(state):
    return {
        shard.data.unsafe_buffer_pointer()
        for array in jax.tree.leaves(state)
        for shard in array.addressable_shards
    }


def save_and_overwrite(directory, states):
    """Saves a state per step, and overwrites each as soon as `save` returns."""
    before = addresses(states[0])
    after = overwrite(states[0])  # Compiles it, and checks that it works in place.
    assert before & addresses(after)
    checkpoints = CheckpointManager(directory, keep_last=len(states))
    for step, state in enumerate(states[1:], 1):
        checkpoints.save(step, state, {})
        after = jax.block_until_ready(overwrite(state))
        assert bits(after) != bits(values(step))
    checkpoints.close()
    assert checkpoints.steps() == [*range(1, len(states))]


def test_save_is_not_affected_by_overwriting_the_arrays(tmp_path):
    save_and_overwrite(tmp_path, [arrays(step) for step in range(9)])
    for step in range(1, 9):
        path = CheckpointManager(tmp_path).path(step)
        assert bits(module.read_arrays(path, abstract_arrays(arrays(0)))) == bits(
            values(step)
        )


def test_save_is_not_affected_by_overwriting_large_arrays(tmp_path):
    rows = 1 << 16
    save_and_overwrite(tmp_path, [arrays(0, rows), arrays(1, rows)])
    assert restored_step(tmp_path, rows) == 1


def test_save_waits_for_the_previous_save(tmp_path):
    checkpoints = CheckpointManager(tmp_path, keep_last=9)
    for step in range(1, 6):
        checkpoints.save(step, arrays(step), {})
        assert [*range(1, step)] == [s for s in checkpoints.steps() if s < step]
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3, 4, 5]
    checkpoints.close()


# --- Retention ---


@pytest.mark.parametrize(
    ("options", "retained"),
    [
        (dict(keep_last=1), [10]),
        (dict(keep_last=3), [8, 9, 10]),
        (dict(keep_last=1, milestone_every=4), [4, 8, 10]),
        (dict(keep_last=2, milestone_every=5), [5, 9, 10]),
    ],
    ids=str,
)
def test_save_retains_the_last_checkpoints_and_milestones(options, retained, tmp_path):
    checkpoints = CheckpointManager(tmp_path, **options)
    for step in (2, 4, 5, 8, 9, 10):
        checkpoints.save(step, {"x": {"y": jnp.ones(2)}}, {})
        checkpoints.wait()
    checkpoints.close()
    assert checkpoints.steps() == retained
    assert names(tmp_path) == sorted(map(str, retained))


def write_incomplete(directory, step, copied_step):
    """Creates the incomplete checkpoint that a kill during a save leaves behind."""
    path = directory / "checkpoints"
    unfinished = path / str(step) / "arrays.orbax-checkpoint-tmp"
    shutil.copytree(path / str(copied_step) / "arrays", unfinished)
    (unfinished / "manifest.ocdbt").unlink()
    (path / str(step) / ".checkpoint.json.unfinished-1").write_text("{")


def test_incomplete_checkpoints_are_reported_and_removed_by_the_next_save(
    two, tmp_path, caplog
):
    run = shutil.copytree(two, tmp_path / "run")
    write_incomplete(run, 0, 2)
    write_incomplete(run, 3, 2)
    assert restored_step(run) == 2
    for step in (0, 3):
        assert f"The checkpoint of step {step} is incomplete" in caplog.text
    save(run, 3)
    assert names(run) == ["2", "3"]
    assert restored_step(run) == 3


def test_save_succeeds_if_old_checkpoints_cannot_be_removed(
    tmp_path, monkeypatch, caplog
):
    save(tmp_path, 1, keep_last=1)

    def refuse(path, remove=files.remove_file):
        if path.endswith("1/checkpoint.json"):
            raise PermissionError(f"[Errno 13] Permission denied: {path}")
        remove(path)

    monkeypatch.setattr(files, "remove_file", refuse)
    save(tmp_path, 2, keep_last=1)
    assert "1/checkpoint.json" in caplog.text
    assert restored_step(tmp_path) == 2
    monkeypatch.undo()
    save(tmp_path, 3, keep_last=1)
    assert names(tmp_path) == ["3"]


# --- Damage ---


def truncate(path):
    size = path.stat().st_size
    os.truncate(path, random.Random(size).randrange(size))


def flip(path):
    data = bytearray(path.read_bytes())
    place = random.Random(len(data)).randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_restore_latest_names_a_damaged_file_and_restores_the_previous_checkpoint(
    damage, two, tmp_path, caplog
):
    for number, name in enumerate(contents(two / "checkpoints" / "2")):
        run = shutil.copytree(two, tmp_path / str(number))
        damaged = run / "checkpoints" / "2"
        damage(damaged / name)
        before = contents(run / "checkpoints")
        caplog.clear()
        assert restored_step(run) == 1
        if (name, damage) == ("checkpoint.json", Path.unlink):
            assert "step 2 is incomplete" in caplog.text
            assert "it has no checkpoint.json" in caplog.text
            assert contents(run / "checkpoints") == before
            continue
        [record] = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert "step 2 is damaged" in record.getMessage()
        assert str(damaged / name) in record.getMessage()
        assert names(run) == ["1", "2.damaged"]
        after = contents(run / "checkpoints")
        assert after == {k.replace("2/", "2.damaged/", 1): before[k] for k in before}
        # The resumed run reaches this step again.
        save(run, 2)
        assert restored_step(run) == 2
        assert names(run) == ["1", "2", "2.damaged"]


def test_read_marker_detects_every_flipped_bit(two, tmp_path):
    file = tmp_path / "checkpoint.json"
    data = (two / "checkpoints" / "2" / file.name).read_bytes()
    file.write_bytes(data)
    with open(file, "r+b", buffering=0) as opened:
        for place in range(8 * len(data)):
            byte = data[place // 8]
            os.pwrite(opened.fileno(), bytes([byte ^ 1 << place % 8]), place // 8)
            with pytest.raises(ValueError, match=re.escape(str(file))):
                module.read_marker(str(tmp_path))
            os.pwrite(opened.fileno(), bytes([byte]), place // 8)
    module.read_marker(str(tmp_path))


def test_restore_latest_skips_a_marker_of_another_format(
    two, tmp_path, monkeypatch, caplog
):
    run = shutil.copytree(two, tmp_path / "run")
    monkeypatch.setattr(module, "FORMAT", 2)
    save(run, 2)
    monkeypatch.undo()
    assert restored_step(run) == 1
    assert "has format 2, and this version reads 1" in caplog.text


def test_restore_latest_raises_every_time_if_all_are_damaged(two, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    for step in "12":
        truncate(run / "checkpoints" / step / "arrays" / "manifest.ocdbt")
    before = contents(run / "checkpoints")
    for _ in range(2):  # The second call must not start a new run.
        with pytest.raises(CheckpointError, match=r"All checkpoints .* are damaged"):
            CheckpointManager(run).restore_latest(target_for())
    assert names(run) == ["1.damaged", "2.damaged"]
    assert sorted(contents(run / "checkpoints").values()) == sorted(before.values())


# --- Full disks and other errors ---


@pytest.fixture
def mount(tmp_path):
    with small_disk(tmp_path / "disk") as mount:
        yield mount


def used_pages(disk):
    stat = os.statvfs(disk)
    return (stat.f_blocks - stat.f_bfree) * stat.f_bsize // 4096


@pytest.mark.usefixtures("swept")
def test_save_on_a_full_disk_leaves_earlier_checkpoints_intact(mount):
    disk, rows = mount(4000), 1 << 10
    checkpoints = CheckpointManager(disk)
    checkpoints.save(1, arrays(1, rows), {})
    checkpoints.wait()
    before, used = contents(disk), used_pages(disk)
    failures = 0
    while True:
        mount(4 * (used + failures))
        try:
            checkpoints.save(2, arrays(2, rows), {})
            checkpoints.wait()
            break
        except CheckpointError as error:
            message = str(error)
        assert "step 2 could not be written" in message
        assert "No space left on device" in message
        assert "Earlier checkpoints are unchanged: [1]. Free space" in message
        assert "run the same command to resume from step 1." in message
        assert contents(disk) == before and names(disk) == ["1"]
        assert used_pages(disk) == used
        failures += 1
    checkpoints.close()
    # It failed at every size, up to the last page, which is the marker's.
    assert failures >= 15 and used_pages(disk) - used <= failures
    assert restored_step(disk, rows) == 2


@pytest.fixture
def small_files():
    """Limits files of this process to 64 KB, to simulate a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))

    def lift():
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    yield limit, lift
    lift()


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def by_raise_if_failed(checkpoints):
    wait_for(checkpoints._pending.done)
    checkpoints.raise_if_failed()


def by_save(checkpoints):
    checkpoints.save(3, arrays(3), {})


@pytest.mark.usefixtures("swept")
@pytest.mark.parametrize(
    "notice",
    [by_raise_if_failed, by_save, CheckpointManager.wait, CheckpointManager.close],
)
def test_the_next_call_raises_the_error_of_a_background_save(
    notice, two, tmp_path, small_files
):
    run = shutil.copytree(two, tmp_path / "run")
    before = contents(run)
    limit, lift = small_files
    checkpoints = CheckpointManager(run)
    large = arrays(3, 1 << 16)
    limit()
    checkpoints.save(3, large, {})
    with pytest.raises(CheckpointError, match="step 3 could not be written") as error:
        notice(checkpoints)
    lift()
    assert "File too large" in str(error.value)
    assert contents(run) == before and names(run) == ["1", "2"]
    checkpoints.raise_if_failed()  # The error is raised once,
    checkpoints.save(3, arrays(3), {})  # and the next save succeeds.
    checkpoints.close()
    assert names(run) == ["2", "3"] and restored_step(run) == 3


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (files, "sha256"),
        (files, "write_bytes"),
        (module.ocp.AsyncCheckpointer, "wait_until_finished"),
    ],
    ids=["checksum", "marker", "Orbax"],
)
def test_raise_if_failed_raises_any_error_of_the_background(
    owner, name, two, tmp_path, monkeypatch
):
    run = shutil.copytree(two, tmp_path / "run")
    before = contents(run)

    original = getattr(owner, name)

    def fail(*arguments):
        if threading.current_thread() is threading.main_thread():
            return original(*arguments)
        raise RuntimeError("the disk is on fire")

    checkpoints = CheckpointManager(run)
    monkeypatch.setattr(owner, name, fail)
    checkpoints.save(3, arrays(3), {})
    with pytest.raises(CheckpointError, match="the disk is on fire") as e:
        by_raise_if_failed(checkpoints)
    assert isinstance(e.value.__cause__, RuntimeError)
    monkeypatch.undo()
    assert contents(run) == before and names(run) == ["1", "2"]
    checkpoints.close()


def test_timeout_names_the_process_that_did_not_finish(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PEERS_TIMEOUT", 0.0)
    message = r"process 1 did not finish its part .*checksums-1.json, within 0 seconds"
    with pytest.raises(TimeoutError, match=message):
        module._wait_for_checksums(str(tmp_path), 1)


def test_save_raises_at_once_if_it_cannot_start(two, tmp_path, monkeypatch):
    run = shutil.copytree(two, tmp_path / "run")
    checkpoints = CheckpointManager(run)
    with pytest.raises(CheckpointError, match="step 3 could not be written"):
        checkpoints.save(3, {"model": {"a": object()}}, {})
    assert names(run) == ["1", "2"]
    save(run, 3)
    assert restored_step(run) == 3


# --- Kills ---

# The program imports everything and computes nothing, so that it can be forked for each
# kill. The first child survives: it records the events at which to kill the others.
KILLS = """
import json, os, random, re, shutil, sys, threading, time
from pathlib import Path

sys.path.append(sys.argv[1])
from test_checkpoint_manager import arrays
from keras_openllama.runs.checkpoint_manager import CheckpointManager

template, output, rows = *sys.argv[2:4], int(sys.argv[4])


def fork(number, begin):
    directory = shutil.copytree(template, f"{output}/{number:03}")
    child = os.fork()
    if not child:
        checkpoints = CheckpointManager(directory, keep_last=1)
        state = arrays(3, rows)
        begin(directory)
        checkpoints.save(3, state, {})
        checkpoints.close()
        os._exit(0)
    return child


def watch(directory, act):
    events = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
    lock = threading.Lock()

    def note(event, path=""):
        # `rmtree` reports names, other events report paths.
        path = str(path).removeprefix(f"{directory}/checkpoints")
        with lock:
            act(re.sub("unfinished-[0-9]+", "unfinished", f"{event} {path}"))

    def hook(event, arguments):
        if event in events:
            note(event, arguments[0])
        elif event == "open" and arguments[0] != os.devnull:
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                note("open", arguments[0])

    def fsync(descriptor, fsync=os.fsync):
        note("fsync")
        fsync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


def at_each_step(inside_removals):
    file = f"{output}.steps"

    def show(directory):
        line = os.open(file, os.O_WRONLY | os.O_CREAT)
        watch(directory, lambda what: os.write(line, f"{what}\\n".encode()))

    os.waitpid(fork(0, show), 0)
    steps = Path(file).read_text().splitlines()
    deaths = [
        (i, what, steps[:i].count(what))
        for i, what in enumerate(steps)
        if "/" in what or "fsync" in what or inside_removals
    ]
    died = {}
    for pair in zip(deaths[::2], [*deaths[1::2], None]):
        children = [
            (fork(i + 1, lambda d: watch(d, die_at(what, before))), i, what)
            for i, what, before in filter(None, pair)
        ]
        for child, i, what in children:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code in (0, 9), code
            if code:
                died[i + 1] = what
    print(json.dumps(died))


def die_at(what, before):
    seen = []

    def act(found):
        if found == what and seen.count(found) == before:
            os._exit(9)
        seen.append(found)

    return act


def at_any_moment(count):
    dice, most = random.Random(0), None
    for number in range(count + 1):
        started, begin = os.pipe()
        child = fork(number, lambda _: os.write(begin, b"!"))
        os.close(begin)
        os.read(started, 1)
        os.close(started)
        start = time.monotonic()
        if number:
            time.sleep(dice.uniform(0, most))
            os.kill(child, 9)
        os.waitpid(child, 0)
        most = most or time.monotonic() - start


globals()[sys.argv[5]](int(sys.argv[6]))
"""
slow = pytest.mark.slow


@pytest.fixture
def left_by_kills(tmp_path):
    """A complete checkpoint of step 2, and incomplete ones of steps 1 and 3."""

    def make(rows):
        directory = tmp_path / "template"
        checkpoints = CheckpointManager(directory)
        checkpoints.save(2, arrays(2, rows), {})
        checkpoints.close()
        write_incomplete(directory, 1, 2)
        write_incomplete(directory, 3, 2)
        return directory

    return make


def run_program(program, *arguments):
    """Runs a program in its own process; returns its output."""
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={
            **os.environ,
            "KERAS_BACKEND": "jax",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support"))),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def steps_after(output, rows):
    """Steps restored after each kill; then saves again, which must clean up."""
    steps = {}
    for directory in output.iterdir():
        steps[directory.name] = restored_step(directory, rows)
        assert not [name for name in names(directory) if "damaged" in name]
        save(directory, 4, keep_last=1)
        assert names(directory) == ["4"]
    return steps


@pytest.mark.parametrize(
    "inside_removals", [False, pytest.param(True, marks=slow)], ids=str
)
def test_a_kill_at_each_event_of_a_save_leaves_the_old_or_the_new_checkpoint(
    inside_removals, left_by_kills, tmp_path
):
    rows, output = 1 << 10, tmp_path / "output"
    how = ("at_each_step", int(inside_removals))
    printed = run_program(KILLS, HERE, left_by_kills(rows), output, rows, *how)
    died = {int(number): what for number, what in json.loads(printed).items()}
    restored = steps_after(output, rows)
    assert len(restored) - 3 <= len(died) >= (60 if inside_removals else 20)
    # Processes killed before the marker is renamed leave the old one.
    [marked] = [n for n, what in died.items() if what.startswith("os.rename /3/.c")]
    before, after = [], []
    for number, what in died.items():
        assert restored[f"{number:03}"] == (2 if number <= marked else 3), what
        (before if number <= marked else after).append(what)
    for what in ("fsync", "os.rename /3/arrays", "os.mkdir /3", "open /3/.checkpoint"):
        assert any(step.startswith(what) for step in before), what
    assert {"os.remove /2/checkpoint.json", "os.rmdir /2"} <= {*after}


@pytest.mark.parametrize("count", [6, pytest.param(150, marks=slow)], ids=str)
def test_a_kill_at_a_random_moment_leaves_the_old_or_the_new_checkpoint(
    count, left_by_kills, tmp_path
):
    rows, output = 1 << 17, tmp_path / "output"
    run_program(KILLS, HERE, left_by_kills(rows), output, rows, "at_any_moment", count)
    restored = steps_after(output, rows)
    assert len(restored) == count + 1 and {*restored.values()} == {2, 3}


# --- Several devices ---

DEVICES = """
import sys

sys.path.append(sys.argv[1])
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from test_checkpoint_manager import abstract_arrays, bits, save_and_overwrite, values
from keras_openllama.runs.checkpoint_manager import CheckpointManager

directory, devices = sys.argv[2], np.array(jax.devices())
assert len(devices) == 8


def sharded(step, devices, axes=("fsdp", None)):
    mesh = Mesh(devices, ("fsdp",))

    def put(array):
        spec = P(*axes) if array.ndim == 2 else P()
        return jax.device_put(array, NamedSharding(mesh, spec))

    return jax.tree.map(put, values(step))


save_and_overwrite(directory, [sharded(step, devices) for step in range(4)])

layouts = {
    "8": (devices,),
    "8 in another order": (devices[::-1],),
    "8 by the other axis": (devices, (None, "fsdp")),
    "4": (devices[:4],),
    "the other 4": (devices[4:], (None, "fsdp")),
    "2": (devices[3:5],),
    "1": (devices[:1],),
    "all on each": (devices, ()),
}
for name, layout in layouts.items():
    target = abstract_arrays(sharded(0, *layout))
    marker, found = CheckpointManager(directory).restore_latest(target)
    assert bits(found) == bits(values(3)), name
    for array, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(target)):
        assert array.sharding == wanted.sharding, name
        assert array.committed, name
    print(name, "agrees")
"""


def test_restore_latest_reshards_to_any_number_of_devices(tmp_path):
    assert run_on_eight_devices(DEVICES, HERE, tmp_path).count("agrees") == 8
    assert restored_step(tmp_path) == 3  # And in this process.


# --- Several processes ---

PROCESSES = """
import sys

sys.path.append(sys.argv[1])
import jax

directory, port, number, what = sys.argv[2:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(number))

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from test_checkpoint_manager import (
    CheckpointManager, abstract_arrays, overwrite, values
)

mesh = Mesh(np.array(jax.devices()), ("fsdp",))
assert jax.process_count() == 2 and len(mesh.devices) == 2


def put(array):
    sharding = NamedSharding(mesh, P("fsdp") if array.ndim == 2 else P())
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def state(step):
    return jax.tree.map(put, values(step))


def local(state):
    return [
        (shard.index, np.asarray(shard.data).tobytes())
        for array in jax.tree.leaves(state)
        for shard in array.addressable_shards
    ]


checkpoints = CheckpointManager(directory)
if what == "save":
    for step in (1, 2):
        saved = state(step)
        checkpoints.save(step, saved, {})
        overwrite(saved)
    checkpoints.close()
else:
    target = abstract_arrays(state(0))
    marker, found = checkpoints.restore_latest(target)
    assert local(found) == local(state(marker["step"]))
    print(marker["step"])
"""


def in_two_processes(directory, what):
    """Runs `PROCESSES` in two processes; returns the last line of each, if any."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor() as pool:
        started = [
            pool.submit(run_program, PROCESSES, HERE, directory, port, number, what)
            for number in range(2)
        ]
        return [process.result().splitlines()[-1:] for process in started]


@pytest.mark.slow
def test_two_processes_save_and_verify_their_shares(tmp_path):
    in_two_processes(tmp_path, "save")
    assert in_two_processes(tmp_path, "restore") == [["2"], ["2"]]
    path = tmp_path / "checkpoints" / "2"
    marker = json.loads((path / "checkpoint.json").read_text())
    for number in range(2):
        assert f"arrays/ocdbt.process_{number}/manifest.ocdbt" in marker["files"]
    assert restored_step(tmp_path) == 2  # In this process alone.
    flip(path / "arrays" / "ocdbt.process_1" / "manifest.ocdbt")
    assert in_two_processes(tmp_path, "restore") == [["1"], ["1"]]
    assert names(tmp_path) == ["1", "2.damaged"]
