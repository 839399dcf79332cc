"""Steps on slices whose `data` is 1 are nearly as fast as on 256 chips."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.backend_free,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="The extra `plan` is not installed.",
    ),
]

PLANS = Path(__file__).parents[2] / "docs" / "tpu_plans.json"
LAYERS = 4  # Two steps of the scan over pairs of layers.


@pytest.mark.slow
@pytest.mark.timeout(900)  # One compilation.
@pytest.mark.parametrize(("topology", "fsdp"), [("v4:2x2x2", 8), ("v4:2x2x4", 16)])
def test_estimate_cost_of_7b_on_small_slices_is_near_that_of_256_chips(topology, fsdp):
    os.environ["JAX_PLATFORMS"] = "cpu"
    from keras_openllama import presets
    from keras_openllama.planning.aot_compile import (
        compile_step_ahead_of_time,
        slice_shape,
        topology_devices,
    )
    from keras_openllama.planning.cost_model import estimate_cost
    from keras_openllama.runs.recipe import preset_recipe

    chip, devices = topology_devices(topology)
    config = presets.find("7b_v2").config
    recipe = preset_recipe("7b_v2")
    recipe = recipe.replace(
        rematerialize="products", micro_batches=recipe.batch_size // fsdp // 2
    )
    mesh = {"data": 1, "fsdp": fsdp, "model": 1}
    step = compile_step_ahead_of_time(
        {**config, "num_layers": LAYERS}, recipe, mesh, devices
    )
    cost = estimate_cost(
        step.hlo,
        chip,
        trip_counts={LAYERS // 2: config["num_layers"] // 2},
        slice_shape=slice_shape(devices),
    )
    rate = recipe.tokens_per_step / cost.step_seconds / len(devices)
    plans = json.loads(PLANS.read_text(encoding="utf-8"))
    assert rate > 0.92 * plans["7b_v2 v4-512"]["tokens_per_second_per_chip"]
