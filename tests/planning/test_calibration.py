"""Plans are compared with published runs, and say what to expect of a new one."""

import importlib.util
import json
import math
import re
import sys

import numpy as np
import pytest
import scipy.stats
from checkout import ROOT

from keras_openllama.planning import calibration
from keras_openllama.planning.cost_model import CHIPS

pytestmark = pytest.mark.backend_free

POINTS = calibration.calibration_points()
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or not importlib.util.find_spec("optax"),
    reason="The extras `plan` and `train` are not installed.",
)


def point(measured, seconds, topology="v4:2x2x1"):
    """A point whose step has 1,000 tokens."""
    values = dict.fromkeys(calibration.CalibrationPoint.__dataclass_fields__)
    values |= {"sequences_per_chip": 2, "sequence_length": 500, "measured": measured}
    values["topology"] = topology
    return calibration.CalibrationPoint(**values | {"seconds": seconds})


def test_calibration_point_compares_measured_and_estimated_speed():
    found = point(400, {"matmul_seconds": 1.5, "kernel_seconds": 0.5})
    assert found.estimated == 500
    assert found.ratio == pytest.approx(0.8)


def test_calibration_factor_is_a_mean_with_its_prediction_interval():
    ratios = {"v4:2x2x1": (1.0, 2.0), "v5e:2x2": (3.0, 6.0), "v5p:2x2x1": (0.5,)}
    points = tuple(
        point(ratio * 1000, {"step": 1.0}, topology)
        for topology, chip_ratios in ratios.items()
        for ratio in chip_ratios
    )
    # The deviation within chips, whose means take one degree of freedom each.
    pooled = math.log(2) * math.sqrt((1 / 4 + 1 / 4 + 1 / 4 + 1 / 4) / 2)
    factor = calibration.calibration_factor("v4", points)
    width = scipy.stats.t.ppf(0.9, 2) * pooled * math.sqrt(1 + 1 / 2)
    assert factor.expected == pytest.approx(math.sqrt(2))
    assert factor.low == pytest.approx(math.sqrt(2) * math.exp(-width))
    assert factor.high == pytest.approx(math.sqrt(2) * math.exp(width))
    # A single run is no evidence for its chip: the mean and the deviation of all.
    logs = np.log([1, 2, 3, 6, 0.5])
    width = scipy.stats.t.ppf(0.9, 4) * logs.std(ddof=1) * math.sqrt(1 + 1 / 5)
    for chip in ("v5p", "v6e", None):
        factor = calibration.calibration_factor(chip, points)
        assert factor.expected == pytest.approx(math.exp(logs.mean()))
        assert factor.low == pytest.approx(math.exp(logs.mean() - width))
        assert factor.high == pytest.approx(math.exp(logs.mean() + width))


def test_points_for_chip_are_those_of_the_factor():
    on_v4 = calibration.points_for_chip("v4")
    ratios = [each.ratio for each in on_v4]
    assert {each.chip for each in on_v4} == {"v4"} and len(on_v4) >= 2
    factor = calibration.calibration_factor("v4")
    assert factor.expected == pytest.approx(scipy.stats.gmean(ratios))
    assert calibration.points_for_chip("v5p", POINTS[:3]) == POINTS[:3]


def test_expected_figures_scale_the_estimate():
    factor = calibration.calibration_factor("v4")
    plan = {"tokens_per_second_per_chip": 2000, "mfu": 0.5, "days": 9, "chips": 4}
    figures = calibration.expected_figures({**plan, "topology": "v4:2x2x1"})
    speed = "expected_tokens_per_second_per_chip"
    assert figures[speed] == pytest.approx(2000 * factor.expected)
    assert figures[f"{speed}_low"] == pytest.approx(2000 * factor.low)
    assert figures[f"{speed}_high"] == pytest.approx(2000 * factor.high)
    assert figures["expected_mfu"] == pytest.approx(0.5 * factor.expected)
    assert figures["expected_days"] == pytest.approx(9 / factor.expected)
    # The fastest run is the shortest.
    assert figures["expected_days_low"] == pytest.approx(9 / factor.high)
    assert figures["expected_days_high"] == pytest.approx(9 / factor.low)
    assert len(figures) == 9


def test_calibration_points_are_complete():
    assert len({each.name for each in POINTS}) == len(POINTS) >= 8
    for each in POINTS:
        chip, _, shape = each.topology.partition(":")
        chips = math.prod(map(int, shape.split("x")))
        assert chip in CHIPS and math.prod(each.mesh.values()) == chips
        assert set(each.seconds) == {
            *("matmul_seconds", "other_seconds", "kernel_seconds", "exposed_seconds")
        }
        assert each.source.startswith("https://") and len(each.differences.split()) > 2
        assert 0.5 < each.ratio < 1.5


def test_docs_show_the_calibration_points_and_the_factor():
    page = (ROOT / "docs" / "tpu_plans.md").read_text(encoding="utf-8")
    for each in POINTS:
        assert (
            f"| {each.measured:,.0f} | {each.estimated:,.0f} | {each.ratio:.2f} |"
            in page
        )
    for chip in (*CHIPS, None):
        factor = calibration.calibration_factor(chip)
        for ratio in (factor.low, factor.expected, factor.high):
            assert f"{ratio:.2f}" in page


def test_docs_show_the_expected_figures_of_each_plan():
    page = (ROOT / "docs" / "tpu_plans.md").read_text(encoding="utf-8")
    plans = json.loads((ROOT / "docs" / "tpu_plans.json").read_text(encoding="utf-8"))
    for plan in plans.values():
        if "reason" in plan:
            continue
        figures = calibration.expected_figures(plan)
        name = "expected_tokens_per_second_per_chip"
        speed, low, high = (figures[name + end] for end in ("", "_low", "_high"))
        assert f"| {speed:,.0f} ({low:,.0f} to {high:,.0f}) |" in page


@pytest.mark.parametrize(
    "name", ["README.md", "docs/pretraining.md", "docs/results.md", "docs/tpu.md"]
)
def test_docs_repeat_the_expected_figures_of_the_plans(name):
    page = (ROOT / "docs" / "tpu_plans.md").read_text(encoding="utf-8")
    text = (ROOT / name).read_text(encoding="utf-8")
    figures = re.findall(r"[\d.,]+%? \([\d.,]+%? to [\d.,]+%?\)", text)
    assert figures and [each for each in figures if f"| {each} |" not in page] == []


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(1800)  # Minutes on two cores.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("MaxText 32B, v5e-256", id="step of MaxText"),
        pytest.param("MaxText Llama 3.1 8B, v6e-256", id="step of this package"),
    ],
)
def test_calibration_point_has_the_speed_that_the_cost_model_estimates(
    name, monkeypatch
):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
    from calibration.estimate import estimate_seconds

    (saved,) = (each for each in POINTS if each.name == name)
    seconds = estimate_seconds(saved)
    assert sum(seconds.values()) == pytest.approx(sum(saved.seconds.values()), rel=0.02)
