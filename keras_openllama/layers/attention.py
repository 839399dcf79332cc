"""Causal self-attention with rotary position embedding and grouped-query heads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_openllama.layers.cached_attention import (
    CACHE_BLOCK,
    MASKED_SCORE,
    attend_blockwise,
    attend_cached,
    heads_first,
)
from keras_openllama.layers.projection import Projection
from keras_openllama.layers.quantized_cache import (
    attend_quantized,
    is_quantized_cache,
    write_to_cache,
)
from keras_openllama.layers.remat import recompute_in_backward
from keras_openllama.layers.rotary_embedding import rotate
from keras_openllama.utils.types import Shape, Tensor

if keras.config.backend() == "jax":
    import jax

    from keras_openllama.layers.attention_by_head import attend_by_head
elif keras.config.backend() == "torch":
    from keras_openllama.layers.attention_torch import (
        FusedAttention,
        fused_causal_attention,
    )

# Heuristic: each query block adds to the program; four save 3/8 of the computation.
QUERY_BLOCKS = 4


def dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor
) -> Tensor:
    """Scaled dot-product attention with grouped heads and a softmax in float32.

    Args:
        query: Float tensor `(batch, num_query_heads, length, head_dim)`.
        key: Float tensor `(batch, num_key_value_heads, key_length, head_dim)`.
        value: Float tensor of the shape of `key`.
        mask: Bool tensor, broadcastable to `(batch, 1, length, key_length)`. True
            where a query may attend to a key.

    Returns:
        Tensor `(batch, num_query_heads, length, head_dim)` with the dtype of `value`.

    Example:
        >>> query = ops.ones((2, 4, 3, 8))  # Four query heads,
        >>> key = ops.ones((2, 2, 3, 8))  # in two groups.
        >>> mask = causal_mask(ops.arange(3)[None])
        >>> dot_product_attention(query, key, key, mask).shape
        (2, 4, 3, 8)

    Source: arXiv:1706.03762, section 3.2.1.
    """
    batch, num_query_heads, length, head_dim = ops.shape(query)
    num_key_value_heads = key.shape[1]
    group = num_query_heads // num_key_value_heads
    # The heads of a group share keys and values. Folding them into the length axis
    # gives one matrix product per key/value head, without repeating the keys.
    query = ops.reshape(query, (batch, num_key_value_heads, group * length, head_dim))
    scores = ops.matmul(query, ops.swapaxes(key, -1, -2))
    key_length = ops.shape(scores)[-1]
    scores = ops.reshape(
        # In float32: bfloat16 cannot represent 1/sqrt(100).
        ops.cast(scores, "float32") * head_dim**-0.5,
        (batch, num_key_value_heads, group, length, key_length),
    )
    scores = ops.where(mask[:, :, None], scores, MASKED_SCORE)
    weights = ops.cast(ops.softmax(scores, axis=-1), value.dtype)
    weights = ops.reshape(
        weights, (batch, num_key_value_heads, group * length, key_length)
    )
    context = ops.matmul(weights, value)
    return ops.reshape(context, (batch, num_query_heads, length, head_dim))


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """`dot_product_attention` for a mask that hides all later positions.

    PyTorch runs its fused kernel, or the package's on a CPU in float32. JAX, and
    PyTorch on a CPU in 16 bits, split the queries into blocks and compute each block
    over the keys up to its end, which skips most of what the mask hides; JAX on a CPU
    does so head by head. The backward pass recomputes the attention weights instead of
    saving them, which is faster, too (`benchmarks/README.md`).

    Args:
        query: Float tensor `(batch, num_query_heads, length, head_dim)`.
        key: Float tensor `(batch, num_key_value_heads, length, head_dim)`.
        value: Float tensor of the shape of `key`.
        mask: Bool tensor `(batch or 1, 1, length, length)`, False for every later
            position.

    Returns:
        Tensor `(batch, num_query_heads, length, head_dim)` with the dtype of `value`.

    Source: recomputed attention weights as in FlashAttention (arXiv:2205.14135).
    """
    length = query.shape[2]
    if keras.config.backend() == "torch":
        return FusedAttention()(query, key, value, mask)
    if keras.config.backend() != "jax" or not isinstance(length, int):
        return dot_product_attention(query, key, value, mask)
    block = max(CACHE_BLOCK // 2, -(-length // QUERY_BLOCKS))
    if length <= block or keras.distribution.distribution() is not None:
        # A loop over the heads of all devices would gather them.
        return _attend_by_block(query, key, value, mask, block)
    return jax.lax.platform_dependent(
        *(query, key, value, mask),
        cpu=functools.partial(attend_by_head, block=block),
        default=functools.partial(_attend_by_block, block=block),
    )


def _attend_by_block(query, key, value, mask, block):
    length = query.shape[2]
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        # Slicing inside the block saves whole tensors, which are shared, not slices.
        attend = recompute_in_backward(functools.partial(_attend_block, start, end))
        outputs.append(attend(query, key, value, mask))
    return ops.concatenate(outputs, axis=2) if len(outputs) > 1 else outputs[0]


def _attend_block(start, end, query, key, value, mask):
    return dot_product_attention(
        query[:, :, start:end],
        key[:, :, :end],
        value[:, :, :end],
        mask[:, :, start:end, :end],
    )


def causal_mask(positions: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """Returns the mask that lets each token attend to its own document up to itself.

    Args:
        positions: Int tensor `(batch or 1, length)`.
        padding_mask: `None`, or a tensor `(batch, length)`: bool, True on real tokens;
            or int, the index of the document that a token belongs to, 0 on padding.

    Returns:
        Bool tensor `(batch or 1, 1, length, length)`, True where a query may attend to
        a key.

    Example:
        >>> causal_mask(ops.arange(3)[None]).astype("int32")[0, 0].tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    mask = positions[:, None, :, None] >= positions[:, None, None, :]
    if padding_mask is not None:
        documents = ops.cast(padding_mask, "int32")
        queries, keys = documents[:, None, :, None], documents[:, None, None, :]
        # Padding attends to real tokens: a softmax over no keys would be NaN.
        visible = ops.logical_or(ops.equal(queries, keys), ops.equal(queries, 0))
        mask = ops.logical_and(mask, ops.logical_and(visible, keys > 0))
    return mask


@keras.saving.register_keras_serializable(package="keras_openllama")
class CausalSelfAttention(keras.layers.Layer):
    """Causal self-attention with rotary position embedding and an optional KV cache.

    Args:
        num_query_heads: int, number of query heads.
        num_key_value_heads: int, a divisor of `num_query_heads`.
        head_dim: int, size of a head. It need not be `hidden_dim / num_query_heads`.
        initializer_std: float, standard deviation of the initial weights.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: float tensor `(batch, length, hidden_dim)`.
        cos: float32 tensor `(batch or 1, 1, length, head_dim / 2)` of
            `RotaryEmbedding`.
        sin: float32 tensor of the shape of `cos`.
        mask: bool tensor, broadcastable to `(batch, 1, length, length)`. With a cache:
            the `bias` of `attend_cached`, or `None` if the cache is empty and attention
            is causal.
        cache: `None`, or a pair of tensors, keys and values,
            `(num_key_value_heads * batch, columns, head_dim)`, of 8 bits with their
            scales; see `write_to_cache`.
        column: int scalar, index of the cache column where the keys and values of `x`
            are written.
        prefill_attention: callable `(query, key, value)`, the causal attention for
            `mask=None`; by default that of PyTorch.

    Returns:
        The output `(batch, length, hidden_dim)`. With a cache, a pair: the output and
        the updated cache.

    Raises:
        ValueError: if `num_key_value_heads` does not divide `num_query_heads`.

    Example:
        >>> from keras_openllama.layers import RotaryEmbedding
        >>> positions = ops.arange(8)[None]
        >>> cos, sin = RotaryEmbedding(head_dim=100)(positions)
        >>> attention = CausalSelfAttention(4, 2, head_dim=100)
        >>> attention(ops.ones((1, 8, 64)), cos, sin, causal_mask(positions)).shape
        (1, 8, 64)

    Sources: arXiv:1706.03762; grouped-query attention, arXiv:2305.13245.
    """

    def __init__(
        self,
        num_query_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        initializer_std: float = 0.02,
        **kwargs: Any,
    ) -> None:
        # No autocast: the rotary tables stay float32.
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

    def build(
        self,
        x_shape: Shape,
        cos_shape: Shape | None = None,
        sin_shape: Shape | None = None,
        mask_shape: Shape | None = None,
    ) -> None:
        """Creates the four projections by `x_shape`."""
        std, dtype = self.initializer_std, self.dtype_policy
        query_dim = self.num_query_heads * self.head_dim
        key_value_dim = self.num_key_value_heads * self.head_dim
        self.query = Projection(query_dim, std, dtype=dtype, name="query")
        self.key = Projection(key_value_dim, std, dtype=dtype, name="key")
        self.value = Projection(key_value_dim, std, dtype=dtype, name="value")
        self.output_projection = Projection(
            x_shape[-1], std, dtype=dtype, name="output"
        )
        for layer in (self.query, self.key, self.value):
            layer.build(x_shape)
        self.output_projection.build((*x_shape[:-1], query_dim))

    def call(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: tuple[Tensor, ...] | None = None,
        column: Tensor | None = None,
        prefill_attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Returns the output, and with a cache the updated cache."""
        query, key, value = self.project_heads(x, cos, sin)
        if cache is None:
            return self.project_output(causal_attention(query, key, value, mask))
        end = None if column is None else column + x.shape[1]
        cache = write_to_cache(cache, heads_first(key), heads_first(value), column)
        if mask is None:
            context = (prefill_attention or fused_causal_attention)(query, key, value)
        elif is_quantized_cache(cache):
            context = attend_quantized(query, cache, mask, end)
        elif x.shape[1] > 1 and cache[0].shape[1] % CACHE_BLOCK == 0:
            context = attend_blockwise(query, *cache, mask, end)
        else:
            context = attend_cached(query, *cache, mask)
        return self.project_output(context), cache

    def project_heads(
        self, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values in the shapes of `causal_attention`."""
        return (
            rotate(self._split_heads(self.query(x)), cos, sin),
            rotate(self._split_heads(self.key(x)), cos, sin),
            self._split_heads(self.value(x)),
        )

    def project_output(self, context: Tensor) -> Tensor:
        """Joins the heads of `causal_attention` and applies the output projection."""
        return self.output_projection(self.join_heads(context))

    def join_heads(self, context: Tensor) -> Tensor:
        """`(batch, heads, length, head_dim)` to `(batch, length, heads * head_dim)`."""
        batch, heads, length, head_dim = ops.shape(context)
        context = ops.transpose(context, (0, 2, 1, 3))
        return ops.reshape(context, (batch, length, heads * head_dim))

    def _split_heads(self, x):
        """`(batch, length, heads * head_dim)` to `(batch, heads, length, head_dim)`."""
        batch, length, width = ops.shape(x)
        heads = width // self.head_dim
        x = ops.reshape(x, (batch, length, heads, self.head_dim))
        return ops.transpose(x, (0, 2, 1, 3))

    def compute_output_shape(
        self,
        x_shape: Shape,
        cos_shape: Shape | None = None,
        sin_shape: Shape | None = None,
        mask_shape: Shape | None = None,
    ) -> Shape:
        """Returns the shape of the output without a cache."""
        return x_shape

    def compute_output_spec(
        self,
        x: keras.KerasTensor,
        cos: keras.KerasTensor,
        sin: keras.KerasTensor,
        mask: keras.KerasTensor | None,
        cache: tuple[keras.KerasTensor, ...] | None = None,
        column: keras.KerasTensor | None = None,
        prefill_attention: Callable[..., Any] | None = None,
    ) -> Any:
        """Returns the shapes and dtypes that `call` returns."""
        output = keras.KerasTensor(x.shape, self.compute_dtype)
        return output if cache is None else (output, cache)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        config = super().get_config()
        config.update(
            num_query_heads=self.num_query_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            initializer_std=self.initializer_std,
        )
        return config
