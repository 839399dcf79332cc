"""Random tiny models of transformers, and the same models here."""

import dataclasses

import keras
import numpy as np
import torch
import transformers
from seeding import set_random_seed

from keras_openllama import (
    OpenLlamaBackbone,
    OpenLlamaCausalLM,
    OpenLlamaCausalLMPreprocessor,
    OpenLlamaTokenizer,
)


@dataclasses.dataclass(frozen=True)
class TinyShape:
    """Sizes of a tiny model; the vocabulary is large enough for 200 varied tokens."""

    name: str
    num_query_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_dim: int = 64
    intermediate_dim: int = 96
    num_layers: int = 2
    vocabulary_size: int = 199
    context: int = 512

    def __str__(self):
        return self.name


SHAPES = (
    TinyShape("multi_head", 4, 4, 16),
    TinyShape("head_dim_100", 2, 2, 100, hidden_dim=200),
    TinyShape("grouped_heads", 6, 2, 16, hidden_dim=96),
    # The heads' total width differs from the width of the network.
    TinyShape("grouped_head_dim_100", 4, 1, 100, num_layers=3),
)


def in_transformers(shape, **config):
    """A `LlamaForCausalLM` in float32 with clearly separated logits."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.vocabulary_size,
            hidden_size=shape.hidden_dim,
            intermediate_size=shape.intermediate_dim,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_query_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.context,
            rms_norm_eps=1e-6,
            # Large enough that the next token is a clear choice, so that greedy
            # decoding tests the model and not its rounding; small enough that layers
            # do not amplify rounding errors.
            initializer_range=0.08,
            bos_token_id=1,
            eos_token_id=2,
            **config,
        )
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # Ones would hide a missing scale.
                weight.add_(0.2 * torch.randn_like(weight))
    return model


def as_ours(model, directory, **options):
    """The same model here, through a directory in transformers format."""
    model.save_pretrained(directory)
    return OpenLlamaCausalLM.from_preset(str(directory), preprocessor=None, **options)


def batch(shape, batch_size=3, length=12, seed=0):
    """Random token ids, without the control ids 0 to 2."""
    random = np.random.default_rng(seed)
    return random.integers(3, shape.vocabulary_size, (batch_size, length), "int32")


def right_padding(lengths, length):
    """A padding mask with the given number of real tokens in each sequence."""
    return np.arange(length)[None] < np.asarray(lengths)[:, None]


def assert_close(found, expected, where=""):
    """Asserts equality within 1e-5 of the largest expected value, or of 1."""
    found = keras.ops.convert_to_numpy(found)
    expected = expected.detach().numpy() if hasattr(expected, "detach") else expected
    assert found.shape == expected.shape, where
    tolerance = 1e-5 * max(1.0, np.abs(expected).max())
    assert np.abs(found - expected).max() <= tolerance, (
        f"{where}: differs by {np.abs(found - expected).max():.2e}, "
        f"and {tolerance:.2e} is allowed"
    )


def random_lm(shape, proto=None, seed=0, **options):
    """A model of this package with random weights, norms included.

    Args:
        shape: `TinyShape`; with a tokenizer its vocabulary is the tokenizer's.
        proto: bytes of a SentencePiece model, or `None` for no preprocessor.
        seed: int.
        **options: arguments of `OpenLlamaBackbone`.
    """
    tokenizer = proto and OpenLlamaTokenizer(proto)
    set_random_seed(seed)
    backbone = OpenLlamaBackbone(
        tokenizer.vocabulary_size() if proto else shape.vocabulary_size,
        shape.num_layers,
        shape.num_query_heads,
        shape.hidden_dim,
        shape.intermediate_dim,
        **{
            "num_key_value_heads": shape.num_key_value_heads,
            "head_dim": shape.head_dim,
            "max_sequence_length": shape.context,
            "initializer_std": 0.08,  # See `in_transformers`.
            **options,
        },
    )
    preprocessor = proto and OpenLlamaCausalLMPreprocessor(
        tokenizer, sequence_length=shape.context
    )
    lm = OpenLlamaCausalLM(backbone, preprocessor or None)
    random = np.random.default_rng(seed)
    for weight in lm.weights:
        if weight.path.endswith("scale"):
            weight.assign(1 + 0.2 * random.standard_normal(weight.shape))
    return lm
