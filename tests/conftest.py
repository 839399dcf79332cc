"""Setup of all tests."""

import gc
import os
import re
import signal
import sys
import tempfile
from pathlib import Path
from unittest import mock

# No access to the real Hub: tests that download use a local server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# The Makefile installs the TPU compiler for plans; JAX must not search for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.append(str(Path(sys.prefix, "tpu-compiler")))
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [os.environ.get("PYTHONPATH"), sys.path[-1]])
)

# Compilation takes most of the time, and many models have the same programs. The cache
# is shared with processes that tests start and with the other parts of
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

# Background processes of a shell ignore Ctrl-C, and so would processes of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)


BACKEND_FREE_MODULE = re.compile(r"^pytestmark = .*mark\.backend_free\b", re.MULTILINE)


def pytest_ignore_collect(collection_path, config):
    """Does not import modules whose tests `-m` would deselect all."""
    if (
        collection_path.suffix == ".py"
        and "not backend_free" in config.option.markexpr
        and BACKEND_FREE_MODULE.search(collection_path.read_text(encoding="utf-8"))
    ):
        return True
    return None  # Other plugins decide.


def pytest_collection_finish():
    """Makes garbage collection rare: it took 5% of the time.

    It skips the objects of the imports, and runs after 10,000 new objects, not 700.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


_delete_attribute = keras.Layer.__delattr__


def _delete_attribute_without_collection(self, name):
    with mock.patch.object(gc, "collect", lambda *generation: 0):
        _delete_attribute(self, name)


# Keras collects garbage after each quantized layer. With the objects of earlier tests,
# that takes a minute for some tests on TensorFlow. Python's automatic collection stays
# enabled.
keras.Layer.__delattr__ = _delete_attribute_without_collection


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Seeds each test, so that random numbers do not depend on earlier tests."""
    set_random_seed(0)


@pytest.fixture(scope="module")
def compile_fast():
    """Disables most optimizations of JAX, for programs that run a few times only."""
    if keras.config.backend() != "jax":
        yield
        return
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
