"""`generate` and `stream`: from what a user passes to new text or token ids."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_openllama.generation.beam_search import SearchLoop
from keras_openllama.generation.continuous_batching.token_loop import EngineTokenLoop
from keras_openllama.generation.generation_result import (
    Generation,
    GenerationRecorder,
)
from keras_openllama.generation.new_tokens import NewTokens
from keras_openllama.generation.onnx_runtime.token_loop import (
    OnnxTokenLoop,
    uses_onnx_runtime,
)
from keras_openllama.generation.sampling.options import SamplingOptions
from keras_openllama.generation.sampling.samplers import is_search_sampler
from keras_openllama.generation.speculation import (
    generate_speculatively,
    resolve_sampling,
)
from keras_openllama.generation.stop_strings import (
    TOKENS_BETWEEN_STOP_CHECKS,
    StopStringDecoder,
    decode_until_stopped,
    normalize_stop_strings,
)
from keras_openllama.generation.token_loop import TokenLoop
from keras_openllama.text.inputs import (
    Batches,
    ChatPrompts,
    Texts,
    TokenArrays,
    normalize_prompts,
)
from keras_openllama.text.token_arrays import pad_sequences

if keras.config.backend() == "torch":
    from keras_openllama.generation.pytorch.token_loop import (
        TorchTokenLoop as TokenLoop,
    )

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM
    from keras_openllama.generation.drafting import Draft
    from keras_openllama.generation.limits import GenerationLimits
    from keras_openllama.generation.prompt_cache import PromptCache

# The sampler of the model, once for each prompt.
DEFAULT_OPTIONS = SamplingOptions()


def generate(
    model: CausalLM,
    inputs: Any,
    limits: GenerationLimits,
    strip_prompt: bool = False,
    options: SamplingOptions = DEFAULT_OPTIONS,
    draft: Draft | None = None,
    cache: PromptCache | None = None,
) -> Any:
    """Implements `OpenLlamaCausalLM.generate`.

    Args:
        model: `OpenLlamaCausalLM`.
        inputs: see `OpenLlamaCausalLM.generate`.
        limits: where generation ends.
        strip_prompt: see `OpenLlamaCausalLM.generate`.
        options: how tokens are chosen.
        draft: what proposes tokens; `None` for no speculation.
        cache: see `OpenLlamaCausalLM.generate`.

    Returns:
        Text, arrays or `Generation`s, see `OpenLlamaCausalLM.generate`.

    Raises:
        ValueError: for malformed inputs, limits or options.

    Example:
        >>> from keras_openllama.generation.limits import GenerationLimits
        >>> generate(lm, "The sea", GenerationLimits(max_new_tokens=2))
        'The sea shines'
    """
    size = model.backbone.vocabulary_size
    prompts = normalize_prompts(inputs, size, model.preprocessor is not None)
    if cache is not None and draft is not None:
        raise ValueError(
            "`draft` and `cache` cannot be combined. Pass one of them. Received: "
            f"draft={draft!r}, cache={cache!r}"
        )
    _check_cache_dtype(model, draft=draft, cache=cache)
    loop = None if cache is None else EngineTokenLoop(model, cache)
    arguments = limits, strip_prompt, options, draft, loop
    if isinstance(prompts, TokenArrays):
        return _generate_arrays(model, prompts, *arguments)
    if isinstance(prompts, Batches):
        results = []
        for batch in prompts.batches:
            results += _generate_texts(model, batch, *arguments)
        return results
    results = _generate_texts(model, prompts, *arguments)
    return results if prompts.batched else results[0]


def _check_cache_dtype(model: CausalLM, **slot_arguments: Any) -> None:
    """Checks arguments of which each needs a `SlotDecoder`."""
    given = [name for name, value in slot_arguments.items() if value is not None]
    if given and model.kv_cache_dtype is not None:
        raise ValueError(
            f"`{given[0]}` needs a KV cache in the compute dtype of the model. Call "
            f"`compile` without `kv_cache_dtype`, or omit `{given[0]}`. Received: "
            f"{given[0]}={slot_arguments[given[0]]!r} and a model that was compiled "
            f"with kv_cache_dtype={model.kv_cache_dtype!r}"
        )


def _generate_texts(
    model: CausalLM,
    prompts: Texts | ChatPrompts,
    limits: GenerationLimits,
    strip_prompt: bool,
    options: SamplingOptions,
    draft: Draft | None,
    loop: EngineTokenLoop | None,
) -> list[Any]:
    """Returns the result for each prompt. Replies to chats never include the prompt."""
    prompt_ids = _prompt_ids(model, prompts)
    is_stripped = strip_prompt or isinstance(prompts, ChatPrompts)
    prefixes = [""] * len(prompt_ids) if is_stripped else prompts.texts
    stop_strings = normalize_stop_strings(limits.stop)
    stride = TOKENS_BETWEEN_STOP_CHECKS if stop_strings else None
    recorders, steps = _start_decoding(
        model, prompt_ids, limits, stop_strings, stride, options, draft, loop
    )
    for _ in steps:
        pass
    results = [
        prefix + recorder.text if options.logprobs is None else recorder.result(prefix)
        for prefix, recorder in zip(
            _repeat(prefixes, options.num_samples), recorders, strict=True
        )
    ]
    n = options.num_samples
    if n == 1:
        return results
    return [results[start : start + n] for start in range(0, len(results), n)]


def _repeat(values, times):
    return [value for value in values for _ in range(times)]


def _prompt_ids(model: CausalLM, prompts: Texts | ChatPrompts) -> list[list[int]]:
    if isinstance(prompts, ChatPrompts):
        chats = zip(prompts.chats, prompts.tools, strict=True)
        return [model.preprocessor.chat_ids(*chat) for chat in chats]
    return model.preprocessor.prompt_ids(prompts.texts, name="inputs")


def stream(
    model: CausalLM,
    inputs: Any,
    limits: GenerationLimits,
    options: SamplingOptions = DEFAULT_OPTIONS,
    draft: Draft | None = None,
) -> Iterator[str] | Iterator[tuple[int, str]]:
    """Implements `OpenLlamaCausalLM.stream`; checks the arguments immediately.

    Args:
        model: `OpenLlamaCausalLM`.
        inputs: a text or a chat, or a list of them.
        limits: where generation ends.
        options: how tokens are chosen.
        draft: what proposes tokens; `None` for no speculation.

    Returns:
        An iterator over pieces of the new text, see `OpenLlamaCausalLM.stream`.

    Raises:
        ValueError: without a preprocessor, for token ids, an empty prompt, malformed
            limits, or several prompts with another sampler than greedy.

    Example:
        >>> from keras_openllama.generation.limits import GenerationLimits
        >>> list(stream(lm, "The sea", GenerationLimits(max_new_tokens=3)))
        [' sh', 'ines', ',']
    """
    if model.preprocessor is None:
        raise ValueError(
            "`stream` needs a `preprocessor`, and this model was built without one. "
            "Use `generate` with token ids."
        )
    prompts = normalize_prompts(inputs, model.backbone.vocabulary_size)
    if not isinstance(prompts, (Texts, ChatPrompts)):
        raise ValueError(
            "`stream` takes texts or chats. Use `generate` for token ids and for "
            f"datasets. Received: inputs of type {type(inputs).__name__}"
        )
    if prompts.batched and draft is not None:
        raise ValueError(
            "`stream` with a `draft` takes one text or one chat. Received: inputs of "
            f"type {type(inputs).__name__}"
        )
    several = inputs if prompts.batched else None
    _check_cache_dtype(model, draft=draft, inputs=several)
    prompt_ids = _prompt_ids(model, prompts)
    stop_strings = normalize_stop_strings(limits.stop)
    loop = EngineTokenLoop(model) if prompts.batched else None
    recorders, steps = _start_decoding(
        model, prompt_ids, limits, stop_strings, 1, options, draft, loop
    )

    def pieces():
        yielded = [0] * len(recorders)
        for _ in steps:
            for index, recorder in enumerate(recorders):
                if len(recorder.text) > yielded[index]:
                    piece = recorder.text[yielded[index] :]
                    yield (index, piece) if prompts.batched else piece
                    yielded[index] = len(recorder.text)

    return pieces()


def _start_decoding(
    model: CausalLM,
    prompt_ids: list[list[int]],
    limits: GenerationLimits,
    stop_strings: tuple[str, ...],
    stride: int | None,
    options: SamplingOptions,
    draft: Draft | None,
    loop: EngineTokenLoop | None,
) -> tuple[list[GenerationRecorder], Iterator[None]]:
    """Returns a recorder for each sequence, and an iterator that advances them."""
    default_length = model.preprocessor.sequence_length
    token_limits, stop_ids = limits.resolve(model, prompt_ids, default_length)
    tokenizer = model.preprocessor.tokenizer
    recorders = [
        GenerationRecorder(StopStringDecoder(tokenizer, ids, stop_strings), stop_ids)
        for ids in _repeat(prompt_ids, options.num_samples)
    ]
    inputs = (model, prompt_ids, token_limits, stop_ids)
    if draft is None:
        new_tokens = _new_tokens(
            *(*inputs, stride, options, loop), lambda index: recorders[index].stopped
        )
        return recorders, decode_until_stopped(recorders, new_tokens)
    # One after the other: a stop string ends one of them only.
    sequences = zip(recorders, _speculate(*inputs, options, draft), strict=True)
    return recorders, itertools.chain.from_iterable(
        decode_until_stopped([recorder], new) for recorder, new in sequences
    )


def _new_tokens(
    model: CausalLM,
    prompt_ids: list[list[int]],
    token_limits: list[int],
    stop_ids: list[int],
    stride: int | None,
    options: SamplingOptions,
    engine_loop: EngineTokenLoop | None = None,
    is_stopped: Callable[[int], bool] = lambda index: False,
) -> Iterator[list[NewTokens]]:
    """Yields new tokens of each sequence; compiles nothing before it is advanced."""
    loop = model.make_generate_function()
    sampling = options.resolve(model, len(prompt_ids))
    arguments = (
        _repeat(prompt_ids, options.num_samples),
        _repeat(token_limits, options.num_samples),
        stop_ids,
        stride,
    )
    if engine_loop is not None:
        return engine_loop.generate(*arguments, sampling, is_stopped)
    if sampling is not None:
        return loop.generate_with_logprobs(*arguments, sampling)
    return (
        [NewTokens(ids) for ids in new_ids] for new_ids in loop.generate(*arguments)
    )


def _speculate(
    model: CausalLM,
    prompt_ids: list[list[int]],
    token_limits: list[int],
    stop_ids: list[int],
    options: SamplingOptions,
    draft: Draft,
) -> list[Iterator[list[NewTokens]]]:
    """`_new_tokens` with a draft, of each sequence by itself."""
    return generate_speculatively(
        model,
        draft,
        _repeat(prompt_ids, options.num_samples),
        _repeat(token_limits, options.num_samples),
        stop_ids,
        resolve_sampling(model, options, len(prompt_ids)),
    )


def _generate_arrays(
    model: CausalLM,
    prompts: TokenArrays,
    limits: GenerationLimits,
    strip_prompt: bool,
    options: SamplingOptions,
    draft: Draft | None,
    loop: EngineTokenLoop | None,
) -> dict[str, np.ndarray] | list[Any]:
    if limits.stop is not None:
        raise ValueError(
            "`stop` is supported for text only, but the inputs are token ids. Use "
            f"`stop_token_ids` instead. Received: stop={limits.stop!r}"
        )
    prompt_ids, width = prompts.sequences, prompts.width
    token_limits, stop_ids = limits.resolve(model, prompt_ids, width)
    inputs = (model, prompt_ids, token_limits, stop_ids)
    if draft is None:
        (outputs,) = _new_tokens(*inputs, None, options, loop)
    else:
        sequences = _speculate(*inputs, options, draft)
        outputs = [NewTokens.joined(new for (new,) in run) for run in sequences]
    if options.logprobs is not None:
        return [_generation_of_ids(new, stop_ids) for new in outputs]
    longest = max(
        len(ids) + limit for ids, limit in zip(prompt_ids, token_limits, strict=True)
    )
    sequences = [new.ids for new in outputs]
    if not strip_prompt:
        prompt_ids = _repeat(prompt_ids, options.num_samples)
        sequences = [a + b for a, b in zip(prompt_ids, sequences, strict=True)]
    return pad_sequences(sequences, max(width, longest))


def _generation_of_ids(new: NewTokens, stop_ids: list[int]) -> Generation:
    recorder = GenerationRecorder(None, stop_ids)
    recorder.push(new)
    return recorder.result()


def make_token_loop(model: CausalLM) -> TokenLoop | SearchLoop:
    """Creates the loop that a model's sampler needs; it compiles on first use.

    Args:
        model: `OpenLlamaCausalLM`, compiled with a sampler.

    Returns:
        A `SearchLoop` for beam and contrastive search; an `OnnxTokenLoop` for a
        quantized model on a CPU; otherwise a `TokenLoop` (`TorchTokenLoop` on PyTorch).

    Example:
        >>> type(make_token_loop(lm)).__name__
        'TokenLoop'
    """
    if is_search_sampler(model.sampler):
        if uses_onnx_runtime(model):
            warnings.warn(
                "Beam and contrastive search run on the backend "
                f"({keras.config.backend()}) and not with ONNX Runtime, so that they "
                "are slow with quantized weights. Use another sampler, or a model "
                "that is not quantized.",
                stacklevel=2,
            )
        return SearchLoop(model)
    return (OnnxTokenLoop if uses_onnx_runtime(model) else TokenLoop)(model)
