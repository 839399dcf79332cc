"""`SamplingConfig`: what it accepts, and what it converts."""

import dataclasses

import numpy as np
import pytest

from keras_openllama import SamplingConfig

pytestmark = pytest.mark.backend_free


@pytest.mark.parametrize(
    "name, value",
    [
        *(("temperature", x) for x in (-0.1, float("nan"), float("inf"), "1", True)),
        *(("top_k", x) for x in (0, -1, 2.5, "5")),
        *(("top_p", x) for x in (0, 1.1, None)),
        *(("min_p", x) for x in (-0.1, 1.1)),
        *(("repetition_penalty", x) for x in (0, -1)),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", None),
        *(("logit_bias", x) for x in ([5], {5: float("-inf")}, {-1: 1.0}, {"5": 1})),
        *(("banned_tokens", x) for x in (5, "5", [2.5], [-1])),
        *(("min_new_tokens", x) for x in (-1, 1.5)),
        *(("seed", x) for x in (-(2**63) - 1, 2**64, 0.5)),
    ],
)
def test_sampling_config_names_an_invalid_value(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must be .*Received: {name}="):
        SamplingConfig(**{name: value})


def test_sampling_config_converts_numbers_of_numpy():
    config = SamplingConfig(
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        logit_bias={np.int32(7): np.float32(2)},
        banned_tokens=np.array([4, 5]),
        seed=np.uint64(2**63),
    )
    assert config == SamplingConfig(
        0.5, 3, logit_bias={7: 2.0}, banned_tokens=(4, 5), seed=2**63
    )
    assert type(config.temperature) is float and type(config.seed) is int
    assert hash(config)


def test_sampling_config_does_not_change():
    biases = {5: 1.0}
    config = SamplingConfig(logit_bias=biases)
    biases[6] = 2.0
    assert config.logit_bias == {5: 1.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.temperature = 0.0


@pytest.mark.parametrize(
    "control",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"logit_bias": {1: 2.0}},
        {"banned_tokens": [1]},
        {"min_new_tokens": 1},
    ],
)
def test_is_plain_greedy_without_controls_only(control):
    assert SamplingConfig(temperature=0, top_k=5, top_p=0.5, seed=3).is_plain_greedy
    config = SamplingConfig(temperature=0, **control)
    assert config.is_greedy and not config.is_plain_greedy
    assert not SamplingConfig().is_greedy
