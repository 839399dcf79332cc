"""The train state of a run on TensorFlow and PyTorch, with Keras's train step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.runs.checkpoint_manager import CheckpointManager
from keras_openllama.training.step_metrics import LossSums, StepMetrics

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM


class KerasTrainState:
    """`trainer.TrainState` with Keras's `train_on_batch`, on one device.

    Checkpoints have the format of `JaxTrainState`, without the running mean of the
    loss, because spikes are not detected here.

    Args:
        lm: The model, compiled, its optimizer built.
        save_frozen: See `JaxTrainState`.
    """

    def __init__(self, lm: OpenLlamaCausalLM, save_frozen: bool = True):
        self.lm, self._save_frozen = lm, save_frozen

    def put_batch(self, batch: Any) -> Any:
        """Returns the batch; Keras puts it on the device."""
        return batch

    def compile(self, batch: Any, evaluation: bool) -> None:
        """Does nothing, because Keras compiles at the first step."""

    def train_step(self, batch: Any) -> StepMetrics:
        """Runs a step of Keras and returns its metrics."""
        x, y, weights = batch
        optimizer = self.lm.optimizer
        rate = float(optimizer.learning_rate)
        before = int(optimizer.iterations)
        self.lm.reset_metrics()
        logs = self.lm.train_on_batch(x, y, sample_weight=weights, return_dict=True)
        applied = int(optimizer.iterations) > before
        return StepMetrics(
            loss=np.float32(logs["loss"]),
            accuracy=np.float32(logs["sparse_categorical_accuracy"]),
            targets=np.float32(weights.sum()),
            grad_norm=None,
            param_norm=None,
            learning_rate=np.float32(rate),
            applied=np.bool_(applied),
        )

    def evaluate_batch(self, batch: Any) -> tuple[LossSums, float]:
        """Returns the sums over a batch's targets, and the sum of their weights."""
        x, y, weights = batch
        if not weights.any():  # Its mean is not a number.
            return LossSums(0.0, 0.0, 0.0), 0.0
        self.lm.reset_metrics()
        logs = self.lm.test_on_batch(x, y, sample_weight=weights, return_dict=True)
        targets = float(weights.sum())
        accuracy = float(logs["sparse_categorical_accuracy"])
        return LossSums(float(logs["loss"]) * targets, 0.0, accuracy * targets), targets

    def block_until_ready(self) -> None:
        """Does nothing, because `train_step` is synchronous."""

    def arrays(self) -> dict[str, dict[str, np.ndarray]]:
        """Returns copies of the variables, by part and path."""
        parts = self._variables()
        return {
            # Copies, because these backends update variables in place.
            part: {v.path: np.array(as_numpy(v.value)) for v in variables}
            for part, variables in parts.items()
        }

    def _variables(self):
        model = [*self.lm.trainable_variables]
        if self._save_frozen:
            model += self.lm.non_trainable_variables
        return {"model": model, "optimizer": self.lm.optimizer.variables}

    def restore(self, checkpoints: CheckpointManager) -> dict[str, Any] | None:
        """Restores the newest intact checkpoint, see `JaxTrainState.restore`.

        Args:
            checkpoints: The checkpoints of the run.

        Returns:
            The metadata in its `checkpoint.json`, or `None` if there is no checkpoint.
        """
        sharding = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            self.arrays(),
        )
        found = checkpoints.restore_latest(target)
        if found is None:
            return None
        metadata, arrays = found
        for part, variables in self._variables().items():
            for variable in variables:
                variable.assign(np.asarray(arrays[part][variable.path]))
        return metadata

    def update_model(self) -> None:
        """Does nothing, because the model's variables are the state."""

    def generate(self, prompts: list, **options: Any) -> list[str]:
        """Generates text for each prompt, see `OpenLlamaCausalLM.generate`."""
        return [self.lm.generate(prompt, **options) for prompt in prompts]
