"""`tensor_on_memory` returns tensors that share the memory of arrays."""

import keras
import ml_dtypes
import numpy as np
import pytest

from keras_openllama.backend.arrays import as_numpy, tensor_on_memory

pytestmark = pytest.mark.skipif(
    keras.config.backend() == "tensorflow", reason="JAX and PyTorch."
)


def aligned_array(dtype):
    """An array of zeros `(4, 32)` at a multiple of 64 bytes."""
    memory = np.zeros(2048, "uint8")
    start = -memory.ctypes.data % 64
    return np.ndarray((4, 32), dtype, memory.data, start)


@pytest.mark.parametrize("dtype", ["uint8", "float16", ml_dtypes.bfloat16, "float32"])
def test_tensor_on_memory_shares_it(dtype):
    array = aligned_array(dtype)
    tensor = tensor_on_memory(array)
    found = as_numpy(tensor)
    assert found.dtype == array.dtype
    assert found.ctypes.data == array.ctypes.data
    assert found.shape == (4, 32)


def test_tensor_on_memory_is_not_changed_by_donation():
    if keras.config.backend() != "jax":
        pytest.skip("JAX only.")
    import jax

    array = aligned_array("float32")
    tensor = tensor_on_memory(array)
    result = jax.jit(lambda x: x + 1, donate_argnums=0)(tensor)
    assert float(result.sum()) == 128
    assert not array.any()
