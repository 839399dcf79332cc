"""How the decoder's layers are computed, where a trainer wants it other than usual."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class LayerExecution:
    """How a backbone computes its layers; none of it changes what they compute.

    Attributes:
        rematerialize: string, one of `config.REMATERIALIZATION`: what the backward pass
            computes again. Any but `"none"` needs JAX.
        attend: callable of `attention_kernels.attention_on`, with the arguments query,
            key, value, mask and documents; `None` is `attention.attend_to_past`.
        scan: bool, whether the layers are a `scan.scan_layers` (JAX).
        embed: callable of token ids that returns their embeddings, such as
            `sharded_embedding.look_up` on a mesh; `None` is the embedding layer.
    """

    rematerialize: str = "none"
    attend: Callable | None = None
    scan: bool = False
    embed: Callable | None = None
