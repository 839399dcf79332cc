"""A run on the device that is killed and resumed, against one that was not."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import results

# Usually XLA sums into an array in no fixed order, as cuDNN's backward pass does, and
# each process takes the kernels that it found to be fastest. With this it does neither.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
NEEDED = ("matplotlib", "orbax", "tensorboardX", "tensorstore", "yaml")
SECONDS = 150  # For one run.


def run():
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        results.skip("resume", f"not installed: {', '.join(missing)}")
        return
    data = results.directory() / "opposites.jsonl"
    data.write_text("".join(json.dumps(x) + "\n" for x in examples()))
    whole, stopped = (results.directory() / name for name in ("whole", "stopped"))
    first, second = start(data, whole), start(data, stopped)
    if not kill_when_under_way(second, stopped):
        first.kill()
        raise RuntimeError(f"The run was not killed:\n{second.communicate()[0]}")
    finish(first)
    text = finish(start(data, stopped))
    resumed = "Resuming from the checkpoint of step" in text
    results.check("resumed from a checkpoint: no", int(not resumed), 0)
    compare("killed and resumed", whole, stopped)
    if results.has_gpu():
        compare_without_the_flag(data)


def examples():
    """What the run learns."""
    pairs = "hot cold,up down,big small,day night,good bad,rich poor,old young"
    for pair in pairs.split(","):
        a, b = pair.split()
        yield {"prompt": f"The opposite of {a} is", "response": f" {b}."}


def compare_without_the_flag(data):
    """Tells whether two runs are alike with XLA's usual programs."""
    outputs = [results.directory() / name for name in ("usual-1", "usual-2")]
    for process in [start(data, output, flags="") for output in outputs]:
        finish(process)
    alike = losses(outputs[0]) == losses(outputs[1])
    results.tell(f"two runs without {DETERMINISTIC}", "alike" if alike else "differ")


def course():
    """Epochs, the steps between checkpoints, and after how many it is killed."""
    return (200, 50, 60) if results.has_gpu() else (20, 5, 12)


def start(data, output, flags=DETERMINISTIC):
    """A process of `keras-openllama finetune`: all weights of nano."""
    epochs, save_every, _ = course()
    command = [
        *(sys.executable, "-m", "keras_openllama", "finetune", "--preset", "nano"),
        *("--data", data, "--output", output, "--length", "24", "--batch-size", "4"),
        *("--learning-rate", "1e-4", "--epochs", epochs, "--save-every", save_every),
        *("--validate-every", "100", "--max-new-tokens", "4", "--export", "none"),
    ]
    before = os.environ.get("XLA_FLAGS", "")
    return subprocess.Popen(
        list(map(str, command)),
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "XLA_FLAGS": f"{before} {flags}".strip(),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_when_under_way(process, output):
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


def finish(process):
    """What a run printed."""
    text, _ = process.communicate(timeout=SECONDS)
    if process.returncode:
        raise RuntimeError(f"A run ended with {process.returncode}:\n{text}")
    return text


def losses(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"]) for r in map(json.loads, lines)]


def compare(name, expected, found):
    import numpy as np
    from pretraining_runs import arrays, checkpoints  # tests/support

    of_expected, of_found = losses(expected), losses(found)
    different = sum(a != b for a, b in zip(of_expected, of_found, strict=True))
    note = f"{len(of_expected)} steps, loss {of_expected[0][1]:.3f} to "
    note += f"{of_expected[-1][1]:.3f}"
    results.check(f"{name}: steps whose loss differs", different, 0, note)
    (*_, last), _ = checkpoints(expected)
    expected, found = arrays(expected, last), arrays(found, last)
    different = [k for k in expected if not np.array_equal(expected[k], found[k])]
    note = f"{len(expected)} arrays {', '.join(different[:2])}".strip()
    results.check(f"{name}: arrays that differ", len(different), 0, note)
