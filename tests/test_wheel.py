"""The wheel carries all that the embedded model needs, outside the checkout."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT

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
    chosen = ("KERAS_BACKEND", "PYTHONPATH")
    left = {name: value for name, value in os.environ.items() if name not in chosen}
    return {**left, "KERAS_HOME": str(tmp_path / "keras")}


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


def test_the_installed_command_generates_outside_the_checkout(
    installed, new_user, tmp_path
):
    result = subprocess.run(
        [installed / "bin" / "keras-openllama", "generate", "The sea"]
        + ["--max-new-tokens", "4"],
        cwd=tmp_path,
        env=new_user,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The sea")
    assert len(result.stdout.strip()) > len("The sea")
