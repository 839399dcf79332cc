"""Builds models without weights, for the names and configurations of Keras's format."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_openllama.config import context_length
from keras_openllama.loading.uninitialized import without_weights
from keras_openllama.models.backbone import OpenLlamaBackbone
from keras_openllama.models.causal_lm import OpenLlamaCausalLM
from keras_openllama.models.causal_lm_preprocessor import OpenLlamaCausalLMPreprocessor
from keras_openllama.models.tokenizer import OpenLlamaTokenizer


def build_empty_task(
    arguments: dict[str, Any],
    dtype: str | keras.DTypePolicy,
    tokenizer: bytes | None = None,
    preprocessing: dict[str, Any] | None = None,
    tokenizer_settings: dict[str, Any] | None = None,
    end_token_ids: Sequence[int] | None = None,
) -> OpenLlamaCausalLM:
    """Builds a task whose variables have no values.

    Args:
        arguments: Arguments of `OpenLlamaBackbone`, from `validate_architecture`.
        dtype: Name of the dtype, or dtype policy.
        tokenizer: The serialized SentencePiece model. `None` builds no preprocessor.
        preprocessing: Settings of the preprocessor.
        tokenizer_settings: Settings of the tokenizer.
        end_token_ids: Ids of the tokens that end a text.

    Returns:
        The task.

    Example:
        >>> task = build_empty_task(lm.backbone.architecture(), "float32")
        >>> task.lm_head.kernel.shape
        (3072, 256)
    """
    preprocessor = None
    if tokenizer is not None:
        settings = {
            "sequence_length": context_length(arguments),
            **(preprocessing or {}),
        }
        preprocessor = OpenLlamaCausalLMPreprocessor(
            OpenLlamaTokenizer(tokenizer, **(tokenizer_settings or {})), **settings
        )
    with without_weights():
        backbone = OpenLlamaBackbone(**arguments, dtype=dtype)
        return OpenLlamaCausalLM(backbone, preprocessor, end_token_ids, compile=False)
