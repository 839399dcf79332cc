"""The sizes of weights are those of models in memory."""

import pytest
from tiny_models import SHAPES, random_lm

from keras_openllama import presets
from keras_openllama.checkpoints.weight_sizes import weight_bytes

pytestmark = pytest.mark.backend_free


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=str)
def test_weight_bytes_are_those_of_the_variables(shape, mode):
    lm = random_lm(shape, dtype="bfloat16")
    if mode:
        lm.quantize(mode)
    expected = sum(weight.value.nbytes for weight in lm.weights)
    assert weight_bytes(lm.backbone.architecture())[mode or "bfloat16"] == expected


def test_7b_in_int4_fits_into_8_gb():
    sizes = weight_bytes(presets.find("open_llama_7b_v2").config)
    assert sizes["int4"] < 4.0e9 < sizes["int8"] < 7.0e9
