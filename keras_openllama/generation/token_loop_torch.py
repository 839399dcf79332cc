"""The loop of `token_loop.TokenLoop` on PyTorch: nothing padded, each step traced.

Eager Keras spends several times as long on Python as the step of a small model takes.
So the network's step is recorded once as a graph of PyTorch operations and replayed. A
graph belongs to a number of rows, and reads as many columns of the cache as are in use.
"""

import warnings

import torch
from keras import ops, tree
from torch.fx.experimental.proxy_tensor import make_fx

from keras_openllama.generation.onednn_weights import pack_linear_weights
from keras_openllama.generation.token_loop import (
    TokenLoop,
    init_cache,
    pad_prompts,
    positions_and_bias,
    run_layers,
    used_columns,
)

# Ours: steps between two looks at which rows are done; a look waits for the device.
STEPS_BETWEEN_DONE_CHECKS = 8


class TorchTokenLoop(TokenLoop):
    """See `TokenLoop`. In its state `prefilled` and `step` are Python numbers.

    Args:
        model: `OpenLlamaCausalLM`.
    """

    def __init__(self, model):
        self.model = model
        self._graphs = {}  # By number of rows.
        self._packed = {}  # By id of the weight.
        self._weights = []

    def start(self, prompts, limits):
        columns = max(map(len, prompts)) + max(limits)
        tokens, rows = pad_prompts(prompts, limits, columns)
        start = int(rows["start"])
        tokens, rows = tree.map_structure(ops.convert_to_tensor, (tokens, rows))
        state = {
            "tokens": tokens,
            "prefilled": 0,
            "step": 0,
            "done": rows["limits"] == 0,
            "cache": init_cache(self.model.backbone, len(prompts), columns),
        }
        return state, {**rows, "start": start}

    @torch.no_grad()
    def advance(self, state, rows, stop_ids, until):
        start = rows["start"]
        if state["prefilled"] < start:
            self._run_prefix(state, rows)
            state = {**state, "prefilled": start}
        self._forget_graphs_of_other_weights()
        while state["step"] < until:
            if state["step"] % STEPS_BETWEEN_DONE_CHECKS == 0 and bool(
                state["done"].all()
            ):
                break
            logits = self._step(state, rows)
            state = self.sample_next(state, logits, rows, stop_ids)
        return state

    def _run_prefix(self, state, rows):
        """All prefixes at once. Padding comes after them, and is never seen."""
        start = rows["start"]
        positions = torch.arange(start, device=state["tokens"].device)[None]
        run_layers(
            self.model.backbone,
            state["tokens"][:, :start],
            positions.expand(len(state["tokens"]), -1),
            rows["final_lengths"],
            None,
            used_columns(state["cache"], start),
            None,
        )

    def _step(self, state, rows):
        column = rows["start"] + state["step"]
        cache = used_columns(state["cache"], column + 1)
        fed = state["tokens"][:, column : column + 1]
        positions, bias = positions_and_bias(rows, column, fed.shape, cache[0][0].shape)
        inputs = (fed, positions, rows["final_lengths"], bias, cache)
        return self._graph(inputs)(*inputs)

    def _graph(self, inputs):
        batch = len(inputs[0])
        if batch not in self._graphs:
            graph = trace_graph(self._logits, inputs)
            pack_linear_weights(graph, self._packed)
            self._graphs[batch] = graph
        return self._graphs[batch]

    def _forget_graphs_of_other_weights(self):
        """What LoRA and quantization change, and the values that training changes."""
        weights = [(id(w), w.value._version) for w in self.model.weights]
        if weights != self._weights:
            self._graphs.clear()
            self._packed.clear()
            self._weights = weights

    def _logits(self, fed, positions, final_lengths, bias, cache):
        hidden, _ = run_layers(
            self.model.backbone, fed, positions, final_lengths, bias, cache, None
        )
        return self.model.lm_head(hidden)[:, 0]


def trace_graph(function, inputs):
    """Records what `function` does with `inputs`, which it does meanwhile.

    Returns:
        A `torch.fx.GraphModule` that is called as `function` is.
    """
    with warnings.catch_warnings():
        # Of a first token, which has only itself to look at.
        warnings.filterwarnings("ignore", "You are using a softmax over axis")
        graph = make_fx(lambda *inputs: function(*inputs))(*inputs)
    remove_noop_reshapes(graph)
    return graph


def remove_noop_reshapes(graph):
    """Removes views that change nothing, which batched products record.

    They cost time, and they alone would tie the graph to one number of columns.
    """
    aten = torch.ops.aten
    views = {aten.view.default, aten._unsafe_view.default, aten.expand.default}
    for node in list(graph.graph.nodes):
        if node.target in views:
            if _shape(graph, node) == _shape(graph, node.args[0]):
                node.replace_all_uses_with(node.args[0])
                graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _shape(graph, node):
    if node.op == "get_attr":
        return getattr(graph, node.target).shape
    return node.meta["tensor_meta"].shape
