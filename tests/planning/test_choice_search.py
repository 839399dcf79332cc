"""Choices of mesh, rematerialization and micro-batches are ranked."""

import math

import pytest

from keras_openllama import presets
from keras_openllama.planning.choice_search import on_twice_the_chips, ranked_choices
from keras_openllama.planning.cost_model import CHIPS
from keras_openllama.planning.execution_choice import ExecutionChoice
from keras_openllama.planning.step_formulas import estimate_memory
from keras_openllama.runs.recipe import preset_recipe

pytestmark = pytest.mark.backend_free


def ranked(name, chip, chips):
    return ranked_choices(presets.find(name), preset_recipe(name), CHIPS[chip], chips)


@pytest.mark.parametrize("name", ["7b", "13b"])
def test_ranked_choices_agree_with_the_recipe_for_v4(name):
    recipe = preset_recipe(name)
    best, plan = ranked(name, "v4", 256)[0], recipe.planned["256"]
    assert best.mesh == recipe.mesh_for(256)
    assert best.rematerialize == plan["rematerialize"] == "products"
    sequences = recipe.batch_size // 256 // best.micro_batches
    assert sequences == plan["sequences_per_device"]


def test_ranked_choices_use_the_memory_of_a_chip():
    def best(chip):
        return ranked("7b", chip, 256)[0]

    assert best("v5e").micro_batches == 2 * best("v4").micro_batches
    assert best("v5p").micro_batches == 1
    # States take 9 of 16 GiB: nothing else than the inputs of the layers is saved.
    assert ranked("7b", "v5e", 16)[0].rematerialize == "full"


def test_ranked_choices_are_empty_if_the_states_do_not_fit():
    assert ranked("13b", "v5e", 16) == []


def test_ranked_choices_cover_the_slice():
    choices = ranked("3b", "v6e", 64)
    assert all(math.prod(choice.mesh.values()) == 64 for choice in choices)
    assert len({str(choice) for choice in choices}) == len(choices) > 10


def test_on_twice_the_chips_keeps_the_work_and_the_memory_of_a_chip():
    choice = ExecutionChoice({"data": 2, "fsdp": 32, "model": 1}, "full", 8)
    preset, recipe = presets.find("13b"), preset_recipe("13b")
    twice = on_twice_the_chips(choice)
    assert twice.mesh == {"data": 4, "fsdp": 32, "model": 1}
    assert twice.micro_batches == 4 and twice.rematerialize == "full"
    memory = [
        estimate_memory(each, preset.config, recipe, preset.parameters)
        for each in (choice, twice)
    ]
    assert memory[0] == memory[1]
    assert on_twice_the_chips(ExecutionChoice(choice.mesh, "full", 1)) is None
