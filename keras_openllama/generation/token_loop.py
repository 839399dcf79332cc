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
from keras_openllama.generation.sampling import exclude_undefined_tokens, next_tokens
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

# Heuristics: most columns, and tokens of the whole batch, of the first chunk on a GPU.
# The matrix products of a chunk then take far longer than reading the weights.
FIRST_CHUNK, FIRST_CHUNK_TOKENS = 2048, 16384
# Heuristic: stop ids are padded to a multiple of 4, so that few shapes are compiled.
STOP_IDS_MULTIPLE = 4


def prefill_chunks(platform: str, batch: int, columns: int) -> list[int]:
    """Returns the sizes of the chunks in which prefixes are written to the cache.

    On a CPU, chunks of 256 tokens are near the peak rate of matrix products, and a
    chunk of 32 takes about as long as two decoding steps. An accelerator reads the
    weights in the time in which it computes about 256 tokens of the whole batch, so
    smaller chunks are not faster. Larger chunks are faster; memory for attention scores
    limits them.

    Args:
        platform: platform of the devices, such as `"cpu"`.
        batch: batch size of the program, a power of two.
        columns: columns of the cache, a power of two.

    Returns:
        Chunk sizes below `columns`, descending; `[columns]` if none is. Each divides
        `columns`.

    Example:
        >>> prefill_chunks("cpu", batch=1, columns=2048)
        [256, 32]
        >>> prefill_chunks("gpu", batch=4, columns=2048)
        [1024, 256, 64]
    """
    if platform == "cpu":
        sizes = {256, 32}
    else:
        sizes = {max(256, min(1024, 8192 // batch)), 256, max(32, 256 // batch)}
    fitting = [size for size in sizes if size < columns]
    return sorted(fitting, reverse=True) or [columns]


def first_chunks(batch: int, columns: int) -> list[int]:
    """Returns the sizes of a first chunk that attends to itself by a fused kernel.

    The program contains each size; the smallest one that holds the prefixes runs. So
    the weights are read once for most prompts.

    Args:
        batch: batch size of the program, a power of two.
        columns: columns of the cache, a power of two.

    Returns:
        Chunk sizes up to `columns`, ascending.

    Example:
        >>> first_chunks(batch=1, columns=2048), first_chunks(batch=64, columns=512)
        ([256, 1024, 2048], [256])
    """
    largest = max(256, min(FIRST_CHUNK, FIRST_CHUNK_TOKENS // batch))
    if columns <= largest:
        return sorted({min(size, columns) for size in (256, 1024, columns)})
    return sorted({256, largest})  # Longer prompts need further chunks.


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
    """

    tokens: Tensor
    num_prefilled: Tensor | int
    step: Tensor | int
    done: Tensor
    cache: Any = ()


class TokenLoop:
    """Generates one token per step: greedy, random, top-k, top-p and similar sampling.

    `generate` runs the loop on prompts. In it, `start` puts the prompts on the device,
    and `advance(state, prompt_layout, stop_ids, until)` returns the state after
    prefill, if that is not done yet, and after generation up to the step `until`, or
    until all sequences have ended.

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
        if max(limits) == 0:
            yield [[] for _ in prompts]
            return
        state, prompt_layout = self.start(prompts, limits)
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
            )
            step = int(state.step)
            tokens = to_numpy(state.tokens)[: len(prompts)]
            new = tokens[:, first + seen : first + step].tolist()
            for i, limit in enumerate(limits):
                ids = cut_at_stop_id(new[i][: max(0, limit - seen)], stop_token_ids)
                new[i] = ids if running[i] else []
                stopped = bool(ids) and ids[-1] in stop_token_ids
                running[i] = running[i] and not stopped and step < limit
            yield new
            seen = step

    def _padded_stop_ids(self, stop_token_ids):
        multiples = max(1, -(-len(stop_token_ids) // STOP_IDS_MULTIPLE))
        padded = np.full(multiples * STOP_IDS_MULTIPLE, -1, "int32")  # No token is -1.
        padded[: len(stop_token_ids)] = stop_token_ids
        return to_device(padded, state_shardings(self.model.backbone)[1])

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
        replicated = state_shardings(self.model.backbone)[1]
        state, prompt_layout = tree.map_structure(
            lambda x: to_device(x, replicated), (state, prompt_layout)
        )
        cache = init_cache(
            *(self.model.backbone, len(prompt_layout.limits), columns),
            self.model.kv_cache_dtype,
        )
        return state._replace(cache=cache), prompt_layout

    def _advance(self, state, prompt_layout, stop_ids, until):
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
                state._replace(cache=cache), logits, prompt_layout, stop_ids
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
    ) -> LoopState:
        """Samples the next token of each sequence and appends it.

        Args:
            state: the state of the loop.
            logits: `(batch, vocabulary_size)`.
            prompt_layout: where the prompts are.
            stop_ids: int `(number,)`, padded with -1.

        Returns:
            The state after the step.
        """
        logits = ops.cast(logits, "float32")
        logits = exclude_undefined_tokens(self.model, logits)
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


def cut_at_stop_id(ids: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    """Returns the tokens up to and including the first stop id.

    Args:
        ids: token ids.
        stop_token_ids: ids that end a sequence.

    Returns:
        A part of `ids`, or all of them.

    Example:
        >>> cut_at_stop_id([5, 2, 7], [2])
        [5, 2]
    """
    ends = [i + 1 for i, token_id in enumerate(ids) if token_id in stop_token_ids]
    return ids[: min(ends, default=len(ids))]
