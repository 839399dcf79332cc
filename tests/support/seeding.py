"""Seeds for tests."""

import contextlib
import sys
import types
from unittest import mock

import keras
from keras.src.utils import rng_utils


def set_random_seed(seed):
    """`keras.utils.set_random_seed`, which imports TensorFlow just to seed it.

    That takes two seconds of each process that has no other use for TensorFlow.
    """
    without_tensorflow = mock.patch.object(
        rng_utils, "tf", types.SimpleNamespace(available=False)
    )
    imported = "tensorflow" in sys.modules
    with contextlib.nullcontext() if imported else without_tensorflow:
        keras.utils.set_random_seed(seed)
