"""Random models with the sizes of presets, created on the device."""

import results

from keras_openllama import presets

# Runs quickly on a CPU.
TINY = dict(
    vocabulary_size=512,
    num_layers=2,
    num_query_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    hidden_dim=64,
    intermediate_dim=96,
    max_sequence_length=256,
)


def sizes(name):
    """Arguments of `OpenLlamaBackbone`: a preset's, or tiny ones without a GPU."""
    config = presets.find(name).config
    return dict(config) if results.has_gpu() else {**config, **TINY}


def ours(sizes, dtype):
    """A model of this package."""
    from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM

    return OpenLlamaCausalLM(OpenLlamaBackbone(**sizes, dtype=dtype))


def transformers(sizes, dtype, **options):
    """The same model in transformers, on the device."""
    import torch
    from random_llama import transformers_config  # benchmarks/random_llama.py
    from transformers import LlamaForCausalLM

    config = transformers_config(sizes, attn_implementation="sdpa", **options)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda" if results.has_gpu() else "cpu"):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def multiplied(sizes):
    """The number of parameters that a decoding step multiplies: no embeddings."""
    heads = sizes["head_dim"] * (
        sizes["num_query_heads"] + sizes["num_key_value_heads"]
    )
    layer = 2 * heads + 3 * sizes["intermediate_dim"]
    layers = sizes["num_layers"] * layer
    return sizes["hidden_dim"] * (layers + sizes["vocabulary_size"])
