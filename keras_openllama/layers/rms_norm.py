"""Root mean square normalisation (arXiv:1910.07467)."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_openllama")
class RMSNorm(keras.layers.Layer):
    """Divides the last axis by its root mean square and scales it, in float32.

    Args:
        epsilon: float, added to the mean square. OpenLLaMA uses 1e-6.

    Call arguments:
        x: float tensor `(..., features)`.

    Returns:
        A tensor of the same shape, in the layer's compute dtype.

    Example:
        RMSNorm(epsilon=1e-6)(hidden_states)
    """

    def __init__(self, epsilon=1e-6, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.epsilon = epsilon

    def build(self, input_shape):
        # No autocast: under a mixed policy the scale would be rounded to bfloat16. (The
        # layer's own counts only where another layer calls it.)
        self.scale = self.add_weight(
            name="scale", shape=(input_shape[-1],), initializer="ones", autocast=False
        )

    def call(self, x):
        x = ops.cast(x, "float32")
        mean_square = ops.mean(ops.square(x), axis=-1, keepdims=True)
        normed = x * ops.rsqrt(mean_square + self.epsilon)
        scale = ops.cast(self.scale, "float32")
        return ops.cast(normed * scale, self.compute_dtype)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, self.compute_dtype)

    def quantize(self, mode=None, type_check=True, config=None):
        """Nothing to quantize: this layer stays float32 in any mode."""

    def get_config(self):
        config = super().get_config()
        config.update(epsilon=self.epsilon)
        return config
