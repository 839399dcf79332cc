"""Reads and writes checkpoints in the format of transformers, tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_openllama import __version__
from keras_openllama.checkpoints import tokenizer_json, weight_names
from keras_openllama.checkpoints.chat_template import TEMPLATE_FILE, exported_template
from keras_openllama.checkpoints.end_tokens import GENERATION_CONFIG, id_or_list
from keras_openllama.checkpoints.files import safetensors
from keras_openllama.checkpoints.matching import (
    check_whole,
    format_names,
    match_tensors,
)
from keras_openllama.checkpoints.model_card import model_card
from keras_openllama.checkpoints.outputs import OutputFile, small_file
from keras_openllama.checkpoints.shards import open_checkpoint
from keras_openllama.checkpoints.wrapped_names import unwrap_names
from keras_openllama.config import END_TOKEN_ID, START_TOKEN_ID
from keras_openllama.text.added_tokens import AddedToken
from keras_openllama.text.sentencepiece_model import keeps_spaces, load_processor

if TYPE_CHECKING:
    from keras_openllama.checkpoints.contents import ModelContents
    from keras_openllama.checkpoints.repository import Repository
    from keras_openllama.checkpoints.tensors import StoredTensor
    from keras_openllama.utils.types import PathLike

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# Settings of transformers of which `OpenLlamaBackbone` implements only these values.
_SUPPORTED_VALUES = {
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


# ----- Reading


def backbone_arguments(
    config: dict[str, Any], path: PathLike = "config.json"
) -> dict[str, Any]:
    """Converts a `config.json` of transformers to arguments of `OpenLlamaBackbone`.

    Args:
        config: Contents of the file.
        path: Its path, for error messages.

    Returns:
        Keyword arguments. Settings that are absent have the defaults of `LlamaConfig`.

    Raises:
        ValueError: If a required setting is missing, or a setting is not supported.

    Example:
        OpenLlamaBackbone(**backbone_arguments(read_json_object(path)))

    Source: `LlamaConfig` of transformers.
    """
    for name, allowed in _SUPPORTED_VALUES.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{path} sets {name}={config[name]!r}, which OpenLlamaBackbone does "
                f"not support; {name} must be {' or '.join(map(repr, allowed))}."
            )
    missing = [name for name in _REQUIRED.values() if name not in config]
    if missing:
        raise ValueError(f"{path} does not set {', '.join(missing)}.")
    arguments = {name: config[setting] for name, setting in _REQUIRED.items()}
    wavelength, scaling = _rope(config, path)
    arguments.update(
        num_key_value_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
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
    """Returns `rope_max_wavelength` and `rope_scaling`."""
    # transformers 5 writes `rope_parameters`, which contains `rope_theta`. Earlier
    # versions wrote `rope_theta` and `rope_scaling`, with "rope_type" or "type".
    settings = config.get("rope_parameters")
    settings = config.get("rope_scaling") if settings is None else settings
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} sets the RoPE scaling {settings!r}, which must be a dict."
        )
    wavelength = settings.get("rope_theta", config.get("rope_theta"))
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        scaling = None
    elif kind in ("linear", "dynamic"):
        scaling = {"rope_type": kind, "factor": settings.get("factor")}
    else:
        raise ValueError(
            f"{path} sets the RoPE scaling {settings}. Only the types 'linear' and "
            "'dynamic' are supported."
        )
    return 10000.0 if wavelength is None else wavelength, scaling


def read_tensors(
    repository: Repository,
    arguments: dict[str, Any],
    head: bool = True,
    tied: bool = False,
) -> dict[str, StoredTensor]:
    """Opens a checkpoint and lists its tensors, without reading their values.

    Args:
        repository: The repository that holds the checkpoint.
        arguments: Arguments of `OpenLlamaBackbone`.
        head: Whether to include the language-model head.
        tied: Whether the head shares the weights of the embedding.

    Returns:
        The tensors by variable path.

    Raises:
        OSError: If a file is missing, or cannot be downloaded or opened.
        ValueError: If a file is damaged, or its tensors do not match the arguments.
    """
    tensors = _unwrapped(open_checkpoint(repository), arguments, repository)
    tensors = _base_names(tensors)
    tensors = {name: t for name, t in tensors.items() if not _is_buffer(name)}
    if not head:
        tensors.pop(weight_names.HEAD.transformers, None)
    elif tied:
        _tie_head(tensors)
    sizes = weight_names.axis_sizes(arguments)
    expected = {
        row.path: (row.transformers, row.shape(sizes))
        for row in weight_names.weight_specs(arguments["num_layers"], head)
    }
    return match_tensors(tensors, expected, repository)


def _unwrapped(tensors, arguments, repository):
    """Returns whole tensors by names without wrappers, or raises if that is not all."""
    check_whole(tensors, repository)
    specs = weight_names.weight_specs(arguments["num_layers"])
    known = {spec.transformers for spec in specs}
    known |= {name.removeprefix("model.") for name in known}  # Of a `LlamaModel`.
    tensors = unwrap_names(tensors, known, repository)
    parts = (".lora_", ".modules_to_save.")
    adapters = [name for name in tensors if any(part in name for part in parts)]
    if adapters:
        raise ValueError(
            f"{repository} has LoRA adapters among the weights, as a PeftModel has: "
            f"{format_names(adapters)}. Merge them with PEFT (`merge_and_unload`), and "
            "save the merged model."
        )
    return tensors


def _base_names(tensors):
    """Adds the prefix `model.`, which a checkpoint of a `LlamaModel` lacks."""
    if "embed_tokens.weight" not in tensors:
        return tensors
    return {f"model.{name}": stored for name, stored in tensors.items()}


def _is_buffer(name):
    """Returns whether a tensor is a buffer of RoPE, which old versions saved."""
    return name.endswith("rotary_emb.inv_freq")


def _tie_head(tensors):
    """Makes the head an alias of the embedding."""
    embedding = tensors.get(weight_names.EMBEDDING.transformers)
    head = tensors.setdefault(weight_names.HEAD.transformers, embedding)
    if embedding is None or head is None:
        tensors.pop(weight_names.HEAD.transformers)
    elif not np.array_equal(embedding.array(), head.array()):
        raise ValueError(
            f"config.json sets tie_word_embeddings=true, but in {head.file.path} "
            f"{head.name} differs from {embedding.name}. Set it to false to load both."
        )


# ----- Writing


def output_files(
    contents: ModelContents, dtype: str, max_shard_bytes: int
) -> list[OutputFile]:
    """Lists the files of an export in the format of transformers.

    Args:
        contents: The model.
        dtype: Name of the dtype of the exported weights.
        max_shard_bytes: Largest number of bytes of tensors in one file. A tensor that
            is larger gets a file of its own.

    Returns:
        The files of the directory.

    Raises:
        ValueError: If the tokenizer cannot be represented as `tokenizer.json`.
    """
    tokenizer = None
    if contents.tokenizer:
        add_start_token = contents.preprocessing.get("add_start_token", True)
        tokenizer = _Tokenizer(
            contents.tokenizer, add_start_token, **contents.tokenizer_settings
        )
    start = tokenizer.ids["bos_token"] if tokenizer else contents.start_token_id
    config = config_settings(contents.arguments, dtype, start, contents.end_token_ids)
    # The vocabulary has no padding token. The unknown token pads instead: the
    # attention mask hides it.
    pad = tokenizer.ids["unk_token"] if tokenizer else 0
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    generation["pad_token_id"] = pad
    merges_spaces = tokenizer and tokenizer.merges_spaces
    return [
        small_file("config.json", _json(config)),
        small_file(GENERATION_CONFIG, _json(generation)),
        *(_tokenizer_files(tokenizer, contents) if tokenizer else ()),
        small_file("README.md", model_card(contents, dtype, merges_spaces)),
        *_weight_files(contents, dtype, max_shard_bytes),
    ]


def _json(data):
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _weight_files(contents, dtype, max_shard_bytes):
    rows = weight_names.weight_specs(contents.arguments["num_layers"])
    sizes = weight_names.axis_sizes(contents.arguments)
    shards = [{}]
    room = max_shard_bytes
    for row in rows:
        spec = {row.transformers: (row.shape(sizes), dtype)}
        nbytes = safetensors.tensor_bytes(spec)
        if shards[-1] and nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1].update(spec)
        room -= nbytes
    shards = [safetensors.aligned_first(shard) for shard in shards]
    if len(shards) == 1:
        names = [_SINGLE]
    else:
        names = [
            f"model-{number:05}-of-{len(shards):05}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        yield small_file(_INDEX, _json(_index(names, shards, contents.parameters)))
    paths = {row.transformers: row.path for row in rows}
    for name, specs in zip(names, shards, strict=True):
        tensors = tuple(paths[tensor] for tensor in specs)
        yield OutputFile(
            name, safetensors.safetensors_size(specs), _writer(specs), tensors
        )


def _writer(specs):
    return lambda file, values: safetensors.write_safetensors(file, specs, values)


def _index(names, shards, parameters):
    return {
        "metadata": {
            "total_parameters": parameters,
            "total_size": sum(map(safetensors.tensor_bytes, shards)),
        },
        "weight_map": {
            tensor: name
            for name, specs in zip(names, shards, strict=True)
            for tensor in specs
        },
    }


def config_settings(
    arguments: dict[str, Any],
    dtype: str,
    start_token_id: int = START_TOKEN_ID,
    end_token_ids: tuple[int, ...] = (END_TOKEN_ID,),
) -> dict[str, Any]:
    """Returns `config.json` with the names that transformers and llama.cpp read.

    Args:
        arguments: All arguments of `OpenLlamaBackbone`.
        dtype: The dtype of the weights.
        start_token_id: Id of the start token.
        end_token_ids: Ids of the tokens that end a text.

    Example:
        >>> from keras_openllama.config import validate_architecture
        >>> from keras_openllama.presets import find
        >>> arguments = validate_architecture(find("open_llama_nano").config)
        >>> config_settings(arguments, "float16")["hidden_size"]
        256

    Source: `LlamaConfig` of transformers.
    """
    scaling = arguments["rope_scaling"]
    if scaling is not None:
        scaling = {**scaling, "type": scaling["rope_type"]}  # The name before 4.43.
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": arguments["vocabulary_size"],
        "hidden_size": arguments["hidden_dim"],
        "intermediate_size": arguments["intermediate_dim"],
        "num_hidden_layers": arguments["num_layers"],
        "num_attention_heads": arguments["num_query_heads"],
        "num_key_value_heads": arguments["num_key_value_heads"],
        "head_dim": arguments["head_dim"],
        "max_position_embeddings": arguments["max_sequence_length"],
        "rope_theta": arguments["rope_max_wavelength"],
        "rope_scaling": scaling,
        "rms_norm_eps": arguments["layer_norm_epsilon"],
        "initializer_range": arguments["initializer_std"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": start_token_id,
        "eos_token_id": id_or_list(end_token_ids),
        "dtype": dtype,
        "torch_dtype": dtype,  # The name in transformers 4.
        "keras_openllama_version": __version__,
    }


class _Tokenizer:
    """The files and special tokens that are exported for a SentencePiece model.

    Args:
        proto: The serialized model.
        add_start_token: Whether the start token is prepended to each text.
        add_eos: Whether the end token is appended to each text.
        added_tokens: Tokens beside the pieces of the model, in JSON.
        prepend_scheme: See `OpenLlamaTokenizer`.
    """

    def __init__(
        self,
        proto,
        add_start_token,
        add_eos=False,
        added_tokens=(),
        prepend_scheme="always",
    ):
        processor = load_processor(proto, "The tokenizer")
        self.proto = proto
        self.add_start_token = add_start_token
        self.add_end_token = add_eos
        self.added = [AddedToken.from_json(token) for token in added_tokens]
        self.json = tokenizer_json.build_tokenizer_json(
            proto, add_start_token, add_eos, self.added, prepend_scheme
        )
        self.merges_spaces = not keeps_spaces(processor)
        self.ids = {
            "bos_token": processor.bos_id(),
            "eos_token": processor.eos_id(),
            "unk_token": processor.unk_id(),
        }
        self.tokens = {
            name: processor.id_to_piece(token_id) for name, token_id in self.ids.items()
        }


def _tokenizer_files(tokenizer, contents):
    tokens = {**tokenizer.tokens, "pad_token": tokenizer.tokens["unk_token"]}
    # Only an added token: it would not be found within a text any more if it were one
    # of the ordinary pieces.
    names = {token.id: token.content for token in tokenizer.added}
    tokens["eos_token"] = names.get(contents.end_token_ids[0], tokens["eos_token"])
    controls = [AddedToken(tokenizer.tokens[n], i) for n, i in tokenizer.ids.items()]
    added = {token.id: token for token in [*controls, *tokenizer.added]}
    config = {
        # Only this class uses tokenizer.json as it is. LlamaTokenizer replaces its
        # normalizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "add_bos_token": tokenizer.add_start_token,
        "add_eos_token": tokenizer.add_end_token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": contents.arguments["max_sequence_length"],
        "padding_side": "left",  # Required for generation.
        "added_tokens_decoder": {
            str(i): {k: v for k, v in dataclasses.asdict(token).items() if k != "id"}
            for i, token in sorted(added.items())
        },
    }
    chat_template = exported_template(contents.preprocessing)
    if chat_template is not None:
        # Versions of transformers before 4.52 read it here only.
        config["chat_template"] = chat_template
    return [
        small_file("tokenizer.model", tokenizer.proto),
        small_file("tokenizer.json", tokenizer.json),
        small_file("tokenizer_config.json", _json(config)),
        small_file("special_tokens_map.json", _json(tokens)),
        *([small_file(TEMPLATE_FILE, chat_template)] if chat_template else ()),
    ]
