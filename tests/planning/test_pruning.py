"""Alternatives that cannot win are not compiled."""

import pytest

from keras_openllama import presets
from keras_openllama.planning import pruning
from keras_openllama.planning.alternatives import ExecutionChoice
from keras_openllama.runs.recipe import preset_recipe

pytestmark = pytest.mark.backend_free

PRESET, RECIPE = presets.find("7b_v2"), preset_recipe("7b_v2")
MESH = {"data": 4, "fsdp": 64, "model": 1}
PLAN = {
    **{"mesh": MESH, "rematerialize": "products", "micro_batches": 2},
    **{"compute_seconds": 3.36, "matmul_seconds": 2.95, "kernel_seconds": 0.28},
    **{"step_seconds": 3.83, "memory_bytes": 32 << 30},
}


def skip(mesh=MESH, rematerialize="products", micro_batches=2, **changes):
    choice = ExecutionChoice(mesh, rematerialize, micro_batches)
    return pruning.reason_to_skip(choice, {**PLAN, **changes}, PRESET, RECIPE)


def test_reason_to_skip_what_does_not_fit():
    assert skip(micro_batches=1) == "it needs at least 46.7 of 32.0 GiB"
    assert skip(micro_batches=1, memory_bytes=95 << 30) is None


def test_reason_to_skip_what_recomputes_more_than_it_can_hide():
    # Gate and up again cost 15 %, and only 5 % are spent waiting for collectives.
    assert "at least 4.0" in skip(rematerialize="projections")
    assert skip(rematerialize="projections", step_seconds=4.5) is None


def test_reason_to_skip_smaller_micro_batches():
    assert "smaller micro-batches" in skip(micro_batches=4)


def test_reason_to_skip_keeps_other_meshes_and_fewer_recomputations():
    assert skip(mesh={"data": 8, "fsdp": 32, "model": 1}) is None
    own = PLAN | {"rematerialize": "full"}
    choice = ExecutionChoice(MESH, "projections", 2)
    assert pruning.reason_to_skip(choice, own, PRESET, RECIPE) is None


def test_recomputed_share_is_a_forward_pass_for_full_rematerialization():
    def share(policy):
        choice = ExecutionChoice(MESH, policy, 2)
        return pruning.recomputed_share(choice, PRESET.config)

    assert share("none") == share("products") == 0
    assert 0.13 < share("projections") < 0.15
    assert 0.25 < share("full") < 0.27  # Without the head and the last product.


def test_least_memory_is_states_and_saved_activations():
    choice = ExecutionChoice(MESH, "full", 2)
    states = 12 * PRESET.parameters // 64
    activations = 4 * 2048 * 4096 * 2 * 32
    found = pruning.least_memory(choice, PRESET.config, RECIPE, PRESET.parameters)
    assert found == states + activations
