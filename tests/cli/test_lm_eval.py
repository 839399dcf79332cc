"""`keras-openllama lm-eval`: the harness's command line with this model."""

import json
import os
import subprocess
import sys

import pytest
from local_tasks import write_own_task, write_tasks

from keras_openllama.__main__ import main

pytestmark = pytest.mark.backend_free


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "keras_openllama", "lm-eval", *map(str, words)],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_lm_eval_help_shows_the_model_arguments(words, capsys):
    assert main(["lm-eval", *words]) == 0
    assert (
        "--model keras_openllama --model_args preset=3b_v2" in capsys.readouterr().out
    )


def test_lm_eval_runs_a_user_defined_task(tmp_path):
    data = write_tasks(tmp_path, count=4)
    write_own_task(tmp_path, data / "boolq.jsonl")
    result = run(
        *("--model", "keras_openllama", "--model_args", "preset=open_llama_nano"),
        *("--tasks", "mine", "--include_path", tmp_path, "--limit", 3),
        *("--output_path", tmp_path / "output"),
    )
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("output/**/results_*.json")
    found = json.loads(path.read_text())
    assert found["n-samples"]["mine"]["effective"] == 3
    assert found["config"]["model_num_parameters"] == 4_524_288
    assert "|mine" in result.stdout.replace(" ", "")


def test_lm_eval_passes_errors_of_the_harness_through():
    result = run("run", "--model")
    assert result.returncode == 2
    assert "expected one argument" in result.stderr
