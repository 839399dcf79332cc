"""The bias-free matrices of the network."""

import keras


def projection(units, name, dtype, initializer_std):
    """A `keras.layers.Dense` without bias, its kernel `(inputs, units)`.

    Each call makes an initializer of its own: one instance shared by several
    matrices would give them equal values.

    Args:
        units: int, size of the output.
        name: string, name of the layer.
        dtype: dtype policy of the layer.
        initializer_std: float, standard deviation of the normal initialisation.
    """
    return keras.layers.Dense(
        units,
        use_bias=False,
        kernel_initializer=keras.initializers.RandomNormal(stddev=initializer_std),
        dtype=dtype,
        name=name,
    )
