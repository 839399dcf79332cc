"""Rotary position embedding, in the half-split layout of transformers.

Dimension `i` of a head is rotated together with dimension `i + head_dim / 2`. (EasyLM
pairs adjacent dimensions instead; only the EasyLM checkpoint format depends on that.)

Sources: RoFormer (arXiv:2104.09864); `rotate_half` in `huggingface/transformers`,
`models/llama/modeling_llama.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_openllama.config import check_rope_scaling
from keras_openllama.utils.types import Shape, Tensor

if keras.config.backend() == "jax":
    import jax
elif keras.config.backend() == "torch":
    from keras_openllama.layers.rotation_torch import (
        compiled_rotate,
        is_rotation_compiled,
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each head vector by the angles of its position.

    Args:
        x: Float tensor `(batch, heads, length, head_dim)`.
        cos: float32 tensor `(batch or 1, 1, length, head_dim / 2)`.
        sin: float32 tensor of the shape of `cos`.

    Returns:
        Tensor of the shape and dtype of `x`. The rotation is computed in float32.

    Example:
        >>> x = ops.array([[[[1.0, 0.0]]]])  # A head of size 2, rotated by 90 degrees.
        >>> rotate(x, ops.zeros((1, 1, 1, 1)), ops.ones((1, 1, 1, 1))).tolist()
        [[[[0.0, 1.0]]]]
    """
    if keras.config.backend() == "jax":
        return _rotate_on_platform()(x, cos, sin)
    if keras.config.backend() == "torch" and is_rotation_compiled(x):
        return compiled_rotate(x, cos, sin)
    return _rotate(x, cos, sin)


@functools.cache
def _rotate_on_platform():
    """The implementation is chosen at compilation, by the platform of the program."""
    return jax.jit(
        lambda *operands: jax.lax.platform_dependent(
            *operands, tpu=_rotate_by_product, default=_rotate
        )
    )


def _rotate(x, cos, sin):
    first, second = ops.split(ops.cast(x, "float32"), 2, axis=-1)
    rotated = ops.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return ops.cast(rotated, x.dtype)


def _rotate_by_product(x, cos, sin):
    """`_rotate` that swaps the halves of a head by a matrix product, for TPUs.

    Slicing the halves on a TPU makes float32 copies, which take as long as the
    projection (`docs/tpu.md`). A product with a matrix of 0, 1 and -1 is exact.
    """
    half = x.shape[-1] // 2
    eye, zeros = np.eye(half), np.zeros((half, half))
    swap = np.block([[zeros, eye], [-eye, zeros]])  # (first, second) @ swap
    swapped = jax.numpy.matmul(
        x, swap.astype(x.dtype), precision="highest", preferred_element_type="float32"
    )
    cos, sin = (ops.concatenate([table, table], axis=-1) for table in (cos, sin))
    return ops.cast(ops.cast(x, "float32") * cos + swapped * sin, x.dtype)


@functools.cache
def _tables_on_platform():
    """The implementation is chosen at compilation, by the platform of the program."""
    return jax.jit(
        lambda angles: jax.lax.platform_dependent(
            angles, cpu=_tables_in_loop, default=lambda x: (ops.cos(x), ops.sin(x))
        )
    )


def _tables_in_loop(angles):
    """XLA on a CPU would recompute the tables for each head vector, but not a loop."""
    return tuple(
        jax.lax.map(
            lambda is_sine: ops.where(is_sine, ops.sin(angles), ops.cos(angles)),
            ops.array([False, True]),
        )
    )


@keras.saving.register_keras_serializable(package="keras_openllama")
class RotaryEmbedding(keras.layers.Layer):
    """Computes the cosines and sines of the rotary angles, once for all layers.

    Args:
        head_dim: int, even, size of an attention head.
        max_wavelength: float, the base of the frequencies ("RoPE theta").
        scaling: `None` or a dict, see `config.check_rope_scaling`. `"linear"` divides
            positions by the factor. `"dynamic"` (dynamic NTK) raises the base for
            sequences longer than `max_sequence_length`, with the formula of
            transformers, but once per sequence, from its final length. So all keys of a
            sequence use one base, however they reached the cache.
        max_sequence_length: int, context length that the weights were trained with.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        positions: int tensor `(batch or 1, length)`.
        final_lengths: int tensor `(batch,)`, the final length of each sequence, prompt
            and generated tokens. Only `"dynamic"` scaling uses it.

    Returns:
        `(cos, sin)`, float32 tensors `(batch or 1, 1, length, head_dim / 2)`.

    Raises:
        ValueError: if `head_dim` is odd or `scaling` is invalid.

    Example:
        >>> cos, sin = RotaryEmbedding(head_dim=100)(ops.arange(8)[None])
        >>> cos.shape
        (1, 1, 8, 50)

    Sources: linear scaling, arXiv:2306.15595; dynamic NTK,
    `_compute_dynamic_ntk_parameters` in `huggingface/transformers`,
    `modeling_rope_utils.py`.
    """

    def __init__(
        self,
        head_dim: int,
        max_wavelength: float = 10000.0,
        scaling: dict[str, Any] | None = None,
        max_sequence_length: int = 2048,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        if head_dim % 2:
            raise ValueError(
                "`head_dim` must be even: rotary embedding pairs its two halves. "
                f"Received: head_dim={head_dim}"
            )
        self.head_dim = head_dim
        self.max_wavelength = max_wavelength
        self.scaling = check_rope_scaling(scaling)
        self.max_sequence_length = max_sequence_length
        self.built = True

    @property
    def is_dynamic(self) -> bool:
        """Whether the base depends on the final length of a sequence."""
        return self.scaling is not None and self.scaling["rope_type"] == "dynamic"

    def call(
        self, positions: Tensor, final_lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the cosines and the sines."""
        # Always float32: bfloat16 does not represent every integer above 256.
        positions = ops.cast(positions, "float32")
        if self.scaling is not None and self.scaling["rope_type"] == "linear":
            positions = positions / self.scaling["factor"]
        exponents = ops.arange(0, self.head_dim, 2, dtype="float32") / self.head_dim
        frequencies = 1.0 / ops.power(self._base(final_lengths), exponents)
        angles = (positions[:, :, None] * frequencies)[:, None]
        if keras.config.backend() == "jax":
            return _tables_on_platform()(angles)
        return ops.cos(angles), ops.sin(angles)

    def _base(self, final_lengths):
        """The base of the frequencies: a scalar, or `(batch, 1, 1)` if dynamic."""
        if not self.is_dynamic:
            return ops.convert_to_tensor(self.max_wavelength, "float32")
        if final_lengths is None:
            raise ValueError(
                "`final_lengths` is required with dynamic rope scaling: the base "
                "depends on the final length of each sequence. Received: "
                "final_lengths=None"
            )
        factor = self.scaling["factor"]
        # Sequences within the trained context use the trained base.
        lengths = ops.maximum(
            ops.cast(final_lengths, "float32"), float(self.max_sequence_length)
        )
        stretch = factor * lengths / self.max_sequence_length - (factor - 1.0)
        power = self.head_dim / (self.head_dim - 2)
        return (self.max_wavelength * ops.power(stretch, power))[:, None, None]

    def compute_output_shape(
        self, positions_shape: Shape, final_lengths_shape: Shape | None = None
    ) -> tuple[Shape, Shape]:
        """Returns the shapes of the cosines and the sines."""
        batch, length = positions_shape
        if self.is_dynamic and final_lengths_shape is not None:
            batch = final_lengths_shape[0]
        shape = (batch, 1, length, self.head_dim // 2)
        return shape, shape

    def compute_output_spec(
        self,
        positions: keras.KerasTensor,
        final_lengths: keras.KerasTensor | None = None,
    ) -> tuple[keras.KerasTensor, keras.KerasTensor]:
        """Returns the shapes and dtypes of the cosines and the sines."""
        shapes = self.compute_output_shape(
            positions.shape, None if final_lengths is None else final_lengths.shape
        )
        # Two tensors: Keras identifies symbolic tensors by identity.
        return tuple(keras.KerasTensor(shape, "float32") for shape in shapes)

    def quantize(
        self, mode: str | None = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Does nothing: this layer stays float32 in every quantization mode."""

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        config = super().get_config()
        config.update(
            head_dim=self.head_dim,
            max_wavelength=self.max_wavelength,
            scaling=self.scaling,
            max_sequence_length=self.max_sequence_length,
        )
        return config
