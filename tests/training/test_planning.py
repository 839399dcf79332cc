"""A run is priced on a machine without a TPU, by the compiler that a TPU would use."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keras_openllama.training import planning

pytestmark = pytest.mark.backend_free

ROOT = Path(__file__).parents[2]
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None
needs_compiler = pytest.mark.skipif(
    not HAS_COMPILER, reason="The extra `plan` is not installed."
)
FEWER_LAYERS = """
import dataclasses, sys
from keras_openllama import presets
preset = presets.find("7b_v2")
config = {**preset.config, "num_layers": 2}
presets.registry()[preset.name] = dataclasses.replace(preset, config=config)
from train import pretrain
sys.exit(pretrain.main())
"""


def run(*arguments, script=("train/pretrain.py",)):
    return subprocess.run(
        [sys.executable, *script, *arguments, "--plan"],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("topology", ["v4", "v3:2x2", "v4:4", "v4:2x2x", "4x8x8"])
def test_what_is_no_topology_is_refused(topology):
    with pytest.raises(ValueError, match=r"such as v4:4x8x8\. Received: '"):
        planning.devices_of(topology)


@needs_compiler
def test_a_topology_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="'v4:3x1x1' is not known"):
        planning.devices_of("v4:3x1x1")


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "script", "chips"),
    [
        pytest.param(["--preset", "nano"], ("train/pretrain.py",), 4, id="nano"),
        pytest.param(
            ["--preset", "7b_v2", "--batch-size", "16"],
            ("-c", FEWER_LAYERS),
            4,
            id="two layers of 7B",
            marks=pytest.mark.slow,  # A minute or two.
        ),
    ],
)
def test_a_step_is_compiled_and_priced(tmp_path, arguments, script, chips):
    path = tmp_path / "plan.json"
    precision = ["--precision", "mixed_bfloat16"]
    topology = ["--topology", "v4:2x2x1", "--json", str(path)]
    done = run(*arguments, *precision, *topology, script=script)
    assert done.returncode == 0, done.stderr
    assert "tokens/s/chip" in done.stdout and "Planned, not run" in done.stdout
    plan = json.loads(path.read_text())
    assert plan["chips"] == chips and plan["fits"]
    parts = ("compute", "kernel", "exposed_collective")
    total = sum(plan[f"{part}_seconds"] for part in parts)
    assert plan["step_seconds"] == pytest.approx(total)
    assert all(plan[f"{part}_seconds"] > 0 for part in parts)
    assert 0 < plan["matmul_seconds"] < plan["compute_seconds"]
    assert plan["exposed_collective_seconds"] <= plan["collective_seconds"]
    rate = plan["tokens_per_step"] / plan["step_seconds"] / chips
    assert plan["tokens_per_second_per_chip"] == pytest.approx(rate)
    assert 0 < plan["mfu"] < 1
    # Weights and moments are in float32, and each chip holds a quarter of them.
    assert plan["peak_memory_bytes"] > 0
    assert "splash_mha_dkv" in Path(plan["hlo"]).read_text()


@needs_compiler
@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much():
    done = run("--preset", "7b_v2", "--topology", "v4:2x2x1")
    assert done.returncode == 2
    assert "does not fit into a chip's memory" in done.stderr
    assert "exceeds available HBM" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(HAS_COMPILER, reason="The compiler is there.")
def test_without_the_compiler_it_says_what_to_install():
    done = run("--preset", "nano", "--topology", "v4:2x2x1")
    assert done.returncode == 2
    assert "pip install 'keras-openllama[plan]'" in done.stderr
