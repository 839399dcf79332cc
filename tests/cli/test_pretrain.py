"""`keras-openllama pretrain` as processes that are killed, stopped, refused, joined."""

import contextlib
import importlib.util
import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from checkout import ROOT
from pretraining_runs import (
    cache_directory,
    checkpoints,
    compilation_cached,
    course,
    digests,
    records,
    rewound,
    small_data,
    small_model,
    steps_logged,
)

from keras_openllama.runs import run_directory

pytestmark = pytest.mark.backend_free

SCRIPT = ROOT / "train" / "pretrain.py"
SHORT = [
    *("--preset", "nano", "--set", "sequence_length=32", "--set", "sample_every=0"),
    *("--set", "validation_batches=1"),
]
ALONE = [
    *(*SHORT, "--batch-size", "4", "--steps", "20", "--save-every", "2"),
    *("--set", "validate_every=10"),
]
TOGETHER = [
    *(*SHORT, "--batch-size", "8", "--steps", "4", "--save-every", "2"),
    *("--set", "validate_every=4", "--mesh", "data=2,fsdp=4"),
]
LONGER = ["--steps", "24", "--save-every", "4"]
# The script, with a smaller nano: it starts in half the time.
SMALLER = f"""
import runpy, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "support")!r}]
from pretraining_runs import presets, smaller_nano
presets.registry().update(smaller_nano())
sys.argv[0] = {str(SCRIPT)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
HOST_TIMEOUT = 10
SECONDS = 240  # That a process may take, on a machine that is busy.


class Process:
    """The script as a process of its own; what it prints is in a file."""

    def __init__(self, script, arguments, log, devices=1, **environment):
        self.log = log
        flags = f"--xla_force_host_platform_device_count={devices}"
        with open(log, "w") as file:
            self._process = subprocess.Popen(
                [sys.executable, *script, *map(str, arguments)],
                env={
                    **os.environ,
                    "KERAS_BACKEND": "jax",
                    "JAX_PLATFORMS": "cpu",
                    **({"XLA_FLAGS": flags} if devices > 1 else {}),
                    **environment,
                },
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self):
        return self._process.pid

    @property
    def said(self):
        return self.log.read_text(errors="replace")

    def running(self):
        return self._process.poll() is None

    def send(self, number):
        self._process.send_signal(number)

    def wait(self, seconds=SECONDS):
        """The exit code."""
        return self._process.wait(seconds)

    def wait_until(self, condition):
        """Looks again and again while it runs; it must not end before."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.running(), self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.005)

    def kill(self):
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module", autouse=True)
def nano_is_small():
    with small_model():
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the script with the small data; what still runs in the end is killed."""
    data = small_data(tmp_path_factory).directory
    logs, processes = tmp_path_factory.mktemp("logs"), []
    cache = {
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache_directory(tmp_path_factory)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }

    def start(output, arguments=ALONE, devices=1, script=("-c", SMALLER)):
        log = logs / f"{len(processes)}.log"
        arguments = [*arguments, "--data", data, "--output", output]
        processes.append(Process(script, arguments, log, devices, **cache))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


@pytest.fixture(scope="module")
def start_two(start):
    """Starts two processes that JAX joins, with four devices each."""

    def start_two(output, *arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        joined = ["--coordinator", address, "--num-processes", 2]
        joined += ["--host-timeout", HOST_TIMEOUT, *arguments]
        return [
            start(output, [*TOGETHER, *joined, "--process-id", number], devices=4)
            for number in (0, 1)
        ]

    return start_two


@pytest.fixture
def main(tmp_path_factory, monkeypatch):
    """The script's `main` in this process, with the small data; returns exit codes."""
    specification = importlib.util.spec_from_file_location("pretrain", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    data = small_data(tmp_path_factory).directory
    root, absl = logging.getLogger(), logging.getLogger("absl")
    handlers, level = [*root.handlers], absl.level

    def main(*arguments, data=data):
        data = () if data is None else ("--data", data)
        try:
            return script.main([*map(str, (*arguments, *data))])
        except SystemExit as error:
            return error.code

    with compilation_cached(cache_directory(tmp_path_factory)):
        yield main
    root.handlers[:] = handlers
    absl.setLevel(level)


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """Begins a run by one device that nothing disturbs.

    A function that waits for its end, and returns its directory.
    """
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(output, [*ALONE, "--profile", "2:3"])

    def ended():
        assert process.wait() == 0, process.said
        assert f"curve of the loss is in {output}/loss.png" in process.said
        return output

    return ended


@pytest.fixture(scope="module")
def eight(start, tmp_path_factory):
    """Begins a run by eight devices of one process; see `undisturbed`."""
    output = tmp_path_factory.mktemp("eight") / "run"
    process = start(output, TOGETHER, devices=8)

    def ended():
        assert process.wait() == 0, process.said
        return output

    return ended


@pytest.fixture(scope="module")
def two(start_two, tmp_path_factory):
    """Begins a run by two processes of four devices each; see `undisturbed`."""
    output = tmp_path_factory.mktemp("two") / "run"
    processes = start_two(output)

    def ended():
        for process in processes:
            assert process.wait() == 0, process.said
        return output

    return ended


@pytest.fixture(scope="module")
def two_longer(start_two, tmp_path_factory):
    """Directory of a longer run by two processes."""
    output = tmp_path_factory.mktemp("two_longer") / "run"
    for process in start_two(output, *LONGER):
        assert process.wait() == 0, process.said
    return output


def assert_close(output, wanted, tolerance):
    """The same batches and nearly the same losses."""
    found, wanted = records(output), records(wanted)
    for name in ("step", "batch", "tokens", "skipped", "learning_rate"):
        assert [r[name] for r in found] == [r[name] for r in wanted]
    losses, others = ([r["loss"] for r in run] for run in (found, wanted))
    np.testing.assert_allclose(losses, others, rtol=tolerance)


# ----- Killed


def torn(output):
    """Checkpoints whose writing has begun and not ended, by step."""
    found, whole = checkpoints(output)
    times = {}
    for step in {*found} - {*whole}:
        with contextlib.suppress(FileNotFoundError):
            status = (output / "checkpoints" / str(step)).stat()
            times[step] = status.st_ino, status.st_ctime_ns
    return times


def kill(process, output, rng, within_save):
    """Kills a run at a random moment; returns whether a save was under way.

    It is a moment of its start, or of its first steps, or of one of its first saves.
    """
    events, before = output / "tensorboard", torn(output)
    _, whole = checkpoints(output)
    opened = len(list(events.glob("*")))
    if not within_save and rng.random() < 0.2:
        time.sleep(rng.uniform(0, 5))
    else:
        steps = (whole or [0])[-1] + int(rng.integers(1, 4))
        process.wait_until(lambda: len(list(events.glob("*"))) > opened)
        process.wait_until(lambda: steps_logged(output) >= steps)
        if within_save:
            process.wait_until(lambda: {*torn(output).values()} - {*before.values()})
        time.sleep(rng.uniform(0, 0.1))
    assert process.running(), process.said
    process.kill()
    return bool({*torn(output).values()} - {*before.values()})


def kill_often(start, output, kills, within_saves, seed):
    """Kills a run and starts it again, so many times.

    Args:
        start: function that starts it, to go on where it was.
        output: its directory.
        kills: int.
        within_saves: int, how many of the kills at least are to interrupt a save.
        seed: int, of the moments.
    """
    rng = np.random.default_rng(seed)
    done = saves = 0
    while done < kills or saves < within_saves:
        aim = kills - done <= within_saves - saves
        saves += kill(start(), output, rng, aim)
        done += 1
        assert done < 2 * kills


def test_a_run_that_is_killed_ends_as_one_that_was_not(
    start, main, undisturbed, tmp_path
):
    kill_often(lambda: start(tmp_path), tmp_path, kills=2, within_saves=1, seed=1)
    assert main(*ALONE, "--output", tmp_path) == 0
    assert course(tmp_path) == course(undisturbed())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_twenty_times_ends_the_same(start, tmp_path):
    def begin(output):
        # Nano itself: its saves take longer.
        return start(output, [*ALONE, "--steps", "120"], script=[SCRIPT])

    killed = tmp_path / "killed"
    kill_often(lambda: begin(killed), killed, kills=20, within_saves=5, seed=2)
    for output in (tmp_path / "undisturbed", killed):
        process = begin(output)
        assert process.wait() == 0, process.said
    assert course(killed) == course(tmp_path / "undisturbed")


# ----- Stopped, refused, complete


def test_signals_stop_a_run_that_has_its_directory_to_itself(
    start, main, undisturbed, tmp_path, capfd
):
    for number, steps in ((signal.SIGTERM, 3), (signal.SIGINT, 9)):
        process = start(tmp_path)
        process.wait_until(lambda steps=steps: steps_logged(tmp_path) >= steps)
        process.send(signal.SIGSTOP)
        known = steps_logged(tmp_path)
        if number == signal.SIGTERM:
            assert main(*ALONE, "--output", tmp_path) == 2
            assert f"Another process trains in {tmp_path}" in capfd.readouterr().err
        process.send(number)
        process.send(signal.SIGCONT)
        assert process.wait() == 75, process.said
        assert f"Stopped by {number.name}; all is saved." in process.said
        last = records(tmp_path)[-1]["step"]
        # A step that is under way is not in the log yet, and the next may have begun.
        assert last <= known + 2
        assert checkpoints(tmp_path)[1][-1] == last
    assert main(*ALONE, "--output", tmp_path) == 0
    assert f"Resuming from the checkpoint of step {last}." in capfd.readouterr().out
    assert course(tmp_path) == course(undisturbed())


def test_a_complete_run_says_so(main, undisturbed, capfd):
    output = undisturbed()
    assert main(*ALONE, "--output", output) == 0
    assert f"The run in {output} is complete." in capfd.readouterr().out


# ----- Disks


def test_a_full_disk_ends_a_run_whose_checkpoints_are_whole(
    start, main, undisturbed, tmp_path
):
    output = rewound(undisturbed(), tmp_path / "run")
    before = digests(output, 18)
    process = start(output)
    # The arrays of a checkpoint take megabytes, and the log some kilobytes.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))
    assert process.wait() == 74, process.said
    assert "The checkpoint of step 20 could not be written" in process.said
    assert "Earlier checkpoints are unchanged: [18]" in process.said
    assert checkpoints(output) == ([18], [18])
    assert digests(output, 18) == before
    # There is room again.
    assert main(*ALONE, "--output", output) == 0
    assert course(output) == course(undisturbed())


def test_steps_that_are_not_finite_end_the_run(main, tmp_path, capfd):
    steep = [*ALONE, "--set", "learning_rate=1e30", "--set", "max_skipped_steps=3"]
    assert main(*steep, "--output", tmp_path) == 70
    assert "The last 3 steps up to step" in capfd.readouterr().err
    assert [r["skipped"] for r in records(tmp_path)][-3:] == [True] * 3


# ----- On other devices


def test_a_run_of_two_processes_goes_on_with_one(main, two, tmp_path):
    marker = json.loads((two() / "checkpoints" / "4" / "checkpoint.json").read_text())
    for number in (0, 1):
        assert any(f"ocdbt.process_{number}/" in name for name in marker["files"])
    output = rewound(two(), tmp_path / "run")
    assert main(*TOGETHER, "--mesh", "data=1", "--output", output) == 0
    assert records(output)[:2] == records(two())[:2]
    assert_close(output, two(), 1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one(two, eight):
    two, eight = two(), eight()
    assert_close(two, eight, 1e-6)
    [found], [wanted] = (
        [json.loads(line) for line in (run / "validation.jsonl").open()]
        for run in (two, eight)
    )
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)


@pytest.mark.slow
def test_a_run_of_eight_devices_goes_on_with_one(main, eight, tmp_path):
    output = rewound(eight(), tmp_path / "run")
    assert main(*TOGETHER, "--mesh", "data=1", "--output", output) == 0
    assert records(output)[:2] == records(eight())[:2]
    assert_close(output, eight(), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,fsdp=1,model=2", "fsdp=4", "fsdp=2"])
def test_a_run_of_eight_devices_goes_on_with_fewer(start, eight, tmp_path, mesh):
    output = rewound(eight(), tmp_path / "run")
    devices = 2 if mesh == "fsdp=2" else 4
    process = start(output, [*TOGETHER, "--mesh", mesh], devices)
    assert process.wait() == 0, process.said
    assert records(output)[:2] == records(eight())[:2]
    assert_close(output, eight(), 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_other(
    start_two, two_longer, tmp_path, victim
):
    processes = start_two(tmp_path, *LONGER)
    processes[0].wait_until(lambda: 4 in checkpoints(tmp_path)[1])
    processes[victim].kill()
    # JAX counts missing heartbeats, and does not look at them all the time.
    code = processes[1 - victim].wait(3 * HOST_TIMEOUT)
    assert code not in (0, 75), processes[1 - victim].said
    assert 24 not in checkpoints(tmp_path)[1]
    for process in start_two(tmp_path, *LONGER):
        assert process.wait() == 0, process.said
    assert course(tmp_path) == course(two_longer)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("receiver", [0, 1])
def test_a_signal_to_one_process_stops_both(start_two, two_longer, tmp_path, receiver):
    processes = start_two(tmp_path, *LONGER)
    processes[0].wait_until(lambda: steps_logged(tmp_path) >= 2)
    processes[receiver].send(signal.SIGTERM)
    for process in processes:
        assert process.wait() == 75, process.said
    last = records(tmp_path)[-1]["step"]
    assert 2 <= last < 24
    # Both have written their parts of it.
    assert checkpoints(tmp_path)[1][-1] == last
    assert "Stopped by SIGTERM; all is saved." in processes[0].said
    for process in start_two(tmp_path, *LONGER):
        assert process.wait() == 0, process.said
    assert course(tmp_path) == course(two_longer)


@pytest.mark.slow
def test_trouble_of_one_process_ends_both(start_two, tmp_path):
    with run_directory.lock_directory(tmp_path):
        first, second = start_two(tmp_path)
        assert first.wait() == 2, first.said
        assert "Another process trains in" in first.said
        assert second.wait(3 * HOST_TIMEOUT) != 0


# ----- The command line


def say(*arguments, **environment):
    """Runs the script where JAX has no device that it could use."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, "JAX_PLATFORMS": "none_such", **environment},
        capture_output=True,
        text=True,
    )


def test_help_needs_no_device():
    found = say("--help")
    assert found.returncode == 0, found.stderr
    for text in ("--mesh AXIS=N,…", "Exit codes:\n  0   the run is complete"):
        assert text in found.stdout


def test_the_recipe_is_shown_with_the_source_of_each_setting():
    found = say("--preset", "7b", "--show", "--steps", "20", "--set", "seed=3")
    assert found.returncode == 0, found.stderr
    rows = {line.split()[0]: line for line in found.stdout.splitlines()}
    assert rows["steps"].split() == ["steps", "20", "command", "line"]
    assert rows["seed"].split() == ["seed", "3", "command", "line"]
    assert rows["warmup_steps"].split()[1] == "2"
    assert "heuristic" in rows["z_loss"] or "EasyLM" in rows["z_loss"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "4b"], "Presets with a recipe: open_llama_13b, open_llama_3b"),
        ([], "required: --preset"),
        (["--preset", "nano", "--set", "stps=3"], "no setting 'stps'. Did you mean"),
        (["--preset", "nano", "--set", "steps"], "--set must be NAME=VALUE"),
        (["--preset", "nano", "--steps", "0"], "`steps` must be a positive integer"),
        (["--preset", "nano", "--mesh", "rows=2"], "--mesh: A mesh must have the form"),
        (["--preset", "nano", "--profile", "3:2"], "--profile: must be FIRST:LAST"),
        (["--preset", "nano", "--config", "/none.yaml"], "/none.yaml"),
    ],
)
def test_wrong_arguments_are_told(arguments, says):
    found = say(*arguments)
    assert found.returncode == 2
    assert says in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--mesh", "data=3"],
            "Meshes of 3 devices that fit: |No mesh of 3 devices fits",
        ),
        (["--mesh", "fsdp=3,model=2"], "fsdp = 3 does not divide hidden_dim = 64"),
        (["--mesh", "model=2"], "number of devices, 1. Received: data=1, fsdp=1, mod"),
        (["--batch-size", "6", "--mesh", "fsdp=4"], "data=2, fsdp=1, model=2"),
    ],
)
def test_meshes_that_fit_are_named(main, tmp_path, capfd, arguments, says):
    assert main(*ALONE, *arguments, "--output", tmp_path / "run") == 2
    said = capfd.readouterr().err
    assert any(text in said for text in says.split("|")), said
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_preset_without_data_names_what_prepares_them(main, tmp_path, capfd):
    output = ["--output", tmp_path / "run"]
    assert main("--preset", "3b_v3", *output, data=None) == 2
    said = capfd.readouterr().err
    assert "keras-openllama prepare-data --mixture" in said
    assert "--tokenizer open_llama_3b_v3 --output DIR" in said
    assert main(*ALONE, *output, data=tmp_path / "none") == 2
    assert "none has no manifest.json" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_changes_of_a_run_are_refused_or_accepted(main, undisturbed, tmp_path, capfd):
    output = shutil.copytree(undisturbed(), tmp_path / "run")
    again = [*ALONE, "--output", output]
    assert main(*again, "--batch-size", "8") == 2
    assert "batch_size was 4 and is 8" in capfd.readouterr().err
    rate = ["--set", "learning_rate=1e-3"]
    assert main(*again, *rate) == 2
    assert "learning_rate was 0.003 and is 0.001" in capfd.readouterr().err
    assert main(*again, *rate, "--accept-changes") == 0
    assert main(*again, *rate) == 0
    assert main(*again) == 2


def test_a_profile_is_recorded(undisturbed):
    [trace] = (undisturbed() / "profile").rglob("*.xplane.pb")
    assert b"jit_step" in trace.read_bytes()


def test_what_a_directory_holds(undisturbed):
    output = undisturbed()
    assert {path.name for path in output.iterdir()} == {
        *("metrics.jsonl", "validation.jsonl", "skipped.jsonl", "samples.txt"),
        *("loss.png", "tensorboard", "checkpoints", "profile", "run.json"),
        *("tokenizer.model", ".lock"),
    }
    assert [r["step"] for r in records(output)] == list(range(1, 21))
    fields = {
        *("step", "loss", "learning_rate", "grad_norm", "tokens"),
        *("tokens_per_second", "goodput", "skipped", "batch"),
    }
    assert all(fields <= {*record} for record in records(output))
