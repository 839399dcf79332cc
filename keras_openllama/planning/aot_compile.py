"""A run's step, compiled for TPUs that need not be there."""

import dataclasses
import os
import re
import time

import jax
import keras
import numpy as np
from jax.experimental import topologies

from keras_openllama.backend.keras_private import set_variable_layout, variable_layout
from keras_openllama.distribution import OpenLlamaParallel, make_mesh
from keras_openllama.models.backbone import OpenLlamaBackbone
from keras_openllama.models.causal_lm import OpenLlamaCausalLM
from keras_openllama.planning.cost_model import CHIPS
from keras_openllama.runs.jax_train_program import StepState, compile_step
from keras_openllama.runs.optimizer import make_optimizer
from keras_openllama.training.train_step_jax import (
    TrainStepOptions,
    options_for_devices,
)

# Chips of a host, by which libtpu lays out a topology; and how a chip's two cores work.
_HOST = (2, 2, 1)
_CONFIGURATION = {"v4": "megacore", "v5p": "megacore"}
# For libtpu: there is no machine to ask about, and another process may compile, too.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices_of(topology):
    """The devices of a slice that need not be there.

    Args:
        topology: string, kind and chips along each axis, such as `"v4:4x8x8"`.

    Returns:
        The `cost_model.Chip`, and a list of JAX devices to compile for.

    Raises:
        ValueError: for a kind or shape that the compiler does not know.
        RuntimeError: if there is no compiler: `libtpu` is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(
            f"`topology` is one of {', '.join(CHIPS)}, and the chips along each axis, "
            f"such as v4:4x8x8. Received: {topology!r}"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = {"chips_per_host_bounds": _HOST}
    if kind in _CONFIGURATION:
        options["chip_config_name"] = _CONFIGURATION[kind]
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology={topology!r} is not known: {error}") from error
    except RuntimeError as error:
        raise RuntimeError(
            "The compiler for TPUs is not installed: pip install "
            f"'keras-openllama[plan]'. ({error})"
        ) from error
    return CHIPS[kind], list(description.devices)


class DoesNotFit(ValueError):
    """A chip has too little memory for a step; `excess` is by how many bytes."""

    def __init__(self, message, excess):
        super().__init__(message)
        self.excess = excess


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step that was compiled for a slice.

    Attributes:
        text: string, the program.
        memory: int, bytes that a chip needs at most.
        parameters: int, of the model.
        seconds: float, that compiling took.
    """

    text: str
    memory: int
    parameters: int
    seconds: float


def compiled_step(config, recipe, mesh, devices):
    """Compiles the step of a run for devices that need not be there.

    No array is made: shapes are all that a compiler needs.

    Args:
        config: dict, arguments of `OpenLlamaBackbone`.
        recipe: `recipe.Recipe`.
        mesh: dict of `"data"`, `"fsdp"`, `"model"`.
        devices: list of JAX devices.

    Returns:
        `Compiled`.

    Raises:
        DoesNotFit: if a chip has too little memory.
    """
    start = time.monotonic()
    distribution = OpenLlamaParallel(make_mesh(**mesh, devices=devices))
    lm = _abstract_lm(config, recipe, distribution)
    shape = recipe.batch_size, recipe.sequence_length
    sharding = distribution.batch_sharding(2)

    def array(dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    x = {"token_ids": array("int32"), "padding_mask": array("int32")}
    batch = x, array("int32"), array("float32")
    options = TrainStepOptions(
        recipe.micro_batches, recipe.rematerialize, recipe.z_loss
    )
    everywhere = jax.sharding.NamedSharding(
        distribution.device_mesh.backend_mesh, jax.sharding.PartitionSpec()
    )
    # What was compiled for a device that is not there cannot be read from the cache.
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        program = compile_step(
            lm,
            _abstract_state(lm, distribution, everywhere),
            batch,
            options_for_devices(options, distribution),
            recipe.spike_threshold,
            everywhere,
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(
            f"The step does not fit into a chip's memory: {_last_sentence(error)} "
            f"Received: rematerialize={recipe.rematerialize}, "
            f"micro_batches={recipe.micro_batches}, mesh={mesh}.",
            _excess(error),
        ) from error
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    return Compiled(
        program.as_text(),
        program.memory_analysis().peak_memory_in_bytes,
        sum(int(np.prod(v.shape)) for v in lm.variables),
        time.monotonic() - start,
    )


def _last_sentence(error):
    """What the compiler says about memory, without what it prints behind."""
    return str(error).partition("RESOURCE_EXHAUSTED: ")[2].splitlines()[0]


def _excess(error):
    """Bytes that are too many, as far as the compiler says so: int."""
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
            # Else the optimizer's moments would be on every chip.
            set_variable_layout(variable, distribution.get_variable_layout(variable))
        optimizer.build(lm.trainable_variables)
    return lm


def _abstract_state(lm, distribution, everywhere):
    def struct(variable):
        layout = variable_layout(variable)
        layout = layout or distribution.get_variable_layout(variable)
        return jax.ShapeDtypeStruct(
            variable.shape, variable.dtype, sharding=layout.backend_layout
        )

    scalar = jax.ShapeDtypeStruct((), "float32", sharding=everywhere)
    return StepState(
        [struct(v) for v in lm.trainable_variables],
        [struct(v) for v in lm.non_trainable_variables],
        [struct(v) for v in lm.optimizer.variables],
        {"mean_loss": scalar, "steps": scalar},
    )
