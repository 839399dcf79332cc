"""What each weight is called, here and elsewhere: one row for each kind of weight.

Import and export of every format read this table, so none can know a weight that the
others do not.
"""

import dataclasses

# How a matrix lies in EasyLM's checkpoints, next to ours, `(outputs, inputs)` with the
# two halves of each head's rotary pairs one after the other.
SAME = "same"
TURNED = "turned"  # (inputs, outputs)
ROTARY = "rotary"  # (inputs, outputs), and the two numbers of a pair side by side


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of the network under its names; `{i}` stands for the layer.

    Attributes:
        path: path of the Keras variable.
        transformers: name in a checkpoint of transformers.
        easylm: name in a checkpoint of EasyLM, its keys joined by `/`.
        axes: tuple of names of sizes, see `sizes`: the shape, here and in transformers.
        easylm_layout: `SAME`, `TURNED` or `ROTARY`.
    """

    path: str
    transformers: str
    easylm: str
    axes: tuple
    easylm_layout: str = SAME

    def in_layer(self, index):
        """The row with the layer's number in its names."""
        return dataclasses.replace(
            self,
            path=self.path.format(i=index),
            transformers=self.transformers.format(i=index),
            easylm=self.easylm.format(i=index),
        )

    def shape(self, sizes):
        """Its shape, here and in transformers, for `sizes(arguments)`."""
        return tuple(sizes[axis] for axis in self.axes)


def _in_each_layer(path, transformers, easylm, *more):
    return Weight(
        "transformer_layer_{i}/" + path,
        "model.layers.{i}." + transformers,
        "transformer/h/{i}/" + easylm,
        *more,
    )


EMBEDDING = Weight(
    "token_embedding/embeddings",
    "model.embed_tokens.weight",
    "transformer/wte/embedding",
    ("vocabulary", "hidden"),
)
LAYER = (
    _in_each_layer(
        "self_attention_norm/scale",
        "input_layernorm.weight",
        "attention_norm/kernel",
        ("hidden",),
    ),
    _in_each_layer(
        "self_attention/query/kernel",
        "self_attn.q_proj.weight",
        "attention/wq/kernel",
        ("query", "hidden"),
        ROTARY,
    ),
    _in_each_layer(
        "self_attention/key/kernel",
        "self_attn.k_proj.weight",
        "attention/wk/kernel",
        ("key_value", "hidden"),
        ROTARY,
    ),
    _in_each_layer(
        "self_attention/value/kernel",
        "self_attn.v_proj.weight",
        "attention/wv/kernel",
        ("key_value", "hidden"),
        TURNED,
    ),
    _in_each_layer(
        "self_attention/output/kernel",
        "self_attn.o_proj.weight",
        "attention/wo/kernel",
        ("hidden", "query"),
        TURNED,
    ),
    _in_each_layer(
        "feedforward_norm/scale",
        "post_attention_layernorm.weight",
        "ffn_norm/kernel",
        ("hidden",),
    ),
    _in_each_layer(
        "feedforward/gate/kernel",
        "mlp.gate_proj.weight",
        "feed_forward/w1/kernel",
        ("intermediate", "hidden"),
        TURNED,
    ),
    _in_each_layer(
        "feedforward/up/kernel",
        "mlp.up_proj.weight",
        "feed_forward/w3/kernel",
        ("intermediate", "hidden"),
        TURNED,
    ),
    _in_each_layer(
        "feedforward/down/kernel",
        "mlp.down_proj.weight",
        "feed_forward/w2/kernel",
        ("hidden", "intermediate"),
        TURNED,
    ),
)
FINAL_NORM = Weight(
    "final_norm/scale", "model.norm.weight", "transformer/ln_f/kernel", ("hidden",)
)
HEAD = Weight(
    "lm_head/kernel", "lm_head.weight", "lm_head/kernel", EMBEDDING.axes, TURNED
)


def weights(num_layers, head=True):
    """Rows of a whole network, in the order of its layers.

    Args:
        num_layers: int, number of decoder layers.
        head: bool, whether the language-model head is among them.

    Returns:
        List of `Weight`s, with layer numbers filled in.

    Example:

    ```python
    names = [weight.transformers for weight in weights(num_layers=26)]
    ```
    """
    layers = [row.in_layer(i) for i in range(num_layers) for row in LAYER]
    return [EMBEDDING, *layers, FINAL_NORM, *([HEAD] if head else [])]


def sizes(arguments):
    """The sizes that `Weight.axes` names.

    Args:
        arguments: dict, as `config.validate_architecture` returns.

    Returns:
        Dict of ints.
    """
    head_dim = arguments["head_dim"]
    return {
        "vocabulary": arguments["vocabulary_size"],
        "hidden": arguments["hidden_dim"],
        "intermediate": arguments["intermediate_dim"],
        "query": arguments["num_query_heads"] * head_dim,
        "key_value": arguments["num_key_value_heads"] * head_dim,
    }
