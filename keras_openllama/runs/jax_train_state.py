"""The state of a run on JAX: one compiled step, on one device or on a mesh."""

import contextlib
import math

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from keras_openllama.distribution import OpenLlamaParallel, check_hosts, make_mesh
from keras_openllama.runs import jax_train_program
from keras_openllama.training.train_step_jax import (
    TrainStepOptions,
    options_for_devices,
)


def distribution_for(mesh):
    """How a model is distributed on a mesh.

    Args:
        mesh: dict of `"data"`, `"fsdp"` and `"model"`.

    Returns:
        `OpenLlamaParallel`, or `None` on a single device.

    Raises:
        ValueError: if the mesh is not of all devices, or processes share sequences.
    """
    # One device of many is refused, as any mesh that omits some.
    if max(math.prod(mesh.values()), jax.device_count()) == 1:
        return None
    device_mesh = make_mesh(**mesh)
    check_hosts(device_mesh.backend_mesh)
    return OpenLlamaParallel(device_mesh)


def scope_of(distribution):
    """The scope in which a model is built; none on a single device."""
    return distribution.scope() if distribution else contextlib.nullcontext()


class JaxTrainState:
    """`trainer.TrainState` on JAX.

    Args:
        lm: `OpenLlamaCausalLM`, compiled, its optimizer built.
        config: `TrainConfig`.
        distribution: `OpenLlamaParallel`, or `None`.
        save_frozen: bool, whether checkpoints hold the variables that training does not
            change, too. A run that trains adapters has them in its preset.
    """

    def __init__(self, lm, config, distribution=None, save_frozen=True):
        self.lm, self._config, self._distribution = lm, config, distribution
        self._save_frozen = save_frozen
        self._state = jax_train_program.state_of(lm, self._sharding(0))

    def _sharding(self, rank):
        """Of an array whose first axis is the batch; with rank 0, a copy everywhere."""
        if self._distribution is None:
            return None
        if rank:
            return self._distribution.batch_sharding(rank)
        mesh = self._distribution.device_mesh.backend_mesh
        return NamedSharding(mesh, PartitionSpec())

    def put(self, batch):
        if self._distribution is None:
            return jax.device_put(batch)
        return jax.tree.map(
            lambda a: jax.make_array_from_process_local_data(
                self._sharding(a.ndim),
                np.ascontiguousarray(a),
                (len(a) * jax.process_count(), *a.shape[1:]),
            ),
            batch,
        )

    def compile(self, batch, evaluation):
        config, replicated = self._config, self._sharding(0)
        options = TrainStepOptions(
            config.micro_batches, config.rematerialize, config.z_loss
        )
        options = options_for_devices(options, self._distribution)
        self._program = jax_train_program.compile_step(
            *(self.lm, self._state, batch, options),
            config.spike_threshold,
            replicated,
        )
        if evaluation:  # What does not fit is to fail now.
            self._evaluate = jax_train_program.compile_evaluation(
                self.lm, self._state, batch, options, replicated
            )

    def step(self, batch):
        metrics, self._state = self._program(self._state, batch)
        return metrics

    def evaluate(self, batch):
        return self._evaluate(self._state, batch)

    def wait(self):
        jax.block_until_ready(self._state)

    def arrays(self):
        return jax_train_program.named(self.lm, self._state, self._save_frozen)

    def restore(self, checkpoints):
        arrays = self.arrays()
        like = jax_train_program.abstract(arrays)

        def make_room(marker):
            jax.tree.map(lambda array: array.delete(), arrays)
            return like

        found = checkpoints.restore_latest(make_room)
        if found is None:
            return None
        marker, arrays = found
        frozen = None if self._save_frozen else self._state.non_trainable
        self._state = jax_train_program.unnamed(self.lm, arrays, frozen)
        self.update_model()
        return marker

    def update_model(self):
        """Gives the model's variables the values of the state."""
        jax_train_program.put_back(self.lm, self._state)

    def generate(self, prompts, **options):
        self.update_model()
        with scope_of(self._distribution):
            if all(isinstance(prompt, str) for prompt in prompts):
                return self.lm.generate(prompts, **options) if prompts else []
            return [self.lm.generate(prompt, **options) for prompt in prompts]
