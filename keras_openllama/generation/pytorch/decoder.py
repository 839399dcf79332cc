"""Decoding steps of `TorchTokenLoop`, which work on buffers that stay where they are.

On a GPU, launching the kernels of a step one by one takes several times as long as the
GPU needs to run them. So the step counts its columns on the device, and is captured
once in a CUDA graph, which is replayed for each token.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from keras_openllama.generation.kv_cache import (
    MIN_CACHE_LENGTH,
    PromptLayout,
    init_cache,
    padded_cache_length,
)
from keras_openllama.generation.pytorch.cpu_layer import (
    attention_buffers,
    decode_layer_on_cpu,
)
from keras_openllama.generation.pytorch.network import (
    TorchNetwork,
    weights_key,
)
from keras_openllama.generation.pytorch.onednn_weights import (
    PackedWeights,
    without_onednn,
)
from keras_openllama.generation.sampling.samplers import (
    is_greedy,
    next_tokens,
    undefined_tokens,
)
from keras_openllama.layers.cached_attention import MASKED_SCORE
from keras_openllama.text.token_arrays import PAD_TOKEN_ID

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

WARM_UPS = 2  # Runs before a capture: kernels are loaded and libraries initialized.
# Each batch size and number of columns compiles once. PyTorch's default is 8.
RECOMPILE_LIMIT = 256


class TorchDecoder:
    """The buffers of one batch, and the decoding step that works on them.

    A step reads only as many columns of the cache as are in use. With static shapes,
    this number is rounded up to a power of two. Each such number has its own graph.

    Args:
        model: `OpenLlamaCausalLM`.
        batch: number of sequences.
        columns: number of columns; with static shapes, a value of
            `padded_cache_length`.
        compile_options: `None`, or options of `torch.compile` for the layer.
        packed: packed weights for products on a CPU.
        is_static: whether the shapes of a step are static, as CUDA graphs need them.

    Attributes:
        tokens: int64 `(batch, columns)`, the prompts and the new tokens.
        done: bool `(batch,)`, which sequences have ended.
    """

    def __init__(
        self,
        model: CausalLM,
        batch: int,
        columns: int,
        compile_options: dict[str, Any] | None = None,
        packed: PackedWeights | None = None,
        is_static: bool = True,
    ) -> None:
        self.model = model
        self.device = model.weights[0].value.device
        self.batch, self.columns = batch, columns
        self._compile_options = compile_options
        self._packed = packed
        self.is_static = is_static
        self._can_capture = self.device.type == "cuda"
        # One for all captures: cuBLAS keeps a workspace for each stream.
        self._stream = torch.cuda.Stream(self.device) if self._can_capture else None
        self.cache = init_cache(model.backbone, batch, columns, model.kv_cache_dtype)

        def counts(*shape, dtype=torch.int64):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.tokens = counts(batch, columns)
        self.done = counts(batch, dtype=torch.bool)
        self._column, self._start = counts(1), counts(1)
        self._prefix_lengths, self._limits = counts(batch), counts(batch)
        self._rows = torch.arange(batch, device=self.device)
        self._numbers = torch.arange(columns, device=self.device)
        half = model.backbone.head_dim // 2
        self._is_dynamic = model.backbone.rotary_embedding.is_dynamic
        tables = batch if self._is_dynamic else 1
        # Rotary tables of each sequence: with dynamic scaling they differ.
        self._cos = counts(tables, columns, half, dtype=torch.float32)
        self._sin = torch.zeros_like(self._cos)
        self._stop_ids = counts(0)
        self._undefined = None
        self._weights = None
        self._graphs = {}  # CUDA graph and logits, by columns in use and sampling.

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return sum(x.nbytes for layer in self.cache for x in layer)

    def load(self, tokens: np.ndarray, prompt_layout: PromptLayout) -> None:
        """Copies prompts into the buffers.

        Args:
            tokens: int `(batch, columns)`, see `kv_cache.pad_prompts`.
            prompt_layout: where the prompts are.
        """
        # A weight of 0 would not hide infinity or NaN of an earlier generation.
        for layer in self.cache:
            for tensor in layer:
                tensor.zero_()
        prefix, start, limits, final = (torch.as_tensor(x) for x in prompt_layout)
        self.tokens.copy_(torch.as_tensor(tokens))
        self.done.copy_(limits == 0)
        self._column.fill_(int(start))
        self._start.fill_(int(start))
        self._prefix_lengths.copy_(prefix)
        self._limits.copy_(limits)
        cos, sin = self.model.backbone.rotary_embedding(
            self._numbers[None].expand(len(self._cos), -1), final.to(self.device)
        )
        self._cos.copy_(cos[:, 0])
        self._sin.copy_(sin[:, 0])

    def prepare(self, stop_ids: torch.Tensor) -> None:
        """Adopts stop ids and changes of the model; called before steps.

        Args:
            stop_ids: int `(number,)`, padded with -1.
        """
        if stop_ids.shape != self._stop_ids.shape:
            self._stop_ids = torch.empty_like(stop_ids, dtype=torch.int64)
            self._graphs.clear()
        self._stop_ids.copy_(stop_ids)
        weights = weights_key(self.model, versions=self._packed is not None)
        undefined = undefined_tokens(self.model)
        if weights != self._weights or undefined != self._undefined:
            self._graphs.clear()
            self._weights, self._undefined = weights, undefined
            self._network = self._create_network()
            self._undefined_ids = torch.tensor(
                undefined, dtype=torch.int64, device=self.device
            )
            self._run_layer = self._select_layer()
            if self._compile_options is not None and not self._network.has_keras_layers:
                self._run_layer = torch.compile(
                    self._run_layer, dynamic=False, options=self._compile_options
                )

    def _create_network(self):
        network = TorchNetwork(self.model)
        if self._packed is not None:
            self._packed.update(network.kernels())
            network.use_packed(self._packed)
        return network

    def _select_layer(self):
        if self.is_static:
            return self._network.run_layer
        return functools.partial(
            decode_layer_on_cpu,
            head_dim=self._network.head_dim,
            epsilon=self._network.epsilon,
            buffers=attention_buffers(self.cache[0][0], self.batch),
        )

    def prefill(self, length: int) -> None:
        """Writes the prefixes to the cache; attention never reads the padding.

        Args:
            length: length of the longest prefix.
        """
        self._network.prefill(
            self.tokens[:, :length],
            self._cos[:, :length, None],
            self._sin[:, :length, None],
            self.cache,
        )

    def step(
        self, used: int, choose: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        """Generates one token per sequence.

        Args:
            used: number of columns of the cache that are in use, this step's included.
            choose: function of float32 logits `(batch, vocabulary_size)` that returns
                the tokens, int `(batch,)`; `None` for the sampler of the model.
        """
        greedy = choose is None and is_greedy(self.model.sampler)
        run = self._run_static if self.is_static else self._run_eagerly
        logits = run(used, greedy)
        if not greedy:
            # Not captured: samplers of Keras read their seed on the host.
            if choose is None:
                choose = functools.partial(next_tokens, self.model.sampler)
            self._append(choose(logits))

    def _run_static(self, used, greedy):
        """Runs `_compute` with a padded number of columns, captured if possible."""
        used = min(self.columns, padded_cache_length(max(used, MIN_CACHE_LENGTH)))
        if not self._can_capture or self._network.has_keras_layers:
            return self._compute(used, greedy)
        key = used, greedy
        if key not in self._graphs:
            self._graphs[key] = self._capture(used, greedy)
        graph, logits = self._graphs[key]
        if graph is None:  # The capture failed.
            return self._compute(used, greedy)
        graph.replay()
        return logits

    def _run_eagerly(self, used, greedy):
        """Runs `_compute` with less overhead per operation."""
        onednn = without_onednn() if self.batch == 1 else contextlib.nullcontext()
        with onednn, torch.inference_mode():
            logits = self._compute(used, greedy)
        # Without inference mode, samplers could not modify its tensors in place.
        return logits if greedy else logits.clone()

    def _compute(self, used, greedy):
        """Computes logits; with greedy sampling, appends the tokens as well."""
        column, start = self._column, self._start
        positions = self._prefix_lengths + column - start
        tables = self._rows if self._is_dynamic else torch.zeros_like(self._rows)
        cos, sin = (x[tables, positions][:, None, None] for x in (self._cos, self._sin))
        if not self.is_static:
            sin = torch.cat([-sin, sin], dim=-2)  # See `decode_layer_on_cpu`.
        keys = self._numbers[:used][None]
        filled = (keys < self._prefix_lengths[:, None]) | (keys >= start)
        visible = filled & (keys <= column)
        bias = (~visible).float() * MASKED_SCORE
        tokens = self.tokens.index_select(1, column)
        logits = self._network.decode(
            tokens, cos, sin, bias, column, self.cache, self._run_layer
        )
        logits = logits.float()
        if self._undefined:
            logits = logits.index_fill(1, self._undefined_ids, float("-inf"))
        if greedy:
            self._append(logits.argmax(dim=-1))
        return logits

    def _append(self, chosen):
        """Appends tokens to the sequences that have not ended."""
        chosen = chosen.to(torch.int64).masked_fill(self.done, PAD_TOKEN_ID)
        self._column += 1
        self.tokens.index_copy_(1, self._column, chosen[:, None])
        self.done |= (chosen[:, None] == self._stop_ids).any(dim=-1)
        self.done |= self._column - self._start >= self._limits

    def _capture(self, used, greedy):
        """Returns a CUDA graph of `_compute`, and the logits that it writes.

        The graph is `None` if an operation cannot be captured.
        """
        # A failed capture would leave its stream the current one.
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(current):
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self._warm_up(used, greedy)
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may go on to use the GPU.
                with torch.cuda.graph(
                    graph, stream=self._stream, capture_error_mode="thread_local"
                ):
                    logits = self._compute(used, greedy)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(
                    "PyTorch could not capture the decoding step in a CUDA graph, so "
                    "each kernel is launched by itself, which is slower. Generation is "
                    f"correct. The error was: {error}",
                    stacklevel=2,
                )
                return None, None
        return graph, logits

    def _warm_up(self, used, greedy):
        """Runs the step, and compiles it, without a change of the state."""
        state = self._column, self.tokens, self.done
        saved = [x.clone() for x in state]
        for _ in range(WARM_UPS):
            try:
                with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                    self._compute(used, greedy)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if self._run_layer is self._network.run_layer:
                    raise
                warnings.warn(
                    "PyTorch could not compile the decoding step, so it runs with more "
                    f"and smaller kernels, which is slower. The error was: {error}",
                    stacklevel=2,
                )
                self._run_layer = self._network.run_layer
            for x, value in zip(state, saved, strict=True):
                x.copy_(value)
