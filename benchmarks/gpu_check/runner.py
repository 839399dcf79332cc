"""Runs each part in its own process, and collects the results."""

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

LEAST_SECONDS = 15  # Heuristic: no part has a result in less time.
LOG_LINES = 40  # Shown of the output of a part that failed.


def work(part, directory):
    """Runs the function of a part, in the process of the part."""
    results.start(part, directory)
    getattr(importlib.import_module(part.module), part.function)(**part.arguments)
    return 0


def environment(part, has_gpu):
    """Environment variables of the process of a part."""
    variables = {
        **os.environ,
        "GPU_CHECK_HAS_GPU": str(int(has_gpu)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if not has_gpu:
        # Tiny sizes take less time than starting threads.
        one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        variables |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", **one}
    elif part.backend == "torch":
        # The package imports JAX, which would allocate most of the GPU's memory.
        variables["JAX_PLATFORMS"] = "cpu"
    if part.kind == "check":
        # Checks share the GPU, and need float32 instead of TF32.
        variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        variables.setdefault("OMP_NUM_THREADS", "2")  # They share the cores, too.
        variables["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    else:
        variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.92"
    return variables


class Results:
    """Results of all parts, printed and saved as they arrive. Thread-safe."""

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
    """Runs parts: checks in parallel, speeds one after the other.

    Args:
        parts: list of `parts.Part`.
        directory: path of a directory that they share.
        has_gpu: bool.
        seconds: float, time limit of all parts.
        save: function of the list of results, called after each new result.

    Returns:
        List of dicts with `"part"`, `"kind"`, `"name"`, `"note"` and, depending on the
        kind, more.
    """
    deadline = time.monotonic() + seconds
    collected = Results(save)

    def run_one(part):
        if part.needs_gpu and not has_gpu:
            reason = "needs a GPU: at tiny sizes it equals another part"
            collected.add(part, {"kind": "skipped", "name": "all", "note": reason})
            return
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            reason = "the time of --minutes is over"
            collected.add(part, {"kind": "skipped", "name": "all", "note": reason})
            return
        _run(part, directory, has_gpu, left, collected)

    # The limits of the device come first: later parts are compared with them.
    first = [part for part in parts if part.name.startswith("device")]
    rest = [part for part in parts if part not in first]
    # Without a GPU speeds are meaningless, and a part has one thread.
    together = [part for part in rest if part.kind == "check" or not has_gpu]
    jobs = (os.cpu_count() or 1) // (2 if has_gpu else 1)
    for part in first:
        run_one(part)
    with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:
        list(pool.map(run_one, together))
    for part in rest:
        if part not in together:
            run_one(part)
    return collected.all


def _run(part, directory, has_gpu, left, collected):
    # On a CPU only the total time has a limit.
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
            start_new_session=True,  # To end its child processes with it.
        )
    timed_out = threading.Event()

    def stop():
        timed_out.set()
        _kill(process)

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        for text in process.stdout:
            collected.add(part, json.loads(text))
        code = process.wait()
    finally:
        timer.cancel()
        _kill(process)
    duration = time.monotonic() - start
    if timed_out.is_set():
        late = limit < part.seconds
        collected.add(part, _stopped(part, late, duration, log))
    elif code:
        kind = "failed" if part.ours else "broken"
        note = f"exit code {code} after {duration:.0f} s\n{_end_of(log)}"
        collected.add(part, {"kind": kind, "name": "process", "note": note})
    else:
        collected.add(
            part,
            {"kind": "measured", "name": "total", "value": duration, "unit": "s"},
        )


def _stopped(part, late, duration, log):
    """The result of a part that was stopped; `late` if the total time was over."""
    if late:
        note = f"stopped after {duration:.0f} s: the time of --minutes is over"
        return {"kind": "skipped", "name": "the rest", "note": note}
    kind = "failed" if part.kind == "check" else "broken"
    note = f"stopped after {duration:.0f} s, its limit\n{_end_of(log)}"
    return {"kind": kind, "name": "process", "note": note}


def _kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end_of(log):
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES:])
