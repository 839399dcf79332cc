"""Runs the tests with each Keras backend, and summarizes the results.

    python tests/run_backends.py [--slow] [--backends jax,torch] [pytest arguments]

The tests are divided into parts. Two parts run at a time, since most tests use one
core. A part is a process, so that its memory is freed when it ends: TensorFlow never
frees compiled programs. Each part prints a line when it ends, with its output if it
failed.

JAX, the default backend, runs all tests. TensorFlow and PyTorch skip the tests marked
`backend_free`, whose results cannot depend on the backend. TensorFlow traces and
compiles each model again: tests marked `slow_on_tensorflow`, whose code PyTorch also
runs, run on TensorFlow with `--slow` only.

A part that runs no test counts as failed, unless pytest arguments select tests: then
there is one part for each backend.

On JAX, compilation takes most of the time. All parts share one directory of compiled
programs. Without `--slow`, programs are compiled fast (`FAST_COMPILATION`,
`FAST_TENSORFLOW`), except in JAX's part `OPTIMIZED`, which compares numbers with tight
tolerances and costs of programs.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("jax", "tensorflow", "torch")
# The directories of each part. Another part for each backend has all other tests.
DIRECTORIES = {
    "jax": (
        ("cli", "runs"),
        ("training", "layers"),
        ("models", "generation"),
        ("parity", "planning"),
        ("convert", "checkpoints", "data", "loading", "quantization", "text"),
    ),
    "tensorflow": (),
    "torch": (),
}
OPTIMIZED = ("parity", "planning")
# LLVM does not optimize.
FAST_COMPILATION = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
# XLA compiles fusions without MLIR: a quarter less time. Tests of runs compare results
# of different programs bit by bit, which differ then.
SIMPLE_FUSIONS = {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}
BIT_EXACT = "jax: cli, runs"
# The same for TensorFlow, which compiles generation and training with XLA, too.
FAST_TENSORFLOW = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
}
# The longest parts start first, in this order, so that both cores are busy.
FIRST = (
    "jax: cli",
    "jax: other",
    "tensorflow",
    "jax: convert",
    "jax: models",
    "torch",
    "jax: training",
    "jax: parity",
)
AT_A_TIME = 2
SLOWEST_SHOWN = 15
NO_TESTS_COLLECTED = 5


@dataclasses.dataclass(frozen=True)
class Part:
    """Tests that run in one process of pytest."""

    backend: str
    name: str
    arguments: tuple[str, ...]
    optimized: bool = True


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a part; `tests` has a `(seconds, name)` for each test."""

    exit_code: int
    counts: dict[str, int]
    tests: list[tuple[float, str]]
    seconds: float
    output: bytes


def parts_of(backend, pytest_arguments=(), slow=False):
    """Returns the parts of one backend; each test file is in one part.

    Args:
        backend: string.
        pytest_arguments: sequence of strings. If there are any, they choose the tests.
        slow: bool, whether all programs are fully optimized.
    """
    if pytest_arguments:
        return [Part(backend, backend, tuple(pytest_arguments))]
    parts = [
        Part(
            backend,
            f"{backend}: {', '.join(directories)}",
            tuple(f"tests/{directory}" for directory in directories),
            slow or set(directories) <= set(OPTIMIZED),
        )
        for directories in DIRECTORIES[backend]
    ]
    named = [argument for part in parts for argument in part.arguments]
    others = tuple(f"--ignore={directory}" for directory in named)
    name = f"{backend}: other" if named else backend
    return [*parts, Part(backend, name, others, slow)]


def place(part):
    """Returns the position of a part in `FIRST`."""
    starts = [part.name.startswith(first) for first in FIRST]
    return starts.index(True) if True in starts else len(FIRST)


def marker_expression(backend, slow):
    """Returns the value of pytest's `-m` for one backend.

    >>> marker_expression("torch", slow=False)
    'not slow and not backend_free'
    """
    left_out = [] if slow else ["slow"]
    if backend == "tensorflow" and not slow:
        left_out.append("slow_on_tensorflow")
    if backend != "jax":
        left_out.append("backend_free")
    return " and ".join(f"not {marker}" for marker in left_out)


def pytest_command(part, slow, report):
    """Returns the command that runs a part and writes a JUnit file."""
    return [
        *(sys.executable, "-m", "pytest", "-q"),
        *("-m", marker_expression(part.backend, slow)),
        f"--junitxml={report}",
        *part.arguments,
    ]


def run(part, slow, cache):
    """Runs pytest on one part.

    Args:
        part: `Part`.
        slow: bool, whether to run the slow tests.
        cache: path of a directory for programs compiled by JAX.

    Returns:
        A `Result`.
    """
    start = time.monotonic()
    environment = {
        **os.environ,
        "KERAS_BACKEND": part.backend,
        "TESTS_COMPILATION_CACHE": str(cache),
        # Two processes with one thread per core would slow each other down.
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
    }
    if part.backend == "tensorflow" and not part.optimized:
        environment |= FAST_TENSORFLOW
    if part.backend == "jax" and not part.optimized:
        environment |= FAST_COMPILATION
        if part.name != BIT_EXACT:
            environment |= SIMPLE_FUSIONS
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.xml")
        result = subprocess.run(
            pytest_command(part, slow, report),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        counts, tests = read_report(report)
    seconds = time.monotonic() - start
    return Result(result.returncode, counts, tests, seconds, result.stdout)


def read_report(report):
    """Reads pytest's JUnit file.

    Returns:
        `{"passed", "failed", "skipped"}`, and `(seconds, name)` of each test.
    """
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    tests = []
    if report.exists():  # A crashed pytest writes none.
        for suite in ElementTree.parse(report).iter("testsuite"):
            failed = int(suite.get("failures")) + int(suite.get("errors"))
            skipped = int(suite.get("skipped"))
            counts["failed"] += failed
            counts["skipped"] += skipped
            counts["passed"] += int(suite.get("tests")) - failed - skipped
            for case in suite.iter("testcase"):
                name = f"{case.get('classname').replace('.', '/')}::{case.get('name')}"
                tests.append((float(case.get("time")), name))
    return counts, tests


def summary(part, result, narrowed):
    """Returns whether a part passed, and a line about it."""
    counts = result.counts
    good = result.exit_code == 0 and counts["passed"] > 0
    if result.exit_code == NO_TESTS_COLLECTED and narrowed:
        good = True
    line = (
        f"{part.name:<48}{counts['passed']:>6} passed{counts['failed']:>6} failed"
        f"{counts['skipped']:>6} skipped{result.seconds:>8.0f} s"
    )
    code = result.exit_code
    return good, line if good else f"{line}   FAILED (pytest's exit code is {code})"


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slow", action="store_true", help="run the slow tests too")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    options, pytest_arguments = parser.parse_known_args(arguments)

    backends = options.backends.split(",")
    for backend in backends:
        if backend not in BACKENDS:
            parser.error(f"--backends: {backend!r} is not one of {BACKENDS}.")
    parts = [
        part
        for backend in backends
        for part in parts_of(backend, pytest_arguments, options.slow)
    ]
    parts.sort(key=place)
    total = {"passed": 0, "failed": 0, "skipped": 0}
    tests = []
    all_good = True
    print(f"Tests on {', '.join(backends)}: {len(parts)} parts", flush=True)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache,
        ThreadPoolExecutor(AT_A_TIME) as pool,
    ):
        runs = {pool.submit(run, part, options.slow, cache): part for part in parts}
        for future in as_completed(runs):
            part, result = runs[future], future.result()
            good, line = summary(part, result, narrowed=bool(pytest_arguments))
            if not good:
                sys.stdout.buffer.write(result.output)
            print(line, flush=True)
            all_good &= good
            tests += [(seconds, part.backend, name) for seconds, name in result.tests]
            for outcome, count in result.counts.items():
                total[outcome] += count

    print(f"\nThe {SLOWEST_SHOWN} slowest tests:")
    for seconds, backend, name in sorted(tests, reverse=True)[:SLOWEST_SHOWN]:
        print(f"{seconds:>8.1f} s  {backend:<11} {name}")
    print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in total.items()))
    return 0 if all_good and total["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
