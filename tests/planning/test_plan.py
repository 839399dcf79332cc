"""A run is planned with the TPU compiler on a machine without a TPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

from keras_openllama.distribution import OpenLlamaParallel, make_mesh
from keras_openllama.planning.aot_compile import topology_devices
from keras_openllama.planning.plan import plan_pretraining
from keras_openllama.runs.recipe import resolve_recipe
from keras_openllama.training.train_step_jax import (
    TrainStepOptions,
    options_for_devices,
)

pytestmark = pytest.mark.backend_free

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
        env={
            **os.environ,
            "KERAS_BACKEND": "jax",
            "XDG_CACHE_HOME": os.environ["TESTS_COMPILATION_CACHE"],
        },
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("topology", ["v4", "v3:2x2", "v4:4", "v4:2x2x", "4x8x8"])
def test_topology_devices_rejects_an_invalid_string(topology):
    with pytest.raises(ValueError, match=r"such as v4:4x8x8\. Received: '"):
        topology_devices(topology)


@needs_compiler
def test_topology_devices_rejects_an_unsupported_shape():
    with pytest.raises(ValueError, match="does not support topology='v4:3x1x1'"):
        topology_devices("v4:3x1x1")


@needs_compiler
@pytest.mark.parametrize(
    ("topology", "expected"),
    [("v4:2x2x2", True), ("v5p:2x2x2", True), ("v5e:4x4", False), ("v6e:4x4", False)],
)
def test_options_for_devices_reduce_by_all_to_alls_where_they_overlap(
    topology, expected
):
    _, devices = topology_devices(topology)
    distribution = OpenLlamaParallel(make_mesh(fsdp=len(devices), devices=devices))
    options = options_for_devices(TrainStepOptions(), distribution)
    assert options.all_to_all == expected


@needs_compiler
def test_plan_pretraining_rejects_a_mesh_of_another_number_of_chips():
    mesh = {"data": 3, "fsdp": 1, "model": 1}
    expected = r"8 chips of v4:2x2x2\. Received: data 3 x fsdp 1 x model 1$"
    with pytest.raises(ValueError, match=expected):
        plan_pretraining(resolve_recipe("nano"), "v4:2x2x2", mesh)


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "script", "chips"),
    [
        pytest.param(["--preset", "nano"], ("train/pretrain.py",), 4, id="nano"),
        pytest.param(
            ["--preset", "7b_v2", "--batch-size", "16", "--set=rematerialize=products"],
            ("-c", FEWER_LAYERS),
            4,
            id="two layers of 7B",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.timeout(1800)
def test_plan_compiles_a_step_and_estimates_its_cost(
    tmp_path, arguments, script, chips
):
    path = tmp_path / "plan.json"
    precision = ["--precision", "mixed_bfloat16", "--no-alternatives"]
    topology = ["--topology", "v4:2x2x1", "--json", str(path), "--price", "2.5"]
    done = run(*arguments, *precision, *topology, script=script)
    assert done.returncode == 0, done.stderr
    assert "tokens/s/chip" in done.stdout and "Estimated, not measured" in done.stdout
    plan = json.loads(path.read_text())
    assert plan["chips"] == chips and plan["fits"] and plan["best"]
    for end in ("", "_low", "_high"):
        price = 2.5 * plan[f"expected_chip_hours{end}"]
        assert plan[f"expected_price{end}"] == pytest.approx(price)
    assert f"{plan['expected_price']:,.0f} (" in done.stdout
    assert "dollars at 2.5 per chip-hour" in done.stdout
    assert plan["alternatives"] == [] and plan["extrapolated_from"] == []
    described = (ROOT / "docs" / "tpu.md").read_text(encoding="utf-8")
    names = {name.removesuffix("_low").removesuffix("_high") for name in plan}
    assert {name for name in names if f"`{name}`" not in described} == set()
    parts = ("compute", "kernel", "exposed_collective")
    total = sum(plan[f"{part}_seconds"] for part in parts)
    assert plan["step_seconds"] == pytest.approx(total)
    assert all(plan[f"{part}_seconds"] > 0 for part in parts)
    assert 0 < plan["matmul_seconds"] < plan["compute_seconds"]
    assert plan["exposed_collective_seconds"] < plan["collective_seconds"]
    assert plan["uncosted_bytes"]["copy-done"] > 0
    rate = plan["tokens_per_step"] / plan["step_seconds"] / chips
    assert plan["tokens_per_second_per_chip"] == pytest.approx(rate)
    assert 0 < plan["mfu"] < 1
    assert 0 < plan["peak_memory_bytes"] < plan["memory_bytes"]
    hlo = Path(plan["hlo"]).read_text()
    assert "splash_mha_dkv" in hlo
    # Gradients of the layers are reduced while something else is computed.
    assert plan["mesh"]["data"] == 1 and "all-to-all-start(" in hlo


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(1800)  # Minutes per choice.
def test_plan_is_compared_with_alternatives(tmp_path):
    path = tmp_path / "plan.json"
    arguments = ["--preset", "7b_v2", "--batch-size", "32", "--json", str(path)]
    choice = ["--set=rematerialize=products", "--set=micro_batches=4"]
    topology = ["--topology", "v4:2x2x1"]
    done = run(*arguments, *choice, *topology, script=("-c", FEWER_LAYERS))
    assert done.returncode == 0, done.stderr
    plan = json.loads(path.read_text())
    plans = [plan, *plan["alternatives"]]
    fitting = [p for p in plans if p["fits"]]
    fastest = min(fitting, key=lambda p: p["step_seconds"])
    compiled = [p for p in plans if p["fits"] is not None]
    assert len(plans) == 5 and len(fitting) > 1
    assert [p["best"] for p in plans].count(True) == 1 and fastest["best"]
    assert done.stdout.count("\n* ") == 2  # The best one, and the legend.
    assert done.stdout.count("skipped: ") == len(plans) - len(compiled) > 0
    assert done.stderr.count("Compiling for v4:2x2x1") == len(compiled)


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_plan_that_does_not_fit_reports_excess_and_suggests_another():
    settings = ["--set=rematerialize=products", "--set=micro_batches=32"]
    done = run("--preset", "7b_v2", "--topology", "v4:2x2x2", *settings)
    assert done.returncode == 2
    assert "does not fit into a chip's memory" in done.stderr
    assert "exceeds available HBM" in done.stderr
    assert "The nearest choice that fits is --set rematerialize=" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(HAS_COMPILER, reason="The TPU compiler is installed.")
def test_plan_without_the_compiler_names_the_extra_to_install():
    done = run("--preset", "nano", "--topology", "v4:2x2x1")
    assert done.returncode == 2
    assert "pip install 'keras-openllama[plan]'" in done.stderr
