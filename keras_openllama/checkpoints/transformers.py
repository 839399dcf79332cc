"""Models in the format of transformers, read and written tensor by tensor."""

import json

import numpy as np

from keras_openllama import __version__
from keras_openllama.checkpoints import tokenizer_json, weight_names
from keras_openllama.checkpoints.files import safetensors
from keras_openllama.checkpoints.matching import match
from keras_openllama.checkpoints.model_card import model_card
from keras_openllama.checkpoints.outputs import Output, small_file
from keras_openllama.checkpoints.shards import open_checkpoint
from keras_openllama.text.sentencepiece_model import keeps_spaces, load_processor

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

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


# ----- Reading


def backbone_arguments(config, path="config.json"):
    """Arguments of `OpenLlamaBackbone` for a `config.json` of transformers.

    Args:
        config: dict, as `read_json_object` returns.
        path: where it is from, for messages.

    Returns:
        Dict of keyword arguments.

    Raises:
        ValueError: if a setting is missing, or cannot be represented here.

    Example:

    ```python
    OpenLlamaBackbone(**backbone_arguments(read_json_object(path)))
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
        repository: `repository.Repository`.
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


# ----- Writing


def plan(contents, dtype, max_shard_bytes):
    """The files of the directory.

    Args:
        contents: `contents.Contents`.
        dtype: string, of the weights to write.
        max_shard_bytes: int, bytes of tensors that one file holds at most; a larger
            tensor has a file of its own.

    Returns:
        List of `outputs.Output`.

    Raises:
        ValueError: if the tokenizer cannot be expressed as `tokenizer.json`.
    """
    tokenizer = None
    if contents.tokenizer:
        starts = contents.preprocessing.get("add_start_token", True)
        tokenizer = _Tokenizer(contents.tokenizer, starts)
    control_ids = contents.control_ids
    if tokenizer:
        control_ids = tokenizer.ids["bos_token"], tokenizer.ids["eos_token"]
    config = _config(contents.arguments, dtype, control_ids)
    generation = _generation_config(control_ids, tokenizer)
    merges_spaces = tokenizer and tokenizer.merges_spaces
    return [
        small_file("config.json", _json(config)),
        small_file("generation_config.json", _json(generation)),
        *(_tokenizer_files(tokenizer, contents.arguments) if tokenizer else ()),
        small_file("README.md", model_card(contents, dtype, merges_spaces)),
        *_weight_files(contents, dtype, max_shard_bytes),
    ]


def _json(data):
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _weight_files(contents, dtype, max_shard_bytes):
    rows = weight_names.weights(contents.arguments["num_layers"])
    sizes = weight_names.sizes(contents.arguments)
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
        yield Output(name, safetensors.size(specs), _writer(specs), tensors)


def _writer(specs):
    return lambda file, values: safetensors.write(file, specs, values)


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


def _config(arguments, dtype, control_ids):
    """`config.json`, with names that transformers 4 and 5 and llama.cpp read."""
    scaling = arguments["rope_scaling"]
    if scaling is not None:
        scaling = {**scaling, "type": scaling["rope_type"]}  # Its name until 4.43.
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
        **_as_settings(control_ids),
        "dtype": dtype,
        "torch_dtype": dtype,  # Its name in transformers 4.
        "keras_openllama_version": __version__,
    }


def _generation_config(control_ids, tokenizer):
    # No token is for padding: what stands in, behind a mask, is the unknown token.
    pad = tokenizer.ids["unk_token"] if tokenizer else 0
    return {**_as_settings(control_ids), "pad_token_id": pad}


def _as_settings(control_ids):
    return dict(zip(("bos_token_id", "eos_token_id"), control_ids, strict=True))


class _Tokenizer:
    """What the export tells of a SentencePiece model.

    Args:
        proto: bytes of the model.
        starts: bool, whether the start token stands before each text.
    """

    def __init__(self, proto, starts):
        processor = load_processor(proto, "The tokenizer")
        self.proto = proto
        self.starts = starts
        self.fast = tokenizer_json.build(proto, starts)
        self.merges_spaces = not keeps_spaces(processor)
        self.ids = {
            "bos_token": processor.bos_id(),
            "eos_token": processor.eos_id(),
            "unk_token": processor.unk_id(),
        }
        self.tokens = {
            name: processor.id_to_piece(token_id) for name, token_id in self.ids.items()
        }


def _tokenizer_files(tokenizer, arguments):
    tokens = {**tokenizer.tokens, "pad_token": tokenizer.tokens["unk_token"]}
    config = {
        # The one class that uses all of tokenizer.json as it is: LlamaTokenizer puts
        # its own normaliser in its place.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "add_bos_token": tokenizer.starts,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": arguments["max_sequence_length"],
        "padding_side": "left",  # As generation needs it.
        "added_tokens_decoder": {
            str(tokenizer.ids[name]): {
                "content": tokenizer.tokens[name],
                "special": True,
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            }
            for name in sorted(tokenizer.ids, key=tokenizer.ids.get)
        },
    }
    return [
        small_file("tokenizer.model", tokenizer.proto),
        small_file("tokenizer.json", tokenizer.fast),
        small_file("tokenizer_config.json", _json(config)),
        small_file("special_tokens_map.json", _json(tokens)),
    ]
