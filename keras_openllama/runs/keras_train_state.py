"""The state of a run on TensorFlow and PyTorch, whose steps Keras computes."""

import jax
import numpy as np

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.training.step_metrics import LossSums, StepMetrics


class KerasTrainState:
    """`trainer.TrainState` by `train_on_batch`, on one device.

    Checkpoints are those of JAX, without the running mean of the loss: there is no
    limit to spikes here.

    Args:
        lm: `OpenLlamaCausalLM`, compiled, its optimizer built.
        save_frozen: bool, see `JaxTrainState`.
    """

    def __init__(self, lm, save_frozen=True):
        self.lm, self._save_frozen = lm, save_frozen

    def put(self, batch):
        return batch

    def compile(self, batch, evaluation):
        """Keras compiles at the first step."""

    def step(self, batch):
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

    def evaluate(self, batch):
        x, y, weights = batch
        self.lm.reset_metrics()
        logs = self.lm.test_on_batch(x, y, sample_weight=weights, return_dict=True)
        targets = float(weights.sum())
        accuracy = float(logs["sparse_categorical_accuracy"])
        return LossSums(float(logs["loss"]) * targets, 0.0, accuracy * targets), targets

    def wait(self):
        """Steps are computed when `step` returns."""

    def arrays(self):
        parts = self._variables()
        return {
            # Copies: these backends change variables in place, and it is written later.
            part: {v.path: np.array(as_numpy(v.value)) for v in variables}
            for part, variables in parts.items()
        }

    def _variables(self):
        model = [*self.lm.trainable_variables]
        if self._save_frozen:
            model += self.lm.non_trainable_variables
        return {"model": model, "optimizer": self.lm.optimizer.variables}

    def restore(self, checkpoints):
        sharding = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
        like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            self.arrays(),
        )
        found = checkpoints.restore_latest(lambda marker: like)
        if found is None:
            return None
        marker, arrays = found
        for part, variables in self._variables().items():
            for variable in variables:
                variable.assign(np.asarray(arrays[part][variable.path]))
        return marker

    def update_model(self):
        """The model's variables are the state."""

    def generate(self, prompts, **options):
        return [self.lm.generate(prompt, **options) for prompt in prompts]
