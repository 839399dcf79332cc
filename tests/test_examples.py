"""The notebooks of examples/ run, learn and are committed with their outputs."""

import json
import re

import nbformat
import pytest
from checkout import ROOT
from nbclient import NotebookClient

EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
MAX_LINES = 60  # Of an output. A longer output is a log.

pytestmark = pytest.mark.backend_free


def run_notebook(name, expression, run_from, output, monkeypatch):
    """Runs a notebook in its short form; returns the value of an expression."""
    monkeypatch.setenv("EXAMPLES_QUICK", "1")
    monkeypatch.setenv("EXAMPLES_OUTPUT", str(output))
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    # It trains long enough for optimized programs to pay off.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    cell = nbformat.v4.new_code_cell(f"print(json.dumps({expression}))")
    notebook.cells.append(cell)
    where = {"metadata": {"path": str(run_from)}}
    client = NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources=where
    )
    client.execute()  # Raises if a cell raises.
    return json.loads(notebook.cells[-1].outputs[0].text)


@pytest.mark.timeout(600)
def test_fine_tune_notebook_answers_held_out_questions(tmp_path, monkeypatch):
    before, after, hits, asked = run_notebook(
        "fine_tune.ipynb",
        "[measured_before['loss'], measured_after['loss'], "
        "sum(map(str.__eq__, after, expected)), len(held_out)]",
        EXAMPLES,
        tmp_path,
        monkeypatch,
    )
    assert after < before / 10
    assert hits > asked / 2
    written = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors"}
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_zero_notebook_trains_and_exports_a_model(tmp_path, monkeypatch):
    before, after, same = run_notebook(
        "from_zero.ipynb",
        "[before['loss'], after['loss'], bool((theirs == ours).all())]",
        ROOT,
        tmp_path,
        monkeypatch,
    )
    assert after < before / 3
    assert same, "transformers chooses different tokens"
    for name in ("tokenizer/tokenizer.model", "run/loss.png", "model/config.json"):
        assert (tmp_path / name).exists(), name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_committed_with_their_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    cells = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert "image/png" in kinds
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr", output
        for text in texts_of(output):
            assert text.count("\n") <= MAX_LINES, text[:500]
            assert not re.search(r"/(home|root|tmp|var|usr|work|Users)/", text), text


def texts_of(output):
    """The texts of an output."""
    data = output.get("data", {})
    return [output.get("text", "")] + [
        value for kind, value in data.items() if kind.startswith("text/")
    ]


def test_instructions_are_unique_short_pairs():
    path = EXAMPLES / "instructions.jsonl"
    pairs = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    prompts = [pair["prompt"] for pair in pairs]
    assert all({*pair} == {"prompt", "response"} for pair in pairs)
    assert all(prompt.endswith("\nA:") for prompt in prompts)
    assert all(pair["response"].startswith(" ") for pair in pairs)
    assert len({*prompts}) == len(prompts) > 1000
    assert path.stat().st_size < 100_000
