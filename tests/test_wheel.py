"""The distributions: what they contain, and that they work outside the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
from checkout import ROOT

from keras_openllama import __version__
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

# One process for all commands: each `--help` ends with `SystemExit`.
HELP = """
import contextlib, io, sys
from keras_openllama.__main__ import COMMANDS, main
for command in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        with contextlib.suppress(SystemExit):
            main([command, "--help"])
    assert f"keras-openllama {command} " in text.getvalue(), command
    print(command)
"""

PAIRS = "".join(
    json.dumps({"prompt": f"Q: {n} and 1?\nA:", "response": f" {n + 1}"}) + "\n"
    for n in range(8)
)


def build(source, output, *targets):
    """Builds with the pinned build backend of this environment: no downloads."""
    targets = [word for target in targets for word in ("-t", target)]
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", output, *targets],
        cwd=source,
        check=True,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """A directory with the sdist and the wheel."""
    directory = tmp_path_factory.mktemp("distributions")
    build(ROOT, directory, "sdist", "wheel")
    return directory


@pytest.fixture(scope="module")
def wheel(distributions):
    (wheel,) = distributions.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def unpacked(distributions, tmp_path_factory):
    """The directory that the sdist unpacks to."""
    (sdist,) = distributions.glob("*.tar.gz")
    parent = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(parent, filter="data")
    (directory,) = parent.iterdir()
    return directory


@pytest.fixture(scope="module")
def index(distributions, tmp_path_factory):
    """URL of a package index that has the two distributions."""
    directory = tmp_path_factory.mktemp("index")
    project = directory / "keras-openllama"
    shutil.copytree(distributions, project)
    links = [f'<a href="{path.name}">{path.name}</a>' for path in project.iterdir()]
    (project / "index.html").write_text("<!DOCTYPE html>" + "\n".join(links))
    return directory.as_uri()


def install(environment, index, python=sys.executable):
    """Makes a virtual environment and installs the package alone, from the index."""
    subprocess.run([python, "-m", "venv", "--without-pip", environment], check=True)
    settings = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", environment / "bin" / "python"]
        + ["install", "--quiet", "--no-deps", "--index-url", index, "keras-openllama"],
        env={**settings, "PIP_CONFIG_FILE": os.devnull},
        check=True,
    )


@pytest.fixture(scope="module")
def installed(index, tmp_path_factory):
    """A new environment with the package, which borrows this one's dependencies."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    install(environment, index)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    # A plain path is not searched for .pth files, so an editable install of the
    # checkout in this environment stays invisible in the new one.
    dependencies = sysconfig.get_paths()["purelib"]
    (site_packages / "dependencies.pth").write_text(dependencies + "\n")
    return environment


def contents(wheel):
    """The files of a wheel, without its metadata: a dict of name and bytes."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: archive.read(name)
            for name in archive.namelist()
            if ".dist-info/" not in name
        }


def metadata(wheel, name):
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"keras_openllama-{__version__}.dist-info/{name}")


def test_wheel_contains_every_module_and_preset_and_nothing_else(wheel):
    files = {
        path: path.relative_to(ROOT)
        for path in ROOT.glob("keras_openllama/**/*")
        if path.is_file() and path.suffix != ".pyc"
    }
    files |= {
        path: "keras_openllama/_presets" / path.relative_to(ROOT / "presets")
        for path in ROOT.glob("presets/**/*")
        if path.is_file()
    }
    expected = {str(target): path.read_bytes() for path, target in files.items()}
    assert contents(wheel) == expected
    assert "keras_openllama/py.typed" in expected
    assert "keras_openllama/_presets/open_llama_nano/model.safetensors" in expected
    assert wheel.stat().st_size < 20e6


def test_wheel_metadata(wheel):
    found = BytesParser().parsebytes(metadata(wheel, "METADATA"))
    assert (found["Name"], found["Version"]) == ("keras-openllama", __version__)
    assert found["Requires-Python"] == ">=3.11"
    assert found["License-Expression"] == "Apache-2.0"
    assert found.get_all("Project-URL")
    classifiers = found.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    for version in ("3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {version}" in classifiers
    assert {"torch", "train", "eval", "plan"} <= set(found.get_all("Provides-Extra"))
    assert "# keras_openllama" in found.get_payload()
    assert metadata(wheel, "entry_points.txt").decode() == (
        "[console_scripts]\nkeras-openllama = keras_openllama.__main__:main\n"
    )


def test_version_is_the_one_of_changelog_and_citation():
    released = re.findall(r"^## \[(\d.*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == __version__
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_twine_accepts_sdist_and_wheel(distributions):
    subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *distributions.iterdir()],
        check=True,
        capture_output=True,
    )


def test_sdist_contains_every_tracked_file(unpacked):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True
    )
    missing = [
        name
        for name in listed.stdout.decode().split("\0")
        if (ROOT / name).is_file() and not (unpacked / name).is_file()
    ]
    assert missing == []


def test_wheel_built_from_sdist_equals_the_one_of_the_checkout(
    unpacked, wheel, tmp_path
):
    build(unpacked, tmp_path, "wheel")
    assert contents(tmp_path / wheel.name) == contents(wheel)
    for name in ("METADATA", "entry_points.txt"):
        assert metadata(tmp_path / wheel.name, name) == metadata(wheel, name)


@pytest.mark.slow
def test_tests_of_the_sdist_are_collected(unpacked):
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
        ],
        cwd=unpacked,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    (count,) = re.findall(r"^(\d+) tests collected", result.stdout, re.M)
    assert int(count) > 1000


@pytest.fixture
def new_user(tmp_path):
    """Environment variables of a user who has not chosen a backend."""
    chosen = ("KERAS_BACKEND", "PYTHONPATH", "GLIBC_TUNABLES")
    others = {name: value for name, value in os.environ.items() if name not in chosen}
    return {**others, "HOME": str(tmp_path), "KERAS_HOME": str(tmp_path / "keras")}


@pytest.fixture
def run(installed, new_user, tmp_path):
    """Runs an installed program in an empty directory; returns its output."""

    def run(program, *arguments):
        result = subprocess.run(
            [installed / "bin" / program, *arguments],
            cwd=tmp_path,
            env=new_user,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_installed_package_generates_with_jax_outside_the_checkout(run, installed):
    file, text, presets, backend = run("python", "-c", GENERATE).splitlines()
    assert Path(file).is_relative_to(installed)
    assert len(text) > 4
    assert presets == "7"
    assert backend == "jax"


def test_installed_commands_show_help(run):
    assert run("python", "-c", HELP).split() == list(COMMANDS)
    version = run("keras-openllama", "--version")
    assert version == f"keras-openllama {__version__}\n"


def interpreter(version):
    """Path of a working interpreter of this version, or `None`."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    paths = sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    for path in (shutil.which(f"python{version}"), *paths):
        if (
            path
            and not subprocess.run([path, "-c", ""], capture_output=True).returncode
        ):
            return path
    return None


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_newer_python_installs_compiles_and_shows_help(version, index, tmp_path):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"this machine has no Python {version}")
    environment = tmp_path / "venv"
    install(environment, index, python)
    (package,) = environment.glob("lib/python*/site-packages/keras_openllama")
    python = environment / "bin" / "python"
    compiled = [python, "-W", "error", "-m", "compileall", "-q", "-f", package]
    subprocess.run(compiled, check=True)
    # Without dependencies: help needs none.
    result = subprocess.run([python, "-c", HELP], check=True, capture_output=True)
    assert result.stdout.decode().split() == list(COMMANDS)


@pytest.mark.slow
def test_installed_generate_command_prints_the_continued_prompt(run):
    text = run("keras-openllama", "generate", "The sea", "--max-new-tokens", "4")
    assert text.startswith("The sea")
    assert len(text.strip()) > len("The sea")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_installed_commands_pretrain_finetune_and_evaluate(run, tmp_path):
    run(
        *("keras-openllama", "pretrain", "--preset", "nano", "--steps", "2"),
        *("--batch-size", "2"),
        *("--set", "sequence_length=32", "--set", "warmup_steps=1"),
        *("--set", "validation_batches=1", "--set", "sample_every=0"),
    )
    pretrained = tmp_path / "runs" / "nano"
    assert steps(pretrained) == [1, 2]
    assert (pretrained / "loss.png").exists()

    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    run(
        *("keras-openllama", "finetune", "--preset", "runs/nano"),
        *("--data", "pairs.jsonl", "--validation", "pairs.jsonl"),
        *("--lora-rank", "2", "--sequence-length", "32"),
        *("--batch-size", "4", "--epochs", "1", "--max-new-tokens", "4"),
        *("--sample-prompt", "Q: 1 and 1?", "--output", "runs/finetuned"),
    )
    finetuned = tmp_path / "runs" / "finetuned"
    assert steps(finetuned) == [1, 2]
    assert (finetuned / "adapters" / "adapter_model.safetensors").exists()

    (tmp_path / "sea.txt").write_text("The captain looked at the sea.")
    model = ["--preset", "runs/finetuned/model", "--output", "evaluation"]
    table = run("keras-openllama", "evaluate", *model, "--perplexity", "sea.txt")
    assert "bits/byte" in table
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text())


def steps(directory):
    """The steps that a run has logged."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if "loss" in record]
