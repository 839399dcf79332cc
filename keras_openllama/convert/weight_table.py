"""What each weight is called, here and elsewhere: one row for each kind of weight.

Import and export both read this table, so neither can know a weight that the other
does not.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of the network under its names; `{i}` stands for the layer.

    Attributes:
        path: path of the Keras variable.
        transformers: name in a checkpoint of transformers.
    """

    path: str
    transformers: str

    def in_layer(self, index):
        """The row with the layer's number in its names."""
        return dataclasses.replace(
            self,
            path=self.path.format(i=index),
            transformers=self.transformers.format(i=index),
        )


_LAYER = "transformer_layer_{i}/"
_THEIR_LAYER = "model.layers.{i}."

EMBEDDING = Weight("token_embedding/embeddings", "model.embed_tokens.weight")
FINAL_NORM = Weight("final_norm/scale", "model.norm.weight")
HEAD = Weight("lm_head/kernel", "lm_head.weight")
LAYER = tuple(
    Weight(_LAYER + ours, _THEIR_LAYER + theirs)
    for ours, theirs in (
        ("self_attention_norm/scale", "input_layernorm.weight"),
        ("self_attention/query/kernel", "self_attn.q_proj.weight"),
        ("self_attention/key/kernel", "self_attn.k_proj.weight"),
        ("self_attention/value/kernel", "self_attn.v_proj.weight"),
        ("self_attention/output/kernel", "self_attn.o_proj.weight"),
        ("feedforward_norm/scale", "post_attention_layernorm.weight"),
        ("feedforward/gate/kernel", "mlp.gate_proj.weight"),
        ("feedforward/up/kernel", "mlp.up_proj.weight"),
        ("feedforward/down/kernel", "mlp.down_proj.weight"),
    )
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
