"""`token_loop.TokenLoop` on PyTorch.

In eager mode, Keras spends several times as long in Python as a small model computes.
So `torch_decoder.TorchDecoder` runs prefill and the decoding steps. On a GPU they have
static shapes: the batch and the columns of the cache are padded as with XLA. On a CPU
they are not padded, and a step reads only the columns of the cache that are in use.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

import torch
from keras import tree

from keras_openllama.generation.kv_cache import (
    PromptLayout,
    pad_prompts,
    padded_batch_size,
    padded_cache_length,
)
from keras_openllama.generation.pytorch.decoder import TorchDecoder
from keras_openllama.generation.pytorch.onednn_weights import PackedWeights
from keras_openllama.generation.sampling.state import SamplingInputs, sample_tokens
from keras_openllama.generation.token_loop import LoopState, TokenLoop
from keras_openllama.text.token_arrays import PAD_TOKEN_ID

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

# Heuristic: steps between two checks whether all sequences have ended. A check waits
# for the device.
STEPS_BETWEEN_DONE_CHECKS = 8
# How steps run, by the type of the device: "eager", the default, "captured" in a CUDA
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

    `cache` is a `DecoderLease`.

    Args:
        model: `OpenLlamaCausalLM`.
    """

    def __init__(self, model: CausalLM):
        self.model = model
        self._packed = PackedWeights()
        self._free_decoders = []  # The last ones are the most recent ones.

    # Without inference mode: its tensors could not be modified by later calls outside.
    @torch.inference_mode(False)
    @torch.no_grad()
    def start(
        self, prompts: list[list[int]], limits: list[int]
    ) -> tuple[LoopState, PromptLayout]:
        """See `TokenLoop.start`."""
        columns, batch = max(map(len, prompts)) + max(limits), len(prompts)
        if self._decoding() != "eager":
            columns, batch = padded_cache_length(columns), padded_batch_size(batch)
        filler = batch - len(prompts)
        tokens, prompt_layout = pad_prompts(
            prompts + [[PAD_TOKEN_ID]] * filler, limits + [0] * filler, columns
        )
        decoder = self._take_decoder(batch, columns)
        lease = DecoderLease(decoder, self._free_decoders if decoder.is_static else [])
        decoder.load(tokens, prompt_layout)
        state = LoopState(
            tokens=decoder.tokens,
            num_prefilled=0,
            step=0,
            done=decoder.done,
            cache=lease,
        )
        return state, prompt_layout._replace(start=int(prompt_layout.start))

    @torch.inference_mode(False)
    @torch.no_grad()
    def advance(
        self,
        state: LoopState,
        prompt_layout: PromptLayout,
        stop_ids: torch.Tensor,
        until: int,
        sampling: SamplingInputs | tuple[()] = (),
    ) -> LoopState:
        """Generates tokens up to a step, or until all sequences have ended.

        Args:
            state: first result of `start`, or of a previous call.
            prompt_layout: second result of `start`.
            stop_ids: int `(number,)`, padded with -1.
            until: number of the step to stop at.
            sampling: inputs of sampling; `()` uses the sampler of the model.

        Returns:
            The new state.
        """
        decoder, step, sampled = state.cache.decoder, state.step, state.sampling

        def choose(logits):
            nonlocal sampled
            tokens, sampled = sample_tokens(logits, sampling, sampled, step)
            return tokens

        start = prompt_layout.start
        decoder.prepare(stop_ids)
        if state.num_prefilled < start:
            decoder.prefill(start)
        while step < until:
            if step % STEPS_BETWEEN_DONE_CHECKS == 0 and bool(state.done.all()):
                break
            decoder.step(used=start + step + 1, choose=choose if sampling else None)
            step += 1
        return state._replace(num_prefilled=start, step=step, sampling=sampled)

    def _on_device(self, arrays):
        device = self.model.weights[0].value.device
        return tree.map_structure(lambda x: torch.as_tensor(x, device=device), arrays)

    def _decoding(self):
        return DECODING.get(self.model.weights[0].value.device.type, "eager")

    def _take_decoder(self, batch, columns):
        """Returns an unused decoder; a generation that is in progress has its own."""
        if self._decoding() == "eager":
            packed = self._packed if batch > 1 else None
            return TorchDecoder(
                self.model, batch, columns, packed=packed, is_static=False
            )
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
