"""Logits and losses of given sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_openllama.generation.sharding import model_device, state_shardings
from keras_openllama.layers.execution import LayerExecution
from keras_openllama.text.input_kinds import Texts
from keras_openllama.text.inputs import normalize_sequences
from keras_openllama.text.token_arrays import as_padding_mask, as_token_ids
from keras_openllama.utils.types import Tensor

if keras.config.backend() == "jax":
    from keras_openllama.layers.attention_kernels import select_attention

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import Backbone

SCORING_MODES = ("logits", "loss")


class ScoreMixin:
    """The methods of `OpenLlamaCausalLM` that compute logits and losses."""

    def score(
        self,
        inputs: Any = None,
        padding_mask: Any = None,
        scoring_mode: str = "logits",
        layer_intercept_fn: Callable[[Tensor, int | None], Tensor] | None = None,
        target_ids: Any = None,
        *,
        token_ids: Any = None,
    ) -> Tensor:
        """Computes logits or losses of given sequences, as in KerasHub.

        Args:
            inputs: token ids, int `(batch, length)`; or with a preprocessor a string or
                a list of strings.
            padding_mask: bool `(batch, length)`; `None` means no padding.
            scoring_mode: `"logits"`, or `"loss"` for the cross-entropy of each target,
                in nats.
            layer_intercept_fn: callable `(hidden_states, index) -> hidden_states`,
                called with the embeddings (index -1) and with each layer's output.
            target_ids: int `(batch, length)`, the correct token after each position.
                `"loss"` needs it for token ids; for text it is the text itself.
            token_ids: the same as `inputs`, by its name in KerasHub.

        Returns:
            Logits `(batch, length, vocabulary_size)`, or losses `(batch, length)`, 0 on
            padding; float32 tensors of the backend. For text, `length` is the number of
            tokens of the longest text minus one, since the last token has no target.

        Raises:
            ValueError: for malformed token ids, mask or targets, sequences longer than
                the context, or an unknown mode.

        Example:
            >>> lm.score("The sea", scoring_mode="loss").round(2)
            Array([[1.89, 6.02]], dtype=float32)
        """
        if (inputs is None) == (token_ids is None):
            raise ValueError(
                "`score` needs exactly one of `inputs` and `token_ids`. Received: "
                f"inputs={str(inputs)[:80]!r}, token_ids={str(token_ids)[:80]!r}"
            )
        inputs = token_ids if inputs is None else inputs
        if scoring_mode not in SCORING_MODES:
            raise ValueError(
                f"`scoring_mode` must be one of {SCORING_MODES}. "
                f"Received: scoring_mode={scoring_mode!r}"
            )
        arrays, target_ids = self._sequences_to_score(
            inputs, padding_mask, target_ids, needs_targets=scoring_mode == "loss"
        )
        if layer_intercept_fn is None:
            logits = self.logits_function(**arrays)
        else:  # Python code that may read values, so the model is not compiled.
            logits = self.logits(**arrays, layer_intercept_fn=layer_intercept_fn)
        if scoring_mode == "logits":
            return logits
        losses = ops.sparse_categorical_crossentropy(
            target_ids, logits, from_logits=True
        )
        return losses * ops.cast(arrays["padding_mask"], "float32")

    def _sequences_to_score(self, inputs, padding_mask, target_ids, needs_targets):
        """Returns the arguments of `logits` as a dict of arrays, and the targets."""
        sequences = normalize_sequences(inputs, self.preprocessor is not None)
        if isinstance(sequences, Texts):
            if padding_mask is not None or target_ids is not None:
                raise ValueError(
                    "`padding_mask` and `target_ids` can only be passed with token "
                    "ids; for text they are derived from it. Received: "
                    f"inputs={str(inputs)[:80]!r}"
                )
            inputs, padding_mask, target_ids = _shifted(
                self.preprocessor, sequences.texts
            )
        size, context = self.backbone.vocabulary_size, self.backbone.context_length
        token_ids = as_token_ids(inputs, size)
        if token_ids.shape[1] > context:
            raise ValueError(
                f"`inputs` has {token_ids.shape[1]} tokens, but the context of this "
                f"model is {context} tokens. Shorten it, or load the model with "
                "`rope_scaling`."
            )
        padding_mask = as_padding_mask(padding_mask, token_ids.shape)
        if needs_targets:
            target_ids = _targets(target_ids, token_ids.shape, size)
        return {"token_ids": token_ids, "padding_mask": padding_mask}, target_ids

    def logits(
        self,
        token_ids: Tensor,
        padding_mask: Tensor,
        layer_intercept_fn: Callable[[Tensor, int | None], Tensor] | None = None,
    ) -> Tensor:
        """Computes logits in float32, whatever the compute dtype.

        Args:
            token_ids: int `(batch, length)`.
            padding_mask: bool or int `(batch, length)`, see `OpenLlamaBackbone`.
            layer_intercept_fn: see `OpenLlamaBackbone.hidden_states`.

        Returns:
            float32 `(batch, length, vocabulary_size)`.

        Example:
            >>> import numpy as np
            >>> token_ids = np.array([[1, 357, 1239]])
            >>> lm.logits(token_ids, np.ones_like(token_ids)).shape
            (1, 3, 3072)
        """
        hidden = self.backbone.hidden_states(
            *(token_ids, padding_mask),
            layer_intercept_fn=layer_intercept_fn,
            execution=layer_execution(self.backbone),
        )
        return ops.cast(self.lm_head(hidden), "float32")


def _targets(target_ids, shape, vocabulary_size):
    if target_ids is None:
        raise ValueError(
            "scoring_mode='loss' needs `target_ids`, the correct token after each "
            "position: an int array (batch, length). Received: target_ids=None"
        )
    target_ids = as_token_ids(target_ids, vocabulary_size, "target_ids")
    if target_ids.shape != shape:
        raise ValueError(
            f"`target_ids` must have the shape of the token ids, {shape}. "
            f"Received: shape {target_ids.shape}"
        )
    return target_ids


def _shifted(preprocessor, texts):
    """Returns token ids, padding mask and targets, padded to the longest text."""
    sequences = preprocessor.prompt_ids(texts, name="inputs")
    shape = len(sequences), max(len(sequence) for sequence in sequences) - 1
    if shape[1] == 0:
        raise ValueError(
            "`inputs` must have at least two tokens, since the first has no loss. "
            f"Received: inputs={texts!r}"
        )
    ids, targets = np.zeros(shape, "int32"), np.zeros(shape, "int32")
    mask = np.zeros(shape, "bool")
    for i, sequence in enumerate(sequences):
        n = len(sequence) - 1
        ids[i, :n], targets[i, :n], mask[i, :n] = sequence[:-1], sequence[1:], True
    return ids, mask, targets


def layer_execution(backbone: Backbone) -> LayerExecution | None:
    """Returns how a backbone computes the layers of given sequences.

    Args:
        backbone: `OpenLlamaBackbone`.

    Returns:
        Execution by the fused attention kernels of a GPU or a CPU on JAX; `None`, the
        default execution, on other devices, and on a mesh, over which XLA cannot
        partition the kernels.

    Example:
        >>> layer_execution(lm.backbone) is None  # On a CPU.
        False
    """
    if keras.config.backend() != "jax" or state_shardings(backbone)[0] is not None:
        return None
    device = model_device(backbone)
    if device.platform not in ("gpu", "cpu"):
        return None
    return LayerExecution(attention_fn=select_attention(device))
