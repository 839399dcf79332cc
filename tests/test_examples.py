"""The notebooks of examples/: they run and learn, and show what they did."""

import json
import re

import nbformat
import pytest
from checkout import ROOT
from nbclient import NotebookClient

EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
MOST_LINES = 60  # Of an output: more of them is a log.

pytestmark = pytest.mark.backend_free


def outcome(name, expression, run_from, output, monkeypatch):
    """Runs a notebook in its short form; returns what an expression then is."""
    monkeypatch.setenv("EXAMPLES_QUICK", "1")
    monkeypatch.setenv("EXAMPLES_OUTPUT", str(output))
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    # It trains for so many steps that optimized programs are worth their compilation.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    asked = nbformat.v4.new_code_cell(f"print(json.dumps({expression}))")
    notebook.cells.append(asked)
    where = {"metadata": {"path": str(run_from)}}
    client = NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources=where
    )
    client.execute()  # Raises where a cell does.
    return json.loads(notebook.cells[-1].outputs[0].text)


@pytest.mark.timeout(600)
def test_fine_tuning_answers_questions_that_were_held_out(tmp_path, monkeypatch):
    before, after, hits, asked = outcome(
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
def test_a_model_from_zero_learns_and_is_exported(tmp_path, monkeypatch):
    before, after, same = outcome(
        "from_zero.ipynb",
        "[before['loss'], after['loss'], bool((theirs == ours).all())]",
        ROOT,
        tmp_path,
        monkeypatch,
    )
    assert after < before / 3
    assert same, "transformers chooses other tokens"
    for name in ("tokenizer/tokenizer.model", "run/loss.png", "model/config.json"):
        assert (tmp_path / name).exists(), name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_with_what_they_show(path):
    cells = nbformat.read(path, as_version=4).cells
    cells = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert "image/png" in kinds
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr", output
        for text in texts_of(output):
            assert text.count("\n") <= MOST_LINES, text[:500]
            assert not re.search(r"/(home|root|tmp|var|usr|work|Users)/", text), text


def texts_of(output):
    """What an output shows in letters."""
    data = output.get("data", {})
    return [output.get("text", "")] + [
        value for kind, value in data.items() if kind.startswith("text/")
    ]


def test_instructions_are_short_pairs_that_are_asked_once():
    path = EXAMPLES / "instructions.jsonl"
    pairs = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    prompts = [pair["prompt"] for pair in pairs]
    assert all({*pair} == {"prompt", "response"} for pair in pairs)
    assert all(prompt.endswith("\nA:") for prompt in prompts)
    assert all(pair["response"].startswith(" ") for pair in pairs)
    assert len({*prompts}) == len(prompts) > 1000
    assert path.stat().st_size < 100_000
