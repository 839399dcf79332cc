"""Memory and time of converting a checkpoint between each pair of formats.

    python benchmarks/convert.py                # 3B: needs 21 GB of disk
    python benchmarks/convert.py --layers 4     # smaller

Writes a random float16 checkpoint with the sizes of `open_llama_3b` in each format.
Then for each pair, one after the other and with the source in the page cache:

- copies the source with `shutil.copyfile`, and calls `fsync` on the copy;
- runs `keras-openllama convert` in a new process, imports included. It calls `fsync` on
  its output, too.

Prints the seconds of both, their ratio, and the peak resident memory, which includes
pages of mapped files. The goals are 2.5 x the time of the copy, and 2.5 GB.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import random_llama  # benchmarks/random_llama.py

from keras_openllama import presets

FORMATS = ("transformers", "easylm", "keras")  # Those that contain one dtype.
GOAL_TIME, GOAL_MEMORY = 2.5, 2.5e9
DTYPE = "float16"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=26, help="layers (%(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="rounds (%(default)s)")
    parser.add_argument("--dtype", help="what is written (that of the source)")
    parser.add_argument("--directory", help="where to write (a temporary directory)")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        directory = Path(directory)
        source = directory / "transformers"
        sizes = {**presets.find("open_llama_3b").config, "num_layers": options.layers}
        random_llama.write_checkpoint(source, sizes, DTYPE)
        print(f"{total_bytes(source) / 1e9:.2f} GB in {DTYPE}; seconds are medians")
        print(
            "from          to             copy   convert   ratio   memory", flush=True
        )
        for first in FORMATS:
            path = directory / first
            if first != "transformers":
                convert(source, path, first, DTYPE, preset=None)
            preset = source if path.is_file() else None
            for second in FORMATS:
                if second != first:
                    rounds = [
                        measure(path, directory, second, options.dtype, preset)
                        for _ in range(options.repeats)
                    ]
                    results.append(report(first, second, rounds))
            if path != source:
                remove(path)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2))


def measure(source, directory, to, dtype, preset):
    """Measures a copy and a conversion: seconds, and the conversion's peak memory."""
    target = directory / "target"
    read(source)
    os.sync()  # No other data waits to be written.
    start = time.perf_counter()
    copy(source, target)
    copied = time.perf_counter() - start
    remove(target)
    os.sync()
    start = time.perf_counter()
    memory = convert(source, target, to, dtype, preset)
    converted = time.perf_counter() - start
    size = total_bytes(target)
    remove(target)
    return {
        "copy_seconds": copied,
        "convert_seconds": converted,
        "peak_resident_bytes": memory,
        "bytes": size,
    }


def convert(source, target, to, dtype, preset):
    """Runs the command; returns its peak resident memory in bytes."""
    command = [sys.executable, "-m", "keras_openllama", "convert"]
    command += [str(source), str(target), "--to", to, "--no-tokenizer"]
    command += ["--dtype", dtype] if dtype else []
    command += ["--preset", str(preset)] if preset else []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return 1024 * usage.ru_maxrss


def copy(source, target):
    """Copies a file or a flat directory, and waits until it is on the disk."""
    if source.is_dir():
        target.mkdir()
    for path in files(source):
        copied = target / path.name if source.is_dir() else target
        shutil.copyfile(path, copied)
        with open(copied, "rb") as file:
            os.fsync(file.fileno())


def files(path):
    """All files of a checkpoint, in order."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file())


def total_bytes(path):
    return sum(file.stat().st_size for file in files(path))


def read(path):
    """Reads files, so that they are in the page cache."""
    buffer = bytearray(16 << 20)
    for name in files(path):
        with open(name, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def remove(path):
    path.unlink() if path.is_file() else shutil.rmtree(path)


def report(first, second, rounds):
    """Prints a line of the table; returns the figures."""

    def median(key):
        return float(np.median([figures[key] for figures in rounds]))

    copied, converted = median("copy_seconds"), median("convert_seconds")
    memory = max(figures["peak_resident_bytes"] for figures in rounds)
    met = converted <= GOAL_TIME * copied and memory <= GOAL_MEMORY
    print(
        f"{first:<13} {second:<13} {copied:>5.1f} {converted:>9.1f} "
        f"{converted / copied:>7.2f} {memory / 1e9:>5.2f} GB"
        f"{'' if met else '   misses the goal'}",
        flush=True,
    )
    return {"from": first, "to": second, "rounds": rounds}


if __name__ == "__main__":
    main()
