"""Causal self-attention with rotary positions and grouped key/value heads."""

import functools

import keras
from keras import ops

from keras_openllama.layers.cached_attention import (
    BLOCK,
    HIDDEN,
    attend_by_blocks,
    attend_cached,
    attend_causally,
    heads_first,
    write,
)
from keras_openllama.layers.projection import Projection
from keras_openllama.layers.remat import computed_again
from keras_openllama.layers.rotary_embedding import rotate

if keras.config.backend() == "torch":
    import torch

QUERY_BLOCKS = 4  # Ours: each is a part of the program; four spare 3/8 of the work.


def attend(query, key, value, mask):
    """Scaled dot-product attention with grouped heads; softmax in float32.

    Args:
        query: `(batch, num_query_heads, length, head_dim)`.
        key, value: `(batch, num_key_value_heads, key_length, head_dim)`.
        mask: bool, broadcastable to `(batch, 1, length, key_length)`; True where a
            query may look at a key.

    Returns:
        `(batch, num_query_heads, length, head_dim)` in the dtype of `value`.
    """
    batch, num_query_heads, length, head_dim = ops.shape(query)
    num_key_value_heads = key.shape[1]
    group = num_query_heads // num_key_value_heads
    # Heads of a group share keys and values, so they join the length axis: one
    # product per key/value head, and no copy of the keys.
    query = ops.reshape(query, (batch, num_key_value_heads, group * length, head_dim))
    scores = ops.matmul(query, ops.swapaxes(key, -1, -2))
    key_length = ops.shape(scores)[-1]
    scores = ops.reshape(
        # In float32, since bfloat16 has no 1/sqrt(100).
        ops.cast(scores, "float32") * head_dim**-0.5,
        (batch, num_key_value_heads, group, length, key_length),
    )
    scores = ops.where(mask[:, :, None], scores, HIDDEN)
    weights = ops.cast(ops.softmax(scores, axis=-1), value.dtype)
    weights = ops.reshape(
        weights, (batch, num_key_value_heads, group * length, key_length)
    )
    context = ops.matmul(weights, value)
    return ops.reshape(context, (batch, num_query_heads, length, head_dim))


def attend_to_past(query, key, value, mask):
    """The same where a mask lets queries look at what comes before them only.

    On PyTorch this is its fused kernel. On JAX the queries go in blocks, each over the
    keys up to its end, which spares most of what the mask hides; and a backward pass
    computes the weights again rather than keep them, which is faster, too
    (`benchmarks/README.md`).

    Args:
        query, key, value: see `attend`, of one length.
        mask: bool `(batch or 1, 1, length, length)`, hiding all that comes later.

    Returns:
        As `attend`.

    Source: recomputed weights as in FlashAttention (arXiv:2205.14135).
    """
    length = query.shape[2]
    if keras.config.backend() == "torch":
        return _attend_fused(query, key, value, mask)
    if keras.config.backend() != "jax" or length is None:
        return attend(query, key, value, mask)
    block = max(BLOCK // 2, -(-length // QUERY_BLOCKS))
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        # Cut within, so that the slices are not what is kept.
        rows = computed_again(functools.partial(_attend_rows, start, end))
        outputs.append(rows(query, key, value, mask))
    return ops.concatenate(outputs, axis=2) if len(outputs) > 1 else outputs[0]


def _attend_fused(query, key, value, mask):
    """`attend` by PyTorch's fused kernel, which keeps no scores."""
    head_dim = query.shape[-1]
    padding = head_padding(head_dim, query.device.type)
    if padding:
        query, key, value = (
            torch.nn.functional.pad(x, (0, padding)) for x in (query, key, value)
        )
    # Finite, as in `attend`; float16 does not reach as far.
    hidden = max(HIDDEN, torch.finfo(query.dtype).min)
    bias = torch.where(mask, 0.0, hidden).to(query.dtype)
    context = torch.nn.functional.scaled_dot_product_attention(
        *(query, key, value),
        attn_mask=bias,
        scale=head_dim**-0.5,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return context[..., :head_dim]


def head_padding(head_dim, device_type):
    """Zeros behind each head that PyTorch's fused kernels need on a device.

    On a GPU those that take a mask want 16 bytes of bfloat16, or PyTorch keeps all
    scores: 3B's heads have 100 numbers.
    """
    return -head_dim % 8 if device_type == "cuda" else 0


def _attend_rows(start, end, query, key, value, mask):
    return attend(
        query[:, :, start:end],
        key[:, :, :end],
        value[:, :, :end],
        mask[:, :, start:end, :end],
    )


def causal_mask(positions, padding_mask=None):
    """Each position sees itself and what comes before it in its document.

    Args:
        positions: int `(batch or 1, length)`.
        padding_mask: `None`, or `(batch, length)`: bool, True on real tokens; or int,
            the number of the document that a token belongs to, 0 on padding.

    Returns:
        bool `(batch or 1, 1, length, length)`.
    """
    mask = positions[:, None, :, None] >= positions[:, None, None, :]
    if padding_mask is not None:
        documents = ops.cast(padding_mask, "int32")
        queries, keys = documents[:, None, :, None], documents[:, None, None, :]
        # Padding sees what is real: a softmax over nothing would be no number.
        seen = ops.logical_or(ops.equal(queries, keys), ops.equal(queries, 0))
        mask = ops.logical_and(mask, ops.logical_and(seen, keys > 0))
    return mask


@keras.saving.register_keras_serializable(package="keras_openllama")
class CausalSelfAttention(keras.layers.Layer):
    """Self-attention whose keys and values may live in a cache.

    Args:
        num_query_heads: int.
        num_key_value_heads: int, a divisor of `num_query_heads`.
        head_dim: int. Never guessed from the width: 3B has 100.
        initializer_std: float, standard deviation of the initial weights.

    Call arguments:
        x: float tensor `(batch, length, hidden_dim)`.
        cos, sin: float32 rotary tables, see `RotaryEmbedding`.
        mask: bool, broadcastable to `(batch, 1, length, length)`; with a cache
            the `bias` of `attend_cached`, or on PyTorch `None`: `x` is causal and
            begins an empty cache.
        cache: `None`, or a pair of tensors
            `(num_key_value_heads * batch, columns, head_dim)`, see `write`.
        column: int scalar, where in the cache the keys and values of `x` go.

    Returns:
        The output `(batch, length, hidden_dim)`; with a cache, a pair of it and the
        updated cache.

    Example:
        positions = ops.arange(8)[None]
        cos, sin = RotaryEmbedding(head_dim=100)(positions)
        attention = CausalSelfAttention(32, 32, 100)
        y = attention(x, cos, sin, causal_mask(positions))

    Sources: arXiv:1706.03762; grouped heads, arXiv:2305.13245.
    """

    def __init__(
        self,
        num_query_heads,
        num_key_value_heads,
        head_dim,
        initializer_std=0.02,
        **kwargs,
    ):
        # No autocast: the rotary tables come in float32 and stay so.
        super().__init__(autocast=False, **kwargs)
        if num_query_heads % num_key_value_heads:
            raise ValueError(
                "`num_key_value_heads` must divide `num_query_heads`. Received: "
                f"num_query_heads={num_query_heads}, "
                f"num_key_value_heads={num_key_value_heads}"
            )
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.initializer_std = initializer_std

    def build(self, input_shape):
        std, dtype = self.initializer_std, self.dtype_policy
        query_dim = self.num_query_heads * self.head_dim
        key_value_dim = self.num_key_value_heads * self.head_dim
        self.query = Projection(query_dim, std, dtype=dtype, name="query")
        self.key = Projection(key_value_dim, std, dtype=dtype, name="key")
        self.value = Projection(key_value_dim, std, dtype=dtype, name="value")
        self.output_projection = Projection(
            input_shape[-1], std, dtype=dtype, name="output"
        )
        for layer in (self.query, self.key, self.value):
            layer.build(input_shape)
        self.output_projection.build((*input_shape[:-1], query_dim))

    def call(self, x, cos, sin, mask, cache=None, column=None):
        query, key, value = self.heads(x, cos, sin)
        if cache is None:
            return self.project(attend_to_past(query, key, value, mask))
        cache = tuple(
            write(tensor, heads_first(update), column)
            for tensor, update in zip(cache, (key, value), strict=True)
        )
        if mask is None:
            context = attend_causally(query, key, value)
        elif x.shape[1] > 1 and cache[0].shape[1] % BLOCK == 0:
            context = attend_by_blocks(query, *cache, mask, column + x.shape[1])
        else:
            context = attend_cached(query, *cache, mask)
        return self.project(context), cache

    def heads(self, x, cos, sin):
        """Queries, keys and values, as `attend_to_past` takes them."""
        return (
            rotate(self._parted(self.query(x)), cos, sin),
            rotate(self._parted(self.key(x)), cos, sin),
            self._parted(self.value(x)),
        )

    def project(self, context):
        """The output from what `attend_to_past` returns."""
        batch, heads, length, head_dim = ops.shape(context)
        context = ops.transpose(context, (0, 2, 1, 3))
        return self.output_projection(
            ops.reshape(context, (batch, length, heads * head_dim))
        )

    def _parted(self, x):
        """`(batch, length, heads * head_dim)` to `(batch, heads, length, head_dim)`."""
        batch, length, width = ops.shape(x)
        heads = width // self.head_dim
        x = ops.reshape(x, (batch, length, heads, self.head_dim))
        return ops.transpose(x, (0, 2, 1, 3))

    def compute_output_spec(self, x, cos, sin, mask, cache=None, column=None):
        output = keras.KerasTensor(x.shape, self.compute_dtype)
        return output if cache is None else (output, cache)

    def get_config(self):
        config = super().get_config()
        config.update(
            num_query_heads=self.num_query_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            initializer_std=self.initializer_std,
        )
        return config
