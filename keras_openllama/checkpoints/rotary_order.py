"""The order of the rows of query and key kernels, which differs between formats.

Rotary embedding rotates pairs of elements of a head. In this package and transformers,
the two elements of a pair are half a head apart (half-split). In EasyLM and GGUF they
are adjacent (interleaved).
"""

from numpy.typing import NDArray

from keras_openllama.checkpoints.array_io import contiguous


def interleaved_to_half_split(kernel: NDArray, head_dim: int) -> NDArray:
    """Reorders the rows of each head from interleaved to half-split rotary pairs.

    Interleaved rows are `[x0, y0, x1, y1, …]`, where `(xi, yi)` is a rotary pair.
    Half-split rows are `[x0, x1, …, y0, y1, …]`.

    Args:
        kernel: Kernel of queries or keys, its rows interleaved, of shape
            `(num_heads * head_dim, inputs)`.
        head_dim: Size of a head. Must be even.

    Returns:
        Array of the same shape in the order of the Keras variables.

    Example:
        >>> import numpy as np
        >>> interleaved_to_half_split(np.arange(6)[:, None], head_dim=6)[:, 0].tolist()
        [0, 2, 4, 1, 3, 5]
    """
    outputs, inputs = kernel.shape
    pairs = contiguous(kernel).reshape(-1, head_dim // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(outputs, inputs)


def half_split_to_interleaved(kernel: NDArray, head_dim: int) -> NDArray:
    """Reorders the rows of each head from half-split to interleaved rotary pairs.

    This is the inverse of `interleaved_to_half_split`.

    Args:
        kernel: Kernel of queries or keys in the order of the Keras variables, of shape
            `(num_heads * head_dim, inputs)`.
        head_dim: Size of a head. Must be even.

    Returns:
        Array of the same shape, its rows interleaved.

    Example:
        >>> import numpy as np
        >>> half_split_to_interleaved(np.arange(6)[:, None], head_dim=6)[:, 0].tolist()
        [0, 3, 1, 4, 2, 5]
    """
    outputs, inputs = kernel.shape
    halves = contiguous(kernel).reshape(-1, 2, head_dim // 2, inputs)
    return halves.swapaxes(1, 2).reshape(outputs, inputs)
