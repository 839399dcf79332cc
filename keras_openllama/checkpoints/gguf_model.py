"""Reads and writes models of llama.cpp: GGUF files of the architecture "llama".

Source: `convert_hf_to_gguf.py`, `src/llama-model.cpp` and `src/llama-quant.cpp` of
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from keras_openllama import presets
from keras_openllama.checkpoints import weight_names
from keras_openllama.checkpoints.files.gguf_file import (
    FLOAT_TYPES,
    BlockTensor,
    GgufFile,
    block_sizes,
    gguf_header,
    gguf_size,
    write_gguf,
)
from keras_openllama.checkpoints.gguf_tokenizer import add_tokenizer
from keras_openllama.checkpoints.matching import format_names, match_tensors
from keras_openllama.checkpoints.outputs import OutputFile
from keras_openllama.checkpoints.quantized_tensors import value_as_it_is
from keras_openllama.checkpoints.rotary_order import (
    half_split_to_interleaved,
    interleaved_to_half_split,
)
from keras_openllama.checkpoints.tensors import RearrangedTensor
from keras_openllama.config import context_length
from keras_openllama.quantization.quantized_matrix import QuantizedMatrix

if TYPE_CHECKING:
    from keras_openllama.checkpoints.contents import ModelContents
    from keras_openllama.checkpoints.tensors import StoredTensor

_ARCHITECTURE = "llama"
# Metadata of which only these values are supported, if they are set at all.
_SUPPORTED_VALUES = {
    "general.type": ("model",),
    "llama.expert_count": (0,),
    "llama.attention.causal": (True,),
    "llama.rope.scaling.attn_factor": (1.0,),
}
_REQUIRED = {
    "num_layers": "llama.block_count",
    "num_query_heads": "llama.attention.head_count",
    "hidden_dim": "llama.embedding_length",
    "intermediate_dim": "llama.feed_forward_length",
    "max_sequence_length": "llama.context_length",
    "layer_norm_epsilon": "llama.attention.layer_norm_rms_epsilon",
}
_ROPE_FACTORS = "rope_freqs.weight"
_ROTATION = ".attn_rot_embd.weight"  # Of early converters; llama.cpp ignores it.
_EMBEDDING, _HEAD = weight_names.EMBEDDING.gguf, weight_names.HEAD.gguf


# ----- Reading


def backbone_arguments(file: GgufFile) -> dict[str, Any]:
    """Converts the metadata of a file to arguments of `OpenLlamaBackbone`.

    Args:
        file: The file.

    Returns:
        Keyword arguments. Settings that are absent have the defaults of llama.cpp.

    Raises:
        ValueError: If the file has another architecture, or a setting is missing or not
            supported.

    Example:
        >>> from keras_openllama.checkpoints.files.gguf_file import read_gguf
        >>> lm.export_to_gguf("nano.gguf")
        >>> backbone_arguments(read_gguf("nano.gguf"))["num_layers"]
        4
    """
    architecture = file.metadata.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise ValueError(
            f"{file.path} has the architecture {architecture!r}. Only models of the "
            f"architecture {_ARCHITECTURE!r} can be loaded."
        )
    for key, allowed in _SUPPORTED_VALUES.items():
        value = file.metadata.get(key, allowed[0])
        if value not in allowed:
            raise _unsupported(file, key, value)
    missing = [key for key in _REQUIRED.values() if key not in file.metadata]
    if missing or _EMBEDDING not in file.tensors:
        names = ", ".join([*missing, *([_EMBEDDING] if not missing else [])])
        raise ValueError(
            f"{file.path} has no {names}. It is incomplete, or not a language model."
        )
    arguments = {name: _value(file, key) for name, key in _REQUIRED.items()}
    arguments["vocabulary_size"] = file.tensors[_EMBEDDING].shape[0]
    arguments["num_key_value_heads"] = _value(file, "llama.attention.head_count_kv")
    arguments["head_dim"] = _head_dim(file)
    arguments["rope_max_wavelength"] = _value(file, "llama.rope.freq_base") or 10000.0
    arguments["rope_scaling"] = _rope_scaling(file)
    if arguments["rope_scaling"]:
        original = _value(file, "llama.rope.scaling.original_context_length")
        arguments["max_sequence_length"] = original or arguments["max_sequence_length"]
    return arguments


def _unsupported(file, key, value):
    return ValueError(
        f"{file.path} sets {key}={value!r}, which OpenLlamaBackbone does not support."
    )


def _value(file, key):
    """Returns a setting; one that is given for each layer must be the same in all."""
    value = file.metadata.get(key)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise _unsupported(file, key, value)
        value = value[0]
    if isinstance(value, float):
        return float(str(np.float32(value)))  # 1e-06 and not 9.999999974752427e-07.
    return value


def _head_dim(file):
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    sizes = {key: _value(file, f"llama.{key}") for key in keys}
    found = {key: size for key, size in sizes.items() if size is not None}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{file.path} sets {', '.join(f'llama.{k}={v}' for k, v in found.items())}."
            " OpenLlamaBackbone supports only heads of one size, rotated as a whole."
        )
    return next(iter(found.values()), None)


def _rope_scaling(file):
    kind = _value(file, "llama.rope.scaling.type") or "none"
    factor = _value(file, "llama.rope.scaling.factor")
    legacy = _value(file, "llama.rope.scale_linear")
    if kind == "none" and legacy not in (None, 0.0, 1.0):
        kind, factor = "linear", legacy
    if kind not in ("none", "linear"):
        raise _unsupported(file, "llama.rope.scaling.type", kind)
    factor = factor or 1.0 if kind == "linear" else 1.0
    factor *= _frequency_factor(file)
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _frequency_factor(file):
    """Returns by how much the tensor of factors divides all frequencies of RoPE."""
    stored = file.tensors.get(_ROPE_FACTORS)
    if stored is None:
        return 1.0
    factors = np.unique(stored.array())
    if len(factors) != 1:
        raise ValueError(
            f"{file.path} has the tensor {_ROPE_FACTORS}, which scales each frequency "
            "of RoPE by another factor, as Llama 3 does. OpenLlamaBackbone supports "
            "only one factor for all frequencies."
        )
    return float(factors[0])


def read_tensors(
    file: GgufFile, arguments: dict[str, Any], head: bool = True
) -> dict[str, StoredTensor]:
    """Lists the tensors of a file, without reading their values.

    Args:
        file: The file.
        arguments: Arguments of `OpenLlamaBackbone`.
        head: Whether to include the language-model head. If the file has none, it
            shares the weights of the embedding.

    Returns:
        The tensors by variable path, in the layout of the Keras variables.

    Raises:
        ValueError: If the tensors do not match the arguments.
    """
    tensors = {
        name: stored
        for name, stored in file.tensors.items()
        if name != _ROPE_FACTORS and not name.endswith(_ROTATION)
    }
    if not head:
        tensors.pop(_HEAD, None)
    elif _EMBEDDING in tensors:
        tensors.setdefault(_HEAD, tensors[_EMBEDDING])
    sizes = weight_names.axis_sizes(arguments)
    rows = weight_names.weight_specs(arguments["num_layers"], head)
    expected = {row.path: (row.gguf, row.shape(sizes)) for row in rows}
    matched = match_tensors(tensors, expected, file.path, "the metadata of the file")
    arrange = functools.partial(
        interleaved_to_half_split, head_dim=arguments["head_dim"]
    )
    for row in rows:
        if row.is_rotary:
            matched[row.path] = _rearranged(matched[row.path], arrange)
    return matched


def _rearranged(stored, arrange):
    if isinstance(stored, BlockTensor):
        return stored.rearranged(arrange)
    return RearrangedTensor(stored, stored.shape, arrange)


# ----- Writing


def output_files(
    contents: ModelContents, quantization: str, name: str
) -> list[OutputFile]:
    """Describes the single file of an export as GGUF.

    Args:
        contents: The model.
        quantization: One of `formats.GGUF_QUANTIZATIONS`.
        name: Name of the model in the metadata, unless it is that of a preset.

    Returns:
        A list of one file.

    Raises:
        ValueError: If llama.cpp cannot apply the tokenizer.
    """
    rows = weight_names.weight_specs(contents.arguments["num_layers"])
    sizes = weight_names.axis_sizes(contents.arguments)
    specs = {
        row.gguf: (row.shape(sizes), _stored_type(row, sizes, quantization.upper()))
        for row in rows
    }
    _warn_of_larger_types(specs, quantization.upper())

    def add_metadata(writer):
        _add_description(writer, contents, name, quantization.upper())
        _add_architecture(writer, contents.arguments)
        add_tokenizer(writer, contents)

    def write(file, values):
        arranged = (
            _to_gguf(row, value, contents.arguments["head_dim"])
            for row, value in zip(rows, values, strict=True)
        )
        write_gguf(file, header, specs, arranged)

    header = gguf_header(_ARCHITECTURE, add_metadata, specs)
    size = gguf_size(header, specs)
    paths = tuple(row.path for row in rows)
    return [OutputFile("", size, write, paths, read=value_as_it_is)]


def _stored_type(row, sizes, type_name):
    """Returns the type of a tensor, as llama.cpp chooses it where that is possible."""
    shape = row.shape(sizes)
    if len(shape) == 1:
        return "F32"
    if type_name in FLOAT_TYPES:
        return type_name
    if shape[-1] % block_sizes(type_name)[0]:
        return "F16"
    # The head and the embedding decide about each token. llama.cpp stores the head in
    # Q6_K, which the gguf package cannot write.
    return "Q8_0" if row.gguf in (_EMBEDDING, _HEAD) else type_name


def _warn_of_larger_types(specs, type_name):
    if type_name in FLOAT_TYPES:
        return
    larger = [
        name
        for name, (shape, kind) in specs.items()
        if len(shape) > 1 and kind == "F16"
    ]
    if larger:
        block, _ = block_sizes(type_name)
        warnings.warn(
            f"Blocks of {type_name} have {block} values, which do not divide the rows "
            f"of these tensors. They are stored in F16: {format_names(larger)}.",
            stacklevel=2,
        )


def _to_gguf(row, value, head_dim):
    if not row.is_rotary:
        return value
    if not isinstance(value, QuantizedMatrix):
        return half_split_to_interleaved(value, head_dim)
    arrays = {
        name: half_split_to_interleaved(array, head_dim)
        for name in ("values", "scales", "zeros")
        if (array := getattr(value, name)) is not None
    }
    return dataclasses.replace(value, **arrays)


def _add_description(writer, contents, name, type_name):
    """Adds what the model is: its name, license, source and type."""
    preset = presets.registry().get(contents.origin)
    writer.add_type("model")
    writer.add_name(preset.name if preset else name)
    writer.add_size_label(
        gguf.size_label(contents.parameters, contents.parameters, 0, 0)
    )
    if preset:
        writer.add_license(preset.license.lower())
        _add_source(writer, preset)
    prefix = "ALL" if type_name == "F32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{prefix}_{type_name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_source(writer, preset):
    handle = preset.handles["transformers"]
    if not handle.startswith("hf://"):
        return
    repository = handle.removeprefix("hf://")
    url = f"https://huggingface.co/{repository}"
    organization, name = repository.split("/")
    writer.add_source_url(url)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, name)
    writer.add_base_model_organization(0, organization)
    writer.add_base_model_repo_url(0, url)


def _add_architecture(writer, arguments):
    head_dim = arguments["head_dim"]
    writer.add_vocab_size(arguments["vocabulary_size"])
    writer.add_block_count(arguments["num_layers"])
    writer.add_embedding_length(arguments["hidden_dim"])
    writer.add_feed_forward_length(arguments["intermediate_dim"])
    writer.add_head_count(arguments["num_query_heads"])
    writer.add_head_count_kv(arguments["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(arguments["layer_norm_epsilon"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(arguments["rope_max_wavelength"])
    _add_context(writer, arguments)


def _add_context(writer, arguments):
    """Adds the context length and the scaling of RoPE that extends it."""
    scaling, original = arguments["rope_scaling"], arguments["max_sequence_length"]
    if scaling is None:
        writer.add_context_length(original)
    elif scaling["rope_type"] == "linear":
        writer.add_context_length(context_length(arguments))
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(original)
    else:
        warnings.warn(
            "llama.cpp has no dynamic RoPE scaling: in the GGUF file, the model has "
            f"its original context of {original} tokens.",
            stacklevel=2,
        )
        writer.add_context_length(original)
