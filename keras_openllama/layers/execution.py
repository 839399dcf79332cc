"""Options for how a backbone computes its decoder layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from keras_openllama.utils.types import Tensor


@dataclasses.dataclass(frozen=True)
class LayerExecution:
    """How a backbone computes its layers; the results do not depend on it.

    Attributes:
        rematerialize: A policy of `config.REMATERIALIZATION`: what the backward pass
            recomputes. All policies except `"none"` need JAX.
        attention_fn: Callable of `attention_kernels.select_attention` with the
            arguments query, key, value, mask and documents. `None` stands for
            `attention.causal_attention`.
        scan: Whether the layers run in `scan.scan_layers` (JAX).
        layers_per_step: Number of layers in a step of the scan.
        embedding_fn: Callable that maps token ids to embeddings, such as
            `sharded_embedding.embedding_lookup` on a mesh. `None` stands for the
            embedding layer.

    Example:
        >>> LayerExecution(rematerialize="full", scan=True).attention_fn is None
        True
    """

    rematerialize: str = "none"
    attention_fn: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = (
        None
    )
    scan: bool = False
    layers_per_step: int = 1
    embedding_fn: Callable[[Tensor], Tensor] | None = None
