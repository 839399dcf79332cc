"""`keras-openllama pretrain`: kills, signals, full disks, several processes, errors."""

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
from fake_devices import xla_flags
from pretraining_runs import (
    cache_directory,
    checkpoints,
    compilation_cached,
    copy_without_last_checkpoint,
    digests,
    records,
    results_of,
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
# The script, with a smaller nano, which starts in half the time.
SMALLER = f"""
import runpy, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "support")!r}]
from pretraining_runs import presets, smaller_nano
presets.registry().update(smaller_nano())
sys.argv[0] = {str(SCRIPT)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
HOST_TIMEOUT = 10
SECONDS = 240  # Time limit of a process, on a busy machine.


class Process:
    """The script in a separate process, which prints into a file."""

    def __init__(self, script, arguments, log, devices=1, **environment):
        self.log = log
        with open(log, "w") as file:
            self._process = subprocess.Popen(
                [sys.executable, *script, *map(str, arguments)],
                env={
                    **os.environ,
                    "KERAS_BACKEND": "jax",
                    "JAX_PLATFORMS": "cpu",
                    **({"XLA_FLAGS": xla_flags(devices)} if devices > 1 else {}),
                    **environment,
                },
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self):
        return self._process.pid

    @property
    def output(self):
        return self.log.read_text(errors="replace")

    def running(self):
        return self._process.poll() is None

    def send(self, number):
        self._process.send_signal(number)

    def wait(self, seconds=SECONDS):
        """Returns the exit code."""
        return self._process.wait(seconds)

    def wait_until(self, condition):
        """Polls a condition while the process runs; fails if the process ends first."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.running(), self.output
            assert time.monotonic() < deadline, self.output
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
    """Starts the script with the small data; kills it at the end of the tests."""
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
    """Starts two processes that JAX connects, with four devices each."""

    def start_two(output, *arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        flags = ["--coordinator", address, "--num-processes", 2]
        flags += ["--host-timeout", HOST_TIMEOUT, *arguments]
        return [
            start(output, [*TOGETHER, *flags, "--process-id", number], devices=4)
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
def uninterrupted(start, tmp_path_factory):
    """Starts an uninterrupted run on one device.

    Returns:
        A function that waits for its end and returns its directory.
    """
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = start(output, [*ALONE, "--profile", "2:3"])

    def ended():
        assert process.wait() == 0, process.output
        assert f"Loss plot: {output}/loss.png" in process.output
        return output

    return ended


@pytest.fixture(scope="module")
def eight(start, tmp_path_factory):
    """Starts a run on eight devices of one process; see `uninterrupted`."""
    output = tmp_path_factory.mktemp("eight") / "run"
    process = start(output, TOGETHER, devices=8)

    def ended():
        assert process.wait() == 0, process.output
        return output

    return ended


@pytest.fixture(scope="module")
def two(start_two, tmp_path_factory):
    """Starts a run of two processes with four devices each; see `uninterrupted`."""
    output = tmp_path_factory.mktemp("two") / "run"
    processes = start_two(output)

    def ended():
        for process in processes:
            assert process.wait() == 0, process.output
        return output

    return ended


@pytest.fixture(scope="module")
def two_longer(start_two, tmp_path_factory):
    """Directory of a longer run of two processes."""
    output = tmp_path_factory.mktemp("two_longer") / "run"
    for process in start_two(output, *LONGER):
        assert process.wait() == 0, process.output
    return output


def assert_close(output, expected, tolerance):
    """Asserts equal batches and nearly equal losses."""
    found, expected = records(output), records(expected)
    for name in ("step", "batch", "tokens", "skipped", "learning_rate"):
        assert [r[name] for r in found] == [r[name] for r in expected]
    losses, others = ([r["loss"] for r in run] for run in (found, expected))
    np.testing.assert_allclose(losses, others, rtol=tolerance)


# ----- Kills


def unfinished_checkpoints(output):
    """Checkpoints that are being written, by step."""
    found, complete = checkpoints(output)
    times = {}
    for step in {*found} - {*complete}:
        with contextlib.suppress(FileNotFoundError):
            status = (output / "checkpoints" / str(step)).stat()
            times[step] = status.st_ino, status.st_ctime_ns
    return times


def kill(process, output, rng, within_save):
    """Kills a run at a random moment; returns whether it was saving.

    The moment is during its start, its first steps, or one of its first saves.
    """
    events, before = output / "tensorboard", unfinished_checkpoints(output)
    _, complete = checkpoints(output)
    opened = len(list(events.glob("*")))
    if not within_save and rng.random() < 0.2:
        time.sleep(rng.uniform(0, 5))
    else:
        steps = (complete or [0])[-1] + int(rng.integers(1, 4))
        process.wait_until(lambda: len(list(events.glob("*"))) > opened)
        process.wait_until(lambda: steps_logged(output) >= steps)
        if within_save:
            process.wait_until(
                lambda: {*unfinished_checkpoints(output).values()} - {*before.values()}
            )
        time.sleep(rng.uniform(0, 0.1))
    assert process.running(), process.output
    process.kill()
    return bool({*unfinished_checkpoints(output).values()} - {*before.values()})


def kill_often(start, output, kills, within_saves, seed):
    """Kills and restarts a run several times.

    Args:
        start: function that starts or resumes the run.
        output: its directory.
        kills: int, number of kills.
        within_saves: int, minimum number of kills during a save.
        seed: int, seed of the random moments.
    """
    rng = np.random.default_rng(seed)
    done = saves = 0
    while done < kills or saves < within_saves:
        aim = kills - done <= within_saves - saves
        saves += kill(start(), output, rng, aim)
        done += 1
        assert done <= 2 * kills


def test_pretrain_resumes_bit_exactly_after_kills(start, main, uninterrupted, tmp_path):
    kill_often(lambda: start(tmp_path), tmp_path, kills=2, within_saves=1, seed=1)
    assert main(*ALONE, "--output", tmp_path) == 0
    assert results_of(tmp_path) == results_of(uninterrupted())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pretrain_resumes_bit_exactly_after_twenty_kills(start, tmp_path):
    def start_run(output):
        # The real nano, whose saves take longer.
        return start(output, [*ALONE, "--steps", "120"], script=[SCRIPT])

    killed = tmp_path / "killed"
    kill_often(lambda: start_run(killed), killed, kills=20, within_saves=5, seed=2)
    for output in (tmp_path / "uninterrupted", killed):
        process = start_run(output)
        assert process.wait() == 0, process.output
    assert results_of(killed) == results_of(tmp_path / "uninterrupted")


# ----- Signals, complete runs


def test_pretrain_stops_at_signals_and_locks_its_directory(
    start, main, uninterrupted, tmp_path, capfd
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
        assert process.wait() == 75, process.output
        assert f"Stopped by {number.name}. The run is saved" in process.output
        last = records(tmp_path)[-1]["step"]
        # A running step is not in the log yet, and the next one may have started.
        assert last <= known + 2
        assert checkpoints(tmp_path)[1][-1] == last
    assert main(*ALONE, "--output", tmp_path) == 0
    assert f"Resuming from the checkpoint of step {last}." in capfd.readouterr().out
    assert results_of(tmp_path) == results_of(uninterrupted())


def test_pretrain_reports_that_a_run_is_complete(main, uninterrupted, capfd):
    output = uninterrupted()
    assert main(*ALONE, "--output", output) == 0
    assert f"The run in {output} is complete." in capfd.readouterr().out


# ----- Disks


def test_pretrain_on_a_full_disk_keeps_earlier_checkpoints(
    start, main, uninterrupted, tmp_path
):
    output = copy_without_last_checkpoint(uninterrupted(), tmp_path / "run")
    before = digests(output, 18)
    process = start(output)
    # The arrays of a checkpoint take megabytes, the log some kilobytes.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))
    assert process.wait() == 74, process.output
    assert "The checkpoint of step 20 could not be written" in process.output
    assert "Earlier checkpoints are unchanged: [18]" in process.output
    assert checkpoints(output) == ([18], [18])
    assert digests(output, 18) == before
    # The limit is gone.
    assert main(*ALONE, "--output", output) == 0
    assert results_of(output) == results_of(uninterrupted())


def test_pretrain_ends_after_consecutive_non_finite_steps(main, tmp_path, capfd):
    steep = [*ALONE, "--set", "learning_rate=1e30", "--set", "max_skipped_steps=3"]
    assert main(*steep, "--output", tmp_path) == 70
    assert "The last 3 steps up to step" in capfd.readouterr().err
    assert [r["skipped"] for r in records(tmp_path)][-3:] == [True] * 3


# ----- On other devices


@pytest.mark.slow
def test_pretrain_resumes_a_run_of_two_processes_with_one(main, two, tmp_path):
    marker = json.loads((two() / "checkpoints" / "4" / "checkpoint.json").read_text())
    for number in (0, 1):
        assert any(f"ocdbt.process_{number}/" in name for name in marker["files"])
    output = copy_without_last_checkpoint(two(), tmp_path / "run")
    assert main(*TOGETHER, "--mesh", "data=1", "--output", output) == 0
    assert records(output)[:2] == records(two())[:2]
    assert_close(output, two(), 1e-5)


@pytest.mark.slow
def test_pretrain_with_two_processes_equals_one(two, eight):
    two, eight = two(), eight()
    assert_close(two, eight, 1e-6)
    [found], [expected] = (
        [json.loads(line) for line in (run / "validation.jsonl").open()]
        for run in (two, eight)
    )
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.slow
def test_pretrain_resumes_a_run_of_eight_devices_with_one(main, eight, tmp_path):
    output = copy_without_last_checkpoint(eight(), tmp_path / "run")
    assert main(*TOGETHER, "--mesh", "data=1", "--output", output) == 0
    assert records(output)[:2] == records(eight())[:2]
    assert_close(output, eight(), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,fsdp=1,model=2", "fsdp=4", "fsdp=2"])
def test_pretrain_resumes_a_run_of_eight_devices_with_fewer(
    start, eight, tmp_path, mesh
):
    output = copy_without_last_checkpoint(eight(), tmp_path / "run")
    devices = 2 if mesh == "fsdp=2" else 4
    process = start(output, [*TOGETHER, "--mesh", mesh], devices)
    assert process.wait() == 0, process.output
    assert records(output)[:2] == records(eight())[:2]
    assert_close(output, eight(), 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [0, 1])
def test_pretrain_ends_if_another_process_is_killed(
    start_two, two_longer, tmp_path, victim
):
    processes = start_two(tmp_path, *LONGER)
    processes[0].wait_until(lambda: 4 in checkpoints(tmp_path)[1])
    processes[victim].kill()
    # JAX counts missing heartbeats, and checks them at intervals.
    code = processes[1 - victim].wait(3 * HOST_TIMEOUT)
    assert code not in (0, 75), processes[1 - victim].output
    assert 24 not in checkpoints(tmp_path)[1]
    for process in start_two(tmp_path, *LONGER):
        assert process.wait() == 0, process.output
    assert results_of(tmp_path) == results_of(two_longer)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("receiver", [0, 1])
def test_pretrain_stops_all_processes_at_a_signal_to_one(
    start_two, two_longer, tmp_path, receiver
):
    processes = start_two(tmp_path, *LONGER)
    processes[0].wait_until(lambda: steps_logged(tmp_path) >= 2)
    processes[receiver].send(signal.SIGTERM)
    for process in processes:
        assert process.wait() == 75, process.output
    last = records(tmp_path)[-1]["step"]
    assert 2 <= last < 24
    # Both processes have written their parts.
    assert checkpoints(tmp_path)[1][-1] == last
    assert "Stopped by SIGTERM. The run is saved" in processes[0].output
    for process in start_two(tmp_path, *LONGER):
        assert process.wait() == 0, process.output
    assert results_of(tmp_path) == results_of(two_longer)


@pytest.mark.slow
def test_pretrain_ends_all_processes_if_one_fails(start_two, tmp_path):
    with run_directory.lock_directory(tmp_path):
        first, second = start_two(tmp_path)
        assert first.wait() == 2, first.output
        assert "Another process trains in" in first.output
        assert second.wait(3 * HOST_TIMEOUT) != 0


# ----- The command line


def run_without_devices(*arguments, **environment):
    """Runs the script with a platform that JAX does not have."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, "JAX_PLATFORMS": "none_such", **environment},
        capture_output=True,
        text=True,
    )


def test_pretrain_help_needs_no_device():
    found = run_without_devices("--help")
    assert found.returncode == 0, found.stderr
    for text in ("--mesh AXIS=N,…", "Exit codes:\n  0   the run is complete"):
        assert text in found.stdout


def test_show_prints_the_recipe_with_the_source_of_each_setting():
    found = run_without_devices(
        "--preset", "7b", "--show", "--steps", "20", "--set", "seed=3"
    )
    assert found.returncode == 0, found.stderr
    rows = {line.split()[0]: line for line in found.stdout.splitlines()}
    assert rows["steps"].split() == ["steps", "20", "command", "line"]
    assert rows["seed"].split() == ["seed", "3", "command", "line"]
    assert rows["warmup_steps"].split()[1] == "2"
    assert "heuristic" in rows["z_loss"] or "EasyLM" in rows["z_loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "4b"], "Presets with a recipe: open_llama_13b, open_llama_3b"),
        ([], "required: --preset"),
        (["--preset", "nano", "--set", "stps=3"], "no setting 'stps'. Did you mean"),
        (["--preset", "nano", "--set", "steps"], "--set must be NAME=VALUE"),
        (["--preset", "nano", "--steps", "0"], "--steps must be a positive integer"),
        (["--preset", "nano", "--steps", str(2**31)], "--steps must be an integer"),
        (["--preset", "nano", "--set", f"steps={2**31}"], "--steps must be an integer"),
        (["--preset", "nano", "--set", "steps=["], "the value is not valid YAML"),
        (["--preset", "nano", "--set", "learning_rate=1e300"], "`learning_rate` must"),
        (["--preset", "nano", "--mixture", "v9"], "--mixture must be one of"),
        (["--preset", "nanno"], "Did you mean 'open_llama_nano'?"),
        (["--preset", "nano", "--mesh", "rows=2"], "--mesh must be of the form"),
        (["--preset", "nano", "--profile", "3:2"], "--profile must be FIRST:LAST"),
        (["--preset", "nano", "--config", "."], "--config: . is a directory"),
        (["--preset", "nano", "--data", "none"], "--data: the directory none does not"),
        (["--preset", "nano", "--plan", "--json", "."], "--json: . is a directory"),
        (["--preset", "nano", "--config", "/none.yaml"], "/none.yaml"),
    ],
)
def test_pretrain_rejects_invalid_arguments(arguments, message):
    found = run_without_devices(*arguments)
    assert found.returncode == 2
    assert message in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--price", "3.22"],
        ["--json", "plan.json"],
        ["--topology", "v4:4x8x8"],
        ["--no-alternatives"],
        ["--no-plan-cache"],
    ],
    ids=lambda flags: flags[0],
)
def test_pretrain_rejects_flags_of_a_plan_without_plan(flags, main, tmp_path, capfd):
    assert main(*ALONE, *flags, "--output", tmp_path / "run") == 2
    error = capfd.readouterr().err
    assert f"{flags[0]} belongs to a plan: add --plan, or remove {flags[0]}." in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mesh", ["data=7", "fsdp=3,model=2", f"data={10**20}"])
def test_pretrain_rejects_a_mesh_of_more_devices(main, tmp_path, capfd, mesh):
    assert main(*ALONE, "--mesh", mesh, "--output", tmp_path / "run") == 2
    error = capfd.readouterr().err
    assert "--mesh: the product of the sizes must be 1, the number of devices" in error
    assert f"Received: {mesh!r}" in error
    assert not (tmp_path / "run").exists()


def test_pretrain_without_data_shows_how_to_prepare_it(main, tmp_path, capfd):
    output = ["--output", tmp_path / "run"]
    assert main("--preset", "3b_v3", *output, data=None) == 2
    error = capfd.readouterr().err
    assert "keras-openllama prepare-data --mixture" in error
    assert "--tokenizer open_llama_3b_v3 --output DIR" in error
    assert main(*ALONE, *output, data=tmp_path) == 2
    assert "has no manifest.json" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pretrain_rejects_changed_settings_unless_accepted(
    main, uninterrupted, tmp_path, capfd
):
    output = shutil.copytree(uninterrupted(), tmp_path / "run")
    command = [*ALONE, "--output", output]
    assert main(*command, "--batch-size", "8") == 2
    assert "batch_size was 4 and is 8" in capfd.readouterr().err
    rate = ["--set", "learning_rate=1e-3"]
    assert main(*command, *rate) == 2
    assert "learning_rate was 0.003 and is 0.001" in capfd.readouterr().err
    assert main(*command, *rate, "--accept-changes") == 0
    assert main(*command, *rate) == 0
    assert main(*command) == 2


def test_pretrain_writes_a_profile(uninterrupted):
    [trace] = (uninterrupted() / "profile").rglob("*.xplane.pb")
    assert b"jit_step" in trace.read_bytes()
    assert b"$trainer.py" not in trace.read_bytes()  # No trace of Python calls.


def test_pretrain_writes_the_files_of_a_run(uninterrupted):
    output = uninterrupted()
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
