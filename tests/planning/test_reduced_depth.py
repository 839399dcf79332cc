"""A step of many layers is extrapolated from two of few."""

import importlib.util
import os

import pytest

from keras_openllama.planning.cost_model import StepCost
from keras_openllama.planning.reduced_depth import extrapolate

pytestmark = pytest.mark.backend_free


def test_extrapolate_is_linear_in_the_depth():
    assert extrapolate((3.0, 5.0), (2, 4), 32) == 33.0
    assert extrapolate((3, 4), (2, 4), 5) == 4  # An integer: 4.5, rounded to even.
    assert extrapolate((5.0, 1.0), (2, 4), 32) == 0.0


def test_extrapolate_adds_up_the_parts_of_a_cost():
    shallow = StepCost(1.0, 2.0, 3.0, {"all-gather": 4.0}, 5.0, {"copy": 6})
    deep = StepCost(2.0, 2.0, 5.0, {"all-gather": 5.0, "all-reduce": 1.0}, 6.0, {})
    cost = extrapolate((shallow, deep), (2, 4), 6)
    assert cost == StepCost(
        *(3.0, 2.0, 7.0, {"all-gather": 6.0, "all-reduce": 2.0}, 7.0, {"copy": 0})
    )
    assert cost.step_seconds == 19.0


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="The extra `plan` is not installed.",
)
@pytest.mark.slow
@pytest.mark.timeout(1800)  # Three compilations.
# With `data` of 1, a step of the scan has two layers.
@pytest.mark.parametrize(("data", "fsdp"), [(2, 4), (1, 8)])
def test_step_estimator_extrapolates_to_full_depth(data, fsdp):
    os.environ["JAX_PLATFORMS"] = "cpu"
    from keras_openllama.planning.aot_compile import topology_devices
    from keras_openllama.planning.execution_choice import ExecutionChoice
    from keras_openllama.planning.step_estimate import StepEstimator
    from keras_openllama.runs.recipe import preset_recipe

    chip, devices = topology_devices("v4:2x2x2")
    config = {
        **{"vocabulary_size": 32000, "num_layers": 12, "num_query_heads": 8},
        **{"hidden_dim": 1024, "intermediate_dim": 2816},
    }
    recipe = preset_recipe("7b").replace(batch_size=64)
    estimator = StepEstimator(config, recipe, chip, devices)
    choice = ExecutionChoice({"data": data, "fsdp": fsdp, "model": 1}, "products", 2)
    full, extrapolated = estimator.compiled(choice), estimator.extrapolated(choice)
    assert extrapolated.depths == (4, 8) and full.depths == ()
    assert extrapolated.parameters == full.parameters
    assert extrapolated.cost.step_seconds == pytest.approx(
        full.cost.step_seconds, rel=0.03
    )
    assert extrapolated.peak_memory == pytest.approx(full.peak_memory, rel=0.03)
