"""The TPU compiler is asked to hide collectives, and where it cannot, that is said."""

import types

import jax
import pytest

from keras_openllama.runs import tpu_compiler_options

pytestmark = pytest.mark.backend_free

TPU, CPU = types.SimpleNamespace(platform="tpu"), types.SimpleNamespace(platform="cpu")


class Lowered:
    """What `jax.jit(…).lower(…)` returns, with a compiler that has so much memory."""

    def __init__(self, problem=None):
        self.problem, self.asked = problem, []

    def compile(self, options=None):
        self.asked.append(options)
        if self.problem and "xla_enable_async_all_reduce" in (options or {}):
            raise jax.errors.JaxRuntimeError(self.problem)
        return "program"


def test_gathers_and_reductions_are_hidden(caplog):
    lowered = Lowered()
    assert tpu_compiler_options.compiled(lowered, TPU) == "program"
    assert lowered.asked == [
        {**tpu_compiler_options.GATHERS, **tpu_compiler_options.REDUCTIONS}
    ]
    assert not caplog.records


def test_reductions_that_need_too_much_are_not_hidden_and_that_is_said(caplog):
    lowered = Lowered("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.")
    assert tpu_compiler_options.compiled(lowered, TPU) == "program"
    assert lowered.asked[1:] == [tpu_compiler_options.GATHERS]
    assert "Gradients are reduced while nothing else is computed" in caplog.text


def test_what_does_not_fit_at_all_is_not_tried_again():
    lowered = Lowered("RESOURCE_EXHAUSTED: Ran out of memory on HBM")
    with pytest.raises(jax.errors.JaxRuntimeError, match="HBM"):
        tpu_compiler_options.compiled(lowered, TPU)
    assert len(lowered.asked) == 1


def test_elsewhere_the_compiler_is_left_alone():
    lowered = Lowered()
    tpu_compiler_options.compiled(lowered, CPU)
    assert lowered.asked == [None]
