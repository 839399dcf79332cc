"""Dtype policies say how the weights of a layer are quantized."""

import keras
import pytest

from keras_openllama.quantization import WeightQuantizationPolicy
from keras_openllama.quantization.policies import MatrixFormat, matrix_format

pytestmark = pytest.mark.backend_free


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("int8", "float32"), "int8_from_float32"),
        (("int8", "float16", 32), "int8/32_from_float16"),
        (("int4", "mixed_bfloat16", 64, False), "int4/64/zeros_from_mixed_bfloat16"),
    ],
)
def test_weight_quantization_policy_is_restored_from_its_config(arguments, name):
    policy = WeightQuantizationPolicy(*arguments)
    assert policy.name == name
    copy = keras.dtype_policies.get(keras.dtype_policies.serialize(policy))
    assert type(copy) is WeightQuantizationPolicy
    assert copy == policy and matrix_format(copy) == matrix_format(policy)
    assert copy.compute_dtype == arguments[1].removeprefix("mixed_")


def test_weight_quantization_policies_differ_by_format():
    policies = [
        WeightQuantizationPolicy("int4", "float32", *rest)
        for rest in ((None,), (32,), (64,), (32, False))
    ]
    assert all(a != b for a in policies for b in policies if a is not b)


def test_matrix_format_of_policies_of_keras():
    get = keras.dtype_policies.get
    assert matrix_format(get("int8_from_bfloat16")) == MatrixFormat(8, None)
    # Their groups cannot be represented: they are converted to 8 bits.
    for name in ("int4/128_from_float32", "int4_from_float32"):
        assert matrix_format(get(name)) == MatrixFormat(8, 32)
    assert matrix_format(get("float8_from_float32")) is None
    assert matrix_format(get("float32")) is None


def test_weight_quantization_policy_rejects_other_modes():
    with pytest.raises(ValueError, match="Received: mode='float8'"):
        WeightQuantizationPolicy("float8", "float32")
    with pytest.raises(ValueError, match="8 bits have no zero points"):
        WeightQuantizationPolicy("int8", "float32", symmetric=False)
