"""Memory of a step, estimated without a compilation, is close to the compiler's."""

import json

import pytest
from checkout import ROOT

from keras_openllama import presets
from keras_openllama.planning import memory_model
from keras_openllama.planning.alternatives import ExecutionChoice
from keras_openllama.runs.recipe import preset_recipe

pytestmark = pytest.mark.backend_free

COMPILED = json.loads((ROOT / "docs/tpu_plans.json").read_text())


@pytest.mark.parametrize("name", ["3b_v3 v4-64", "7b_v2 v4-512", "13b v4-128"])
def test_estimate_memory_is_close_to_a_compiled_plan(name):
    plan = COMPILED[name]
    preset, recipe = presets.find(plan["preset"]), preset_recipe(plan["preset"])
    choice = ExecutionChoice(plan["mesh"], plan["rematerialize"], plan["micro_batches"])
    found = memory_model.estimate_memory(
        choice, preset.config, recipe, preset.parameters
    )
    assert found == pytest.approx(plan["peak_memory_bytes"], rel=0.02)


@pytest.mark.parametrize("name", ["3b", "7b", "13b"])
def test_parameters_per_layer_add_up_to_the_model(name):
    preset = presets.find(name)
    config = preset.config
    layers = config["num_layers"] * memory_model.parameters_per_layer(config)
    ends = config["hidden_dim"] * (2 * config["vocabulary_size"] + 1)
    assert layers + ends == preset.parameters
