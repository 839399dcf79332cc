"""Runs parts, each in a process of its own, and gathers what they find."""

import concurrent.futures
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import results
from tables import line

LEAST_SECONDS = 15  # Heuristic: in less no part finds anything.
LOG_LINES = 40  # Of what a broken part has printed.


def work(part, directory):
    """In a part's process: runs the function of the part."""
    results.begin(part, directory)
    getattr(importlib.import_module(part.module), part.function)(**part.arguments)
    return 0


def environment(part, has_gpu):
    """Environment variables of a part's process."""
    variables = {
        **os.environ,
        "GPU_CHECK_HAS_GPU": str(int(has_gpu)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if not has_gpu:
        # What is tiny is computed sooner than threads are started.
        one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        variables |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", **one}
    elif part.backend == "torch":
        # JAX, which the package imports, would take most of the GPU's memory.
        variables["JAX_PLATFORMS"] = "cpu"
    if part.kind == "check":
        # Checks share the GPU; and float32 is to be float32, not TF32.
        variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        variables.setdefault("OMP_NUM_THREADS", "2")  # They share the cores, too.
        variables["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    else:
        variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.92"
    return variables


class Gathered:
    """Results of all parts, printed and saved as they come; for several threads."""

    def __init__(self, save):
        self.all = []
        self._save, self._lock = save, threading.Lock()

    def add(self, part, result):
        with self._lock:
            result = {"part": part.name, **result}
            self.all.append(result)
            print(line(result), flush=True)
            self._save(self.all)


def run(parts, directory, has_gpu, seconds, save):
    """Runs parts: checks side by side, speeds one after the other.

    Args:
        parts: list of `parts.Part`.
        directory: path of a directory for what they share.
        has_gpu: bool.
        seconds: float, for all of them.
        save: called with the list of results whenever there is another.

    Returns:
        List of dicts of `"part"`, `"kind"`, `"name"`, `"note"` and more by kind.
    """
    deadline = time.monotonic() + seconds
    gathered = Gathered(save)

    def run_one(part):
        if part.needs_gpu and not has_gpu:
            reason = "needs a GPU: at tiny sizes it is a part that ran already"
            gathered.add(part, {"kind": "skipped", "name": "all", "note": reason})
            return
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            reason = "the time of --minutes is spent"
            gathered.add(part, {"kind": "skipped", "name": "all", "note": reason})
            return
        _run(part, directory, has_gpu, left, gathered)

    # A device's ceilings come first, since later parts are compared with them.
    first = [part for part in parts if part.name.startswith("device")]
    rest = [part for part in parts if part not in first]
    # Without a GPU speeds mean nothing, and a part has one thread.
    together = [part for part in rest if part.kind == "check" or not has_gpu]
    jobs = (os.cpu_count() or 1) // (2 if has_gpu else 1)
    for part in first:
        run_one(part)
    with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:
        list(pool.map(run_one, together))
    for part in rest:
        if part not in together:
            run_one(part)
    return gathered.all


def _run(part, directory, has_gpu, left, gathered):
    # On a CPU, with few cores and other work, only the whole has a limit.
    limit = min(part.seconds, left) if has_gpu else left
    log = directory / f"{part.name}.log"
    script = str(Path(__file__).parent)
    command = [sys.executable, script, "--work", part.name, "--directory", directory]
    start = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            env=environment(part, has_gpu),
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,  # So that what it starts ends with it.
        )
    timed_out = threading.Event()

    def stop():
        timed_out.set()
        _kill(process)

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        for text in process.stdout:
            gathered.add(part, json.loads(text))
        code = process.wait()
    finally:
        timer.cancel()
        _kill(process)
    took = time.monotonic() - start
    if timed_out.is_set():
        late = limit < part.seconds
        gathered.add(part, _stopped(part, late, took, log))
    elif code:
        kind = "failed" if part.ours else "broken"
        note = f"exit code {code} after {took:.0f} s\n{_end_of(log)}"
        gathered.add(part, {"kind": kind, "name": "process", "note": note})
    else:
        gathered.add(
            part,
            {"kind": "measured", "name": "whole part", "value": took, "unit": "s"},
        )


def _stopped(part, late, took, log):
    """The result of a part that was stopped; `late` if all of the time was over."""
    if late:
        note = f"stopped after {took:.0f} s: the time of --minutes is spent"
        return {"kind": "skipped", "name": "the rest", "note": note}
    kind = "failed" if part.kind == "check" else "broken"
    note = f"stopped after {took:.0f} s, its limit\n{_end_of(log)}"
    return {"kind": kind, "name": "process", "note": note}


def _kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end_of(log):
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES:])
