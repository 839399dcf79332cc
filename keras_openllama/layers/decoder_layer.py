"""One decoder layer of the transformer."""

from __future__ import annotations

import functools
from typing import Any

import keras
from keras import ops

from keras_openllama.layers.attention import CausalSelfAttention, causal_attention
from keras_openllama.layers.feed_forward import FeedForward
from keras_openllama.layers.remat import maybe_rematerialize
from keras_openllama.layers.rms_norm import RMSNorm
from keras_openllama.utils.types import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_openllama")
class DecoderLayer(keras.layers.Layer):
    """Pre-norm decoder layer: self-attention, then a feed-forward network.

    Args:
        num_query_heads: int, number of query heads.
        num_key_value_heads: int, a divisor of `num_query_heads`.
        head_dim: int, size of a head.
        intermediate_dim: int, width of the feed-forward network.
        layer_norm_epsilon: float, epsilon of both norms.
        initializer_std: float, standard deviation of the initial weights.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: float tensor `(batch, length, hidden_dim)`.
        cos, sin, mask, cache, column, prefill_attention: see `CausalSelfAttention`.
        attention_fn: callable with the arguments of `causal_attention`, which is the
            default. Without a cache only.
        rematerialize: string, a policy of `config.REMATERIALIZATION`. Without a cache
            only.
        in_scan: bool, whether the layer runs in `scan.scan_layers`. Without a cache
            only.

    Returns:
        The hidden states `(batch, length, hidden_dim)`. With a cache, a pair: the
        hidden states and the updated cache.

    Example:
        >>> from keras import ops
        >>> from keras_openllama.layers import RotaryEmbedding
        >>> positions = ops.arange(8)[None]
        >>> cos, sin = RotaryEmbedding(head_dim=16)(positions)
        >>> mask = positions[:, None, :, None] >= positions[:, None, None, :]
        >>> layer = DecoderLayer(4, 2, head_dim=16, intermediate_dim=128)
        >>> layer(ops.ones((1, 8, 64)), cos, sin, mask).shape
        (1, 8, 64)

    Source: LLaMA (arXiv:2302.13971), section 2.2.
    """

    def __init__(
        self,
        num_query_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        intermediate_dim: int,
        layer_norm_epsilon: float = 1e-6,
        initializer_std: float = 0.02,
        **kwargs: Any,
    ) -> None:
        # No autocast: the rotary tables stay float32.
        super().__init__(autocast=False, **kwargs)
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_dim = intermediate_dim
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_std = initializer_std

    def build(
        self,
        x_shape: Shape,
        cos_shape: Shape | None = None,
        sin_shape: Shape | None = None,
        mask_shape: Shape | None = None,
    ) -> None:
        """Creates the norms, the attention and the feed-forward layer by `x_shape`."""
        self.self_attention_norm = RMSNorm(
            self.layer_norm_epsilon, dtype=self.dtype_policy, name="self_attention_norm"
        )
        self.self_attention = CausalSelfAttention(
            self.num_query_heads,
            self.num_key_value_heads,
            self.head_dim,
            initializer_std=self.initializer_std,
            dtype=self.dtype_policy,
            name="self_attention",
        )
        self.feedforward_norm = RMSNorm(
            self.layer_norm_epsilon, dtype=self.dtype_policy, name="feedforward_norm"
        )
        self.feedforward = FeedForward(
            self.intermediate_dim,
            initializer_std=self.initializer_std,
            dtype=self.dtype_policy,
            name="feedforward",
        )
        self.self_attention_norm.build(x_shape)
        self.self_attention.build(x_shape)
        self.feedforward_norm.build(x_shape)
        self.feedforward.build(x_shape)

    def call(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: tuple[Tensor, ...] | None = None,
        column: Tensor | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Returns the hidden states, and with a cache the updated cache."""
        x = ops.cast(x, self.compute_dtype)
        if cache is None:
            return self._without_cache(x, cos, sin, mask, **options)
        attention, cache = self.self_attention(
            *(self.self_attention_norm(x), cos, sin, mask),
            cache=cache,
            column=column,
            **options,
        )
        x = x + attention
        return x + self.feedforward(self.feedforward_norm(x)), cache

    def _without_cache(
        self,
        x,
        cos,
        sin,
        mask,
        attention_fn=causal_attention,
        rematerialize="none",
        in_scan=False,
    ):
        """Computes the layer in blocks that `rematerialize` may reduce to their inputs.

        The matrix product that ends a block is not recomputed: nothing in the backward
        pass needs its output.
        """
        attention, feedforward = self.self_attention, self.feedforward
        remat = functools.partial(
            maybe_rematerialize, policy=rematerialize, in_scan=in_scan
        )

        def project_heads(x):
            return attention.project_heads(self.self_attention_norm(x), cos, sin)

        def project_up(x):
            return feedforward.project_up(self.feedforward_norm(x))

        def feed_forward(x):
            gate_and_up = remat(project_up, if_policy="products")(x)
            project_down = remat(feedforward.project_down, if_policy="products")
            return project_down(*gate_and_up)

        both = ("products", "projections")
        heads = remat(project_heads, if_policy=both)(x)
        context = attention_fn(*heads, mask)
        x = x + remat(attention.project_output, if_policy=both)(context)
        return x + remat(feed_forward, if_policy="projections")(x)

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
        **_: Any,
    ) -> Any:
        """Returns the shapes and dtypes that `call` returns."""
        return self.self_attention.compute_output_spec(x, cos, sin, mask, cache=cache)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        config = super().get_config()
        config.update(
            num_query_heads=self.num_query_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            intermediate_dim=self.intermediate_dim,
            layer_norm_epsilon=self.layer_norm_epsilon,
            initializer_std=self.initializer_std,
        )
        return config
