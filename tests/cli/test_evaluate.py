"""`keras-openllama evaluate`: what a user types, what comes, what outlives a kill."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from checkout import ROOT
from local_tasks import write_tasks

from keras_openllama.cli.evaluate import main

SCRIPT = ROOT / "train" / "evaluate.py"

pytestmark = pytest.mark.backend_free


@pytest.fixture
def run(capsys):
    """Runs the command in this process; returns its exit code, output and messages."""

    def run(*arguments):
        try:
            code = main([*map(str, arguments)])
        except SystemExit as ended:  # argparse's way.
            code = ended.code
        return code, *capsys.readouterr()

    return run


def results(directory):
    return json.loads((directory / "results.json").read_text())


def values(directory):
    return [(r["task"], r["metric"], r["value"]) for r in results(directory)["metrics"]]


def stored(path):
    """Keys of answers with their place in the file, which another writing changes."""
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as file:
            return dict(file.execute("SELECT key, rowid FROM answers"))
    except sqlite3.OperationalError:  # It is not there yet.
        return {}


def test_a_killed_evaluation_goes_on_to_the_same_results(run, small, tmp_path):
    data = write_tasks(tmp_path / "data", count=24)
    arguments = ["--preset", small, "--tasks", "hellaswag", "boolq", "--data", data]
    arguments += ["--batch-size", 1, "--output"]
    killed = tmp_path / "killed"
    with subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments), killed],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while not stored(killed / "answers.sqlite") and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    finished = stored(killed / "answers.sqlite")
    assert run(*arguments, killed)[0] == 0
    after = stored(killed / "answers.sqlite")
    assert 0 < len(finished) < len(after)
    assert finished.items() <= after.items()
    assert run(*arguments, tmp_path / "whole")[0] == 0
    assert values(killed) == values(tmp_path / "whole")


def test_what_cannot_be_had_is_told_and_the_rest_is_measured(run, small, tmp_path):
    data = write_tasks(tmp_path / "data", count=6)
    output = tmp_path / "output"
    model = ("--preset", small, "--output", output)
    code, table, told = run(
        *model, "--suite", "openllama", "--data", data, "--limit", 4
    )
    assert code == os.EX_UNAVAILABLE, told
    assert "piqa is left out: its data cannot be had" in told
    found = results(output)
    assert {row["task"] for row in found["metrics"]} == {
        *("hellaswag", "arc_easy", "winogrande", "boolq", "record", "truthfulqa_mc2")
    }
    assert set(found["skipped"]) == {
        *("anli_r1", "anli_r2", "anli_r3", "arc_challenge", "openbookqa", "piqa"),
        *("rte", "truthfulqa_mc1", "wic"),
    }
    assert {row["samples"] for row in found["metrics"]} == {4}
    assert "| hellaswag/acc_norm |" in table
    assert "first 4 documents" in (output / "table.md").read_text()
    assert (output / "table.png").read_bytes().startswith(b"\x89PNG")

    # Another part of the same model, into the same directory.
    text = tmp_path / "text.txt"
    text.write_text("The captain looked at the sea. " * 40)
    code, _, told = run(*model, "--perplexity", text)
    assert code == 0, told
    both = results(output)
    assert both["metrics"] == found["metrics"]
    assert both["perplexity"][0]["name"] == "text"
    assert "first 4 documents" in (output / "table.md").read_text()

    code, table, told = run("--compare", output, output, "--output", tmp_path / "c")
    assert code == 0, told
    assert "model (2)" in table
    assert (tmp_path / "c" / "table.svg").exists()

    code, _, told = run(*model, "--perplexity", text, "--dtype", "bfloat16")
    assert code == 2
    assert "answers of another model" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "say what to measure"),
        (["--tasks", "helaswag"], "no task 'helaswag'"),
        (["--tasks", "piqa", "--limit", "0"], "--limit is above 0"),
        (["--tasks", "piqa", "--compare-with", "GPT-5"], "Received: GPT-5"),
        (["--human-eval", "--samples-per-problem", "3"], "need a --temperature"),
        (["--perplexity", "nowhere.txt"], "nowhere.txt"),
        (["--compare", "nowhere"], "give it alone"),
    ],
)
def test_nonsense_is_answered_in_a_line(arguments, told, run, tmp_path):
    code, _, said = run("--preset", "nano", *arguments, "--output", tmp_path / "out")
    assert code == 2
    assert told in said
    assert "Traceback" not in said
