"""Saves and loads LoRA adapters in the format of PEFT.

Source: https://github.com/huggingface/peft.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING

from keras_openllama import presets
from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.keras_private import flatten_layers
from keras_openllama.checkpoints import weight_names
from keras_openllama.checkpoints.files import safetensors, torch_zip
from keras_openllama.checkpoints.matching import FLOATS, check_whole, format_names
from keras_openllama.checkpoints.model_files import foreign_content
from keras_openllama.checkpoints.wrapped_names import unwrap_names
from keras_openllama.layers.lora import adapted_layers
from keras_openllama.utils.files import read_json_object
from keras_openllama.utils.staging import errors_name_target, staged
from keras_openllama.utils.validation import (
    check_integer,
    check_positive,
    raise_invalid,
)

if TYPE_CHECKING:
    import keras

    from keras_openllama.checkpoints.repository import Repository
    from keras_openllama.utils.types import PathLike

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# In order of preference, as in PEFT.
_READERS = {
    WEIGHTS_FILE: safetensors.read_safetensors,
    "adapter_model.bin": torch_zip.read_torch_file,
}
_PREFIX = "base_model.model."
# PEFT's names of the two factors. In PEFT, A is applied to the inputs, and B gives the
# outputs. Kernels are `(outputs, inputs)` here, so it is the other way round.
_FACTORS = {"lora_kernel_b": "lora_A", "lora_kernel_a": "lora_B"}
_DEFAULT = 8  # Of PEFT, for rank and alpha.
# Settings of PEFT that do not change what trained adapters compute, or whose effect is
# visible in the names of the tensors. Source: `LoraConfig` of PEFT 0.21.
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version"),
    *("revision", "task_type"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
    *("ensure_weight_tying", "lora_dropout", "megatron_core", "qalora_group_size"),
}
# Initializations that leave the weights of the base model as they are. PEFT repeats the
# others, such as PiSSA, when it loads adapters.
_INITIALIZATIONS = ("true", "false", "none", "gaussian", "orthogonal", "eva")
# What settings stand for whose names do not say it.
_FEATURES = {
    "alora_invocation_tokens": "adapters that act after certain tokens only",
    "alpha_pattern": "different alphas per layer",
    "bias": "trained biases",
    "fan_in_fan_out": "transposed weights",
    "init_lora_weights": "an initialization that may change the base model's weights",
    "lora_bias": "biases of the adapters",
    "modules_to_save": "fully trained layers in addition to the adapters",
    "rank_pattern": "different ranks per layer",
    "trainable_token_indices": "trained embeddings",
    "use_dora": "DoRA",
}


def save_adapters(lm: keras.Model, directory: PathLike, force: bool = False) -> None:
    """Implements `OpenLlamaCausalLM.save_adapters`.

    Args:
        lm: `OpenLlamaCausalLM` with adapters.
        directory: Path of the directory to write.
        force: Whether to replace an existing directory.

    Raises:
        ValueError: If the model has no adapters.
        OSError: If the directory exists or cannot be written.
    """
    layers = adapted_layers(lm.backbone)
    if not layers:
        raise ValueError(
            "There are no adapters to save. Add some with `enable_lora`, or restore "
            "merged ones with `unmerge_lora`."
        )
    variables = {
        _tensor_name(layer, factor): layer.adapters()[factor]
        for layer in layers
        for factor in _FACTORS
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _hub_repository(lm.loaded_from),
        "r": layers[0].lora_rank,
        "lora_alpha": layers[0].lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({_target_module(layer) for layer in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    specs = {name: (tuple(v.shape), "float32") for name, v in variables.items()}
    values = (as_numpy(variable.value) for variable in variables.values())
    with (
        errors_name_target(directory),
        staged(directory, force=force, foreign_content=foreign_content) as unfinished,
    ):
        with open(unfinished / WEIGHTS_FILE, "wb") as file:
            safetensors.write_safetensors(file, specs, values)
        (unfinished / CONFIG_FILE).write_text(
            json.dumps(config, indent=2) + "\n", "utf-8"
        )


def _hub_repository(origin):
    """Returns the repository of the base model on the Hub, or `None`."""
    known = presets.find(origin or "")
    handle = known.handles["transformers"] if known else origin or ""
    repository = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)", handle)
    return repository and repository[1]


def load_adapters(lm: keras.Model, repository: Repository) -> None:
    """Implements `OpenLlamaCausalLM.load_adapters`.

    Args:
        lm: `OpenLlamaCausalLM`.
        repository: The directory or repository that holds the adapters.

    Raises:
        ValueError: If the files are damaged, the adapters do not match the model, or
            they use a variant of LoRA that is not supported.
        OSError: If a file is missing or cannot be read.
    """
    rank, alpha = _read_config(repository.file(CONFIG_FILE))
    matched = _match(_open_tensors(repository), lm.backbone, rank, repository)
    targets = {layer.name for layer, _, _ in matched}
    _enable_or_check(lm.backbone, rank, alpha, targets)
    for layer, factor, tensor in matched:
        layer.adapters()[factor].assign(tensor.array().astype("float32"))


def _open_tensors(repository):
    """Returns the tensors of the adapters by name, without reading their values."""
    for name, read in _READERS.items():
        if path := repository.optional(name):
            stored = read(path)
            break
    else:
        try:
            repository.file(WEIGHTS_FILE)  # Raises an error that says why.
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} Nor is there {name}.") from None
    if not stored:
        raise ValueError(f"{path} contains no tensors. Save the adapters again.")
    check_whole(stored, path)
    integers = [name for name, tensor in stored.items() if tensor.dtype not in FLOATS]
    if integers:
        raise ValueError(
            f"{path} has tensors that are not floating point: {format_names(integers)}."
        )
    return stored


def _read_config(path):
    """Returns rank and alpha, or raises if another setting is not supported."""
    config = read_json_object(path)
    peft_type = config.pop("peft_type", None)
    if peft_type != "LORA":
        raise ValueError(
            f"{path} is not the configuration of LoRA adapters. Only LoRA is "
            f"supported. Received: peft_type={peft_type!r}"
        )
    try:
        rank = check_integer("r", config.pop("r", _DEFAULT))
        alpha = check_positive("lora_alpha", config.pop("lora_alpha", _DEFAULT))
        rank_stabilized = config.pop("use_rslora", None)
        if rank_stabilized not in (True, False, None):
            raise_invalid("use_rslora", rank_stabilized, "true or false")
        if rank_stabilized:  # The scale is alpha / sqrt(rank).
            alpha = check_positive("lora_alpha", alpha * math.sqrt(rank))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    unsupported = [
        f"{name}={value!r:.80}" + (f" ({_FEATURES[name]})" if name in _FEATURES else "")
        for name, value in config.items()
        if not _is_supported(name, value)
    ]
    if unsupported:
        raise ValueError(
            f"{path} has unsupported settings: {', '.join(unsupported)}. Merge the "
            "adapters with PEFT (`merge_and_unload`), and load the merged model."
        )
    return rank, alpha


def _is_supported(name, value):
    if name == "bias":
        return value in ("none", None)
    if name == "init_lora_weights":
        return str(value).lower() in _INITIALIZATIONS
    return name in _WITHOUT_EFFECT or not value


def _match(stored, backbone, rank, repository):
    """Matches the tensors of a file to the layers of a model.

    Args:
        stored: The tensors by name.
        backbone: The model. It may have no adapters yet.
        rank: The rank of the adapters.
        repository: Where the file is, for error messages.

    Returns:
        A list of layer, name of the factor, and tensor.

    Raises:
        ValueError: If a tensor is unknown, missing, or has another shape.
    """
    known = {
        _tensor_name(layer, factor): (layer, factor)
        for layer in flatten_layers(backbone)
        if layer.name in weight_names.PROJECTION_MODULES
        for factor in _FACTORS
    }
    names = {name.removeprefix(_PREFIX) for name in known}
    stored = {
        _PREFIX + name.removeprefix(_PREFIX): tensor
        for name, tensor in unwrap_names(stored, names, repository, _PREFIX).items()
    }
    unknown = set(stored) - set(known)
    if unknown:
        raise ValueError(
            f"{repository} has adapters for layers that this model does not have: "
            f"{format_names(unknown)}. Load them into their base model; adapters "
            "of the embeddings or the head are not supported: merge them with PEFT "
            "(`merge_and_unload`), and load the merged model."
        )
    for name, tensor in stored.items():
        expected = _factor_shape(*known[name], rank)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} in {repository} has the shape {tuple(tensor.shape)}, but this "
                f"model requires {expected} for r={rank}: the adapters belong to "
                f"another model, or `r` in {CONFIG_FILE} is wrong."
            )
    targets = {known[name][0].name for name in stored}
    required = {name for name, (layer, _) in known.items() if layer.name in targets}
    missing = required - set(stored)
    if missing:
        raise ValueError(
            f"{repository} has no adapters for {format_names(missing)}. Adapters of "
            "only some decoder layers are not supported: merge them with PEFT "
            "(`merge_and_unload`), and load the merged model."
        )
    return [(*known[name], tensor) for name, tensor in stored.items()]


def _enable_or_check(backbone, rank, alpha, targets):
    """Adds adapters to a model, or checks that it has adapters of the same kind."""
    layers = adapted_layers(backbone)
    if not layers:
        backbone.enable_lora(rank, sorted(targets), alpha)
        return
    present = layers[0].lora_rank, layers[0].lora_alpha, {la.name for la in layers}
    if present != (rank, alpha, targets):
        raise ValueError(
            "The model already has different adapters: its rank, alpha and layers are "
            f"{present}, and those in the files {(rank, alpha, targets)}. Load the "
            "model again, and do not call `enable_lora`."
        )


def _target_module(layer):
    """Returns the name of a projection in transformers, such as `"q_proj"`."""
    return weight_names.PROJECTION_MODULES[layer.name].rsplit(".", 1)[1]


def _tensor_name(layer, factor):
    """Returns the name of a factor in the file."""
    index = re.search(r"transformer_layer_(\d+)/", layer.path)[1]
    module = weight_names.PROJECTION_MODULES[layer.name].format(i=index)
    return f"{_PREFIX}{module}.{_FACTORS[factor]}.weight"


def _factor_shape(layer, factor, rank):
    outputs, inputs = layer.matrix_shape
    return (outputs, rank) if factor == "lora_kernel_a" else (rank, inputs)
