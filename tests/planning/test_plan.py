"""A run is priced on a machine without a TPU, by the compiler that a TPU would use."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

from keras_openllama.planning import alternatives
from keras_openllama.planning.aot_compile import DoesNotFit, devices_of
from keras_openllama.runs import recipe as recipes

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
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("topology", ["v4", "v3:2x2", "v4:4", "v4:2x2x", "4x8x8"])
def test_what_is_no_topology_is_refused(topology):
    with pytest.raises(ValueError, match=r"such as v4:4x8x8\. Received: '"):
        devices_of(topology)


@needs_compiler
def test_a_topology_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="'v4:3x1x1' is not known"):
        devices_of("v4:3x1x1")


SEVEN_B = {
    "vocabulary_size": 32000,
    "num_layers": 32,
    "num_query_heads": 32,
    "hidden_dim": 4096,
    "intermediate_dim": 11008,
    "head_dim": 128,
}
RECIPE = recipes.preset_recipe("7b_v2")
CHOICE = alternatives.Choice({"data": 4, "fsdp": 64, "model": 1}, "products", 2)


def changed(**changes):
    return dataclasses.replace(CHOICE, **changes)


def test_neighbours_differ_in_one_thing():
    found = alternatives.neighbours(CHOICE, SEVEN_B, RECIPE)
    assert found == [
        changed(micro_batches=4),
        changed(micro_batches=1),
        changed(rematerialize="projections"),
        changed(mesh={"data": 2, "fsdp": 128, "model": 1}),
        changed(mesh={"data": 8, "fsdp": 32, "model": 1}),
    ]


def test_neighbours_divide_the_batch():
    # A row for each chip and part, and one group of chips: there is nothing to halve.
    choice = changed(mesh={"data": 1, "fsdp": 256, "model": 1}, micro_batches=8)
    found = alternatives.neighbours(choice, SEVEN_B, RECIPE)
    assert {c.micro_batches for c in found} == {4, 8}
    assert {c.mesh["data"] for c in found} == {1, 2}


def test_what_is_kept_is_counted_by_the_policy():
    def gigabytes(**changes):
        return alternatives.kept_bytes(changed(**changes), SEVEN_B, RECIPE) / 1e9

    tokens = 4 * 2048  # Of a chip, at a time.
    states = tokens * 4096 * 2 * 32 / 1e9  # Of all layers, in bfloat16.
    assert gigabytes(rematerialize="full") == pytest.approx(states)
    assert gigabytes(rematerialize="projections") == pytest.approx(6 * states)
    wide = 2 * 11008 / 4096
    assert gigabytes() == pytest.approx((6 + wide) * states)
    assert gigabytes(micro_batches=4) == pytest.approx(gigabytes() / 2)
    assert gigabytes(rematerialize="none") > gigabytes()


def test_the_nearest_that_fits_keeps_what_it_can():
    tried = []

    def attempt(choice):
        tried.append(choice)
        if choice.micro_batches < 8:
            raise DoesNotFit("too much", 1)
        return {"tokens_per_second_per_chip": 3456.7, "peak_memory_bytes": 3 << 33}

    error = DoesNotFit("too much", 5 * 10**9)
    text = alternatives.nearest_that_fits(CHOICE, SEVEN_B, RECIPE, attempt, error)
    assert tried == [changed(micro_batches=4), changed(micro_batches=8)]
    assert "--set rematerialize=products --set micro_batches=8" in text
    assert "3,457 tokens/s/chip and 24.0 GiB" in text


def test_the_last_try_keeps_least():
    tried = []

    def attempt(choice):
        tried.append(choice)
        raise DoesNotFit("too much", 0)

    text = alternatives.nearest_that_fits(
        *(CHOICE, SEVEN_B, RECIPE, attempt), DoesNotFit("too much, it does not say", 0)
    )
    assert tried == [
        changed(micro_batches=4),
        changed(micro_batches=8),
        changed(rematerialize="full", micro_batches=8),
    ]
    assert text.startswith("No other choice")


def test_where_nothing_fits_more_chips_are_asked_for():
    error = DoesNotFit("too much", 10**12)
    text = alternatives.nearest_that_fits(CHOICE, SEVEN_B, RECIPE, None, error)
    assert text == "No other choice was found to fit; take more chips."


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
def test_a_step_is_compiled_and_priced(tmp_path, arguments, script, chips):
    path = tmp_path / "plan.json"
    precision = ["--precision", "mixed_bfloat16", "--no-alternatives"]
    topology = ["--topology", "v4:2x2x1", "--json", str(path)]
    done = run(*arguments, *precision, *topology, script=script)
    assert done.returncode == 0, done.stderr
    assert "tokens/s/chip" in done.stdout and "Planned, not run" in done.stdout
    plan = json.loads(path.read_text())
    assert plan["chips"] == chips and plan["fits"] and plan["best"]
    assert plan["alternatives"] == []
    parts = ("compute", "kernel", "exposed_collective")
    total = sum(plan[f"{part}_seconds"] for part in parts)
    assert plan["step_seconds"] == pytest.approx(total)
    assert all(plan[f"{part}_seconds"] > 0 for part in parts)
    assert 0 < plan["matmul_seconds"] < plan["compute_seconds"]
    assert plan["exposed_collective_seconds"] < plan["collective_seconds"]
    rate = plan["tokens_per_step"] / plan["step_seconds"] / chips
    assert plan["tokens_per_second_per_chip"] == pytest.approx(rate)
    assert 0 < plan["mfu"] < 1
    assert 0 < plan["peak_memory_bytes"] < plan["memory_bytes"]
    assert "splash_mha_dkv" in Path(plan["hlo"]).read_text()


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(1800)  # Minutes for each choice.
def test_a_plan_is_compared_with_its_neighbours(tmp_path):
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
    assert len(plans) == 5 and len(fitting) > 2
    assert [p["best"] for p in plans].count(True) == 1 and fastest["best"]
    assert done.stdout.count("\n* ") == 2  # The best one, and what the star says.
    assert done.stderr.count("Compiling for v4:2x2x1") == len(plans)


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_does_not_fit_says_by_how_much_and_what_would():
    kept = ["--set=rematerialize=products", "--set=micro_batches=32"]
    done = run("--preset", "7b_v2", "--topology", "v4:2x2x2", *kept)
    assert done.returncode == 2
    assert "does not fit into a chip's memory" in done.stderr
    assert "exceeds available HBM" in done.stderr
    assert "The nearest that fits: --set rematerialize=" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(HAS_COMPILER, reason="The compiler is there.")
def test_without_the_compiler_it_says_what_to_install():
    done = run("--preset", "nano", "--topology", "v4:2x2x1")
    assert done.returncode == 2
    assert "pip install 'keras-openllama[plan]'" in done.stderr
