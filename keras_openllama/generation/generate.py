"""`generate` and `stream`: from what a user passes to new text or token ids."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_openllama.generation.beam_search import SearchLoop
from keras_openllama.generation.sampling import is_search_sampler
from keras_openllama.generation.stop_strings import (
    TOKENS_BETWEEN_STOP_CHECKS,
    StopStringDecoder,
    decode_until_stopped,
    normalize_stop_strings,
)
from keras_openllama.generation.token_loop import TokenLoop
from keras_openllama.generation.token_loop_onnx import (
    OnnxTokenLoop,
    uses_onnx_runtime,
)
from keras_openllama.text.inputs import (
    Batches,
    ChatPrompts,
    Texts,
    TokenArrays,
    normalize_prompts,
)
from keras_openllama.text.token_arrays import pad_sequences

if keras.config.backend() == "torch":
    from keras_openllama.generation.token_loop_torch import TorchTokenLoop as TokenLoop

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM
    from keras_openllama.generation.limits import GenerationLimits


def generate(
    model: CausalLM, inputs: Any, limits: GenerationLimits, strip_prompt: bool = False
) -> str | list[str] | dict[str, np.ndarray]:
    """Implements `OpenLlamaCausalLM.generate`.

    Args:
        model: `OpenLlamaCausalLM`.
        inputs: see `OpenLlamaCausalLM.generate`.
        limits: where generation ends.
        strip_prompt: see `OpenLlamaCausalLM.generate`.

    Returns:
        Text or arrays, see `OpenLlamaCausalLM.generate`.

    Raises:
        ValueError: for malformed inputs or limits.

    Example:
        >>> from keras_openllama.generation.limits import GenerationLimits
        >>> generate(lm, "The sea", GenerationLimits(max_new_tokens=2))
        'The sea shines'
    """
    size = model.backbone.vocabulary_size
    prompts = normalize_prompts(inputs, size, model.preprocessor is not None)
    if isinstance(prompts, TokenArrays):
        return _generate_arrays(model, prompts, limits, strip_prompt)
    if isinstance(prompts, Batches):
        results = []
        for batch in prompts.batches:
            results += _generate_texts(model, batch, limits, strip_prompt)
        return results
    results = _generate_texts(model, prompts, limits, strip_prompt)
    return results if prompts.batched else results[0]


def _generate_texts(
    model: CausalLM,
    prompts: Texts | ChatPrompts,
    limits: GenerationLimits,
    strip_prompt: bool,
) -> list[str]:
    """Generates text for each prompt. Replies to chats never include the prompt."""
    prompt_ids = _prompt_ids(model, prompts)
    is_chat = isinstance(prompts, ChatPrompts)
    prefixes = [""] * len(prompt_ids) if is_chat else prompts.texts
    stop_strings = normalize_stop_strings(limits.stop)
    stride = TOKENS_BETWEEN_STOP_CHECKS if stop_strings else None
    decoders, steps = _start_decoding(model, prompt_ids, limits, stop_strings, stride)
    for _ in steps:
        pass
    return [
        decoder.text if strip_prompt else prefix + decoder.text
        for prefix, decoder in zip(prefixes, decoders, strict=True)
    ]


def _prompt_ids(model: CausalLM, prompts: Texts | ChatPrompts) -> list[list[int]]:
    if isinstance(prompts, ChatPrompts):
        chats = zip(prompts.chats, prompts.tools, strict=True)
        return [model.preprocessor.chat_ids(*chat) for chat in chats]
    return model.preprocessor.prompt_ids(prompts.texts, name="inputs")


def stream(
    model: CausalLM, inputs: str | dict[str, Any], limits: GenerationLimits
) -> Iterator[str]:
    """Implements `OpenLlamaCausalLM.stream`; checks the arguments immediately.

    Args:
        model: `OpenLlamaCausalLM`.
        inputs: a text or a chat.
        limits: where generation ends.

    Returns:
        An iterator over pieces of the new text.

    Raises:
        ValueError: without a preprocessor, for several prompts, an empty prompt, or
            malformed limits.

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
    if not isinstance(prompts, (Texts, ChatPrompts)) or prompts.batched:
        raise ValueError(
            "`stream` takes one text or one chat. Use `generate` for several prompts "
            f"or for token ids. Received: inputs of type {type(inputs).__name__}"
        )
    prompt_ids = _prompt_ids(model, prompts)
    stop_strings = normalize_stop_strings(limits.stop)
    (decoder,), steps = _start_decoding(
        model, prompt_ids, limits, stop_strings, stride=1
    )

    def pieces():
        yielded = 0
        for _ in steps:
            if len(decoder.text) > yielded:
                yield decoder.text[yielded:]
                yielded = len(decoder.text)

    return pieces()


def _start_decoding(
    model: CausalLM,
    prompt_ids: list[list[int]],
    limits: GenerationLimits,
    stop_strings: tuple[str, ...],
    stride: int | None,
) -> tuple[list[StopStringDecoder], Iterator[None]]:
    """Returns a decoder for each prompt, and an iterator that advances them."""
    default_length = model.preprocessor.sequence_length
    token_limits, stop_ids = limits.resolve(model, prompt_ids, default_length)
    tokenizer = model.preprocessor.tokenizer
    decoders = [StopStringDecoder(tokenizer, ids, stop_strings) for ids in prompt_ids]
    loop = model.make_generate_function()
    # Nothing is compiled before the iterator is advanced.
    new_tokens = loop.generate(prompt_ids, token_limits, stop_ids, stride)
    return decoders, decode_until_stopped(decoders, new_tokens)


def _generate_arrays(
    model: CausalLM,
    prompts: TokenArrays,
    limits: GenerationLimits,
    strip_prompt: bool,
) -> dict[str, np.ndarray]:
    if limits.stop is not None:
        raise ValueError(
            "`stop` is supported for text only, but the inputs are token ids. Use "
            f"`stop_token_ids` instead. Received: stop={limits.stop!r}"
        )
    prompt_ids, width = prompts.sequences, prompts.width
    token_limits, stop_ids = limits.resolve(model, prompt_ids, width)
    loop = model.make_generate_function()
    (outputs,) = loop.generate(prompt_ids, token_limits, stop_ids)
    longest = max(
        len(ids) + limit for ids, limit in zip(prompt_ids, token_limits, strict=True)
    )
    if not strip_prompt:
        outputs = [ids + new for ids, new in zip(prompt_ids, outputs, strict=True)]
    return pad_sequences(outputs, max(width, longest))


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
