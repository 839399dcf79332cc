"""Root mean square layer normalization (arXiv:1910.07467)."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_openllama.utils.types import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_openllama")
class RMSNorm(keras.layers.Layer):
    """Divides the last axis by its root mean square and scales it, in float32.

    Args:
        epsilon: float, added to the mean square. OpenLLaMA uses 1e-6.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: float tensor `(..., features)`.

    Returns:
        A tensor of the same shape, in the layer's compute dtype.

    Example:
        >>> [round(x, 3) for x in RMSNorm()(ops.array([1.0, -1.0, 3.0])).tolist()]
        [0.522, -0.522, 1.567]
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.epsilon = epsilon

    def build(self, input_shape: Shape) -> None:
        """Creates the scale."""
        # No autocast: a mixed policy would round the scale to bfloat16. (`autocast` of
        # the layer has an effect only when another layer calls it.)
        self.scale = self.add_weight(
            name="scale", shape=(input_shape[-1],), initializer="ones", autocast=False
        )

    def call(self, x: Tensor) -> Tensor:
        """Returns the normalized tensor."""
        x = ops.cast(x, "float32")
        mean_square = ops.mean(ops.square(x), axis=-1, keepdims=True)
        normed = x * ops.rsqrt(mean_square + self.epsilon)
        scale = ops.cast(self.scale, "float32")
        return ops.cast(normed * scale, self.compute_dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns the shape of the output."""
        return input_shape

    def quantize(
        self, mode: str | None = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Does nothing: this layer stays float32 in every quantization mode."""

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        config = super().get_config()
        config.update(epsilon=self.epsilon)
        return config
