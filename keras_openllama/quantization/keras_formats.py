"""Reads quantized weights in Keras's own formats, which version 0.2 saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from keras_openllama.quantization.quantized_matrix import unpack_nibbles


def is_keras_format(arrays: Sequence[np.ndarray], outputs: int) -> bool:
    """Returns whether stored arrays are in one of Keras's formats.

    Args:
        arrays: The arrays of a layer in their order in a file.
        outputs: Number of rows of the layer's matrix.

    Example:
        >>> is_keras_format([np.ones((2, 3), "int8"), np.ones(2)], outputs=2)
        True
    """
    if len(arrays) < 2 or arrays[0].dtype not in (np.int8, np.uint8):
        return False
    scales = arrays[1].shape
    return len(arrays) == 4 or len(scales) != 2 or scales[0] != outputs


def dequantize_kernel(
    arrays: Sequence[np.ndarray], shape: tuple[int, int]
) -> np.ndarray:
    """Returns the kernel of `keras.layers.EinsumDense` with `"bti,oi->bto"`.

    Args:
        arrays: The int8 kernel, its scales, and for int4 by groups the zero points and
            the groups of the inputs.
        shape: Shape `(outputs, inputs)` of the kernel.

    Returns:
        float32 array of that shape.

    Source: `keras.layers.EinsumDense` of Keras 3.15.
    """
    outputs = shape[0]
    values, scales = arrays[0], arrays[1].astype("float32")
    if values.shape == shape and scales.size == outputs and len(arrays) == 2:
        # Of int4, the first axis has the inputs, so that only int8 has this shape.
        return values / scales.reshape(outputs, 1)
    # Keras reshapes the kernel to `(inputs, outputs)` without transposing it.
    flat = _unpack(values, outputs)
    if len(arrays) == 2:
        return (flat / scales.reshape(1, outputs)).reshape(shape)
    groups = arrays[3].astype("int64")
    zeros = arrays[2].astype("float32")
    return ((flat - zeros[groups]) * scales[groups]).reshape(shape)


def dequantize_embeddings(
    arrays: Sequence[np.ndarray], shape: tuple[int, int]
) -> np.ndarray:
    """Returns the table of `keras.layers.Embedding`.

    Args:
        arrays: The int8 embeddings, their scales, and for int4 by groups the zero
            points and the groups of the columns.
        shape: Shape `(tokens, columns)` of the table.

    Returns:
        float32 array of that shape.

    Source: `keras.layers.Embedding` of Keras 3.15.
    """
    values, scales = arrays[0], arrays[1].astype("float32")
    if values.shape != shape:
        values = _unpack(values, shape[1])
    if len(arrays) == 2:
        return values / scales.reshape(-1, 1)
    groups = arrays[3].astype("int64")
    zeros = arrays[2].astype("float32")
    return (values - zeros[:, groups]) * scales[:, groups]


def stored_arrays(store: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Returns the arrays that a file has of a layer, in their order.

    Example:
        >>> [len(array) for array in stored_arrays({"0": np.ones(2), "1": np.ones(3)})]
        [2, 3]
    """
    return [np.asarray(store[name]) for name in sorted(store, key=int)]


def _unpack(packed, columns):
    """Unpacks int4 in two's complement, the first value in the low nibble."""
    nibbles = unpack_nibbles(packed.view("uint8"), columns).view("int8")
    return ((nibbles << 4) >> 4).astype("float32")
