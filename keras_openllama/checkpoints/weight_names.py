"""The name of each weight in every checkpoint format: one table for all of them.

Readers and writers of every format use this table, so all formats cover the same
weights.
"""

import dataclasses
from typing import Any

# How EasyLM stores a matrix. This package, like transformers, stores kernels as
# `(outputs, inputs)`, with the rows of each query and key head in half-split order:
# the first elements of all rotary pairs, then the second elements.
SAME = "same"
TRANSPOSED = "transposed"  # (inputs, outputs)
ROTARY = "rotary"  # (inputs, outputs), with the elements of a rotary pair interleaved


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One weight of the model. In names, `{i}` stands for the index of the layer.

    Attributes:
        path: Path of the Keras variable.
        transformers: Its name in a transformers checkpoint.
        easylm: Its name in an EasyLM checkpoint, the nested keys joined by `/`.
        gguf: Its name in a GGUF file.
        axes: Its shape in Keras and transformers, as keys of `axis_sizes`.
        easylm_layout: `SAME`, `TRANSPOSED` or `ROTARY`.
    """

    path: str
    transformers: str
    easylm: str
    gguf: str
    axes: tuple[str, ...]
    easylm_layout: str = SAME

    @property
    def is_rotary(self) -> bool:
        """Whether rotary embedding rotates its outputs, see `rotary_order`."""
        return self.easylm_layout == ROTARY

    def in_layer(self, index: int | str) -> "WeightSpec":
        """Returns the weight of one decoder layer, with the index in its names."""
        return dataclasses.replace(
            self,
            path=self.path.format(i=index),
            transformers=self.transformers.format(i=index),
            easylm=self.easylm.format(i=index),
            gguf=self.gguf.format(i=index),
        )

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Returns the shape in Keras and transformers, given `axis_sizes(arguments)`.

        Example:
            >>> LAYER[0].shape({"hidden": 64})
            (64,)
        """
        return tuple(sizes[axis] for axis in self.axes)


def _in_each_layer(path, transformers, easylm, gguf, *more):
    return WeightSpec(
        "transformer_layer_{i}/" + path,
        "model.layers.{i}." + transformers,
        "transformer/h/{i}/" + easylm,
        "blk.{i}." + gguf,
        *more,
    )


EMBEDDING = WeightSpec(
    "token_embedding/embeddings",
    "model.embed_tokens.weight",
    "transformer/wte/embedding",
    "token_embd.weight",
    ("vocabulary", "hidden"),
)
LAYER = (
    _in_each_layer(
        "self_attention_norm/scale",
        "input_layernorm.weight",
        "attention_norm/kernel",
        "attn_norm.weight",
        ("hidden",),
    ),
    _in_each_layer(
        "self_attention/query/kernel",
        "self_attn.q_proj.weight",
        "attention/wq/kernel",
        "attn_q.weight",
        ("query", "hidden"),
        ROTARY,
    ),
    _in_each_layer(
        "self_attention/key/kernel",
        "self_attn.k_proj.weight",
        "attention/wk/kernel",
        "attn_k.weight",
        ("key_value", "hidden"),
        ROTARY,
    ),
    _in_each_layer(
        "self_attention/value/kernel",
        "self_attn.v_proj.weight",
        "attention/wv/kernel",
        "attn_v.weight",
        ("key_value", "hidden"),
        TRANSPOSED,
    ),
    _in_each_layer(
        "self_attention/output/kernel",
        "self_attn.o_proj.weight",
        "attention/wo/kernel",
        "attn_output.weight",
        ("hidden", "query"),
        TRANSPOSED,
    ),
    _in_each_layer(
        "feedforward_norm/scale",
        "post_attention_layernorm.weight",
        "ffn_norm/kernel",
        "ffn_norm.weight",
        ("hidden",),
    ),
    _in_each_layer(
        "feedforward/gate/kernel",
        "mlp.gate_proj.weight",
        "feed_forward/w1/kernel",
        "ffn_gate.weight",
        ("intermediate", "hidden"),
        TRANSPOSED,
    ),
    _in_each_layer(
        "feedforward/up/kernel",
        "mlp.up_proj.weight",
        "feed_forward/w3/kernel",
        "ffn_up.weight",
        ("intermediate", "hidden"),
        TRANSPOSED,
    ),
    _in_each_layer(
        "feedforward/down/kernel",
        "mlp.down_proj.weight",
        "feed_forward/w2/kernel",
        "ffn_down.weight",
        ("hidden", "intermediate"),
        TRANSPOSED,
    ),
)
# Modules of the projections in transformers, by the name of the Keras layer.
PROJECTION_MODULES = {
    row.path.split("/")[-2]: row.transformers.removesuffix(".weight")
    for row in LAYER
    if row.path.endswith("/kernel")
}
FINAL_NORM = WeightSpec(
    "final_norm/scale",
    "model.norm.weight",
    "transformer/ln_f/kernel",
    "output_norm.weight",
    ("hidden",),
)
HEAD = WeightSpec(
    "lm_head/kernel",
    "lm_head.weight",
    "lm_head/kernel",
    "output.weight",
    EMBEDDING.axes,
    TRANSPOSED,
)


def weight_specs(num_layers: int, head: bool = True) -> list[WeightSpec]:
    """Lists all weights of a model, in the order of its layers.

    Args:
        num_layers: Number of decoder layers.
        head: Whether to include the language-model head.

    Returns:
        The weights, with layer indices filled in.

    Example:
        >>> len(weight_specs(num_layers=26))
        237
        >>> weight_specs(num_layers=26)[1].transformers
        'model.layers.0.input_layernorm.weight'
    """
    layers = [row.in_layer(i) for i in range(num_layers) for row in LAYER]
    return [EMBEDDING, *layers, FINAL_NORM, *([HEAD] if head else [])]


def axis_sizes(arguments: dict[str, Any]) -> dict[str, int]:
    """Returns the size of each axis that `WeightSpec.axes` names.

    Args:
        arguments: Arguments of `OpenLlamaBackbone`, from `validate_architecture`.

    Returns:
        The sizes by name.

    Example:
        >>> axis_sizes(lm.backbone.architecture())["key_value"]
        128
    """
    head_dim = arguments["head_dim"]
    return {
        "vocabulary": arguments["vocabulary_size"],
        "hidden": arguments["hidden_dim"],
        "intermediate": arguments["intermediate_dim"],
        "query": arguments["num_query_heads"] * head_dim,
        "key_value": arguments["num_key_value_heads"] * head_dim,
    }
