"""Models in the format of transformers: their configuration and their tensors."""

import json

import numpy as np

from keras_openllama.checkpoints import weight_names
from keras_openllama.checkpoints.matching import match
from keras_openllama.checkpoints.shards import open_checkpoint

# Settings of transformers that our network has no counterpart for, and the values with
# which they change nothing.
_WITHOUT_COUNTERPART = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
_REQUIRED = {
    "vocabulary_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_query_heads": "num_attention_heads",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
}


def read_config(path):
    """Reads a `config.json`.

    Raises:
        ValueError: if it is not a JSON object.
    """
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return config


def backbone_arguments(config, path="config.json"):
    """Arguments of `OpenLlamaBackbone` for a `config.json` of transformers.

    Args:
        config: dict, as `read_config` returns.
        path: where it is from, for messages.

    Returns:
        Dict of keyword arguments.

    Raises:
        ValueError: if a setting is missing, or cannot be represented here.

    Example:

    ```python
    OpenLlamaBackbone(**backbone_arguments(read_config(path)))
    ```

    Source: `LlamaConfig` of transformers, whose defaults stand in for what is absent.
    """
    for name, allowed in _WITHOUT_COUNTERPART.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{path} sets {name}={config[name]!r}, which OpenLLaMA's network does "
                f"not have; {name} may be {' or '.join(map(repr, allowed))}."
            )
    missing = [name for name in _REQUIRED.values() if name not in config]
    if missing:
        raise ValueError(f"{path} does not set {', '.join(missing)}.")
    arguments = {ours: config[theirs] for ours, theirs in _REQUIRED.items()}
    heads = arguments["num_query_heads"]
    wavelength, scaling = _rope(config, path)
    arguments.update(
        num_key_value_heads=_or_default(config, "num_key_value_heads", heads),
        head_dim=_or_default(config, "head_dim", None),
        rope_max_wavelength=wavelength,
        rope_scaling=scaling,
        layer_norm_epsilon=_or_default(config, "rms_norm_eps", 1e-6),
        max_sequence_length=_or_default(config, "max_position_embeddings", 2048),
        initializer_std=_or_default(config, "initializer_range", 0.02),
    )
    return arguments


def _or_default(config, name, default):
    value = config.get(name)
    return default if value is None else value


def _rope(config, path):
    """Base of the rotary frequencies, and our `rope_scaling`."""
    # transformers 5 writes `rope_parameters`, base included; before, it was
    # `rope_theta` and `rope_scaling`, whose "rope_type" once was called "type".
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} sets the RoPE scaling {settings!r}, which is no dict."
        )
    wavelength = settings.get("rope_theta", config.get("rope_theta"))
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        scaling = None
    elif kind in ("linear", "dynamic"):
        scaling = {"rope_type": kind, "factor": settings.get("factor")}
    else:
        raise ValueError(
            f"{path} sets the RoPE scaling {settings}, of which only the types "
            "'linear' and 'dynamic' are supported here."
        )
    return 10000.0 if wavelength is None else wavelength, scaling


def read_tensors(repository, arguments, head=True, tied=False):
    """Describes the tensors of a checkpoint; none is read yet.

    Args:
        repository: `hub.Directory` or `hub.HubRepository`.
        arguments: dict, arguments of `OpenLlamaBackbone`.
        head: bool, whether the language-model head is wanted.
        tied: bool, whether the head's weights are those of the embedding.

    Returns:
        Dict of `tensors.StoredTensor`s by variable path.

    Raises:
        OSError: if a file is missing, or cannot be fetched or opened.
        ValueError: if a file is damaged, or its tensors are not those of the network
            that the arguments describe.
    """
    tensors = _base_names(open_checkpoint(repository))
    tensors = {name: t for name, t in tensors.items() if not _is_buffer(name)}
    if not head:  # A backbone alone has no use for it.
        tensors.pop(weight_names.HEAD.transformers, None)
    elif tied:
        _tie_head(tensors)
    sizes = weight_names.sizes(arguments)
    expected = {
        row.path: (row.transformers, row.shape(sizes))
        for row in weight_names.weights(arguments["num_layers"], head)
    }
    return match(tensors, expected, repository)


def _base_names(tensors):
    """A checkpoint of `LlamaModel` alone has names without `model.`."""
    if "embed_tokens.weight" not in tensors:
        return tensors
    return {f"model.{name}": stored for name, stored in tensors.items()}


def _is_buffer(name):
    """Old versions saved the rotary frequencies, which follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def _tie_head(tensors):
    """Lets the head be read from the embedding."""
    embedding = tensors.get(weight_names.EMBEDDING.transformers)
    head = tensors.setdefault(weight_names.HEAD.transformers, embedding)
    if embedding is None or head is None:
        tensors.pop(weight_names.HEAD.transformers)
    elif not np.array_equal(embedding.array(), head.array()):
        raise ValueError(
            f"config.json sets tie_word_embeddings, and {head.file.path} has a "
            f"{head.name} that differs from {embedding.name}. Set it to false to load "
            "both."
        )
