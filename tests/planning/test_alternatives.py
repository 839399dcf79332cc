"""Alternatives to a choice: its neighbors, which cannot win, and which fits."""

import dataclasses

import pytest

from keras_openllama import presets
from keras_openllama.planning import alternatives
from keras_openllama.planning.aot_compile import OutOfDeviceMemoryError
from keras_openllama.planning.execution_choice import ExecutionChoice
from keras_openllama.runs.recipe import preset_recipe

pytestmark = pytest.mark.backend_free

PRESET, RECIPE = presets.find("7b_v2"), preset_recipe("7b_v2")
CHOICE = ExecutionChoice({"data": 4, "fsdp": 64, "model": 1}, "products", 2)


def changed(**changes):
    return dataclasses.replace(CHOICE, **changes)


def test_neighboring_choices_differ_in_one_value():
    found = alternatives.neighboring_choices(CHOICE, PRESET.config, RECIPE)
    assert found == [
        changed(micro_batches=4),
        changed(micro_batches=1),
        changed(rematerialize="projections"),
        changed(mesh={"data": 2, "fsdp": 128, "model": 1}),
        changed(mesh={"data": 8, "fsdp": 32, "model": 1}),
    ]


def test_neighboring_choices_divide_the_batch():
    # One sequence per chip and micro-batch, and `data` is 1: neither can be halved.
    choice = changed(mesh={"data": 1, "fsdp": 256, "model": 1}, micro_batches=8)
    found = alternatives.neighboring_choices(choice, PRESET.config, RECIPE)
    assert {c.micro_batches for c in found} == {4, 8}
    assert {c.mesh["data"] for c in found} == {1, 2}


PLAN = {
    **{"mesh": CHOICE.mesh, "rematerialize": "products", "micro_batches": 2},
    **{"compute_seconds": 3.36, "matmul_seconds": 2.95, "kernel_seconds": 0.28},
    **{"step_seconds": 3.83, "memory_bytes": 32 << 30},
}


def skip(mesh=CHOICE.mesh, rematerialize="products", micro_batches=2, **changes):
    choice = ExecutionChoice(mesh, rematerialize, micro_batches)
    return alternatives.reason_to_skip(choice, {**PLAN, **changes}, PRESET, RECIPE)


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
    choice = ExecutionChoice(CHOICE.mesh, "projections", 2)
    assert alternatives.reason_to_skip(choice, own, PRESET, RECIPE) is None


def test_suggest_choice_that_fits_returns_the_nearest():
    tried = []

    def plan_choice(choice):
        tried.append(choice)
        if choice.micro_batches < 8:
            raise OutOfDeviceMemoryError("too much", 1)
        return {"tokens_per_second_per_chip": 3456.7, "peak_memory_bytes": 3 << 33}

    error = OutOfDeviceMemoryError("too much", 5 * 10**9)
    text = alternatives.suggest_choice_that_fits(
        CHOICE, PRESET.config, RECIPE, plan_choice, error
    )
    assert tried == [changed(micro_batches=4), changed(micro_batches=8)]
    assert "--set rematerialize=products --set micro_batches=8" in text
    assert "3,457 tokens/s/chip and 24.0 GiB" in text


def test_suggest_choice_that_fits_tries_the_least_memory_last():
    tried = []

    def plan_choice(choice):
        tried.append(choice)
        raise OutOfDeviceMemoryError("too much", 0)

    text = alternatives.suggest_choice_that_fits(
        *(CHOICE, PRESET.config, RECIPE, plan_choice),
        OutOfDeviceMemoryError("too much, by an unknown amount", 0),
    )
    assert tried == [
        changed(micro_batches=4),
        changed(micro_batches=8),
        changed(rematerialize="full", micro_batches=8),
    ]
    assert text.startswith("No other choice")


def test_suggest_choice_that_fits_recommends_more_chips_if_none_fits():
    error = OutOfDeviceMemoryError("too much", 10**12)
    text = alternatives.suggest_choice_that_fits(
        CHOICE, PRESET.config, RECIPE, None, error
    )
    assert text == "No other choice was found that fits. Use more chips."
