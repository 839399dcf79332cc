"""The train step on PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import torch
from keras import ops

from keras_openllama.backend.keras_private import compiled_metrics, loss_tracker
from keras_openllama.layers.attention_torch import FusedAttention
from keras_openllama.layers.execution import LayerExecution
from keras_openllama.training.chunked_loss_torch import chunked_cross_entropy
from keras_openllama.training.loss_scaling import has_dynamic_loss_scale
from keras_openllama.training.target_weights import target_weights


class _Sums(NamedTuple):
    """Weighted sums over the targets of a batch, float32 scalars."""

    loss: torch.Tensor
    correct: torch.Tensor
    targets: torch.Tensor


class TorchTrainStep:
    """The train step of `OpenLlamaCausalLM` on PyTorch.

    With the default loss and metrics it computes the loss in chunks. The loss of an
    epoch is the mean over its targets, not over the means of its batches; and a step
    without targets, or whose loss or gradient is not finite, is skipped. Other losses
    and metrics need all logits, so the step of Keras is used.
    """

    def train_step(self, data: Any) -> dict[str, Any]:
        """See `keras.Model.train_step`."""
        if not self.train_plan.auto_loss or not self.trainable_variables:
            return super().train_step(data)
        objective, sums = self._objective_and_sums(data, self.optimizer.scale_loss)
        self.zero_grad()
        objective.backward()
        variables = self.trainable_variables
        gradients = [variable.value.grad for variable in variables]
        with torch.no_grad():
            usable = torch.isfinite(sums.loss) & (sums.targets > 0)
            if not has_dynamic_loss_scale(self.optimizer):
                usable &= torch.isfinite(torch.nn.utils.get_total_norm(gradients))
            if usable:  # A single synchronization with the device.
                self.optimizer.apply(gradients, variables)
            return self._update_metrics(sums)

    def test_step(self, data: Any) -> dict[str, Any]:
        """See `keras.Model.test_step`."""
        if not self.train_plan.auto_loss:
            return super().test_step(data)
        return self._update_metrics(self._objective_and_sums(data)[1])

    def _objective_and_sums(self, data, scale_loss=lambda loss: loss):
        """Returns the mean loss times the loss scale, and the sums of the metrics."""
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        weights = target_weights(x["padding_mask"], weights)
        hidden = self.backbone.hidden_states(
            x["token_ids"],
            x["padding_mask"],
            execution=LayerExecution(attention_fn=FusedAttention()),
        )
        kernel = ops.convert_to_tensor(self.lm_head.kernel)
        targets = ops.convert_to_tensor(y)
        total = weights.sum()
        scale = scale_loss(1 / total.clamp(min=1e-9))
        objective, *sums = chunked_cross_entropy(
            hidden, kernel, targets, weights, scale
        )
        return objective, _Sums(*sums, total)

    def _update_metrics(self, sums):
        """Adds a batch to the metrics and returns their results."""
        mean = sums.loss / sums.targets.clamp(min=1e-9)
        loss_tracker(self).update_state(mean, sample_weight=sums.targets)
        for metric in compiled_metrics(self):  # Token accuracy, or none.
            metric.total.assign_add(sums.correct)
            metric.count.assign_add(sums.targets)
        return self.get_metrics_result()
