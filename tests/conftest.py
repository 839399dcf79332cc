"""Set-up common to all tests."""

import gc
import os
import signal
import sys
import tempfile
from pathlib import Path
from unittest import mock

# Nothing may be fetched from the real Hub; tests that download name their own server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# The TPU compiler, where the Makefile puts it, is for plans; no test looks for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.append(str(Path(sys.prefix, "tpu-compiler")))
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [os.environ.get("PYTHONPATH"), sys.path[-1]])
)

# Most of the time goes into compilation, and many models have the same programs. They
# are shared with the processes that tests start, and with the other parts of
# `run_backends.py`, but not with the user's cache.
if "TESTS_COMPILATION_CACHE" not in os.environ:
    _directory = tempfile.TemporaryDirectory(
        prefix="tests_compilation_cache_", ignore_cleanup_errors=True
    )
    os.environ["TESTS_COMPILATION_CACHE"] = _directory.name
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["TESTS_COMPILATION_CACHE"]
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

sys.path.insert(0, str(Path(__file__).parent / "support"))  # Shared helpers.

import keras
import pytest
from seeding import set_random_seed

# What a shell starts in the background ignores Ctrl-C, and so would what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """Spares the garbage collector what the imports have made."""
    gc.collect()
    gc.freeze()


_delete_attribute = keras.Layer.__delattr__


def _delete_attribute_without_collection(self, name):
    with mock.patch.object(gc, "collect", lambda *generation: 0):
        _delete_attribute(self, name)


# Keras collects garbage after each layer that it quantizes, and looks at every object
# that earlier tests have left each time: a minute for some tests on TensorFlow. Python
# still collects by itself.
keras.Layer.__delattr__ = _delete_attribute_without_collection


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Each test draws the same numbers, whichever run before it."""
    set_random_seed(0)


@pytest.fixture(scope="module")
def compile_fast():
    """For JAX: half the time goes into programs that each run a few times."""
    if keras.config.backend() != "jax":
        yield
        return
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
