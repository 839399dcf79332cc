"""Ahead-of-time compilation of a training step for TPUs that need not be present."""

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import keras
import numpy as np
from jax.experimental import topologies

from keras_openllama.backend.keras_private import set_variable_layout, variable_layout
from keras_openllama.distribution import OpenLlamaParallel, make_mesh
from keras_openllama.models.backbone import OpenLlamaBackbone
from keras_openllama.models.causal_lm import OpenLlamaCausalLM
from keras_openllama.planning.compilation_cache import CompilationCache, program_key
from keras_openllama.planning.cost_model import TpuChip
from keras_openllama.planning.topology import parse_topology
from keras_openllama.runs import tpu_compiler_options
from keras_openllama.runs.jax_train_program import StepState, lower_step
from keras_openllama.runs.optimizer import make_optimizer
from keras_openllama.runs.recipe import Recipe
from keras_openllama.training.train_step_jax import (
    TrainStepOptions,
    options_for_devices,
)

# Arguments of libtpu: chips of a host, and how the two cores of a chip are used.
_CHIPS_PER_HOST = (2, 2, 1)
_CHIP_CONFIG_NAMES = {"v4": "megacore", "v5p": "megacore"}
# libtpu must not query a metadata server, and another process may compile, too.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Fields of an entry of the cache: of a compiled step, or of one that does not fit.
# Entries with other fields, of another version of this package, are compiled again.
_ENTRY_FIELDS = (
    {"hlo", "peak_memory", "compile_seconds"},
    {"error", "excess_bytes"},
)


def topology_devices(topology: str) -> tuple[TpuChip, list[Any]]:
    """Returns the devices of a slice, which need not be present.

    Args:
        topology: chip type and number of chips along each axis, such as `"v4:4x8x8"`.

    Returns:
        The chip type, and JAX devices to compile for.

    Raises:
        ValueError: if the compiler does not support the chip type or shape.
        RuntimeError: if the compiler, `libtpu`, is not installed.

    Example:
        >>> chip, devices = topology_devices("v4:2x2x1")  # doctest: +SKIP
        >>> chip.name, len(devices)  # doctest: +SKIP
        ('v4', 4)
    """
    chip = parse_topology(topology)
    for name, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = {"chips_per_host_bounds": _CHIPS_PER_HOST}
    if chip.name in _CHIP_CONFIG_NAMES:
        options["chip_config_name"] = _CHIP_CONFIG_NAMES[chip.name]
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"The compiler does not support topology={topology!r}: {error}. Use the "
            "shape of a slice that exists, such as v4:2x2x4."
        ) from error
    except RuntimeError as error:
        raise RuntimeError(
            "The TPU compiler is not installed: pip install "
            f"'keras-openllama[plan]'. ({error})"
        ) from error
    return chip, list(description.devices)


def slice_shape(devices: Sequence[Any]) -> tuple[int, ...]:
    """Returns the number of chips along each axis of a slice.

    Args:
        devices: all JAX devices of the slice.

    Example:
        >>> _, devices = topology_devices("v4:2x2x4")  # doctest: +SKIP
        >>> slice_shape(devices)  # doctest: +SKIP
        (2, 2, 4)
    """
    axes = zip(*(device.coords for device in devices), strict=True)
    return tuple(max(axis) + 1 for axis in axes)


class OutOfDeviceMemoryError(ValueError):
    """A step does not fit into the memory of a chip.

    Args:
        message: the error message.
        excess_bytes: how many bytes too many the step needs; 0 if unknown.
    """

    def __init__(self, message: str, excess_bytes: int):
        super().__init__(message)
        self.excess_bytes = excess_bytes


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A training step that was compiled for a slice.

    Attributes:
        hlo: text of the compiled program.
        peak_memory: peak memory of a chip in bytes.
        parameters: number of parameters of the model.
        compile_seconds: compile time; of the first time if it was cached.
        cached: whether the compiled program was read from a cache.
    """

    hlo: str
    peak_memory: int
    parameters: int
    compile_seconds: float
    cached: bool = False


def compile_step_ahead_of_time(
    config: dict[str, Any],
    recipe: Recipe,
    mesh: dict[str, int],
    devices: Sequence[Any],
    cache: CompilationCache | None = None,
) -> CompiledStep:
    """Compiles the training step of a run for devices that need not be present.

    It allocates no arrays, since compilation requires shapes only.

    Args:
        config: arguments of `OpenLlamaBackbone`.
        recipe: the recipe.
        mesh: sizes of the axes `"data"`, `"fsdp"` and `"model"`.
        devices: JAX devices, see `topology_devices`.
        cache: finished compilations; `None` compiles always.

    Returns:
        The compiled step.

    Raises:
        OutOfDeviceMemoryError: if the step does not fit into the memory of a chip.
    """
    start = time.monotonic()
    distribution = OpenLlamaParallel(make_mesh(**mesh, devices=devices))
    lm = _abstract_lm(config, recipe, distribution)
    lowered = _lowered_step(lm, recipe, distribution)
    ordered = list(distribution.device_mesh.backend_mesh.devices.flat)
    key = program_key(lowered, ordered, tpu_compiler_options.options_for(lowered))
    entry = cache.load(key) if cache else None
    cached = entry is not None and set(entry) in _ENTRY_FIELDS
    if not cached:
        entry = _compiled_entry(lowered, ordered[0], start)
        if cache:
            cache.save(key, entry)
    if "error" in entry:
        raise OutOfDeviceMemoryError(
            f"The step does not fit into a chip's memory: {entry['error']} "
            f"Received: rematerialize={recipe.rematerialize}, "
            f"micro_batches={recipe.micro_batches}, mesh={mesh}.",
            entry["excess_bytes"],
        )
    parameters = sum(int(np.prod(v.shape)) for v in lm.variables)
    return CompiledStep(parameters=parameters, cached=cached, **entry)


def _lowered_step(lm, recipe, distribution):
    shape = recipe.batch_size, recipe.sequence_length
    sharding = distribution.batch_sharding(2)

    def array(dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    x = {"token_ids": array("int32"), "padding_mask": array("int32")}
    batch = x, array("int32"), array("float32")
    options = TrainStepOptions(
        recipe.micro_batches, recipe.rematerialize, recipe.z_loss
    )
    replicated = jax.sharding.NamedSharding(
        distribution.device_mesh.backend_mesh, jax.sharding.PartitionSpec()
    )
    # Kernels would contain the paths and lines of this code, and so would their hash.
    with _no_locations():
        return lower_step(
            lm,
            _abstract_state(lm, distribution, replicated),
            batch,
            options_for_devices(options, distribution),
            recipe.spike_threshold,
            replicated,
        )


@contextlib.contextmanager
def _no_locations():
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def _compiled_entry(lowered, device, start):
    """Compiles a program; what `CompiledStep` needs of it, or why it does not fit."""
    # Programs for absent devices cannot be read from JAX's compilation cache.
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        program = tpu_compiler_options.compile_lowered(lowered, device)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message, excess = _compiler_message(error), _excess_bytes(error)
        return {"error": message, "excess_bytes": excess}
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
    return {
        "hlo": program.as_text(),
        "peak_memory": program.memory_analysis().peak_memory_in_bytes,
        "compile_seconds": time.monotonic() - start,
    }


def _compiler_message(error):
    """What the compiler reports about memory, without the list of buffers."""
    return str(error).partition("RESOURCE_EXHAUSTED: ")[2].splitlines()[0]


def _excess_bytes(error):
    """How many bytes too many the step needs; 0 if the compiler does not report it."""
    needed = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error))
    if needed is None:
        return 0
    return int((float(needed[1]) - float(needed[2])) * 2**30)


def _abstract_lm(config, recipe, distribution):
    optimizer = make_optimizer(recipe)
    with distribution.scope(), keras.StatelessScope(initialize_variables=False):
        lm = OpenLlamaCausalLM(
            OpenLlamaBackbone(**config, dtype=recipe.precision), compile=False
        )
        lm.compile(optimizer=optimizer, weighted_metrics=[])
        for variable in lm.variables:
            # Otherwise the optimizer's moments would be replicated.
            set_variable_layout(variable, distribution.get_variable_layout(variable))
        optimizer.build(lm.trainable_variables)
    return lm


def _abstract_state(lm, distribution, replicated):
    def struct(variable):
        layout = variable_layout(variable)
        layout = layout or distribution.get_variable_layout(variable)
        return jax.ShapeDtypeStruct(
            variable.shape, variable.dtype, sharding=layout.backend_layout
        )

    scalar = jax.ShapeDtypeStruct((), "float32", sharding=replicated)
    return StepState(
        [struct(v) for v in lm.trainable_variables],
        [struct(v) for v in lm.non_trainable_variables],
        [struct(v) for v in lm.optimizer.variables],
        {"mean_loss": scalar, "steps": scalar},
    )
