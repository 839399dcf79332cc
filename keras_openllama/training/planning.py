"""What a run would cost on TPUs, without one: its step is compiled, and priced."""

import dataclasses
import os
import re
import tempfile
import time

import jax
import keras
import numpy as np
from jax.experimental import topologies

from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM, presets
from keras_openllama.distribution import OpenLlamaParallel, check_mesh, make_mesh
from keras_openllama.training import throughput
from keras_openllama.training.cost_model import CHIPS, Prices, price
from keras_openllama.training.state import State, compile_step, make_optimizer
from keras_openllama.training_step import Options, placed

# Chips of a host, by which libtpu lays out a topology; and how a chip's two cores work.
_HOST = (2, 2, 1)
# For libtpu: there is no machine to ask about, and another process may compile, too.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
DEFAULT_PRICES = Prices()
_CONFIGURATION = {"v4": "megacore", "v5p": "megacore"}


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
        ValueError: if it does not fit into a chip's memory.
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
    options = Options(recipe.micro_batches, recipe.rematerialize, recipe.z_loss)
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
            placed(options, distribution),
            recipe.spike_threshold,
            everywhere,
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"The step does not fit into a chip's memory: {_last_sentence(error)} Try "
            "a rematerialize that keeps less, more micro_batches, or more chips. "
            f"Received: rematerialize={recipe.rematerialize}, "
            f"micro_batches={recipe.micro_batches}, mesh={mesh}"
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


def _abstract_lm(config, recipe, distribution):
    optimizer = make_optimizer(recipe)
    with distribution.scope(), keras.StatelessScope(initialize_variables=False):
        lm = OpenLlamaCausalLM(
            OpenLlamaBackbone(**config, dtype=recipe.precision), compile=False
        )
        lm.compile(optimizer=optimizer, weighted_metrics=[])
        for variable in lm.variables:
            # Else the optimizer's moments would be on every chip.
            variable._layout = distribution.get_variable_layout(variable)
        optimizer.build(lm.trainable_variables)
    return lm


def _abstract_state(lm, distribution, everywhere):
    def struct(variable):
        layout = variable._layout or distribution.get_variable_layout(variable)
        return jax.ShapeDtypeStruct(
            variable.shape, variable.dtype, sharding=layout.backend_layout
        )

    scalar = jax.ShapeDtypeStruct((), "float32", sharding=everywhere)
    return State(
        [struct(v) for v in lm.trainable_variables],
        [struct(v) for v in lm.non_trainable_variables],
        [struct(v) for v in lm.optimizer.variables],
        {"mean_loss": scalar, "steps": scalar},
    )


def plan(resolved, topology, mesh=None, directory=None, prices=DEFAULT_PRICES):
    """What a run would cost.

    Args:
        resolved: `recipe.Resolved`.
        topology: string, see `devices_of`.
        mesh: dict of `"data"`, `"fsdp"`, `"model"`; the recipe's if `None`.
        directory: string, where the program's text is kept; a new one if `None`.
        prices: `cost_model.Prices`.

    Returns:
        Dict that JSON can hold: `preset`, `topology`, `chips`, `mesh`, `rematerialize`,
        `micro_batches`, `tokens_per_step`; `peak_memory_bytes`, `memory_bytes`, `fits`;
        `step_seconds`, `compute_seconds`, of that `matmul_seconds`, `kernel_seconds`,
        `collective_seconds`, `exposed_collective_seconds`;
        `tokens_per_second_per_chip`, `mfu`, `days`, `chip_hours`; `compile_seconds`,
        `assumptions`, `hlo`.

    Raises:
        ValueError: if mesh or memory do not fit, or the topology is not known.
        RuntimeError: if there is no compiler.

    Example:

    ```python
    plan(resolve("7b_v2"), "v4:4x8x8")["tokens_per_second_per_chip"]
    ```
    """
    recipe, preset = resolved.recipe, presets.find(resolved.preset)
    chip, devices = devices_of(topology)
    mesh = mesh or recipe.mesh_for(len(devices))
    check_mesh(mesh, preset.config, recipe.batch_size, recipe.micro_batches)
    step = compiled_step(preset.config, recipe, mesh, devices)
    directory = directory or tempfile.mkdtemp(prefix="plan-")
    path = os.path.join(directory, f"{preset.name}-{topology.replace(':', '-')}.hlo")
    with open(path, "w") as file:
        file.write(step.text)
    cost = price(step.text, chip, prices)
    rate = recipe.tokens_per_step / cost.step_seconds / len(devices)
    flops = throughput.flops_per_token(
        step.parameters,
        preset.config["num_layers"],
        preset.config["num_query_heads"],
        preset.config["head_dim"],
        recipe.sequence_length,
    )
    hours = recipe.steps * cost.step_seconds / 3600
    return {
        "preset": preset.name,
        "topology": topology,
        "chips": len(devices),
        "mesh": mesh,
        "rematerialize": recipe.rematerialize,
        "micro_batches": recipe.micro_batches,
        "tokens_per_step": recipe.tokens_per_step,
        "peak_memory_bytes": step.memory,
        "memory_bytes": chip.memory,
        "fits": step.memory <= chip.memory,
        "step_seconds": cost.step_seconds,
        "compute_seconds": cost.compute_seconds,
        "matmul_seconds": cost.matmul_seconds,
        "kernel_seconds": cost.kernel_seconds,
        "collective_seconds": sum(cost.collective_seconds.values()),
        "exposed_collective_seconds": cost.exposed_seconds,
        "tokens_per_second_per_chip": rate,
        "mfu": rate * flops / chip.peak_flops,
        "days": hours / 24,
        "chip_hours": hours * len(devices),
        "compile_seconds": step.seconds,
        "assumptions": prices.to_json(),
        "hlo": path,
    }


def table(found):
    """A plan as lines to print.

    Args:
        found: dict, see `plan`.
    """
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    step = found["step_seconds"]

    def share(name):
        seconds = found[f"{name}_seconds"]
        return f"{seconds:.3f} s ({seconds / step:.0%})"

    hidden = found["collective_seconds"] - found["exposed_collective_seconds"]
    other = found["compute_seconds"] - found["matmul_seconds"]
    rows = {
        "preset": found["preset"],
        "slice": f"{found['topology']}: {found['chips']} chips, {mesh}",
        "rematerialize, micro_batches": (
            f"{found['rematerialize']}, {found['micro_batches']}"
        ),
        "peak memory of a chip": (
            f"{found['peak_memory_bytes'] / 2**30:.1f} of "
            f"{found['memory_bytes'] / 2**30:.0f} GiB"
        ),
        "a step": f"{step:.3f} s, {found['tokens_per_step']:,} tokens",
        "  around matrix products": share("matmul"),
        "  attention kernels": share("kernel"),
        "  other computation": f"{other:.3f} s ({other / step:.0%})",
        "  waiting for collectives": share("exposed_collective"),
        "collectives hidden by these": f"{hidden:.3f} s",
        "tokens/s/chip": f"{found['tokens_per_second_per_chip']:,.0f}",
        "MFU (6N + 12 x layers x width x length)": f"{found['mfu']:.1%}",
        "the whole run": (
            f"{found['days']:.1f} days, {found['chip_hours']:,.0f} chip-hours"
        ),
        "compiled in": f"{found['compile_seconds']:.0f} s, into {found['hlo']}",
    }
    width = max(map(len, rows))
    lines = [f"{name:{width}}  {value}" for name, value in rows.items()]
    assumed = [f"  {name}: {text}" for name, text in found["assumptions"].items()]
    return "\n".join([*lines, "Planned, not run. Assumed are", *assumed])
