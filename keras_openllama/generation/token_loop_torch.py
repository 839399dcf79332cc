"""`token_loop.TokenLoop` on PyTorch.

In eager mode, Keras spends several times as long in Python as a small model computes.
On a CPU, the decoding step of the network is traced once to a graph of PyTorch
operations, which is then run for each token, without padding. A graph is valid for one
batch size. It reads only the columns of the cache that are in use.

On a GPU, `torch_decoder.TorchDecoder` runs the step. It has static shapes: the batch
and the columns of the cache are padded as with XLA.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from keras import ops, tree
from torch.fx.experimental.proxy_tensor import make_fx

from keras_openllama.generation.kv_cache import (
    PromptLayout,
    init_cache,
    pad_prompts,
    padded_batch_size,
    padded_cache_length,
    positions_and_bias,
    run_layers,
    used_columns,
)
from keras_openllama.generation.onednn_weights import (
    pack_linear_weights,
    without_onednn,
)
from keras_openllama.generation.token_loop import LoopState, TokenLoop
from keras_openllama.generation.torch_decoder import TorchDecoder
from keras_openllama.generation.weights_state import WeightsState
from keras_openllama.text.token_arrays import PAD_TOKEN_ID

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

# Heuristic: steps between two checks whether all sequences have ended. A check waits
# for the device.
STEPS_BETWEEN_DONE_CHECKS = 8
# How steps run, by the type of the device: "traced", the default, "captured" in a CUDA
# graph, or "compiled" and captured.
DECODING = {"cuda": "captured"}
# Options of `torch.compile` for the layers of "compiled".
COMPILE_OPTIONS = {}
# Share of a GPU's memory for the caches of decoders that are kept for later calls.
KEPT_CACHES = 1 / 8
# Of the lists of free decoders. Reentrant: garbage collection may end a generation.
_LOCK = threading.RLock()


class TorchTokenLoop(TokenLoop):
    """See `TokenLoop`. In the state, `num_prefilled` and `step` are Python integers.

    On a GPU, `cache` of the state is a `DecoderLease`.

    Args:
        model: `OpenLlamaCausalLM`.
    """

    def __init__(self, model: CausalLM):
        self.model = model
        self._graphs = {}  # By batch size.
        self._packed = {}  # By id of the weight.
        self._weights = WeightsState(model)
        self._free_decoders = []  # The last ones are the most recent ones.

    # Without inference mode: its tensors could not be modified by later calls outside.
    @torch.inference_mode(False)
    @torch.no_grad()
    def start(
        self, prompts: list[list[int]], limits: list[int]
    ) -> tuple[LoopState, PromptLayout]:
        """See `TokenLoop.start`."""
        if self._decoding() != "traced":
            return self._start_decoder(prompts, limits)
        columns = max(map(len, prompts)) + max(limits)
        tokens, prompt_layout = pad_prompts(prompts, limits, columns)
        start = int(prompt_layout.start)
        tokens, prompt_layout = tree.map_structure(
            ops.convert_to_tensor, (tokens, prompt_layout)
        )
        state = LoopState(
            tokens=tokens,
            num_prefilled=0,
            step=0,
            done=prompt_layout.limits == 0,
            cache=init_cache(self.model.backbone, len(prompts), columns),
        )
        return state, prompt_layout._replace(start=start)

    @torch.inference_mode(False)
    @torch.no_grad()
    def advance(
        self,
        state: LoopState,
        prompt_layout: PromptLayout,
        stop_ids: torch.Tensor,
        until: int,
    ) -> LoopState:
        """Generates tokens up to a step, or until all sequences have ended.

        Args:
            state: first result of `start`, or of a previous call.
            prompt_layout: second result of `start`.
            stop_ids: int `(number,)`, padded with -1.
            until: number of the step to stop at.

        Returns:
            The new state.
        """
        start = prompt_layout.start
        if isinstance(state.cache, DecoderLease):
            return self._advance_decoder(state, start, stop_ids, until)
        if state.num_prefilled < start:
            self._prefill_prefixes(state, prompt_layout)
            state = state._replace(num_prefilled=start)
        self._drop_stale_graphs()
        while state.step < until:
            if state.step % STEPS_BETWEEN_DONE_CHECKS == 0 and bool(state.done.all()):
                break
            logits = self._step(state, prompt_layout)
            state = self.sample_next(state, logits, prompt_layout, stop_ids)
        return state

    def _decoding(self):
        return DECODING.get(self.model.weights[0].value.device.type, "traced")

    def _start_decoder(self, prompts, limits):
        columns = padded_cache_length(max(map(len, prompts)) + max(limits))
        batch = padded_batch_size(len(prompts))
        filler = batch - len(prompts)
        tokens, prompt_layout = pad_prompts(
            prompts + [[PAD_TOKEN_ID]] * filler, limits + [0] * filler, columns
        )
        decoder = self._take_decoder(batch, columns)
        lease = DecoderLease(decoder, self._free_decoders)
        decoder.load(tokens, prompt_layout)
        state = LoopState(
            tokens=decoder.tokens,
            num_prefilled=0,
            step=0,
            done=decoder.done,
            cache=lease,
        )
        return state, prompt_layout._replace(start=int(prompt_layout.start))

    def _take_decoder(self, batch, columns):
        """Returns an unused decoder; a generation that is in progress has its own."""
        device = self.model.weights[0].value.device
        with _LOCK:
            # The model may have been moved.
            on_device = [free for free in self._free_decoders if free.device == device]
            self._free_decoders[:] = on_device
            for decoder in on_device:
                if (decoder.batch, decoder.columns) == (batch, columns):
                    self._free_decoders.remove(decoder)
                    return decoder
        options = COMPILE_OPTIONS if self._decoding() == "compiled" else None
        try:
            return TorchDecoder(self.model, batch, columns, options)
        except torch.OutOfMemoryError:
            self._free_decoders.clear()
            return TorchDecoder(self.model, batch, columns, options)

    def _advance_decoder(self, state, start, stop_ids, until):
        decoder, step = state.cache.decoder, state.step
        decoder.prepare(stop_ids)
        if state.num_prefilled < start:
            decoder.prefill(start)
        while step < until:
            if step % STEPS_BETWEEN_DONE_CHECKS == 0 and bool(state.done.all()):
                break
            decoder.step(used=start + step + 1)
            step += 1
        return state._replace(num_prefilled=start, step=step)

    def _prefill_prefixes(self, state, prompt_layout):
        """Feeds all prefixes at once; causal attention never reads the padding."""
        start = prompt_layout.start
        positions = torch.arange(start, device=state.tokens.device)[None]
        run_layers(
            self.model.backbone,
            state.tokens[:, :start],
            positions.expand(len(state.tokens), -1),
            prompt_layout.final_lengths,
            None,
            used_columns(state.cache, start),
            None,
        )

    def _step(self, state, prompt_layout):
        column = prompt_layout.start + state.step
        cache = used_columns(state.cache, column + 1)
        tokens = state.tokens[:, column : column + 1]
        positions, bias = positions_and_bias(
            prompt_layout, column, tokens.shape, cache[0][0].shape
        )
        inputs = (tokens, positions, prompt_layout.final_lengths, bias, cache)
        with without_onednn() if len(tokens) == 1 else contextlib.nullcontext():
            return self._graph(inputs)(*inputs)

    def _graph(self, inputs):
        batch = len(inputs[0])
        if batch not in self._graphs:
            graph = trace_graph(self._logits, inputs)
            if batch > 1:
                pack_linear_weights(graph, self._packed)
            self._graphs[batch] = graph
        return self._graphs[batch]

    def _drop_stale_graphs(self):
        """Drops the graphs if LoRA, quantization or training changed the weights."""
        if self._weights.update():
            self._graphs.clear()
            self._packed.clear()

    def _logits(self, tokens, positions, final_lengths, bias, cache):
        hidden, _ = run_layers(
            self.model.backbone, tokens, positions, final_lengths, bias, cache, None
        )
        return self.model.lm_head(hidden)[:, 0]


class DecoderLease:
    """The use of a decoder by one generation, which ends with this object.

    Args:
        decoder: `TorchDecoder`.
        free: list that the decoder is added to at the end. The caches of its decoders
            have at most `KEPT_CACHES` of the memory; the oldest ones are removed.
    """

    def __init__(self, decoder: TorchDecoder, free: list[TorchDecoder]):
        self.decoder = decoder
        weakref.finalize(self, _keep_decoder, decoder, free).atexit = False


def kept_cache_bytes(device: torch.device) -> float:
    """Returns how many bytes of caches are kept on a device, see `KEPT_CACHES`."""
    if device.type != "cuda":
        return float("inf")
    return KEPT_CACHES * torch.cuda.get_device_properties(device).total_memory


def _keep_decoder(decoder, free):
    limit = kept_cache_bytes(decoder.device)
    with _LOCK:
        free.append(decoder)
        while sum(kept.nbytes for kept in free) > limit:
            del free[0]


def trace_graph(
    function: Callable[..., Any], inputs: tuple[Any, ...]
) -> torch.fx.GraphModule:
    """Traces a function of tensors to a graph.

    Args:
        function: a function of tensors; it is run once.
        inputs: its arguments, nested tensors.

    Returns:
        A module that is called like `function`.
    """
    with warnings.catch_warnings():
        # PyTorch warns at the first token, which attends only to itself.
        warnings.filterwarnings("ignore", "You are using a softmax over axis")
        graph = make_fx(lambda *inputs: function(*inputs))(*inputs)
    remove_noop_reshapes(graph)
    return graph


def remove_noop_reshapes(graph: torch.fx.GraphModule) -> None:
    """Removes reshapes to the same shape, which batched products record.

    They take time, and they would restrict the graph to one number of cache columns.

    Args:
        graph: a traced graph; modified in place.
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
