"""Compiles the steps of published runs and estimates their speed, as for a plan."""

import math
from unittest import mock

import jax
import optax
from calibration import easylm, maxtext
from jax.sharding import NamedSharding, PartitionSpec

from keras_openllama.distribution import OpenLlamaParallel, make_mesh
from keras_openllama.layers import attention_kernels
from keras_openllama.planning.aot_compile import (
    compile_step_ahead_of_time,
    topology_devices,
)
from keras_openllama.planning.cost_model import estimate_cost
from keras_openllama.runs.recipe import preset_recipe
from keras_openllama.runs.tpu_compiler_options import compile_lowered
from keras_openllama.training import chunked_loss, train_step_jax

PUBLISHED_STEPS = {
    "easylm": easylm,
    "maxtext_2023_04": maxtext.April,
    "maxtext_2023_10": maxtext.October,
}
# Layers that are compiled of this package's step. It scans them, so that the number of
# iterations is all that changes with more layers, apart from their optimizer: 0.01 % of
# a step of 70B on 256 chips. No other loop has as many iterations.
LAYERS = 3
# MaxText does not split the logits. Splitting those of Llama 3 into the chunks that
# suit 32,000 pieces would reread the gradient of the head for every 128 tokens.
LOGITS_PER_CHUNK = 1 << 29
PARTS = ("matmul_seconds", "other_seconds", "kernel_seconds", "exposed_seconds")


def estimate_seconds(point):
    """Estimates the seconds of a point's step, by part.

    Args:
        point: a `CalibrationPoint`.

    Returns:
        `matmul_seconds`, `other_seconds`, `kernel_seconds` and `exposed_seconds`.
    """
    published = point.step in PUBLISHED_STEPS
    hlo, chip = (compile_published if published else compile_own)(point)
    trip_counts = {} if published else {LAYERS: point.sizes["num_layers"]}
    _, _, shape = point.topology.partition(":")
    cost = estimate_cost(
        hlo,
        chip,
        trip_counts=trip_counts,
        slice_shape=tuple(map(int, shape.split("x"))),
    )
    seconds = {part: getattr(cost, part) for part in PARTS}
    # A kernel without a causal mask computes both halves of the scores.
    seconds["kernel_seconds"] *= point.kernel_work
    return seconds


def compile_own(point):
    """Returns the HLO of this package's step, and the chip."""
    chip, devices = topology_devices(point.topology)
    recipe = preset_recipe("7b_v2").replace(
        batch_size=point.sequences_per_chip * len(devices),
        sequence_length=point.sequence_length,
        rematerialize=point.rematerialize,
        micro_batches=1,
    )
    config = {**point.sizes, "num_layers": LAYERS}
    with (
        mock.patch.object(chunked_loss, "LOGITS_PER_CHUNK", LOGITS_PER_CHUNK),
        mock.patch.object(attention_kernels, "SPLASH_BLOCK", point.attention_block),
        # MaxText leaves the reduction of gradients to the compiler.
        mock.patch.object(train_step_jax, "_prefers_all_to_all", lambda *_: False),
    ):
        step = compile_step_ahead_of_time(config, recipe, point.mesh, devices)
    return step.hlo, chip


def compile_published(point):
    """Returns the HLO of a step of another package, and the chip."""
    chip, devices = topology_devices(point.topology)
    published = PUBLISHED_STEPS[point.step]
    distribution = OpenLlamaParallel(make_mesh(**point.mesh, devices=devices))
    mesh = distribution.device_mesh.backend_mesh
    loss = published.make_loss(point.sizes, mesh)

    def step(params, moments, ids, targets):
        value, gradients = jax.value_and_grad(loss)(params, ids, targets)
        updates, moments = published.OPTIMIZER.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    shapes = arguments(point, published, mesh)
    shardings = jax.tree.map(lambda struct: struct.sharding, shapes[:2])
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*shardings, None))
        program = compile_lowered(jitted.lower(*shapes), devices[0])
    return program.as_text(), chip


def arguments(point, published, mesh):
    """Shapes of the arguments of a step: weights, moments, token IDs and targets."""

    def struct(shape, axes, dtype="float32"):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    shapes = published.weights(point.sizes)
    layers, layer = point.sizes["num_layers"], shapes.pop("layers")
    params = {name: struct(*weight) for name, weight in shapes.items()}
    axis = published.STACKED_AXIS
    params["layers"] = {
        name: struct(
            (*shape[:axis], layers, *shape[axis:]), (*axes[:axis], None, *axes[axis:])
        )
        for name, (shape, axes) in layer.items()
    }
    moments = optax.tree.map_params(
        published.OPTIMIZER,
        lambda _, param: param,
        jax.eval_shape(published.OPTIMIZER.init, params),
        params,
        transform_non_params=lambda count: struct((), (), count.dtype),
    )
    batch = point.sequences_per_chip * math.prod(point.mesh.values())
    ids = struct((batch, point.sequence_length), (("data", "fsdp"),), "int32")
    return params, moments, ids, ids
