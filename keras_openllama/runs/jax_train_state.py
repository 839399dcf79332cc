"""The train state of a run on JAX, on a single device or on a mesh."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from keras_openllama.distribution import OpenLlamaParallel, check_hosts, make_mesh
from keras_openllama.runs import jax_train_program
from keras_openllama.runs.checkpoint_manager import CheckpointManager
from keras_openllama.runs.train_config import TrainConfig
from keras_openllama.training.step_metrics import LossSums, StepMetrics
from keras_openllama.training.train_step_jax import (
    TrainStepOptions,
    options_for_devices,
)

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM


def distribution_for(mesh: Mapping[str, int]) -> OpenLlamaParallel | None:
    """Returns the Keras distribution of a mesh.

    Args:
        mesh: Sizes of the axes `"data"`, `"fsdp"` and `"model"`.

    Returns:
        The distribution, or `None` on a single device.

    Raises:
        ValueError: if the mesh does not use all devices, or a sequence would be split
            between processes.
    """
    # `make_mesh` rejects one device of many, as any mesh that omits some.
    if max(math.prod(mesh.values()), jax.device_count()) == 1:
        return None
    device_mesh = make_mesh(**mesh)
    check_hosts(device_mesh.backend_mesh)
    return OpenLlamaParallel(device_mesh)


def distribution_scope(
    distribution: OpenLlamaParallel | None,
) -> contextlib.AbstractContextManager:
    """Returns the scope in which a model is built; a null context without one."""
    return distribution.scope() if distribution else contextlib.nullcontext()


class JaxTrainState:
    """`trainer.TrainState` on JAX.

    Args:
        lm: The model, compiled, its optimizer built.
        config: The settings of the steps.
        distribution: The distribution that the model was built with, or `None`.
        save_frozen: Whether checkpoints include the variables that are not trainable.
            Runs that train adapters load them from their preset instead.
    """

    def __init__(
        self,
        lm: OpenLlamaCausalLM,
        config: TrainConfig,
        distribution: OpenLlamaParallel | None = None,
        save_frozen: bool = True,
    ):
        self.lm, self._config, self._distribution = lm, config, distribution
        self._save_frozen = save_frozen
        self._state = jax_train_program.initial_state(lm, self._sharding(0))

    def _sharding(self, rank):
        """Batch sharding of an array with this rank; rank 0 means replicated."""
        if self._distribution is None:
            return None
        if rank:
            return self._distribution.batch_sharding(rank)
        mesh = self._distribution.device_mesh.backend_mesh
        return NamedSharding(mesh, PartitionSpec())

    def put_batch(self, batch: Any) -> Any:
        """Puts this process's sequences on the devices, as part of the global batch."""
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

    def compile(self, batch: Any, evaluation: bool) -> None:
        """Compiles the step, and the evaluation if wanted, for batches like this."""
        config, replicated = self._config, self._sharding(0)
        options = TrainStepOptions(
            config.micro_batches, config.rematerialize, config.z_loss
        )
        options = options_for_devices(options, self._distribution)
        self._program = jax_train_program.compile_step(
            self.lm,
            self._state,
            batch,
            options,
            config.spike_threshold,
            replicated,
        )
        if evaluation:  # If it does not fit into memory, fail before training.
            self._evaluate = jax_train_program.compile_evaluation(
                self.lm, self._state, batch, options, replicated
            )

    def train_step(self, batch: Any) -> StepMetrics:
        """Runs a step; dispatch is asynchronous."""
        metrics, self._state = self._program(self._state, batch)
        return metrics

    def evaluate_batch(self, batch: Any) -> tuple[LossSums, Any]:
        """Returns the sums over a batch's targets, and the sum of their weights."""
        return self._evaluate(self._state, batch)

    def block_until_ready(self) -> None:
        """Waits until all steps have been computed."""
        jax.block_until_ready(self._state)

    def arrays(self) -> dict[str, dict[str, jax.Array]]:
        """Returns the arrays of a checkpoint, by part and variable path."""
        return jax_train_program.state_to_dict(self.lm, self._state, self._save_frozen)

    def restore(self, checkpoints: CheckpointManager) -> dict[str, Any] | None:
        """Restores the newest intact checkpoint.

        Args:
            checkpoints: The checkpoints of the run.

        Returns:
            The metadata in its `checkpoint.json`, or `None` if there is no checkpoint.

        Raises:
            checkpoint_manager.CheckpointError: if there are checkpoints, but none is
                intact.
            ValueError: if the checkpoint is that of another model or optimizer. The
                state is then lost, because its memory was freed.
        """
        arrays = self.arrays()
        target = jax_train_program.abstract_arrays(arrays)

        def delete_arrays():  # There is no memory for both states.
            jax.tree.map(lambda array: array.delete(), arrays)

        found = checkpoints.restore_latest(target, before_read=delete_arrays)
        if found is None:
            return None
        metadata, arrays = found
        frozen = None if self._save_frozen else self._state.non_trainable
        self._state = jax_train_program.state_from_dict(self.lm, arrays, frozen)
        self.update_model()
        return metadata

    def update_model(self) -> None:
        """Assigns the values of the state to the model's variables."""
        jax_train_program.assign_to_model(self.lm, self._state)

    def generate(self, prompts: list, **options: Any) -> list[str]:
        """Generates with the current weights, see `OpenLlamaCausalLM.generate`.

        Args:
            prompts: Prompts, strings or chats.
            **options: Arguments of `OpenLlamaCausalLM.generate`.

        Returns:
            The generated texts.
        """
        self.update_model()
        with distribution_scope(self._distribution):
            if all(isinstance(prompt, str) for prompt in prompts):
                return self.lm.generate(prompts, **options) if prompts else []
            return [self.lm.generate(prompt, **options) for prompt in prompts]
