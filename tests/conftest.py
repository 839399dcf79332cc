"""Set-up common to all tests."""

import gc
import os
import signal
import sys
from pathlib import Path

# Nothing may be fetched from the real Hub; tests that download name their own server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# The TPU compiler, where the Makefile puts it, is for plans; no test looks for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.append(str(Path(sys.prefix, "tpu-compiler")))
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [os.environ.get("PYTHONPATH"), sys.path[-1]])
)

# Programs compiled by tests are no use to anyone: not into the user's cache.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")

sys.path.insert(0, str(Path(__file__).parent / "support"))  # Shared helpers.

import keras
import pytest

# What a shell starts in the background ignores Ctrl-C, and so would what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """Spares the garbage collector what the imports have made.

    Keras collects garbage after each layer that it quantizes, and would look at all of
    it each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Each test draws the same numbers, whichever run before it."""
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="module")
def compile_fast():
    """For JAX: half the time goes into programs that each run a few times."""
    if keras.config.backend() != "jax":
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
