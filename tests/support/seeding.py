"""Seeds for tests."""

import keras

from keras_openllama.backend.keras_hub import without_tensorflow


def set_random_seed(seed):
    """`keras.utils.set_random_seed` without importing TensorFlow only to seed it.

    That takes two seconds of each process that has no other use for TensorFlow.
    """
    with without_tensorflow():
        keras.utils.set_random_seed(seed)
