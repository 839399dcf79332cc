"""Saves and loads LoRA adapters in the format of PEFT.

Source: https://github.com/huggingface/peft.
"""

from __future__ import annotations

import functools
import json
import re
from typing import TYPE_CHECKING

from keras_openllama import presets
from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.keras_private import flatten_layers, kernel_variable
from keras_openllama.checkpoints import weight_names
from keras_openllama.checkpoints.files import safetensors
from keras_openllama.checkpoints.matching import format_names
from keras_openllama.checkpoints.model_files import foreign_content
from keras_openllama.layers.lora import adapted_layers
from keras_openllama.utils.files import read_json_object
from keras_openllama.utils.staging import staged

if TYPE_CHECKING:
    import keras

    from keras_openllama.checkpoints.repository import Repository
    from keras_openllama.utils.types import PathLike

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# PEFT's names of the two factors. In PEFT, A is applied to the inputs, and B gives the
# outputs. Kernels are `(outputs, inputs)` here, so it is the other way round.
_FACTORS = {"lora_kernel_b": "lora_A", "lora_kernel_a": "lora_B"}
# Settings of PEFT that change what the adapters compute, and are not supported.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "use_rslora": "rank-stabilized scaling",
    "rank_pattern": "different ranks per layer",
    "alpha_pattern": "different alphas per layer",
    "modules_to_save": "fully trained layers in addition to the adapters",
    "fan_in_fan_out": "transposed weights",
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
        _name(layer, factor): layer.adapters()[factor]
        for layer in layers
        for factor in _FACTORS
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base(lm.loaded_from),
        "r": layers[0].lora_rank,
        "lora_alpha": layers[0].lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({_modules()[layer.name] for layer in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    specs = {name: (tuple(v.shape), "float32") for name, v in variables.items()}
    values = (as_numpy(variable.value) for variable in variables.values())
    with staged(directory, force=force, foreign_content=foreign_content) as unfinished:
        with open(unfinished / WEIGHTS_FILE, "wb") as file:
            safetensors.write_safetensors(file, specs, values)
        (unfinished / CONFIG_FILE).write_text(
            json.dumps(config, indent=2) + "\n", "utf-8"
        )


def _base(origin):
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
    config = _read_config(repository)
    stored = safetensors.read_safetensors(repository.file(WEIGHTS_FILE))
    named = {
        _name(layer, factor): (layer, factor)
        for layer in flatten_layers(lm.backbone)
        if layer.name in _modules()
        for factor in _FACTORS
    }
    unknown = set(stored) - set(named)
    if unknown or not stored:
        raise ValueError(
            f"{repository} has adapters for layers that this model does not have: "
            f"{format_names(unknown)}."
        )
    rank, alpha = config["r"], config.get("lora_alpha") or config["r"]
    for name, tensor in stored.items():
        layer, factor = named[name]
        expected = _shape(layer, factor, rank)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} in {repository} has the shape {tuple(tensor.shape)}, but this "
                f"model requires {expected}: the adapters belong to another model."
            )
    targets = {layer.name for layer, _ in (named[name] for name in stored)}
    required = {name for name, (layer, _) in named.items() if layer.name in targets}
    missing = required - set(stored)
    if missing:
        raise ValueError(
            f"{repository} has no adapters for {format_names(missing)}. Adapters of "
            "only some decoder layers are not supported."
        )
    _enable(lm.backbone, rank, alpha, targets)
    for name, tensor in stored.items():
        layer, factor = named[name]
        layer.adapters()[factor].assign(tensor.array().astype("float32"))


def _enable(backbone, rank, alpha, targets):
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


def _read_config(repository):
    path = repository.file(CONFIG_FILE)
    config = read_json_object(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} is not the configuration of LoRA adapters.")
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f"The rank in {path} must be a positive integer. Received: r={rank!r}"
        )
    found = [text for name, text in _UNSUPPORTED.items() if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append("biases")
    if found:
        raise ValueError(
            f"{path} uses unsupported features: {', '.join(found)}. Merge the adapters "
            "with PEFT (`merge_and_unload`), and load the merged model."
        )
    return config


@functools.cache
def _modules():
    """Returns the module names in transformers by the names of the Keras layers."""
    return {
        row.path.split("/")[-2]: row.transformers.split(".")[-2]
        for row in weight_names.LAYER
        if row.path.endswith("/kernel")
    }


def _name(layer, factor):
    """Returns the name of a factor in the file."""
    index = layer.path.split("transformer_layer_")[1].split("/")[0]
    row = next(
        row for row in weight_names.LAYER if row.path.endswith(f"/{layer.name}/kernel")
    )
    module = row.in_layer(index).transformers.removesuffix(".weight")
    return f"{_PREFIX}{module}.{_FACTORS[factor]}.weight"


def _shape(layer, factor, rank):
    outputs, inputs = kernel_variable(layer).shape
    return (outputs, rank) if factor == "lora_kernel_a" else (rank, inputs)
