"""One layer of the decoder."""

import functools

import keras

from keras_openllama.layers.attention import CausalSelfAttention, attend_to_past
from keras_openllama.layers.feed_forward import FeedForward
from keras_openllama.layers.remat import rematerialized
from keras_openllama.layers.rms_norm import RMSNorm


@keras.saving.register_keras_serializable(package="keras_openllama")
class DecoderLayer(keras.layers.Layer):
    """Attention, then the feed-forward network, each behind its norm.

    Args:
        num_query_heads: int.
        num_key_value_heads: int, a divisor of `num_query_heads`.
        head_dim: int, size of a head.
        intermediate_dim: int, width of the feed-forward network.
        layer_norm_epsilon: float, epsilon of both norms.
        initializer_std: float, standard deviation of the initial weights.

    Call arguments: those of `CausalSelfAttention`; and without a cache
        attend: callable with the arguments of `attend_to_past`, which it is unless
            given.
        rematerialize, in_scan: string and bool, see `remat`.

    Returns:
        The hidden states `(batch, length, hidden_dim)`; with a cache, a pair of them
        and the updated cache.

    Example:
        layer = DecoderLayer(32, 32, 100, intermediate_dim=8640)
        x = layer(x, cos, sin, causal_mask(positions))

    Source: LLaMA (arXiv:2302.13971), section 2.2.
    """

    def __init__(
        self,
        num_query_heads,
        num_key_value_heads,
        head_dim,
        intermediate_dim,
        layer_norm_epsilon=1e-6,
        initializer_std=0.02,
        **kwargs,
    ):
        # No autocast: the rotary tables come in float32 and stay so.
        super().__init__(autocast=False, **kwargs)
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_dim = intermediate_dim
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_std = initializer_std

    def build(self, input_shape):
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
        self.self_attention_norm.build(input_shape)
        self.self_attention.build(input_shape)
        self.feedforward_norm.build(input_shape)
        self.feedforward.build(input_shape)

    def call(self, x, cos, sin, mask, cache=None, **options):
        if cache is None:
            return self._without_cache(x, cos, sin, mask, **options)
        attention, cache = self.self_attention(
            self.self_attention_norm(x), cos, sin, mask, cache=cache, **options
        )
        x = x + attention
        return x + self.feedforward(self.feedforward_norm(x)), cache

    def _without_cache(
        self,
        x,
        cos,
        sin,
        mask,
        attend=attend_to_past,
        rematerialize="none",
        in_scan=False,
    ):
        """In blocks that keep their inputs only, as `rematerialize` wants it.

        A product with a kernel that ends a block is not computed again, for nothing of
        the backward pass needs what it gives.
        """
        attention, feedforward = self.self_attention, self.feedforward
        block = functools.partial(rematerialized, rematerialize, in_scan=in_scan)

        def heads(x):
            return attention.heads(self.self_attention_norm(x), cos, sin)

        def widen(x):
            return feedforward.widen(self.feedforward_norm(x))

        def feed_forward(x):
            wide = block(widen, "products")(x)
            return block(feedforward.narrow, "products")(*wide)

        heads = block(heads, "products", "projections")(x)
        context = attend(*heads, mask)
        x = x + block(attention.project, "products", "projections")(context)
        return x + block(feed_forward, "projections")(x)

    def compute_output_spec(self, x, cos, sin, mask, cache=None, **_):
        return self.self_attention.compute_output_spec(x, cos, sin, mask, cache=cache)

    def get_config(self):
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
