"""The train step on TensorFlow."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_openllama.backend.keras_private import loss_tracker
from keras_openllama.training.loss_scaling import has_dynamic_loss_scale
from keras_openllama.training.target_weights import target_weights


class TensorFlowTrainStep:
    """The train step of `OpenLlamaCausalLM` on TensorFlow.

    It differs from the step of Keras in two ways. The loss of an epoch is the mean over
    its targets, not over the means of its batches; and a step without targets, or whose
    loss or gradient is not finite, is skipped. With other losses or metrics, the step
    of Keras is used.
    """

    def train_step(self, data: Any) -> dict[str, Any]:
        """See `keras.Model.train_step`."""
        if not self.train_plan.auto_loss or not self.trainable_variables:
            return super().train_step(data)
        with tf.GradientTape() as tape:
            loss, *batch = self._forward(data, training=True)
            scaled_loss = self.optimizer.scale_loss(loss)
        variables = self.trainable_variables
        gradients = tape.gradient(scaled_loss, variables)
        if self.optimizer.loss_scale_factor:  # Keras cannot unscale `IndexedSlices`.
            gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        usable = tf.math.is_finite(loss) & (tf.reduce_sum(batch[-1]) > 0)
        if not has_dynamic_loss_scale(self.optimizer):
            usable &= tf.math.is_finite(tf.linalg.global_norm(gradients))

        def apply():
            self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
            return True

        tf.cond(usable, apply, lambda: False)
        return self._update_metrics(loss, *batch)

    def test_step(self, data: Any) -> dict[str, Any]:
        """See `keras.Model.test_step`."""
        if not self.train_plan.auto_loss:
            return super().test_step(data)
        return self._update_metrics(*self._forward(data, training=False))

    def _forward(self, data, training):
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        weights = target_weights(x["padding_mask"], weights)
        logits = self(x, training=training)
        loss = self.compute_loss(x, y, logits, weights, training=training)
        return loss, x, y, logits, weights

    def _update_metrics(self, loss, x, y, logits, weights):
        loss_tracker(self).update_state(loss, sample_weight=ops.sum(weights))
        return self.compute_metrics(x, y, logits, sample_weight=weights)
