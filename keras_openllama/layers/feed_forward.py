"""The gated feed-forward network (SwiGLU, arXiv:2002.05202)."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_openllama.layers.projection import Projection
from keras_openllama.utils.types import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_openllama")
class FeedForward(keras.layers.Layer):
    """Computes `down(silu(gate(x)) * up(x))`.

    Args:
        intermediate_dim: int, width of the gate and up projections.
        initializer_std: float, standard deviation of the initial weights.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: float tensor `(batch, length, hidden_dim)`.

    Returns:
        A tensor of the shape of `x`.

    Example:
        >>> FeedForward(intermediate_dim=128)(ops.ones((1, 8, 64))).shape
        (1, 8, 64)
    """

    def __init__(
        self, intermediate_dim: int, initializer_std: float = 0.02, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.intermediate_dim = intermediate_dim
        self.initializer_std = initializer_std

    def build(self, input_shape: Shape) -> None:
        """Creates the three projections."""
        std, dtype = self.initializer_std, self.dtype_policy
        self.gate = Projection(self.intermediate_dim, std, dtype=dtype, name="gate")
        self.up = Projection(self.intermediate_dim, std, dtype=dtype, name="up")
        self.down = Projection(input_shape[-1], std, dtype=dtype, name="down")
        self.gate.build(input_shape)
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], self.intermediate_dim))

    def call(self, x: Tensor) -> Tensor:
        """Returns the output of the network."""
        return self.project_down(*self.project_up(x))

    def project_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `gate(x)` and `up(x)`, each `(batch, length, intermediate_dim)`."""
        return self.gate(x), self.up(x)

    def project_down(self, gate: Tensor, up: Tensor) -> Tensor:
        """Returns `down(silu(gate) * up)`, `(batch, length, hidden_dim)`."""
        return self.down(self.activate(gate, up))

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Returns `silu(gate) * up`, the input of `down`."""
        return ops.silu(gate) * up

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns the shape of the output."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        config = super().get_config()
        config.update(
            intermediate_dim=self.intermediate_dim,
            initializer_std=self.initializer_std,
        )
        return config
