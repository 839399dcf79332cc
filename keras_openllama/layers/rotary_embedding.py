"""Rotary position embedding, in the half-split layout of transformers.

Dimension `i` of a head is rotated together with dimension `i + head_dim / 2`. (EasyLM
pairs neighbours instead; only `convert/easylm` knows of that.)

Sources: RoFormer (arXiv:2104.09864); `rotate_half` in `huggingface/transformers`,
`models/llama/modeling_llama.py`.
"""

import functools

import keras
import numpy as np
from keras import ops

from keras_openllama.config import check_rope_scaling

if keras.config.backend() == "jax":
    import jax


def rotate(x, cos, sin):
    """Rotates each head vector by the angles of its position.

    Args:
        x: float tensor `(batch, heads, length, head_dim)`.
        cos, sin: float32 tensors `(batch or 1, 1, length, head_dim / 2)`.

    Returns:
        A tensor of the shape and dtype of `x`. The rotation itself is float32.
    """
    if keras.config.backend() == "jax":
        return _choose()(x, cos, sin)
    return _rotate(x, cos, sin)


@functools.cache
def _choose():
    """The choice is made where a program is compiled, for what it will run on."""
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
    """The same where halves of a vector are costly to take, but products are not.

    On a TPU the halves would be float32 copies, which take as long as the projection
    (`docs/tpu.md`). A product with zeros and ones is exact.
    """
    half = x.shape[-1] // 2
    eye, zeros = np.eye(half), np.zeros((half, half))
    swap = np.block([[zeros, eye], [-eye, zeros]])  # (first, second) @ swap
    swapped = jax.numpy.matmul(
        x, swap.astype(x.dtype), precision="highest", preferred_element_type="float32"
    )
    cos, sin = (ops.concatenate([table, table], axis=-1) for table in (cos, sin))
    return ops.cast(ops.cast(x, "float32") * cos + swapped * sin, x.dtype)


@keras.saving.register_keras_serializable(package="keras_openllama")
class RotaryEmbedding(keras.layers.Layer):
    """Cosines and sines of the rotary angles, computed once for all layers.

    Args:
        head_dim: int, even. Size of an attention head.
        max_wavelength: float. The base of the frequencies ("RoPE theta").
        scaling: `None` or a dict, see `check_rope_scaling`. `"linear"` divides
            positions by the factor. `"dynamic"` (dynamic NTK) raises the base for
            rows longer than `max_sequence_length`, as transformers does, but once
            per row, from that row's final length: so all keys of a row share one
            base, however they reached the cache.
        max_sequence_length: int. The context the weights were trained with.

    Call arguments:
        positions: int tensor `(batch or 1, length)`.
        final_lengths: int tensor `(batch,)`, the length each row will have in the
            end. Used by `"dynamic"` scaling only.

    Returns:
        `(cos, sin)`, float32, each `(batch or 1, 1, length, head_dim / 2)`.

    Example:
        rope = RotaryEmbedding(head_dim=100)
        cos, sin = rope(ops.arange(8)[None])

    Sources: linear scaling, arXiv:2306.15595; dynamic NTK,
    `_compute_dynamic_ntk_parameters` in `huggingface/transformers`,
    `modeling_rope_utils.py`.
    """

    def __init__(
        self,
        head_dim,
        max_wavelength=10000.0,
        scaling=None,
        max_sequence_length=2048,
        **kwargs,
    ):
        # Positions beyond 256 are not whole numbers in bfloat16: always float32.
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
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
    def is_dynamic(self):
        return self.scaling is not None and self.scaling["rope_type"] == "dynamic"

    def call(self, positions, final_lengths=None):
        positions = ops.cast(positions, "float32")
        if self.scaling is not None and self.scaling["rope_type"] == "linear":
            positions = positions / self.scaling["factor"]
        exponents = ops.arange(0, self.head_dim, 2, dtype="float32") / self.head_dim
        frequencies = 1.0 / ops.power(self._base(final_lengths), exponents)
        angles = (positions[:, :, None] * frequencies)[:, None]
        return ops.cos(angles), ops.sin(angles)

    def _base(self, final_lengths):
        """The base of the frequencies: a scalar, or `(batch, 1, 1)` if dynamic."""
        if not self.is_dynamic:
            return ops.convert_to_tensor(self.max_wavelength, "float32")
        if final_lengths is None:
            raise ValueError(
                "`final_lengths` is needed with dynamic rope scaling: the base "
                "depends on each row's final length. Received: None"
            )
        factor = self.scaling["factor"]
        # Rows within the trained context keep the trained base.
        lengths = ops.maximum(
            ops.cast(final_lengths, "float32"), float(self.max_sequence_length)
        )
        stretch = factor * lengths / self.max_sequence_length - (factor - 1.0)
        power = self.head_dim / (self.head_dim - 2)
        return (self.max_wavelength * ops.power(stretch, power))[:, None, None]

    def compute_output_spec(self, positions, final_lengths=None):
        batch, length = positions.shape
        if self.is_dynamic and final_lengths is not None:
            batch = final_lengths.shape[0]
        shape = (batch, 1, length, self.head_dim // 2)
        # Two tensors: the same one twice would make the sine the cosine.
        return keras.KerasTensor(shape, "float32"), keras.KerasTensor(shape, "float32")

    def quantize(self, mode=None, type_check=True, config=None):
        """Nothing to quantize: this layer stays float32 in any mode."""

    def get_config(self):
        config = super().get_config()
        config.update(
            head_dim=self.head_dim,
            max_wavelength=self.max_wavelength,
            scaling=self.scaling,
            max_sequence_length=self.max_sequence_length,
        )
        del config["dtype"]
        return config
