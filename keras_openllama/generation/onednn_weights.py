"""Products in bfloat16 for decoding on CPUs with PyTorch: with oneDNN, and without.

For a single row, PyTorch's own product reads the weights at the rate of the memory, and
oneDNN's at less than half of it (`benchmarks/README.md`).

oneDNN multiplies pairs of rows at once. With weights in the usual layout it rearranges
them in every product. Weights that are packed once make decoding of several sequences
1.7 to 2.5 times as fast, but need memory for a second copy of the weights.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator

import torch

from keras_openllama.utils.host_memory import free_memory


class _Switch:
    """Whether oneDNN is enabled, and how many need it to be disabled."""

    lock = threading.Lock()
    users = 0
    before = True


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """Disables oneDNN, for the whole process.

    Products of other threads are slower in the meantime, and as exact.

    Example:
        >>> with without_onednn():
        ...     torch.backends.mkldnn.enabled
        False
    """
    onednn = torch.backends.mkldnn
    with _Switch.lock:
        if not _Switch.users:
            _Switch.before = onednn.enabled
        _Switch.users += 1
        onednn.enabled = False
    try:
        yield
    finally:
        with _Switch.lock:
            _Switch.users -= 1
            if not _Switch.users:
                onednn.enabled = _Switch.before


def pack_linear_weights(
    graph: torch.fx.GraphModule, packed: dict[int, torch.Tensor]
) -> None:
    """Replaces the matrix products of a traced graph by products with packed weights.

    Only weights that profit are packed. If there is not enough memory for the packed
    copies, the graph is left unchanged, with a warning.

    Args:
        graph: graph whose constants are the weights; modified in place.
        packed: packed weights by the `id` of the weight; missing ones are added.
    """
    products = [
        (node, weight) for node, weight in _linear_nodes(graph) if _is_packable(weight)
    ]
    missing = {id(w): w for _, w in products if id(w) not in packed}
    needed = sum(weight.nbytes for weight in missing.values())
    if needed > (free_memory() or 0):
        _warn_of_memory(f"{needed / 1e9:.1f} GB")
        return
    for key, weight in missing.items():
        packed[key] = torch.ops.mkldnn._reorder_linear_weight(weight)
    for i, (node, weight) in enumerate(products):
        graph.register_buffer(f"packed_{i}", packed[id(weight)])
        with graph.graph.inserting_before(node):
            matrix = graph.graph.get_attr(f"packed_{i}")
            product = graph.graph.call_function(
                torch.ops.mkldnn._linear_pointwise.default,
                (node.args[0], matrix, None, "none", [], ""),
            )
        node.replace_all_uses_with(product)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _linear_nodes(
    graph: torch.fx.GraphModule,
) -> Iterator[tuple[torch.fx.Node, torch.Tensor]]:
    """Yields nodes that multiply by the transpose of a constant, with the constant."""
    aten = torch.ops.aten
    transposes = {aten.t.default, aten.permute.default, aten.transpose.int}
    for node in list(graph.graph.nodes):
        if node.target is aten.mm.default and node.args[1].target in transposes:
            (source, *_) = node.args[1].args
            if source.op == "get_attr":
                yield node, getattr(graph, source.target)


def _is_packable(weight: torch.Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@functools.cache
def _warn_of_memory(needed: str) -> None:
    warnings.warn(
        f"With {needed} of free memory, generation in bfloat16 would be about 1.5 "
        "times as fast: it would hold a copy of the weights in oneDNN's layout.",
        stacklevel=2,
    )
