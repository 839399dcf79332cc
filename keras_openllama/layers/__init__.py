"""The layers of the LLaMA architecture."""

from keras_openllama.layers.attention import CausalSelfAttention
from keras_openllama.layers.decoder_layer import DecoderLayer
from keras_openllama.layers.feed_forward import FeedForward
from keras_openllama.layers.rms_norm import RMSNorm
from keras_openllama.layers.rotary_embedding import RotaryEmbedding

__all__ = [
    "CausalSelfAttention",
    "DecoderLayer",
    "FeedForward",
    "RMSNorm",
    "RotaryEmbedding",
]
