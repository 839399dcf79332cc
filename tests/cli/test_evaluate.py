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


def command(*arguments):
    return [sys.executable, str(SCRIPT), "--preset", "nano", *map(str, arguments)]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True)


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


def test_a_killed_evaluation_goes_on_to_the_same_results(tmp_path):
    data = write_tasks(tmp_path / "data", count=24)
    arguments = ["--tasks", "hellaswag", "boolq", "--data", data, "--batch-size", 1]
    whole = run(*arguments, "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = tmp_path / "killed"
    with subprocess.Popen(
        command(*arguments, "--output", killed),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while not stored(killed / "answers.sqlite") and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    finished = stored(killed / "answers.sqlite")
    resumed = run(*arguments, "--output", killed)
    assert resumed.returncode == 0, resumed.stderr
    after = stored(killed / "answers.sqlite")
    assert 0 < len(finished) < len(after)
    assert finished.items() <= after.items()
    assert values(killed) == values(tmp_path / "whole")


def test_what_cannot_be_had_is_told_and_the_rest_is_measured(tmp_path):
    data = write_tasks(tmp_path / "data", count=6)
    output = tmp_path / "output"
    told = run("--suite", "openllama", "--data", data, "--limit", 4, "--output", output)
    assert told.returncode == os.EX_UNAVAILABLE, told.stderr
    assert "piqa is left out: its data cannot be had" in told.stderr
    found = results(output)
    assert {row["task"] for row in found["metrics"]} == {
        *("hellaswag", "arc_easy", "winogrande", "boolq", "record", "truthfulqa_mc2")
    }
    assert set(found["skipped"]) == {
        *("anli_r1", "anli_r2", "anli_r3", "arc_challenge", "openbookqa", "piqa"),
        *("rte", "truthfulqa_mc1", "wic"),
    }
    assert {row["samples"] for row in found["metrics"]} == {4}
    assert "| hellaswag/acc_norm |" in told.stdout
    assert "first 4 documents" in (output / "table.md").read_text()
    assert (output / "table.png").read_bytes().startswith(b"\x89PNG")

    # Another part of the same model, into the same directory.
    text = tmp_path / "text.txt"
    text.write_text("The captain looked at the sea. " * 40)
    more = run("--perplexity", text, "--output", output)
    assert more.returncode == 0, more.stderr
    both = results(output)
    assert both["metrics"] == found["metrics"]
    assert both["perplexity"][0]["name"] == "text"
    assert "first 4 documents" in (output / "table.md").read_text()

    both = [sys.executable, SCRIPT, "--compare", output, output]
    side = subprocess.run(
        [*both, "--output", tmp_path / "c"], capture_output=True, text=True
    )
    assert side.returncode == 0, side.stderr
    assert "open_llama_nano (2)" in side.stdout
    assert (tmp_path / "c" / "table.svg").exists()

    other = run("--perplexity", text, "--dtype", "bfloat16", "--output", output)
    assert other.returncode == 2
    assert "answers of another model" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "say what to measure"),
        (["--tasks", "helaswag"], "no task 'helaswag'"),
        (["--tasks", "piqa", "--limit", "0"], "--limit is above 0"),
        (["--tasks", "piqa", "--beside", "GPT-5"], "Received: GPT-5"),
        (["--human-eval", "--samples-per-problem", "3"], "need a --temperature"),
        (["--perplexity", "nowhere.txt"], "nowhere.txt"),
        (["--compare", "nowhere"], "give it alone"),
    ],
)
def test_nonsense_is_answered_in_a_line(arguments, told, tmp_path, capsys):
    try:
        code = main(["--preset", "nano", *arguments, "--output", str(tmp_path / "out")])
    except SystemExit as ended:  # argparse's way.
        code = ended.code
    assert code == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said
