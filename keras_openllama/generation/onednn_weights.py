"""Matrices in oneDNN's own order, for steps of decoding on CPUs with PyTorch.

In bfloat16 oneDNN multiplies pairs of rows at once, and from a matrix in the usual
order it makes such pairs anew in every product. Made once, they let a product of few
rows run at 1.5 to 1.8 times the speed (`benchmarks/README.md`), for a second copy of
the weights in memory.
"""

import functools
import warnings

import torch

from keras_openllama.utils.host_memory import free_memory


def pack_linear_weights(graph, packed):
    """Lets a traced graph use packed matrices wherever that pays.

    Args:
        graph: `torch.fx.GraphModule` whose constants are the weights; changed in place.
        packed: dict of the packed matrices by the `id` of the weight; what is missing
            is added.
    """
    products = [(node, weight) for node, weight in _products(graph) if _pays(weight)]
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


def _products(graph):
    """Nodes that multiply by the transpose of a constant, each with the constant."""
    aten = torch.ops.aten
    turns = {aten.t.default, aten.permute.default, aten.transpose.int}
    for node in list(graph.graph.nodes):
        if node.target is aten.mm.default and node.args[1].target in turns:
            (source, *_) = node.args[1].args
            if source.op == "get_attr":
                yield node, getattr(graph, source.target)


def _pays(weight):
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@functools.cache
def _warn_of_memory(needed):
    warnings.warn(
        f"With {needed} of free memory, generation in bfloat16 would be about 1.5 "
        "times as fast: it would keep a copy of the weights in oneDNN's order.",
        stacklevel=2,
    )
