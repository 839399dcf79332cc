"""Memory and FLOPs of a step by formulas are close to those of compiled steps."""

import dataclasses
import json

import pytest
from checkout import ROOT

from keras_openllama import presets
from keras_openllama.planning import step_formulas
from keras_openllama.planning.execution_choice import ExecutionChoice
from keras_openllama.runs.recipe import preset_recipe

pytestmark = pytest.mark.backend_free

PRESET, RECIPE = presets.find("7b_v2"), preset_recipe("7b_v2")
CHOICE = ExecutionChoice({"data": 4, "fsdp": 64, "model": 1}, "products", 2)
COMPILED = json.loads((ROOT / "docs/tpu_plans.json").read_text())


@pytest.mark.parametrize(
    "name",
    [
        *("3b_v3 v4-16", "3b_v3 v4-64", "7b_v2 v4-16", "7b_v2 v4-32", "7b_v2 v4-512"),
        *("13b v4-32", "13b v4-128"),
    ],
)
def test_estimate_memory_is_close_to_a_compiled_plan(name):
    plan = COMPILED[name]
    preset, recipe = presets.find(plan["preset"]), preset_recipe(plan["preset"])
    choice = ExecutionChoice(plan["mesh"], plan["rematerialize"], plan["micro_batches"])
    found = step_formulas.estimate_memory(
        choice, preset.config, recipe, preset.parameters
    )
    assert found == pytest.approx(plan["peak_memory_bytes"], rel=0.02)


@pytest.mark.parametrize("name", ["3b", "7b", "13b"])
def test_parameters_per_layer_add_up_to_the_model(name):
    preset = presets.find(name)
    config = preset.config
    layers = config["num_layers"] * step_formulas.parameters_per_layer(config)
    ends = config["hidden_dim"] * (2 * config["vocabulary_size"] + 1)
    assert layers + ends == preset.parameters


def test_saved_activation_bytes_depend_on_the_policy():
    def gigabytes(**changes):
        return (
            step_formulas.saved_activation_bytes(
                dataclasses.replace(CHOICE, **changes), PRESET.config, RECIPE
            )
            / 1e9
        )

    tokens = 4 * 2048  # Per chip and micro-batch.
    states = tokens * 4096 * 2 * 32 / 1e9  # One hidden state per layer, in bfloat16.
    assert gigabytes(rematerialize="full") == pytest.approx(states)
    assert gigabytes(rematerialize="projections") == pytest.approx(6 * states)
    wide = 2 * 11008 / 4096
    assert gigabytes() == pytest.approx((6 + wide) * states)
    assert gigabytes(micro_batches=4) == pytest.approx(gigabytes() / 2)
    assert gigabytes(rematerialize="none") > gigabytes()


def test_recomputed_share_is_a_forward_pass_for_full_rematerialization():
    def share(policy):
        choice = dataclasses.replace(CHOICE, rematerialize=policy)
        return step_formulas.recomputed_share(choice, PRESET.config)

    assert share("none") == share("products") == 0
    assert 0.13 < share("projections") < 0.15
    assert 0.25 < share("full") < 0.27  # Without the head and the last product.


def test_layer_memory_is_states_and_saved_activations():
    choice = dataclasses.replace(CHOICE, rematerialize="full")
    states = 12 * PRESET.parameters // 64
    activations = 4 * 2048 * 4096 * 2 * 32
    found = step_formulas.layer_memory(
        *(choice, PRESET.config, RECIPE, PRESET.parameters), step_formulas.STATE_BYTES
    )
    assert found == states + activations
