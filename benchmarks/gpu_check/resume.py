"""A run that is killed and resumed, compared with one that is not."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time

import results

NEEDED = ("matplotlib", "orbax", "tensorboardX", "tensorstore", "yaml")
SECONDS = 150  # Time limit of a run.
# On a GPU the order of XLA's scatter-adds is not fixed, and each process selects the
# kernels that it measures as fastest (with `--xla_gpu_deterministic_ops=true` a run
# crashed). Rounding differences grow with each step, so only the steps right after
# resuming count.
LIMIT, STEPS = 1e-5, 20


def run():
    """Runs three processes, of which one is killed and resumed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        results.skip("resume", f"not installed: {', '.join(missing)}")
        return
    data = results.directory() / "opposites.jsonl"
    data.write_text("".join(json.dumps(x) + "\n" for x in examples()))
    complete, again, stopped = (
        results.directory() / name for name in ("complete", "again", "stopped")
    )
    processes = [start(data, output) for output in (complete, again, stopped)]
    try:
        if not kill_in_the_middle(processes[-1], stopped):
            text = processes[-1].communicate()[0]
            raise RuntimeError(f"The run was not killed:\n{text}")
        finish("complete", processes[0])
        text = finish("resumed", start(data, stopped))
        finish("uninterrupted second", processes[1])
    finally:
        for process in processes:
            process.kill()
    found = re.search("Resuming from the checkpoint of step ([0-9]+)", text)
    results.check("resumed from a checkpoint: no", int(found is None), 0)
    compare("an uninterrupted second run", complete, again, 0)
    first = int(found[1])
    error = compare("killed and resumed", complete, stopped, first)
    limit = LIMIT if results.has_gpu() else 0.0  # Programs on a CPU are deterministic.
    name = f"killed and resumed: losses of the {STEPS} steps after it"
    results.check(name, error, limit, f"resumed at step {first}")


def examples():
    """The training examples."""
    pairs = "hot cold,up down,big small,day night,good bad,rich poor,old young"
    for pair in pairs.split(","):
        a, b = pair.split()
        yield {"prompt": f"The opposite of {a} is", "response": f" {b}."}


def course():
    """Epochs, steps between checkpoints, and steps after which the run is killed."""
    return (120, 20, 30) if results.has_gpu() else (20, 5, 12)


def start(data, output):
    """Starts `keras-openllama finetune` on all weights of nano."""
    epochs, save_every, _ = course()
    command = [
        *(sys.executable, "-m", "keras_openllama", "finetune", "--preset", "nano"),
        *("--data", data, "--output", output),
        *("--sequence-length", "24", "--batch-size", "4"),
        *("--learning-rate", "1e-4", "--epochs", epochs, "--save-every", save_every),
        *("--validate-every", "100", "--max-new-tokens", "4", "--export", "none"),
    ]
    return subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_in_the_middle(process, output):
    """Kills a run in the middle; returns whether it was still running."""
    log = output / "metrics.jsonl"
    *_, killed_after = course()
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= killed_after:
            process.send_signal(signal.SIGKILL)
            return process.wait() == -signal.SIGKILL
        time.sleep(0.02)
    process.kill()
    return False


def finish(name, process):
    """Waits for a run; returns its output."""
    text, _ = process.communicate(timeout=SECONDS)
    if process.returncode:
        code = process.returncode
        raise RuntimeError(f"{text}\nThe {name} run ended with {code}, see above.")
    return text


def losses(output):
    """The logged losses: dict of step -> loss."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines)}


def compare(name, expected, found, first):
    """Reports the difference between two runs.

    Returns:
        The largest relative difference of losses in the `STEPS` steps after `first`.
    """
    import numpy as np
    from pretraining_runs import arrays, checkpoints  # tests/support

    of_expected, of_found = losses(expected), losses(found)
    if list(of_expected) != list(of_found):
        raise RuntimeError(f"{name}: the logs have different steps.")
    errors = {
        step: abs(of_found[step] - loss) / abs(loss)
        for step, loss in of_expected.items()
    }
    (*_, last), _ = checkpoints(expected)
    expected, found = arrays(expected, last), arrays(found, last)
    different = sum(not np.array_equal(expected[k], found[k]) for k in expected)
    equal = sum(error == 0 for error in errors.values())
    _, *_, end = of_expected.values()
    results.info(
        f"{name}: bit-exact",
        f"{equal} of {len(errors)} losses, {len(expected) - different} of "
        f"{len(expected)} arrays; largest difference of a loss "
        f"{max(errors.values()):.1e}; loss {next(iter(of_expected.values())):.3f} to "
        f"{end:.3f}",
    )
    return max(errors[s] for s in errors if first < s <= first + STEPS)
