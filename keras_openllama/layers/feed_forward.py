"""The gated feed-forward network (SwiGLU, arXiv:2002.05202)."""

import keras
from keras import ops

from keras_openllama.layers.projection import Projection


@keras.saving.register_keras_serializable(package="keras_openllama")
class FeedForward(keras.layers.Layer):
    """`down(silu(gate(x)) * up(x))`.

    Args:
        intermediate_dim: int, width between the projections.
        initializer_std: float, standard deviation of the initial weights.

    Call arguments:
        x: float tensor `(batch, length, hidden_dim)`.

    Returns:
        A tensor of the shape of `x`.

    Example:
        FeedForward(intermediate_dim=8640)(hidden_states)
    """

    def __init__(self, intermediate_dim, initializer_std=0.02, **kwargs):
        super().__init__(**kwargs)
        self.intermediate_dim = intermediate_dim
        self.initializer_std = initializer_std

    def build(self, input_shape):
        std, dtype = self.initializer_std, self.dtype_policy
        self.gate = Projection(self.intermediate_dim, std, dtype=dtype, name="gate")
        self.up = Projection(self.intermediate_dim, std, dtype=dtype, name="up")
        self.down = Projection(input_shape[-1], std, dtype=dtype, name="down")
        self.gate.build(input_shape)
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], self.intermediate_dim))

    def call(self, x):
        return self.narrow(*self.widen(x))

    def widen(self, x):
        """The gate and what it gates, each `(batch, length, intermediate_dim)`."""
        return self.gate(x), self.up(x)

    def narrow(self, gate, up):
        """The output from both."""
        return self.down(ops.silu(gate) * up)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, self.compute_dtype)

    def get_config(self):
        config = super().get_config()
        config.update(
            intermediate_dim=self.intermediate_dim,
            initializer_std=self.initializer_std,
        )
        return config
