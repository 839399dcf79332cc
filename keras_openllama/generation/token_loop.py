"""The generation loop that samples one token per step.

The tokens of each prompt except the last, its prefix, are written to the KV cache first
(prefill). Each decoding step then feeds one token per sequence, beginning with the last
token of the prompt, and samples the next one. `kv_cache.py` says which columns of the
cache they use.

With XLA, prefill and decoding are one compiled program for each batch size and number
of columns. Both are rounded up to few different values, and prefixes are fed in as many
chunks as needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from keras_openllama.backend.arrays import to_numpy
from keras_openllama.backend.jit import compile_function, while_loop
from keras_openllama.generation.kv_cache import (
    PromptLayout,
    forward_with_cache,
    init_cache,
    pad_prompts,
    padded_batch_size,
    padded_cache_length,
)
from keras_openllama.generation.new_tokens import NewTokens, cut_at_stop_id
from keras_openllama.generation.prefill_chunks import first_chunks, prefill_chunks
from keras_openllama.generation.sampling.samplers import (
    exclude_undefined_tokens,
    next_tokens,
)
from keras_openllama.generation.sampling.state import (
    BatchSampling,
    SamplingInputs,
    SamplingState,
    recorded_logprobs,
    sample_tokens,
    start_sampling,
)
from keras_openllama.generation.sharding import (
    constrain_sharding,
    device_platform,
    model_device,
    state_shardings,
    to_device,
)
from keras_openllama.text.token_arrays import PAD_TOKEN_ID
from keras_openllama.utils.types import Tensor

if keras.config.backend() == "jax":
    from keras_openllama.layers import attention_kernels

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import Backbone, CausalLM

# Heuristic: stop ids are padded to a multiple of 4, so that few shapes are compiled.
STOP_IDS_MULTIPLE = 4


def is_any_of(tokens: Tensor, stop_ids: Tensor) -> Tensor:
    """Returns which tokens are among the stop ids.

    Args:
        tokens: int `(batch,)`.
        stop_ids: int `(number,)`.

    Returns:
        bool `(batch,)`.

    Example:
        >>> is_any_of(np.array([5, 2]), np.array([2, 13]))
        Array([False,  True], dtype=bool)
    """
    return ops.any(ops.equal(tokens[:, None], stop_ids), axis=-1)


class LoopState(NamedTuple):
    """The state of a `TokenLoop`, which stays on the device.

    Attributes:
        tokens: int32 `(batch, columns)`, the prompts and the new tokens.
        num_prefilled: int scalar, how many columns of the prefixes are in the cache.
        step: int scalar, the number of generated tokens per sequence.
        done: bool `(batch,)`, which sequences have ended.
        cache: the KV cache, see `kv_cache.py`.
        sampling: the state of sampling with a `SamplingConfig`; `()` with the sampler
            of the model.
    """

    tokens: Tensor
    num_prefilled: Tensor | int
    step: Tensor | int
    done: Tensor
    cache: Any = ()
    sampling: SamplingState | tuple[()] = ()


class TokenLoop:
    """Generates one token per step: greedy, random, top-k, top-p and similar sampling.

    `generate` runs the loop on prompts. In it, `start` puts the prompts on the device,
    and `advance(state, prompt_layout, stop_ids, until, sampling)` returns the state
    after prefill, if that is not done yet, and after generation up to the step `until`,
    or until all sequences have ended.

    Args:
        model: `OpenLlamaCausalLM`.

    Example:
        >>> prompt = [1, 357, 1239]  # "The sea"
        >>> for [new_tokens] in TokenLoop(lm).generate([prompt], [3], [2], stride=2):
        ...     print(lm.preprocessor.tokenizer.detokenize(new_tokens))
        shines
        ,
    """

    def __init__(self, model: CausalLM):
        self.model = model
        self.advance = compile_function(self._advance, model, donate=("state",))

    def generate(
        self,
        prompts: list[list[int]],
        limits: list[int],
        stop_token_ids: Sequence[int],
        stride: int | None = None,
    ) -> Iterator[list[list[int]]]:
        """Yields the new tokens of prompts while they are generated.

        Args:
            prompts: token ids of each prompt, at least one per prompt.
            limits: maximum number of new tokens for each prompt.
            stop_token_ids: ids that end a sequence.
            stride: tokens per sequence between two yields; `None` yields once, at the
                end.

        Yields:
            For each prompt, its new tokens since the previous yield, including the stop
            id.
        """
        for new in self.generate_with_logprobs(prompts, limits, stop_token_ids, stride):
            yield [tokens.ids for tokens in new]

    def generate_with_logprobs(
        self,
        prompts: list[list[int]],
        limits: list[int],
        stop_token_ids: Sequence[int],
        stride: int | None = None,
        sampling: BatchSampling | None = None,
    ) -> Iterator[list[NewTokens]]:
        """`generate` with log-probabilities.

        `sampling` says how to sample each sequence; `None` uses the sampler of the
        model, without log-probabilities. The other arguments are those of `generate`.
        """
        if max(limits) == 0:
            yield [NewTokens([]) for _ in prompts]
            return
        state, prompt_layout = self.start(prompts, limits)
        inputs, number = {}, None
        if sampling is not None:
            inputs["sampling"], sampling_state = self._on_device(
                start_sampling(
                    sampling,
                    prompts,
                    state.tokens.shape,
                    self.model.backbone.vocabulary_size,
                    stop_token_ids,
                )
            )
            state = state._replace(sampling=sampling_state)
            number = sampling.logprobs
        stop_ids = self._padded_stop_ids(stop_token_ids)
        first = max(map(len, prompts))
        seen = 0
        running = [limit > 0 for limit in limits]
        while any(running):
            until = min(max(limits), seen + (stride or max(limits)))
            state = self.advance(
                state=state,
                prompt_layout=prompt_layout,
                stop_ids=stop_ids,
                until=np.int32(until),
                **inputs,
            )
            step = int(state.step)
            tokens = to_numpy(state.tokens)[: len(prompts)]
            new = tokens[:, first + seen : first + step].tolist()
            with_logprobs = recorded_logprobs(state.sampling, number)
            for i, limit in enumerate(limits):
                ids = cut_at_stop_id(new[i][: max(0, limit - seen)], stop_token_ids)
                new[i] = with_logprobs(i, seen, ids if running[i] else [])
                stopped = bool(ids) and ids[-1] in stop_token_ids
                running[i] = running[i] and not stopped and step < limit
            yield new
            seen = step

    def _on_device(self, arrays):
        replicated = state_shardings(self.model.backbone)[1]
        return tree.map_structure(lambda x: to_device(x, replicated), arrays)

    def _padded_stop_ids(self, stop_token_ids):
        multiples = max(1, -(-len(stop_token_ids) // STOP_IDS_MULTIPLE))
        padded = np.full(multiples * STOP_IDS_MULTIPLE, -1, "int32")  # No token is -1.
        padded[: len(stop_token_ids)] = stop_token_ids
        return self._on_device(padded)

    def start(
        self, prompts: list[list[int]], limits: list[int]
    ) -> tuple[LoopState, PromptLayout]:
        """Creates the initial state.

        Args:
            prompts: token ids of each prompt, at least one per prompt.
            limits: maximum number of new tokens for each prompt.

        Returns:
            The state, and where the prompts are in its columns.
        """
        longest = max(map(len, prompts))
        columns = padded_cache_length(longest + max(limits))
        filler = padded_batch_size(len(prompts)) - len(prompts)
        tokens, prompt_layout = pad_prompts(
            prompts + [[PAD_TOKEN_ID]] * filler, limits + [0] * filler, columns
        )
        state = LoopState(
            tokens=tokens,
            num_prefilled=np.int32(0),
            step=np.int32(0),
            done=prompt_layout.limits == 0,
        )
        state, prompt_layout = self._on_device((state, prompt_layout))
        cache = init_cache(
            *(self.model.backbone, len(prompt_layout.limits), columns),
            self.model.kv_cache_dtype,
        )
        return state._replace(cache=cache), prompt_layout

    def _advance(self, state, prompt_layout, stop_ids, until, sampling=()):
        state = self._with_sharding(state)
        # On TensorFlow, chunk sizes were measured on CPUs only.
        on_jax = keras.config.backend() == "jax"
        platform = device_platform(self.model.backbone) if on_jax else "cpu"
        attention = prefill_attention(self.model.backbone)
        chunks = prefill_chunks(platform, *state.tokens.shape)
        if attention is not None:
            sizes = first_chunks(*state.tokens.shape)
            state = self._prefill_first(state, prompt_layout, sizes, attention)
            fits = sizes[-1] == state.tokens.shape[1]
            chunks = [] if fits else sorted({256, sizes[-1]}, reverse=True)
        for chunk in chunks:
            state = self._prefill(
                state, prompt_layout, chunk, is_last=chunk == chunks[-1]
            )

        def is_running(state):
            return ops.logical_and(
                state.step < until, ops.logical_not(ops.all(state.done))
            )

        def step(state):
            column = prompt_layout.start + state.step
            inputs = ops.take(state.tokens, column, axis=1)[:, None]
            hidden, cache = forward_with_cache(
                self.model.backbone, inputs, prompt_layout, state.cache, column
            )
            logits = self.model.lm_head(hidden)[:, 0]
            return self.sample_next(
                state._replace(cache=cache), logits, prompt_layout, stop_ids, sampling
            )

        return self._with_sharding(while_loop(self.model, is_running, step, state))

    def _with_sharding(self, state):
        cache_sharding, replicated = state_shardings(self.model.backbone)
        cache = constrain_sharding(state.cache, cache_sharding)
        rest = constrain_sharding(state._replace(cache=()), replicated)
        return rest._replace(cache=cache)

    def _prefill(self, state, prompt_layout, chunk, is_last):
        """Feeds the prefixes in chunks; the last chunk may extend beyond their end."""
        backbone, overshoot = self.model.backbone, 0 if is_last else chunk - 1

        def is_running(state):
            return state.num_prefilled + overshoot < prompt_layout.start

        def feed_chunk(state):
            column = state.num_prefilled
            shape = (state.tokens.shape[0], chunk)
            tokens = ops.slice(state.tokens, (0, column), shape)
            _, cache = forward_with_cache(
                backbone, tokens, prompt_layout, state.cache, column
            )
            return state._replace(cache=cache, num_prefilled=column + chunk)

        return while_loop(self.model, is_running, feed_chunk, state)

    def _prefill_first(self, state, prompt_layout, sizes, attention):
        """Feeds the first chunk, which attends to itself; it may exceed the prefixes.

        A loop, which runs once or not at all, updates the cache in place.
        """
        start = prompt_layout.start
        for smaller, size in zip([0, *sizes], sizes, strict=False):

            def is_next(state, smaller=smaller, size=size):
                fits = start <= size if size < sizes[-1] else True
                is_first = ops.equal(state.num_prefilled, 0)
                return ops.logical_and(is_first, ops.logical_and(start > smaller, fits))

            def feed_chunk(state, size=size):
                _, cache = forward_with_cache(
                    *(self.model.backbone, state.tokens[:, :size], prompt_layout),
                    *(state.cache, np.int32(0), attention),
                )
                return state._replace(cache=cache, num_prefilled=np.int32(size))

            state = while_loop(self.model, is_next, feed_chunk, state)
        return state

    def sample_next(
        self,
        state: LoopState,
        logits: Tensor,
        prompt_layout: PromptLayout,
        stop_ids: Tensor,
        sampling: SamplingInputs | tuple[()] = (),
    ) -> LoopState:
        """Samples the next token of each sequence and appends it.

        Args:
            state: the state of the loop.
            logits: `(batch, vocabulary_size)`.
            prompt_layout: where the prompts are.
            stop_ids: int `(number,)`, padded with -1.
            sampling: inputs of sampling; `()` uses the sampler of the model.

        Returns:
            The state after the step.
        """
        logits = ops.cast(logits, "float32")
        logits = exclude_undefined_tokens(self.model, logits)
        if sampling:
            token, sampled = sample_tokens(logits, sampling, state.sampling, state.step)
            state = state._replace(sampling=sampled)
        else:
            token = next_tokens(self.model.sampler, logits)
        token = ops.where(state.done, PAD_TOKEN_ID, ops.cast(token, "int32"))
        step = state.step + 1
        done = ops.logical_or(is_any_of(token, stop_ids), step >= prompt_layout.limits)
        column = prompt_layout.start + step
        return state._replace(
            tokens=ops.slice_update(state.tokens, (0, column), token[:, None]),
            step=step,
            done=ops.logical_or(state.done, done),
        )


def prefill_attention(backbone: Backbone) -> Callable[..., Tensor] | None:
    """Selects the attention of the first chunk of prompts to itself.

    Args:
        backbone: `OpenLlamaBackbone`.

    Returns:
        See `attention_kernels.select_prefill_attention`; `None` on a mesh, too, over
        which XLA cannot partition the kernels, and on other backends than JAX.
    """
    if keras.config.backend() != "jax" or state_shardings(backbone)[0] is not None:
        return None
    return attention_kernels.select_prefill_attention(model_device(backbone))
