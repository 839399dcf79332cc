"""The guides of examples/: they run and learn, and the notebooks are made from them."""

import ast
import json
import runpy
import subprocess
import sys

import nbformat
import pytest
from checkout import ROOT

EXAMPLES = ROOT / "examples"
GUIDES = sorted(EXAMPLES.glob("*.ipynb"))
FIELDS = ["Title", "Author", "Date created", "Description", "Accelerator"]

pytestmark = pytest.mark.backend_free


def run_guide(name, output, monkeypatch, quick=True):
    """Runs a guide in this process; returns the names that it has defined.

    Args:
        name: string, such as `"fine_tune"`.
        output: path of the directory that it writes to.
        quick: bool, whether it runs in its short form.
    """
    monkeypatch.setenv("EXAMPLES_QUICK", "1" if quick else "0")
    monkeypatch.setenv("EXAMPLES_OUTPUT", str(output))
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(EXAMPLES)
    return runpy.run_path(f"{name}.py")


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_fine_tune_guide_lowers_the_loss_and_exports_adapters(tmp_path, monkeypatch):
    guide = run_guide("fine_tune", tmp_path, monkeypatch)
    assert guide["measured_after"]["loss"] < guide["measured_before"]["loss"] / 2
    written = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors"}
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_fine_tune_guide_answers_held_out_questions(tmp_path, monkeypatch):
    guide = run_guide("fine_tune", tmp_path, monkeypatch, quick=False)
    assert guide["measured_after"]["loss"] < guide["measured_before"]["loss"] / 10
    correct = sum(map(str.__eq__, guide["after"], guide["expected"]))
    assert correct > len(guide["held_out"]) / 2


def test_getting_started_guide_learns_its_pairs(tmp_path, monkeypatch):
    guide = run_guide("getting_started", tmp_path, monkeypatch)
    losses = guide["history"]["loss"]
    assert losses[-1] < losses[0] / 2
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_evaluate_guide_measures_perplexity_and_a_task(tmp_path, monkeypatch):
    guide = run_guide("evaluate", tmp_path, monkeypatch)
    bible, manual, _ = guide["rows"]
    assert bible["bits_per_byte"] < manual["bits_per_byte"]
    assert 0 <= guide["accuracy"] <= 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pretrain_on_tpu_guide_stops_resumes_and_generates(tmp_path, monkeypatch):
    guide = run_guide("pretrain_on_tpu", tmp_path, monkeypatch)
    steps = [*range(1, 21)]
    assert [*guide["uninterrupted"]] == steps
    assert 3 <= len(guide["before"]) < 20
    assert guide["resumed"] == guide["uninterrupted"]
    assert guide["text"].startswith("The value of")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_zero_guide_learns_and_exports_the_model(tmp_path, monkeypatch):
    # It trains long enough for optimized programs to pay off.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    guide = run_guide("from_zero", tmp_path, monkeypatch)
    assert guide["after"]["loss"] < guide["before"]["loss"] / 3
    same = (guide["theirs"] == guide["ours"]).all()
    assert same, "transformers chooses other tokens"
    for name in ("tokenizer/tokenizer.model", "run/loss.png", "model/config.json"):
        assert (tmp_path / name).exists(), name


def test_notebooks_are_up_to_date_with_the_guides():
    check = [sys.executable, "docs/build_guides.py", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(GUIDES) >= 5


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_notebook_installs_chooses_the_backend_and_has_no_outputs(path):
    source = path.with_suffix(".py").read_text("utf-8")
    header = ast.literal_eval(ast.parse(source).body[0].value)
    assert [line.split(": ")[0] for line in header.strip().splitlines()] == FIELDS
    cells = nbformat.read(path, as_version=4).cells
    first, second, *rest = [cell for cell in cells if cell.cell_type == "code"]
    assert "!pip install" in first.source
    assert 'os.environ["KERAS_BACKEND"] = "jax"' in second.source
    assert not any(cell.outputs for cell in (first, second, *rest))
    name = f"examples/{path.name}"
    assert "colab.research.google.com" in cells[0].source and name in cells[0].source
    assert "kaggle.com" in cells[0].source


def test_instructions_are_unique_short_pairs():
    path = EXAMPLES / "instructions.jsonl"
    pairs = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    prompts = [pair["prompt"] for pair in pairs]
    assert all({*pair} == {"prompt", "response"} for pair in pairs)
    assert all(prompt.endswith("\nA:") for prompt in prompts)
    assert all(pair["response"].startswith(" ") for pair in pairs)
    assert len({*prompts}) == len(prompts) > 1000
    assert path.stat().st_size < 100_000
