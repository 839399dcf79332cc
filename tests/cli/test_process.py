"""The process of a command: training restarts it once."""

import json
import os
import subprocess
import sys

import pytest
from checkout import ROOT

pytestmark = pytest.mark.backend_free

# Python imports this module at each start.
RECORD_STARTS = """
import json, os, sys
with open(os.path.join(os.path.dirname(__file__), "starts"), "a") as file:
    words = sys.orig_argv[1:], os.environ.get("GLIBC_TUNABLES")
    file.write(json.dumps(words) + "\\n")
"""
CONSOLE_SCRIPT = """
import sys
from keras_openllama.__main__ import main
sys.exit(main())
"""


def starts(program, directory, **environment):
    """Shows a recipe; returns the command line and GLIBC_TUNABLES of each start."""
    (directory / "sitecustomize.py").write_text(RECORD_STARTS)
    inherited = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    words = ["-W", "ignore", *map(str, program), "--preset", "nano", "--show"]
    result = subprocess.run(
        [sys.executable, *words],
        env={**inherited, "PYTHONPATH": f"{directory}:{ROOT}", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("sequence_length") == 1
    lines = (directory / "starts").read_text().splitlines()
    return words, [json.loads(line) for line in lines]


@pytest.mark.skipif(sys.platform != "linux", reason="Needs glibc.")
@pytest.mark.parametrize("kind", ["console script", "module", "checkout"])
def test_use_large_pages_restarts_training_once(kind, tmp_path):
    script = tmp_path / "keras-openllama"
    script.write_text(CONSOLE_SCRIPT)
    program = {
        "console script": [script, "pretrain"],
        "module": ["-m", "keras_openllama", "pretrain"],
        "checkout": [ROOT / "train" / "pretrain.py"],
    }[kind]
    words, found = starts(program, tmp_path)
    assert found == [[words, None], [words, "glibc.malloc.hugetlb=1"]]


def test_use_large_pages_respects_the_users_setting(tmp_path):
    program = ["-m", "keras_openllama", "pretrain"]
    words, found = starts(program, tmp_path, GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert found == [[words, "glibc.malloc.hugetlb=0"]]
