"""The check of a GPU runs without one, at tiny sizes."""

import json
import subprocess
import sys

import pytest
from checkout import ROOT

pytestmark = pytest.mark.backend_free


def run_gpu_check(tmp_path, *arguments):
    """Runs `benchmarks/gpu_check`; returns its results.

    Args:
        tmp_path: path of a directory for its file.
        *arguments: strings of the command line.
    """
    file = tmp_path / "results.json"
    command = [sys.executable, "benchmarks/gpu_check", "--minutes", "25"]
    done = subprocess.run(
        [*command, "--json", file, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return json.loads(file.read_text())


@pytest.mark.slow
def test_gpu_check_compares_jax_with_transformers(tmp_path):
    results = run_gpu_check(tmp_path, "--only", "parity-jax")
    passed = {result["name"] for result in results if result["kind"] == "passed"}
    checks = ("logits", "gradients", "greedy tokens that differ")
    for shape in ("head_dim_100", "grouped_heads"):
        assert passed >= {f"{shape}: {check}" for check in checks}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gpu_check_runs_each_part_without_a_gpu(tmp_path):
    results = run_gpu_check(tmp_path)
    assert {result["kind"] for result in results} == {
        *("info", "measured", "passed", "skipped")
    }
    reasons = [result["note"] for result in results if result["kind"] == "skipped"]
    assert reasons
    assert all("a GPU" in reason for reason in reasons)
