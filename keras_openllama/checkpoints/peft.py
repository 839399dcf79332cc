"""LoRA adapters in files of their own, in the format of PEFT.

Source: https://github.com/huggingface/peft.
"""

import functools
import json
import re

from keras_openllama import presets
from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.keras_private import flatten_layers, kernel_variable
from keras_openllama.checkpoints import weight_names
from keras_openllama.checkpoints.files import safetensors
from keras_openllama.checkpoints.matching import listed
from keras_openllama.checkpoints.model_files import foreign_content
from keras_openllama.layers.lora import adapted_layers
from keras_openllama.utils.files import read_json_object
from keras_openllama.utils.staging import staged

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Our factors under PEFT's names: its A is the one at the inputs, B that at the outputs.
_FACTORS = {"lora_kernel_b": "lora_A", "lora_kernel_a": "lora_B"}
# Settings of PEFT that make something else of the same files.
_UNKNOWN = {
    "use_dora": "DoRA",
    "use_rslora": "rank-stabilised scaling",
    "rank_pattern": "ranks by layer",
    "alpha_pattern": "alphas by layer",
    "modules_to_save": "whole layers beside the adapters",
    "fan_in_fan_out": "turned weights",
}


def save(lm, directory, force=False):
    """See `OpenLlamaCausalLM.save_adapters`."""
    layers = adapted_layers(lm.backbone)
    if not layers:
        raise ValueError("There are no adapters to save. See `enable_lora`.")
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
            safetensors.write(file, specs, values)
        (unfinished / CONFIG_FILE).write_text(
            json.dumps(config, indent=2) + "\n", "utf-8"
        )


def _base(origin):
    """The repository that PEFT would load below adapters; `None` if there is none."""
    known = presets.find(origin or "")
    handle = known.handles["transformers"] if known else origin or ""
    repository = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)", handle)
    return repository and repository[1]


def load(lm, files):
    """See `OpenLlamaCausalLM.load_adapters`.

    Args:
        lm: `OpenLlamaCausalLM`.
        files: `repository.Repository`.
    """
    config = _read_config(files)
    stored = safetensors.read(files.file(WEIGHTS_FILE))
    named = {
        _name(layer, factor): (layer, factor)
        for layer in flatten_layers(lm.backbone)
        if layer.name in _modules()
        for factor in _FACTORS
    }
    unknown = set(stored) - set(named)
    if unknown or not stored:
        raise ValueError(
            f"{files} has adapters for what is not in this model: {listed(unknown)}."
        )
    rank, alpha = config["r"], config.get("lora_alpha") or config["r"]
    for name, tensor in stored.items():
        layer, factor = named[name]
        expected = _shape(layer, factor, rank)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} in {files} has the shape {tuple(tensor.shape)}, and this "
                f"model takes {expected}: these adapters are for another model."
            )
    targets = {layer.name for layer, _ in (named[name] for name in stored)}
    whole = {name for name, (layer, _) in named.items() if layer.name in targets}
    if whole - set(stored):
        raise ValueError(
            f"{files} has no adapters for {listed(whole - set(stored))}; here every "
            "layer has the same."
        )
    _enable(lm.backbone, rank, alpha, targets)
    for name, tensor in stored.items():
        layer, factor = named[name]
        layer.adapters()[factor].assign(tensor.array().astype("float32"))


def _enable(backbone, rank, alpha, targets):
    """Adapters as the files have them, or the same that are there."""
    layers = adapted_layers(backbone)
    if not layers:
        backbone.enable_lora(rank, sorted(targets), alpha)
        return
    there = layers[0].lora_rank, layers[0].lora_alpha, {la.name for la in layers}
    if there != (rank, alpha, targets):
        raise ValueError(
            "The model has other adapters than the files: rank, alpha and layers are "
            f"{there}, and in the files {(rank, alpha, targets)}. Load the model again "
            "without `enable_lora`."
        )


def _read_config(files):
    path = files.file(CONFIG_FILE)
    config = read_json_object(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} is not the configuration of LoRA adapters.")
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{path} has no rank: r={rank!r}")
    found = [text for name, text in _UNKNOWN.items() if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append("biases")
    if found:
        raise ValueError(
            f"{path} asks for what this model has not: {', '.join(found)}. Merge these "
            "adapters with PEFT (`merge_and_unload`), and load what results."
        )
    return config


@functools.cache
def _modules():
    """Names of modules in transformers by those of projections here."""
    return {
        row.path.split("/")[-2]: row.transformers.split(".")[-2]
        for row in weight_names.LAYER
        if row.path.endswith("/kernel")
    }


def _name(layer, factor):
    """What a factor of an adapter is called in a file."""
    index = layer.path.split("transformer_layer_")[1].split("/")[0]
    row = next(
        row for row in weight_names.LAYER if row.path.endswith(f"/{layer.name}/kernel")
    )
    module = row.in_layer(index).transformers.removesuffix(".weight")
    return f"{_PREFIX}{module}.{_FACTORS[factor]}.weight"


def _shape(layer, factor, rank):
    outputs, inputs = kernel_variable(layer).shape
    return (outputs, rank) if factor == "lora_kernel_a" else (rank, inputs)
