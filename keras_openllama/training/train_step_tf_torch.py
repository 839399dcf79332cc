"""The training step on TensorFlow and PyTorch, each target by its weight."""

import keras
from keras import ops

from keras_openllama.backend.keras_private import loss_tracker
from keras_openllama.training.target_weights import target_weights

if keras.config.backend() == "tensorflow":
    import tensorflow as tf
else:
    import torch


class TfTorchTrainStep:
    """`OpenLlamaCausalLM` on TensorFlow and PyTorch.

    Unlike Keras's own step, the loss of an epoch is the mean over its targets (and not
    of means over batches), and a step whose loss or gradient is not finite is left out.
    With a loss or metrics of your own the step is Keras's.
    """

    def train_step(self, data):
        if not self.train_plan.auto_loss or not self.trainable_variables:
            return super().train_step(data)
        if keras.config.backend() == "tensorflow":
            return self._step_of_tensorflow(data)
        return self._step_of_torch(data)

    def test_step(self, data):
        if not self.train_plan.auto_loss:
            return super().test_step(data)
        return self._measured(*self._forward(data, training=False))

    def _forward(self, data, training):
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        weights = target_weights(x["padding_mask"], weights)
        logits = self(x, training=training)
        loss = self.compute_loss(x, y, logits, weights, training=training)
        return loss, x, y, logits, weights

    def _measured(self, loss, x, y, logits, weights):
        loss_tracker(self).update_state(loss, sample_weight=ops.sum(weights))
        return self.compute_metrics(x, y, logits, sample_weight=weights)

    def _step_of_torch(self, data):
        loss, *batch = self._forward(data, training=True)
        self.zero_grad()
        loss.backward()
        variables = self.trainable_variables
        gradients = [variable.value.grad for variable in variables]
        with torch.no_grad():
            norm = torch.nn.utils.get_total_norm(gradients)
            if torch.isfinite(loss) and torch.isfinite(norm):
                self.optimizer.apply(gradients, variables)
            return self._measured(loss.detach(), *batch)

    def _step_of_tensorflow(self, data):
        with tf.GradientTape() as tape:
            loss, *batch = self._forward(data, training=True)
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        norm = tf.linalg.global_norm(gradients)
        tf.cond(
            tf.math.is_finite(loss) & tf.math.is_finite(norm),
            lambda: self.optimizer.apply_gradients(
                zip(gradients, variables, strict=True)
            ),
            lambda: self.optimizer.iterations.value,
        )
        return self._measured(loss, *batch)
