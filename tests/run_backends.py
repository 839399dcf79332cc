"""Runs the tests once for each Keras backend, and adds the results up.

    python tests/run_backends.py [--slow] [--backends jax,torch] [pytest arguments]

Two parts run at a time, as most tests keep one core busy. The first one is shown as it
goes, the others when they have ended.

JAX, the default backend, runs everything, in three parts. TensorFlow and PyTorch leave
out the tests marked `backend_free`, whose answer cannot depend on the backend. A part
that runs no test at all counts as failed, unless pytest arguments narrowed the choice.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("jax", "tensorflow", "torch")
# What takes longest is divided, so that both cores are busy to the end.
_APART = ("tests/training", "tests/convert", "tests/parity")
PARTS = {
    "jax": {
        "jax": [f"--ignore={directory}" for directory in _APART],
        "jax, training": ["tests/training"],
        "jax, convert and parity": ["tests/convert", "tests/parity"],
    }
}
AT_A_TIME = 2
NO_TESTS_COLLECTED = 5


def marker_expression(backend, slow):
    """Returns what pytest's `-m` is given for one backend.

    >>> marker_expression("torch", slow=False)
    'not slow and not backend_free'
    """
    left_out = [] if slow else ["slow"]
    if backend != "jax":
        left_out.append("backend_free")
    return " and ".join(f"not {marker}" for marker in left_out)


def run(backend, slow, pytest_arguments, shown):
    """Runs pytest on one backend.

    Args:
        backend: string.
        slow: bool, whether to run the slow tests.
        pytest_arguments: list of strings.
        shown: bool, whether its output is shown as it goes.

    Returns:
        Its exit code, its counts by outcome, its seconds, and the output that was not
        shown.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.xml")
        result = subprocess.run(
            [
                *(sys.executable, "-m", "pytest"),
                *("-m", marker_expression(backend, slow)),
                f"--junitxml={report}",
                *pytest_arguments,
            ],
            cwd=ROOT,
            env={**os.environ, "KERAS_BACKEND": backend},
            stdout=None if shown else subprocess.PIPE,
            stderr=None if shown else subprocess.STDOUT,
        )
        seconds = time.monotonic() - start
        return result.returncode, counts_of(report), seconds, result.stdout or b""


def counts_of(report):
    """Reads `{"passed", "failed", "skipped"}` from pytest's JUnit file."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    if report.exists():  # A pytest that died early writes none.
        for suite in ElementTree.parse(report).iter("testsuite"):
            failed = int(suite.get("failures")) + int(suite.get("errors"))
            skipped = int(suite.get("skipped"))
            counts["failed"] += failed
            counts["skipped"] += skipped
            counts["passed"] += int(suite.get("tests")) - failed - skipped
    return counts


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
        (backend, name, [*pytest_arguments, *chosen])
        for backend in backends
        for name, chosen in ({} if pytest_arguments else PARTS.get(backend, {})).items()
        or [(backend, [])]
    ]
    lines = []
    total = {"passed": 0, "failed": 0, "skipped": 0}
    all_good = True
    print(f"=== Tests on {', '.join(backends)}; the first is shown", flush=True)
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        runs = [
            pool.submit(run, backend, options.slow, arguments, number == 0)
            for number, (backend, _, arguments) in enumerate(parts)
        ]
        for (_, name, _), future in zip(parts, runs, strict=True):
            code, counts, seconds, output = future.result()
            if output:
                print(f"\n=== Tests on {name}", flush=True)
                sys.stdout.buffer.write(output)
            good = code == 0 and counts["passed"] > 0
            if code == NO_TESTS_COLLECTED and pytest_arguments:
                good = True
            all_good &= good
            for outcome, count in counts.items():
                total[outcome] += count
            lines.append(
                f"{name:<32}{counts['passed']:>6} passed{counts['failed']:>6} failed"
                f"{counts['skipped']:>6} skipped{seconds:>8.0f} s"
                + ("" if good else f"   FAILED (pytest's exit code is {code})")
            )

    print("\n" + "\n".join(lines) + "\n")
    print(", ".join(f"{count} {outcome}" for outcome, count in total.items()))
    return 0 if all_good and total["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
