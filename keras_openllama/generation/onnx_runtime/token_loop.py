"""`token_loop.TokenLoop` with ONNX Runtime, for models on a CPU.

They are quantized, or in bfloat16. XLA and PyTorch multiply by quantized matrices at
the rate of float ones or slower, and slowly in bfloat16 for some numbers of rows. Here
products are limited by the memory, see `benchmarks/README.md`. The sampler is that of
the model, on the backend of Keras.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import keras
import numpy as np
from keras import ops

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.jit import compile_function
from keras_openllama.backend.keras_private import (
    embeddings_variable,
    flatten_layers,
    stored_value,
)
from keras_openllama.generation.kv_cache import PromptLayout, pad_prompts
from keras_openllama.generation.onnx_runtime.matrices import runtime_group_size
from keras_openllama.generation.onnx_runtime.weights_in_memory import float_matrices
from keras_openllama.generation.sampling.samplers import (
    exclude_undefined_tokens,
    is_greedy,
    next_tokens,
    undefined_tokens,
)
from keras_openllama.generation.sampling.state import SamplingInputs, sample_tokens
from keras_openllama.generation.sharding import runs_on_one_cpu
from keras_openllama.generation.token_loop import LoopState, TokenLoop
from keras_openllama.generation.weights_state import WeightsState
from keras_openllama.layers.projection import Projection, is_float8
from keras_openllama.layers.quantizable import is_quantized
from keras_openllama.native.library import native_library
from keras_openllama.text.token_arrays import PAD_TOKEN_ID

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM
    from keras_openllama.generation.onnx_runtime.decoder import OnnxDecoder


class OnnxTokenLoop(TokenLoop):
    """See `TokenLoop`. The state has NumPy arrays, and as `cache` an `OnnxCache`.

    Args:
        model: `OpenLlamaCausalLM`, for which `uses_onnx_runtime` holds.
    """

    def __init__(self, model: CausalLM):
        self.model = model
        self._decoder = None
        self._weights = WeightsState(model)
        self._choose = compile_function(self._choose_tokens, model)
        self._sample = compile_function(self._sample_tokens, model, donate=("state",))

    def start(
        self, prompts: list[list[int]], limits: list[int]
    ) -> tuple[LoopState, PromptLayout]:
        """See `TokenLoop.start`."""
        from keras_openllama.generation.onnx_runtime.decoder import OnnxCache

        columns = max(map(len, prompts)) + max(limits)
        tokens, prompt_layout = pad_prompts(prompts, limits, columns)
        state = LoopState(
            tokens=tokens,
            num_prefilled=0,
            step=0,
            done=prompt_layout.limits == 0,
            cache=OnnxCache(self.decoder(), len(prompts), columns),
        )
        return state, prompt_layout

    def decoder(self) -> OnnxDecoder:
        """Returns the model in ONNX Runtime, made anew if the weights have changed."""
        from keras_openllama.generation.onnx_runtime.decoder import OnnxDecoder

        if self._weights.update() or self._decoder is None:
            self._decoder = None  # Its memory is free before the next one is made.
            self._decoder = OnnxDecoder(self.model)
            self._weights.update()  # It has moved them to another memory.
        return self._decoder

    def release(self) -> None:
        """Frees the model in ONNX Runtime until the next call."""
        self._decoder = None

    def advance(
        self,
        state: LoopState,
        prompt_layout: PromptLayout,
        stop_ids: np.ndarray,
        until: int,
        sampling: SamplingInputs | tuple[()] = (),
    ) -> LoopState:
        """See `TorchTokenLoop.advance`."""
        start, cache = int(prompt_layout.start), state.cache
        tokens, done, step = state.tokens, state.done, state.step
        sampled, logits = state.sampling, None
        if state.num_prefilled < start:
            rows = zip(tokens, prompt_layout.prefix_lengths, strict=True)
            prompts = [row[:length].astype("int64") for row, length in rows]
            # With the last token of the prompts, a step is saved.
            whole = step < until and not done.all()
            if whole:
                last = tokens[:, start, None].astype("int64")
                prompts = [
                    np.concatenate(pair) for pair in zip(prompts, last, strict=True)
                ]
            logits = cache.prefill(prompts)
            logits = logits if whole else None
            state = state._replace(num_prefilled=start)
        while step < until and not done.all():
            if logits is None:
                logits = cache.step(tokens[:, start + step])
            if sampling:
                chosen, sampled = self._sample(
                    logits=logits, inputs=sampling, state=sampled, step=np.int32(step)
                )
                chosen = as_numpy(chosen)
            else:
                chosen = self._next_tokens(logits)
            logits = None
            chosen = np.where(done, PAD_TOKEN_ID, chosen)
            step += 1
            tokens[:, start + step] = chosen
            stopped = (chosen[:, None] == stop_ids).any(axis=1)  # Faster than `isin`.
            done = done | stopped | (step >= prompt_layout.limits)
        return state._replace(step=step, done=done, sampling=sampled)

    def _padded_stop_ids(self, stop_token_ids: Sequence[int]) -> np.ndarray:
        return np.array(stop_token_ids, "int32")

    def _next_tokens(self, logits):
        if is_greedy(self.model.sampler):
            undefined = undefined_tokens(self.model)
            if undefined:
                logits[:, undefined] = -np.inf
            return logits.argmax(axis=-1)
        return as_numpy(self._choose(logits=logits))

    def _choose_tokens(self, logits):
        logits = exclude_undefined_tokens(self.model, logits)
        return next_tokens(self.model.sampler, logits)

    def _sample_tokens(self, logits, inputs, state, step):
        logits = ops.convert_to_tensor(logits)
        logits = exclude_undefined_tokens(self.model, logits)
        return sample_tokens(logits, inputs, state, step)


def uses_onnx_runtime(model: CausalLM, named_adapters: bool = False) -> bool:
    """Returns whether `OnnxTokenLoop` generates with a model.

    Args:
        model: `OpenLlamaCausalLM`.
        named_adapters: whether its adapters are exchanged during generation.

    Returns:
        True for a model on a CPU with a quantized projection, or in bfloat16 where
        there is a compiled product for it. False, with a warning if it is quantized,
        if ONNX Runtime does not support the model.
    """
    quantized = [layer for layer in flatten_layers(model) if is_quantized(layer)]
    # First: the matrices of another device would be copied to the host.
    if not (quantized or _is_in_bfloat16(model)) or not runs_on_one_cpu(model.backbone):
        return False
    if not quantized:
        return not named_adapters and not _reasons(model) and bool(native_library())
    reasons = _reasons(model)
    matrices = [layer.quantized_matrix() for layer in quantized]
    if any(runtime_group_size(matrix) is None for matrix in matrices):
        reasons.append("groups whose size is not a multiple of 16")
    if reasons:
        warnings.warn(
            f"ONNX Runtime does not support {' and '.join(reasons)}. This quantized "
            f"model generates on {keras.config.backend()}, which is slower.",
            stacklevel=2,
        )
    return not reasons


def _is_in_bfloat16(model):
    # TensorFlow copies weights to give them to ONNX Runtime.
    if keras.config.backend() == "tensorflow" or is_float8(model):
        return False
    layers = [x for x in flatten_layers(model) if isinstance(x, Projection)]
    embedding = embeddings_variable(model.backbone.token_embedding)
    matrices = [embedding, *float_matrices(model)]
    return (
        embedding.dtype == "bfloat16"
        and len(matrices) == len(layers) + 1
        and len({str(stored_value(matrix).device) for matrix in matrices}) == 1
    )


def _reasons(model):
    """What of a model ONNX Runtime does not support."""
    reasons = []
    if model.backbone.rotary_embedding.is_dynamic:
        reasons.append("dynamic RoPE scaling")
    if model.kv_cache_dtype is not None and not native_library():
        reasons.append(f"kv_cache_dtype={model.kv_cache_dtype!r}")
    if model.backbone.token_embedding.lora_enabled:
        reasons.append("an embedding with adapters")
    return reasons
