"""A model as a directory that transformers loads with no further argument."""

import json

from keras_openllama import __version__
from keras_openllama.checkpoints import tokenizer_json, weight_names
from keras_openllama.checkpoints.files import safetensors
from keras_openllama.checkpoints.model_card import model_card
from keras_openllama.checkpoints.outputs import Output, small_file

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


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


# ----- Weights


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


# ----- Configuration


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


# ----- Tokenizer


class _Tokenizer:
    """What the export tells of a SentencePiece model.

    Args:
        proto: bytes of the model.
        starts: bool, whether the start token stands before each text.
    """

    def __init__(self, proto, starts):
        from keras_openllama.text.sentencepiece_model import (
            keeps_spaces,
            load_processor,
        )

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
