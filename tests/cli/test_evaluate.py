"""`keras-openllama evaluate`: output, resuming and errors."""

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
        except SystemExit as ended:  # argparse exits this way.
            code = ended.code
        return code, *capsys.readouterr()

    return run


def results(directory):
    return json.loads((directory / "results.json").read_text())


def values(directory):
    return [(r["task"], r["metric"], r["value"]) for r in results(directory)["metrics"]]


def stored(path):
    """Row ids of the stored answers by key; a second write changes the id."""
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as file:
            return dict(file.execute("SELECT key, rowid FROM answers"))
    except sqlite3.OperationalError:  # The file does not exist yet.
        return {}


def test_evaluate_resumes_after_a_kill_with_the_same_results(run, small, tmp_path):
    data = write_tasks(tmp_path / "data", count=12)
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
    assert run(*arguments, tmp_path / "uninterrupted")[0] == 0
    assert values(killed) == values(tmp_path / "uninterrupted")


def test_evaluate_reports_unavailable_tasks_and_measures_the_others(
    run, small, tmp_path
):
    data = write_tasks(tmp_path / "data", count=6)
    output = tmp_path / "output"
    model = ("--preset", small, "--output", output)
    code, table, error = run(
        *model, "--suite", "openllama", "--data", data, "--limit", 4
    )
    assert code == os.EX_UNAVAILABLE, error
    assert "piqa is skipped: its data" in error
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

    # Another measurement of the same model, in the same directory.
    text = tmp_path / "text.txt"
    text.write_text("The captain looked at the sea. " * 40)
    code, _, error = run(*model, "--perplexity", text)
    assert code == 0, error
    both = results(output)
    assert both["metrics"] == found["metrics"]
    assert both["perplexity"][0]["name"] == "text"
    assert "first 4 documents" in (output / "table.md").read_text()

    code, table, error = run("--compare", output, output, "--output", tmp_path / "c")
    assert code == 0, error
    assert "model (2)" in table
    assert (tmp_path / "c" / "table.svg").exists()

    for other in (("--dtype", "bfloat16"), ("--quantization", "int4")):
        code, _, error = run(*model, "--perplexity", text, *other)
        assert code == 2
        assert "responses of another model" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Choose what to measure"),
        (["--tasks", "helaswag"], "no task 'helaswag'"),
        (["--tasks", "piqa", "--limit", "0"], "--limit must be a positive"),
        (["--tasks", "piqa", "--compare-with", "GPT-5"], "Received: GPT-5"),
        (["--human-eval", "--samples-per-problem", "3"], "need a --temperature"),
        (["--tasks", "piqa", "--limit", "inf"], "--limit must be"),
        (["--perplexity", "nowhere.txt"], "--perplexity: nowhere.txt does not exist"),
        (["--perplexity", ".", "--mesh", "rows=2"], "--mesh must be of the form"),
        (["--perplexity", ".", "--preset", "nanno"], "--preset must be one of"),
        (["--perplexity", ".", "--adapters", "none"], "--adapters: the directory none"),
        (["--tasks", "piqa", "--data", "none"], "--data: the directory none"),
        (["--compare", "nowhere"], "cannot be combined"),
    ],
)
def test_evaluate_rejects_invalid_arguments_in_one_line(
    arguments, message, run, tmp_path
):
    code, _, error = run("--preset", "nano", *arguments, "--output", tmp_path / "out")
    assert code == 2
    assert message in error
    assert "Traceback" not in error
