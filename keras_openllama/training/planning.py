"""What a run would cost on TPUs, without one: its step is compiled, and priced."""

import dataclasses
import math
import os
import re
import sys
import tempfile
import time

import jax
import keras
import numpy as np
from jax.experimental import topologies

from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM, presets
from keras_openllama.distribution import OpenLlamaParallel, check_mesh, make_mesh
from keras_openllama.rematerialization import POLICIES
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
TRIES = 3  # Ours: so many choices are compiled to find one that fits.
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


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to run a recipe.

    Attributes:
        mesh: dict of `"data"`, `"fsdp"`, `"model"`.
        rematerialize: string, one of `rematerialization.POLICIES`.
        micro_batches: int.
    """

    mesh: dict
    rematerialize: str
    micro_batches: int

    def applied(self, recipe):
        """The recipe, run so."""
        return recipe.replace(
            rematerialize=self.rematerialize, micro_batches=self.micro_batches
        )

    def __str__(self):
        mesh = " x ".join(f"{axis} {n}" for axis, n in self.mesh.items() if n > 1)
        return f"{mesh or 'one chip'}, {self.rematerialize}, {self.micro_batches}"


def neighbours(choice, config, recipe):
    """Choices that differ in one thing: micro-batches, what is kept, the mesh.

    Args:
        choice: `Choice`.
        config: dict, arguments of `OpenLlamaBackbone`.
        recipe: `recipe.Recipe`.

    Returns:
        List of `Choice`, those that divide what they have to.
    """
    policies, mesh = list(POLICIES), choice.mesh
    position = policies.index(choice.rematerialize)
    changes = [
        {"micro_batches": 2 * choice.micro_batches},
        {"micro_batches": choice.micro_batches // 2},
        *({"rematerialize": p} for p in policies[max(1, position - 1) : position + 2]),
        {"mesh": {**mesh, "data": mesh["data"] // 2, "fsdp": 2 * mesh["fsdp"]}},
        {"mesh": {**mesh, "data": 2 * mesh["data"], "fsdp": mesh["fsdp"] // 2}},
    ]
    found = [dataclasses.replace(choice, **change) for change in changes]
    return [c for c in found if c != choice and _divides(c, mesh, config, recipe)]


def _divides(choice, mesh, config, recipe):
    sizes = choice.mesh.values()
    if math.prod(sizes) != math.prod(mesh.values()) or choice.micro_batches < 1:
        return False
    if recipe.batch_size % choice.micro_batches:
        return False
    try:
        check_mesh(choice.mesh, config, recipe.batch_size, choice.micro_batches)
    except ValueError:
        return False
    return True


def kept_bytes(choice, config, recipe):
    """What a chip keeps for the backward pass, by the policy alone: int.

    Args:
        choice, config, recipe: see `neighbours`.
    """
    hidden, heads = config["hidden_dim"], config["num_query_heads"]
    key_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    wide = 2 * config["intermediate_dim"]
    numbers = {
        "full": hidden,
        "projections": 2 * hidden + 2 * (heads + key_heads) * head_dim,
    }
    numbers["products"] = numbers["projections"] + wide
    # Both norms' outputs, the gate's function and its product.
    numbers["none"] = numbers["products"] + 2 * hidden + wide
    chips = choice.mesh["data"] * choice.mesh["fsdp"]
    rows = recipe.batch_size // chips // choice.micro_batches
    tokens = rows * recipe.sequence_length
    size = 2 if recipe.precision == "mixed_bfloat16" else 4
    return tokens * numbers[choice.rematerialize] * size * config["num_layers"]


def nearest_that_fits(choice, config, recipe, attempt, error):
    """Text on the choice nearest to one that does not fit, and what it would give.

    Args:
        choice, config, recipe: see `neighbours`.
        attempt: callable of a `Choice` that returns a plan or raises `DoesNotFit`.
        error: `DoesNotFit`, of the choice.

    Returns:
        String; also where none is found.
    """
    policies = list(POLICIES)
    after = policies[policies.index(choice.rematerialize) :]
    candidates = [
        dataclasses.replace(choice, rematerialize=p, micro_batches=n)
        for p in after
        for n in (choice.micro_batches * 2**k for k in range(8))
    ]
    least = kept_bytes(choice, config, recipe) - error.excess
    candidates = [
        c
        for c in candidates
        if _divides(c, choice.mesh, config, recipe)
        and kept_bytes(c, config, recipe) <= least
    ]
    for candidate in candidates[:TRIES]:
        try:
            found = attempt(candidate)
        except DoesNotFit:
            continue
        return (
            f"The nearest that fits: --set rematerialize={candidate.rematerialize} "
            f"--set micro_batches={candidate.micro_batches}, with "
            f"{found['tokens_per_second_per_chip']:,.0f} tokens/s/chip and "
            f"{found['peak_memory_bytes'] / 2**30:.1f} GiB."
        )
    return "No other choice was found to fit; take more chips."


def plan(
    resolved, topology, mesh=None, directory=None, prices=DEFAULT_PRICES, alone=False
):
    """What a run would cost, and its neighbours.

    Args:
        resolved: `recipe.Resolved`.
        topology: string, see `devices_of`.
        mesh: dict of `"data"`, `"fsdp"`, `"model"`; the recipe's if `None`.
        directory: string, where the programs' texts are kept; a new one if `None`.
        prices: `cost_model.Prices`.
        alone: bool, leaves the neighbours out: each takes a minute to compile.

    Returns:
        Dict that JSON can hold: `preset`, `topology`, `chips`, `mesh`, `rematerialize`,
        `micro_batches`, `tokens_per_step`; `peak_memory_bytes`, `memory_bytes`, `fits`;
        `step_seconds`, `compute_seconds`, of that `matmul_seconds`, `kernel_seconds`,
        `collective_seconds`, `exposed_collective_seconds`;
        `tokens_per_second_per_chip`, `mfu`, `days`, `chip_hours`; `compile_seconds`,
        `assumptions`, `hlo`; `best`, whether no neighbour that fits is faster; and
        `alternatives`, a list of such dicts, those that do not fit with `reason`.

    Raises:
        DoesNotFit: if a chip has too little memory; it names the nearest that fits.
        ValueError: if the mesh does not fit, or the topology is not known.
        RuntimeError: if there is no compiler.

    Example:

    ```python
    plan(resolve("7b_v2"), "v4:4x8x8", alone=True)["tokens_per_second_per_chip"]
    ```
    """
    chip, devices = devices_of(topology)
    resolved = resolved.on(len(devices), mesh)
    recipe, preset = resolved.recipe, presets.find(resolved.preset)
    mesh = mesh or recipe.mesh_for(len(devices))
    check_mesh(mesh, preset.config, recipe.batch_size, recipe.micro_batches)
    directory = directory or tempfile.mkdtemp(prefix="plan-")

    def attempt(choice):
        print(f"Compiling for {topology}: {choice} …", file=sys.stderr, flush=True)
        run = choice.applied(recipe)
        step = compiled_step(preset.config, run, choice.mesh, devices)
        path = os.path.join(directory, _file_name(preset.name, topology, choice))
        with open(path, "w") as file:
            file.write(step.text)
        cost = price(step.text, chip, prices)
        shared = {"preset": preset.name, "topology": topology, "hlo": path}
        return shared | _told(preset.config, run, choice, chip, step, cost, prices)

    choice = Choice(mesh, recipe.rematerialize, recipe.micro_batches)
    try:
        found = attempt(choice)
    except DoesNotFit as error:
        if alone:
            raise
        nearest = nearest_that_fits(choice, preset.config, recipe, attempt, error)
        raise DoesNotFit(f"{error} {nearest}", error.excess) from error
    around = [] if alone else neighbours(choice, preset.config, recipe)
    found["alternatives"] = [_attempted(attempt, other) for other in around]
    fitting = [p for p in (found, *found["alternatives"]) if p["fits"]]
    best = min(fitting, key=lambda p: p["step_seconds"], default=None)
    for each in (found, *found["alternatives"]):
        each["best"] = each is best
    return found


def _file_name(preset, topology, choice):
    mesh = "x".join(str(size) for size in choice.mesh.values())
    kind = f"{choice.rematerialize}-{choice.micro_batches}"
    return f"{preset}-{topology.replace(':', '-')}-{mesh}-{kind}.hlo"


def _attempted(attempt, choice):
    """A plan, or why there is none."""
    try:
        return attempt(choice)
    except DoesNotFit as error:
        return {**dataclasses.asdict(choice), "fits": False, "reason": str(error)}


def _told(config, recipe, choice, chip, step, cost, prices):
    """The figures of a plan, see `plan`."""
    chips = math.prod(choice.mesh.values())
    rate = recipe.tokens_per_step / cost.step_seconds / chips
    flops = throughput.flops_per_token(
        step.parameters,
        config["num_layers"],
        config["num_query_heads"],
        config["head_dim"],
        recipe.sequence_length,
    )
    hours = recipe.steps * cost.step_seconds / 3600
    return {
        **dataclasses.asdict(choice),
        "chips": chips,
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
        "chip_hours": hours * chips,
        "compile_seconds": step.seconds,
        "assumptions": prices.to_json(),
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
    if found["alternatives"]:
        lines += _compared([found, *found["alternatives"]])
    assumed = [f"  {name}: {text}" for name, text in found["assumptions"].items()]
    return "\n".join([*lines, "Planned, not run. Assumed are", *assumed])


def _compared(plans):
    """Lines that show plans side by side, the best one marked."""
    lines = ["", "mesh, kept, micro-batches: GiB, s/step, tokens/s/chip"]
    for each in plans:
        names = [field.name for field in dataclasses.fields(Choice)]
        choice = Choice(**{name: each[name] for name in names})
        mark = "*" if each["best"] else " "
        if "reason" in each:
            numbers = "does not fit"
        else:
            numbers = (
                f"{each['peak_memory_bytes'] / 2**30:5.1f}  "
                f"{each['step_seconds']:8.3f}  "
                f"{each['tokens_per_second_per_chip']:6,.0f}"
            )
        lines.append(f"{mark} {choice!s:44}  {numbers}")
    return [*lines, "* the fastest that fits", ""]
