"""compile_lowered overlaps collectives on TPUs, and warns if it cannot."""

import types

import jax
import pytest

from keras_openllama.runs import tpu_compiler_options

pytestmark = pytest.mark.backend_free

TPU, CPU = types.SimpleNamespace(platform="tpu"), types.SimpleNamespace(platform="cpu")


class Lowered:
    """Stands for the result of `jax.jit(…).lower(…)`; may fail to compile."""

    def __init__(self, problem=None, text="stablehlo.reduce_scatter"):
        self.problem, self.text, self.options = problem, text, []

    def as_text(self):
        return self.text

    def compile(self, options=None):
        self.options.append(options)
        if self.problem and "xla_enable_async_all_reduce" in (options or {}):
            raise jax.errors.JaxRuntimeError(self.problem)
        return "program"


def test_compile_lowered_overlaps_gathers_and_reductions_on_tpus(caplog):
    lowered = Lowered()
    assert tpu_compiler_options.compile_lowered(lowered, TPU) == "program"
    assert lowered.options == [
        {
            **tpu_compiler_options.ALL_GATHER_OPTIONS,
            **tpu_compiler_options.REDUCTION_OPTIONS,
        }
    ]
    assert not caplog.records


def test_compile_lowered_warns_if_reductions_do_not_fit(caplog):
    lowered = Lowered("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.")
    assert tpu_compiler_options.compile_lowered(lowered, TPU) == "program"
    assert lowered.options[1:] == [tpu_compiler_options.ALL_GATHER_OPTIONS]
    assert "do not overlap with computation" in caplog.text


def test_compile_lowered_overlaps_all_to_alls_instead_of_reductions(caplog):
    lowered = Lowered(text="stablehlo.all_to_all")
    assert tpu_compiler_options.compile_lowered(lowered, TPU) == "program"
    assert lowered.options == [
        {
            **tpu_compiler_options.ALL_GATHER_OPTIONS,
            **tpu_compiler_options.ALL_TO_ALL_OPTIONS,
        }
    ]
    assert not caplog.records


def test_compile_lowered_raises_other_errors():
    lowered = Lowered("RESOURCE_EXHAUSTED: Ran out of memory on HBM")
    with pytest.raises(jax.errors.JaxRuntimeError, match="HBM"):
        tpu_compiler_options.compile_lowered(lowered, TPU)
    assert len(lowered.options) == 1


def test_compile_lowered_passes_no_options_on_other_devices():
    lowered = Lowered()
    tpu_compiler_options.compile_lowered(lowered, CPU)
    assert lowered.options == [None]
