"""Loads a model for an evaluation, and checks the arguments that say which."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import keras

from keras_openllama.checkpoints.peft import CONFIG_FILE as ADAPTER_CONFIG
from keras_openllama.distribution import OpenLlamaParallel, make_mesh
from keras_openllama.evaluation.token_scoring import DEFAULT_BATCH_SIZE
from keras_openllama.loading.hub import open_repository
from keras_openllama.loading.load import find_source
from keras_openllama.models.causal_lm import OpenLlamaCausalLM
from keras_openllama.models.causal_lm_preprocessor import OpenLlamaCausalLMPreprocessor
from keras_openllama.text.sentencepiece_model import check_vocabulary
from keras_openllama.utils.validation import check_integer, raise_invalid


def load_model(
    preset: str,
    dtype: str | None = None,
    revision: str | None = None,
    mesh: Mapping[str, int] | None = None,
    adapters: str | None = None,
    tokenizer: str | None = None,
    quantization: str | None = None,
) -> OpenLlamaCausalLM:
    """Loads a model, sharded over a device mesh if one is given.

    Args:
        preset: see `OpenLlamaCausalLM.from_preset`.
        dtype: dtype or dtype policy of the weights.
        revision: branch, tag or commit of a repository on the Hub.
        mesh: sizes of the mesh by axis, see `distribution.make_mesh`. If `None` or
            empty, Keras's current distribution applies.
        adapters: LoRA adapters to load, see `OpenLlamaCausalLM.load_adapters`.
        tokenizer: preset of another tokenizer.
        quantization: `"int8"` or `"int4"`; `None` for weights as in the files.

    Returns:
        The model.

    Example:
        >>> load_model("nano", dtype="float32").count_params()
        4524288
    """
    scope = contextlib.nullcontext()
    if mesh:
        scope = OpenLlamaParallel(make_mesh(**mesh)).scope()
    # Errors of other files are raised before the weights are read.
    if adapters is not None:
        open_repository(adapters).file(ADAPTER_CONFIG)
    preprocessor = "auto"
    if tokenizer is not None and tokenizer != preset:
        preprocessor = OpenLlamaCausalLMPreprocessor.from_preset(tokenizer)
        size = find_source(preset, revision).arguments()["vocabulary_size"]
        check_vocabulary(preprocessor.tokenizer.vocabulary_size(), size)
    with scope:
        lm = OpenLlamaCausalLM.from_preset(
            preset,
            dtype=dtype,
            revision=revision,
            preprocessor=preprocessor,
            quantization=quantization or "auto",
        )
    if adapters is not None:
        lm.load_adapters(adapters)
    return lm


def parse_dtype(dtype: str | None) -> str | None:
    """Checks the dtype of a model before it is loaded.

    Args:
        dtype: dtype or dtype policy; `None` or `"auto"` for Keras's global policy.

    Returns:
        The dtype, or `None`.

    Raises:
        ValueError: if it is not a floating-point dtype.
    """
    if dtype in (None, "auto"):
        return None
    try:
        policy = keras.dtype_policies.get(dtype)
    except (TypeError, ValueError):
        policy = None
    if policy is None or "float" not in policy.compute_dtype:
        raise_invalid(
            "dtype", dtype, 'a floating-point dtype or policy, such as "bfloat16"'
        )
    return dtype


def check_not_given(arguments: Mapping[str, Any]) -> None:
    """Rejects arguments of `load_model` for a model that is loaded already.

    Args:
        arguments: the arguments by name; `None` if they are not given.

    Raises:
        ValueError: if one is given.
    """
    given = [f"{k}={v!r}" for k, v in arguments.items() if v is not None]
    if given:
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in arguments)} apply to `preset` only, "
            f"and `lm` is already loaded. Remove them. Received: {', '.join(given)}"
        )


def parse_batch_size(value: int | str) -> int:
    """Parses `batch_size`, which may be a string from a command line.

    Args:
        value: a positive integer, or `"auto"`.

    Returns:
        The number.

    Raises:
        ValueError: for another value.

    Example:
        >>> parse_batch_size("16"), parse_batch_size("auto")
        (16, 8)
    """
    if isinstance(value, str):
        if value.partition(":")[0] == "auto":
            return DEFAULT_BATCH_SIZE
        if value.isdecimal() and int(value) >= 1:
            return int(value)
        raise_invalid("batch_size", value, 'a positive integer or "auto"')
    return check_integer("batch_size", value)
