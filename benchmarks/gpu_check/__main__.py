"""Test and benchmark keras_openllama on one GPU, on JAX and on PyTorch.

    python benchmarks/gpu_check
    python benchmarks/gpu_check --minutes 9 --json gpu_check.json
    python benchmarks/gpu_check --only parity-jax decode-3b
    python benchmarks/gpu_check --list

Checks pass or fail: logits, tokens and gradients compared with transformers, attention
kernels compared with the plain formula, and a run that is killed and resumed. Speeds
are reported with their share of the device's limits, measured in the same run, and
compared with transformers. The exit code is 1 if a check failed, or if a part that runs
this package raised an error.

Each part is a separate process, so an error, a hang or a lack of memory ends that part
only. Checks run in parallel, then speeds run one after the other, in the order of
--only or --list. A part that would start after --minutes is skipped, and a running part
is stopped then; its earlier results count. A check that reaches its time limit, or that
of --limit, fails, because its other cases did not run. The name and the limits of the
device come from the parts `device`: include them in --only.

Without a GPU the same parts run at tiny sizes. That tests the parts themselves: what
needs a GPU is skipped, and the speeds are meaningless.
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

import paths  # noqa: F401  First: it makes the other imports work.
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
        help="names of parts, or prefixes of names",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=7.0,
        help="time limit of all parts (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="time limit of each part, if less than its own; a check that reaches it "
        "fails, and attention and resume need over 60 on 16 cores",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results to FILE"
    )
    parser.add_argument("--list", action="store_true", help="list the parts and exit")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        return runner.work(PARTS[options.work], Path(options.directory))
    chosen = choose(options.only, options.limit)
    if not chosen:
        parser.error(f"no part matches --only {' '.join(options.only)}. See --list.")
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
    """The parts whose names start with one of `only`, with at most `limit` seconds."""
    names = [n for start in only or [""] for n in PARTS if n.startswith(start)]
    parts = [PARTS[name] for name in dict.fromkeys(names)]
    if limit is None:
        return parts
    return [dataclasses.replace(p, seconds=min(p.seconds, limit)) for p in parts]


def save(path, results):
    """Writes the results so far; readers never see a partial file."""
    if path is not None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
