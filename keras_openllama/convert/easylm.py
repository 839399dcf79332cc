"""Loads and saves checkpoints of EasyLM, which contain only weights.

Source: https://github.com/young-geng/EasyLM.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from keras_openllama.checkpoints import contents, writer
from keras_openllama.loading.load import (
    describe_origin,
    find_source,
    load_task,
)
from keras_openllama.loading.sources import EasyLMSource
from keras_openllama.models.causal_lm import OpenLlamaCausalLM

if TYPE_CHECKING:
    import keras

    from keras_openllama.utils.types import PathLike


def load(
    path: PathLike,
    preset: PathLike,
    *,
    dtype: str | keras.DTypePolicy | None = None,
    preprocessor: Any = "auto",
    revision: str | None = None,
    **kwargs: Any,
) -> OpenLlamaCausalLM:
    """Loads a model from a checkpoint of EasyLM, tensor by tensor.

    Args:
        path: Path of the file: a stream of parameters or of a train state, or Flax's
            msgpack. The kind is detected.
        preset: Source of the architecture and the tokenizer, which the file does not
            contain: a name of `OpenLlamaCausalLM.presets`, a directory or
            `"hf://user/repo"`. Its weights are not read.
        dtype: Dtype or dtype policy. `None` is Keras's global policy.
        preprocessor: A preprocessor. `"auto"` loads that of the preset, and warns if it
            is a directory without a tokenizer. `None` loads no tokenizer.
        revision: Branch, tag or commit of a repository on the Hub.
        **kwargs: Arguments of `OpenLlamaBackbone`, which override those of the preset.

    Returns:
        The model.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is truncated or damaged, or contains weights of another model.

    Example:
        >>> save(lm, "nano.msgpack", dtype=None)
        >>> loaded = load("nano.msgpack", "open_llama_nano")
        >>> loaded.count_params() == lm.count_params()
        True
    """
    source = EasyLMSource(path, find_source(preset, revision))
    if preprocessor == "auto":
        try:
            source.tokenizer_proto()
        except FileNotFoundError as error:
            warnings.warn(
                f"{error} So the model works on token ids. Pass preprocessor=None if "
                "that is intended.",
                stacklevel=2,
            )
            preprocessor = None
    return load_task(
        OpenLlamaCausalLM,
        source,
        describe_origin(path, is_file=True),
        dtype=dtype,
        preprocessor=preprocessor,
        **kwargs,
    )


def save(
    lm: OpenLlamaCausalLM,
    path: PathLike,
    dtype: str | None = "bfloat16",
    content: str = "params",
    force: bool = False,
) -> None:
    """Saves a model as a checkpoint of EasyLM, tensor by tensor and atomically.

    EasyLM loads the file as `params::PATH`, `trainstate_params::PATH` or
    `flax_params::PATH`. Quantized weights are dequantized.

    Args:
        lm: The model.
        path: Path of the file.
        dtype: `"bfloat16"`, `"float16"` or `"float32"`. `None` is the dtype of the
            model.
        content: `"params"` or `"trainstate_params"` for EasyLM's streams, or
            `"flax_params"` for Flax's msgpack.
        force: Whether to replace an existing file.

    Raises:
        ValueError: If the dtype or the content is unknown, or a value exceeds the range
            of the dtype.
        OSError: If the file exists already, or cannot be written.

    Example:
        >>> save(lm, "nano_bfloat16.msgpack")
    """
    config = writer.ExportConfig(
        path, "easylm", dtype=dtype, content=content, force=force
    )
    writer.write_model(contents.contents_of_model(lm), config)
