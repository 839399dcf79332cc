"""Alternatives are extrapolated, and the fastest is compiled at full depth."""

import dataclasses

import pytest

from keras_openllama import presets
from keras_openllama.planning.alternative_plans import plan_alternatives, summary
from keras_openllama.planning.aot_compile import OutOfDeviceMemoryError
from keras_openllama.planning.execution_choice import ExecutionChoice
from keras_openllama.runs.recipe import preset_recipe

pytestmark = pytest.mark.backend_free

MESH = {"data": 4, "fsdp": 64, "model": 1}
OWN = ExecutionChoice(MESH, "products", 2)


def figures(choice, seconds, extrapolate=False):
    return {
        **dataclasses.asdict(choice),
        **{"topology": "v4:4x8x8", "fits": True, "compile_seconds": 95.0},
        **{"compute_seconds": 3.36, "matmul_seconds": 2.95, "kernel_seconds": 0.28},
        **{"step_seconds": seconds, "tokens_per_second_per_chip": 4277.4},
        **{"memory_bytes": 32 << 30, "peak_memory_bytes": 26 << 30},
        "extrapolated_from": [2, 4] if extrapolate else [],
    }


def plans(seconds):
    """Plans the neighbors of `OWN`; returns its plan, and what was compiled.

    Args:
        seconds: seconds by (`data`, whether it was extrapolated); `None` does not fit.
    """
    compiled = []

    def plan_choice(choice, extrapolate):
        key = choice.mesh["data"], extrapolate
        compiled.append(key)
        if seconds[key] is None:
            raise OutOfDeviceMemoryError("too much", 0)
        return figures(choice, seconds[key], extrapolate)

    plan = figures(OWN, 3.83)
    plan_alternatives(plan, presets.find("7b_v2"), preset_recipe("7b_v2"), plan_choice)
    return plan, compiled


def test_plan_alternatives_skips_what_cannot_win(capsys):
    plan, compiled = plans({(2, True): 4.0, (8, True): 3.9})
    assert compiled == [(2, True), (8, True)]
    reasons = [each.get("reason") for each in plan["alternatives"]]
    assert [bool(reason) for reason in reasons] == [True, True, True, False, False]
    assert plan["best"] and not any(each["best"] for each in plan["alternatives"])
    printed = capsys.readouterr().err
    assert "data 2 x fsdp 128, products, 2 with fewer layers (about 3 min left)" in (
        printed
    )
    assert "  26.0     4.000   4,277  ~" in printed


def test_plan_alternatives_compiles_the_fastest_at_full_depth():
    plan, compiled = plans({(2, True): 4.0, (8, True): 3.7, (8, False): 3.72})
    assert compiled == [(2, True), (8, True), (8, False)]
    best = plan["alternatives"][-1]
    assert best["best"] and best["step_seconds"] == 3.72 and not plan["best"]


def test_plan_alternatives_keeps_the_choice_if_the_fastest_does_not_fit():
    plan, compiled = plans({(2, True): None, (8, True): 3.7, (8, False): None})
    assert compiled == [(2, True), (8, True), (8, False)]
    assert plan["best"]
    assert [each["fits"] for each in plan["alternatives"][-2:]] == [False, False]


def test_summary_marks_extrapolated_figures():
    assert summary(figures(OWN, 3.83)) == " 26.0     3.830   4,277"
    assert summary(figures(OWN, 3.83, extrapolate=True)).endswith("~")
    assert summary({"fits": False, "reason": "too much"}) == "does not fit"
