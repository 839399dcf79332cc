"""Logits and losses of given sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_openllama.generation.sharding import model_device, state_shardings
from keras_openllama.layers.execution import LayerExecution
from keras_openllama.text.inputs import Texts, normalize_sequences
from keras_openllama.text.token_arrays import as_padding_mask, as_token_ids
from keras_openllama.utils.types import Tensor

if keras.config.backend() == "jax":
    from keras_openllama.layers.attention_kernels import select_attention

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import Backbone, CausalLM

SCORING_MODES = ("logits", "loss")


def score_sequences(
    model: CausalLM,
    inputs: Any,
    padding_mask: Any,
    scoring_mode: str,
    layer_intercept_fn: Callable[[Tensor, int | None], Tensor] | None,
    target_ids: Any,
) -> Tensor:
    """Implements `OpenLlamaCausalLM.score`.

    Args:
        model: `OpenLlamaCausalLM`.
        inputs: see `OpenLlamaCausalLM.score`, as for all further arguments.
        padding_mask: see there.
        scoring_mode: see there.
        layer_intercept_fn: see there.
        target_ids: see there.

    Returns:
        Logits or losses, see there.

    Raises:
        ValueError: see there.

    Example:
        >>> score_sequences(lm, "The sea", None, "logits", None, None).shape
        (1, 2, 3072)
    """
    if scoring_mode not in SCORING_MODES:
        raise ValueError(
            f"`scoring_mode` must be one of {SCORING_MODES}. "
            f"Received: scoring_mode={scoring_mode!r}"
        )
    sequences = normalize_sequences(inputs, model.preprocessor is not None)
    if isinstance(sequences, Texts):
        if padding_mask is not None or target_ids is not None:
            raise ValueError(
                "`padding_mask` and `target_ids` can only be passed with token ids; "
                "for text they are derived from it. Received: "
                f"inputs={str(inputs)[:80]!r}"
            )
        inputs, padding_mask, target_ids = _shifted(model.preprocessor, sequences.texts)
    size, context = model.backbone.vocabulary_size, model.backbone.context_length
    token_ids = as_token_ids(inputs, size)
    if token_ids.shape[1] > context:
        raise ValueError(
            f"`inputs` has {token_ids.shape[1]} tokens, but the context of this model "
            f"is {context} tokens. Shorten it, or load the model with `rope_scaling`."
        )
    padding_mask = as_padding_mask(padding_mask, token_ids.shape)
    if scoring_mode == "loss":
        target_ids = _targets(target_ids, token_ids.shape, size)
    arrays = {"token_ids": token_ids, "padding_mask": padding_mask}
    if layer_intercept_fn is None:
        logits = model.logits_function(**arrays)
    else:  # Python code that may read values, so the model is not compiled.
        logits = model.logits(**arrays, layer_intercept_fn=layer_intercept_fn)
    if scoring_mode == "logits":
        return logits
    losses = ops.sparse_categorical_crossentropy(target_ids, logits, from_logits=True)
    return losses * ops.cast(padding_mask, "float32")


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
        Execution by the fused attention kernels of a GPU on JAX; `None`, the default
        execution, on other devices, and on a mesh, over which XLA cannot partition the
        kernels.

    Example:
        >>> layer_execution(lm.backbone) is None  # On a CPU.
        True
    """
    if keras.config.backend() != "jax" or state_shardings(backbone)[0] is not None:
        return None
    device = model_device(backbone)
    if device.platform != "gpu":
        return None
    return LayerExecution(attention_fn=select_attention(device))
