"""The layout of quantized matrices for ONNX Runtime's `MatMulNBits`."""

import numpy as np
import onnxruntime
import pytest

from keras_openllama.generation.onnx_runtime.file import (
    GRAPH_FILE,
    MICROSOFT,
    OnnxGraph,
    Weight,
)
from keras_openllama.generation.onnx_runtime.matrices import (
    JoinedMatrix,
    can_be_joined,
    runtime_group_size,
)
from keras_openllama.quantization.rounding import quantize_matrix

pytestmark = pytest.mark.backend_free


def random_matrix(outputs, inputs, bits, group_size, symmetric=True):
    weights = np.random.default_rng(0).normal(0.1, 1, (outputs, inputs))
    return quantize_matrix(weights.astype("float32"), bits, group_size, symmetric)


def multiply(joined, x, directory):
    """The product by ONNX Runtime, without rounding of `x`."""
    graph = OnnxGraph()
    inputs = [graph.input("x", "float32", ["rows", joined.shape[1]])]
    for name in (
        ("values", "scales", "zeros") if joined.has_zeros else ("values", "scales")
    ):
        array = getattr(joined, name)()
        assert array.shape == getattr(joined, f"{name}_shape")
        inputs.append(graph.weight(name, Weight.of(array)))
    outputs, columns = joined.shape
    graph.add(
        *("MatMulNBits", inputs, "y", MICROSOFT),
        K=columns,
        N=outputs,
        bits=joined.bits,
        block_size=joined.group_size,
        accuracy_level=1,
    )
    graph.output("y", "float32", ["rows", outputs])
    graph.save(directory, "a product")
    session = onnxruntime.InferenceSession(str(directory / GRAPH_FILE))
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("bits, symmetric", [(8, True), (4, True), (4, False)])
@pytest.mark.parametrize("group_size", [None, 16, 32, 64, 512, 96])
@pytest.mark.parametrize("inputs", [100, 1024])
def test_joined_matrix_multiplies_as_the_quantized_matrices(
    bits, symmetric, group_size, inputs, tmp_path
):
    matrices = [
        random_matrix(outputs, inputs, bits, group_size, symmetric)
        for outputs in (6, 10)
    ]
    assert can_be_joined(matrices)
    x = np.random.default_rng(1).normal(size=(3, inputs)).astype("float32")
    expected = x @ np.concatenate([matrix.dequantize() for matrix in matrices]).T
    found = multiply(JoinedMatrix(matrices), x, tmp_path)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("bits, symmetric", [(8, True), (4, True), (4, False)])
def test_joined_matrix_selects_rows_and_adds_zeros(bits, symmetric, tmp_path):
    matrix = random_matrix(5, 64, bits, 32, symmetric)
    rows = np.array([3, -1, 0, 4, -1])
    x = np.random.default_rng(1).normal(size=(2, 64)).astype("float32")
    expected = np.where(rows < 0, 0, (x @ matrix.dequantize().T)[:, rows])
    found = multiply(JoinedMatrix([matrix], rows), x, tmp_path)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert (found[:, rows < 0] == 0).all()


@pytest.mark.parametrize(
    "group_size, expected",
    [(None, 128), (16, 16), (96, 32), (512, 256), (100, None), (8, None)],
)
def test_runtime_group_size_divides_the_groups(group_size, expected):
    assert runtime_group_size(random_matrix(2, 1024, 8, group_size)) == expected


def test_can_be_joined_compares_formats():
    four, eight = (random_matrix(2, 64, bits, 32) for bits in (4, 8))
    assert can_be_joined([four, four])
    assert not can_be_joined([four, eight])
    assert not can_be_joined([four, random_matrix(2, 64, 4, 16)])
    assert not can_be_joined([four, random_matrix(2, 64, 4, 32, symmetric=False)])
