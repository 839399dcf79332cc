"""Runs the tests once for each Keras backend in turn, and adds the results up.

    python tests/run_backends.py [--slow] [--backends jax,torch] [pytest arguments]

JAX, the default backend, runs everything. TensorFlow and PyTorch leave out the tests
marked `backend_free`, whose answer cannot depend on the backend. A backend that runs
no test at all counts as failed, unless pytest arguments narrowed the choice.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("jax", "tensorflow", "torch")
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


def run(backend, slow, pytest_arguments):
    """Runs pytest on one backend. Returns its exit code and its counts by outcome."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.xml")
        code = subprocess.call(
            [
                *(sys.executable, "-m", "pytest"),
                *("-m", marker_expression(backend, slow)),
                f"--junitxml={report}",
                *pytest_arguments,
            ],
            cwd=ROOT,
            env={**os.environ, "KERAS_BACKEND": backend},
        )
        return code, counts_of(report)


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

    lines = []
    total = {"passed": 0, "failed": 0, "skipped": 0}
    all_good = True
    for backend in options.backends.split(","):
        if backend not in BACKENDS:
            parser.error(f"--backends: {backend!r} is not one of {BACKENDS}.")
        print(f"\n=== Tests on {backend}", flush=True)
        start = time.monotonic()
        code, counts = run(backend, options.slow, pytest_arguments)
        good = code == 0 and counts["passed"] > 0
        if code == NO_TESTS_COLLECTED and pytest_arguments:
            good = True
        all_good &= good
        for outcome, count in counts.items():
            total[outcome] += count
        lines.append(
            f"{backend:<12}{counts['passed']:>6} passed{counts['failed']:>6} failed"
            f"{counts['skipped']:>6} skipped{time.monotonic() - start:>8.0f} s"
            + ("" if good else f"   FAILED (pytest's exit code is {code})")
        )

    print("\n" + "\n".join(lines) + "\n")
    print(", ".join(f"{count} {outcome}" for outcome, count in total.items()))
    return 0 if all_good and total["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
