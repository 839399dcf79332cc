"""Check and measure keras_openllama on one GPU, on JAX and on PyTorch.

    python benchmarks/gpu_check
    python benchmarks/gpu_check --minutes 9 --json gpu_check.json
    python benchmarks/gpu_check --only parity-jax decode-3b
    python benchmarks/gpu_check --list

Checks pass or fail: logits, tokens and gradients against transformers, attention
kernels against the plain formula, and a run that is killed and resumed. Speeds are
reported with their share of what the device can do, measured in the same run, and
beside those of transformers. The exit code is 1 if a check failed, or if a part of
this package broke.

Each part is a process of its own: what breaks, hangs or runs out of memory ends that
part alone. Checks run side by side, then speeds one after the other, in the order of
--only or of --list. A part that would begin after --minutes is skipped, and one that is
running then is stopped; what it had measured by then counts. A check that meets its own
limit, or that of --limit, fails: its other cases were not tried. The device's name, and
shares of what it can do, come from the parts `device`: name them in --only, too.

Without a GPU the same parts run at tiny sizes, which tests the parts themselves: what
needs a GPU is skipped, and the speeds mean nothing.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import paths  # noqa: F401  First: the others import from the checkout.
import runner
from parts import PARTS
from tables import tables


def find_gpu():
    """Whether there is an NVIDIA GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU 0" in listed.stdout


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="names of parts, or beginnings of them",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=7.0,
        help="for all parts (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="for each part, if less than its own; a check that is stopped by it "
        "fails, and on 16 cores attention and resume need over 60",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results here")
    parser.add_argument("--list", action="store_true", help="list the parts, and end")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        return runner.work(PARTS[options.work], Path(options.directory))
    chosen = choose(options.only, options.limit)
    if not chosen:
        parser.error(f"--only names no part: {' '.join(options.only)}. See --list.")
    if options.list:
        for part in chosen:
            print(f"{part.name:24}{part.kind:8}{part.text}")
        return 0
    has_gpu = find_gpu()
    print("one NVIDIA GPU" if has_gpu else "no GPU: tiny sizes on the CPU", flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as directory:
        results = runner.run(
            chosen,
            Path(directory),
            has_gpu=has_gpu,
            seconds=60 * options.minutes,
            save=lambda results: save(options.json, results),
        )
    print(tables(results))
    return int(any(result["kind"] == "failed" for result in results))


def choose(only, limit):
    """Parts whose names begin so, in that order, with no more seconds than `limit`."""
    names = [n for start in only or [""] for n in PARTS if n.startswith(start)]
    parts = [PARTS[name] for name in dict.fromkeys(names)]
    if limit is None:
        return parts
    return [dataclasses.replace(p, seconds=min(p.seconds, limit)) for p in parts]


def save(path, results):
    """Writes what is known by now; a reader never sees half of it."""
    if path is not None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
