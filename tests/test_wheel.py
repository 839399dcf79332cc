"""The wheel has the embedded model and every command, outside the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT

from keras_openllama.__main__ import COMMANDS

pytestmark = pytest.mark.backend_free


GENERATE = """
import keras_openllama
from keras_openllama import OpenLlamaCausalLM
print(keras_openllama.__file__)
lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
print(repr(lm.generate("The sea", max_new_tokens=4, strip_prompt=True)))
print(len(OpenLlamaCausalLM.presets))
import keras
print(keras.config.backend())
"""

PAIRS = "".join(
    json.dumps({"prompt": f"Q: {n} and 1?\nA:", "response": f" {n + 1}"}) + "\n"
    for n in range(8)
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    # With the pinned build backend of this environment: nothing is downloaded.
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
        + ["--no-build-isolation", "--wheel-dir", directory, ROOT],
        check=True,
    )
    (wheel,) = directory.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A new environment with the wheel, which borrows the dependencies of this one."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", environment], check=True
    )
    python = environment / "bin" / "python"
    (site_packages,) = environment.glob("lib/python*/site-packages")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
        + ["--no-deps", "--no-index", wheel],
        check=True,
    )
    # A plain path is not searched for .pth files, so an editable install of the
    # checkout in this environment stays invisible in the new one.
    dependencies = sysconfig.get_paths()["purelib"]
    (site_packages / "dependencies.pth").write_text(dependencies + "\n")
    return environment


def test_the_wheel_holds_the_package_and_the_presets(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    presets = {path.relative_to(ROOT / "presets") for path in ROOT.glob("presets/**/*")}
    expected = {
        f"keras_openllama/_presets/{path}"
        for path in presets
        if (ROOT / "presets" / path).is_file()
    }
    assert "keras_openllama/_presets/open_llama_nano/model.safetensors" in expected
    assert expected <= names
    assert "keras_openllama/evaluation/report/published.json" in names
    assert {name.split("/")[0] for name in names} == {
        "keras_openllama",
        next(name.split("/")[0] for name in names if ".dist-info/" in name),
    }


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < 20e6


@pytest.fixture
def new_user(tmp_path):
    """Environment variables of somebody who never chose a backend."""
    chosen = ("KERAS_BACKEND", "PYTHONPATH", "GLIBC_TUNABLES")
    left = {name: value for name, value in os.environ.items() if name not in chosen}
    return {**left, "HOME": str(tmp_path), "KERAS_HOME": str(tmp_path / "keras")}


@pytest.fixture
def run(installed, new_user, tmp_path):
    """Runs the installed command in an empty directory; returns what it prints."""

    def run(*arguments):
        result = subprocess.run(
            [installed / "bin" / "keras-openllama", *arguments],
            cwd=tmp_path,
            env=new_user,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_the_installed_package_generates_with_jax_outside_the_checkout(
    installed, new_user, tmp_path
):
    result = subprocess.run(
        [installed / "bin" / "python", "-c", GENERATE],
        cwd=tmp_path,
        env=new_user,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    file, text, presets, backend = result.stdout.splitlines()
    assert Path(file).is_relative_to(installed)
    assert len(text) > 4
    assert presets == "7"
    assert backend == "jax"


def test_the_installed_command_generates_outside_the_checkout(run):
    text = run("generate", "The sea", "--max-new-tokens", "4")
    assert text.startswith("The sea")
    assert len(text.strip()) > len("The sea")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_an_installed_command_names_it(command, run):
    assert f"keras-openllama {command} " in run(command, "--help")


@pytest.mark.timeout(600)
def test_the_installed_commands_pretrain_finetune_and_evaluate(run, tmp_path):
    run(
        *("pretrain", "--preset", "nano", "--steps", "2", "--batch-size", "2"),
        *("--set", "sequence_length=32", "--set", "warmup_steps=1"),
        *("--set", "validation_batches=1", "--set", "sample_every=0"),
    )
    pretrained = tmp_path / "runs" / "nano"
    assert steps(pretrained) == [1, 2]
    assert (pretrained / "loss.png").exists()

    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    run(
        *("finetune", "--preset", "runs/nano", "--data", "pairs.jsonl"),
        *("--validation", "pairs.jsonl", "--lora-rank", "2", "--length", "32"),
        *("--batch-size", "4", "--epochs", "1", "--max-new-tokens", "4"),
        *("--question", "Q: 1 and 1?", "--output", "runs/finetuned"),
    )
    finetuned = tmp_path / "runs" / "finetuned"
    assert steps(finetuned) == [1, 2]
    assert (finetuned / "adapters" / "adapter_model.safetensors").exists()

    (tmp_path / "sea.txt").write_text("The captain looked at the sea.")
    model = ["--preset", "runs/finetuned/model", "--output", "evaluation"]
    table = run("evaluate", *model, "--perplexity", "sea.txt")
    assert "bits/byte" in table
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text())


def steps(directory):
    """The steps that a run has logged."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if "loss" in record]
