"""The walk from what a user passes to `generate` or `stream` to new text or ids."""

import keras

from keras_openllama.generation.beam_search import SearchLoop, is_search_sampler
from keras_openllama.generation.stop_strings import (
    TOKENS_BETWEEN_STOP_CHECKS,
    StopStringDecoder,
    decode_until_stopped,
    normalize_stop_strings,
)
from keras_openllama.generation.token_loop import TokenLoop, sample_tokens
from keras_openllama.text.inputs import (
    Batches,
    Chats,
    TokenArrays,
    normalize_prompts,
    normalize_texts,
)
from keras_openllama.text.token_arrays import pad_sequences

if keras.config.backend() == "torch":
    from keras_openllama.generation.token_loop_torch import TorchTokenLoop as TokenLoop


def generate(model, inputs, limits, strip_prompt=False):
    """What `OpenLlamaCausalLM.generate` returns.

    Args:
        model: `OpenLlamaCausalLM`.
        inputs, strip_prompt: see there.
        limits: `limits.GenerationLimits`.
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


def _generate_texts(model, prompts, limits, strip_prompt):
    """New text for each of `Texts` or `Chats`; nothing stands before a chat's reply."""
    preprocessor = model.preprocessor
    if isinstance(prompts, Chats):
        rows = [preprocessor.chat_ids(messages) for messages in prompts.chats]
        texts = [""] * len(rows)
    else:
        rows, texts = preprocessor.prompt_ids(prompts.texts), prompts.texts
    stops = normalize_stop_strings(limits.stop)
    stride = TOKENS_BETWEEN_STOP_CHECKS if stops else None
    continuations, steps = _start(model, rows, limits, stops, stride)
    for _ in steps:
        pass
    return [
        row.text if strip_prompt else text + row.text
        for text, row in zip(texts, continuations, strict=True)
    ]


def stream(model, text, limits):
    """What `OpenLlamaCausalLM.stream` returns; checks the request at once.

    Args:
        model: `OpenLlamaCausalLM` with a preprocessor.
        text: string.
        limits: `limits.GenerationLimits`.
    """
    rows = model.preprocessor.prompt_ids(normalize_texts(text).texts)
    stops = normalize_stop_strings(limits.stop)
    (row,), steps = _start(model, rows, limits, stops, stride=1)

    def pieces():
        shown = 0
        for _ in steps:
            if len(row.text) > shown:
                yield row.text[shown:]
                shown = len(row.text)

    return pieces()


def _start(model, rows, limits, stops, stride):
    """The continuations of prompts, and an iterator that lets them grow."""
    length = model.preprocessor.sequence_length
    numbers, end_ids = limits.resolve(model, rows, length)
    tokenizer = model.preprocessor.tokenizer
    continuations = [StopStringDecoder(tokenizer, row, stops) for row in rows]
    # The program is made when the first token is asked for.
    new = _generate_tokens(model, rows, numbers, end_ids, stride)
    return continuations, decode_until_stopped(continuations, new)


def _generate_arrays(model, prompts, limits, strip_prompt):
    if limits.stop is not None:
        raise ValueError(
            "`stop` finds strings in text, and here are token ids. Give "
            f"`stop_token_ids` instead. Received: stop={limits.stop!r}"
        )
    rows, width = prompts.sequences, prompts.width
    numbers, end_ids = limits.resolve(model, rows, width)
    (new,) = _generate_tokens(model, rows, numbers, end_ids, None)
    longest = max(len(r) + n for r, n in zip(rows, numbers, strict=True))
    if not strip_prompt:
        new = [prompt + ids for prompt, ids in zip(rows, new, strict=True)]
    return pad_sequences(new, max(width, longest))


def _generate_tokens(model, rows, limits, stop_token_ids, stride):
    loop = model.make_generate_function()
    yield from generate_tokens(loop, rows, limits, stop_token_ids, stride)


def make_token_loop(model):
    """The loop that a model's sampler needs; it compiles its programs at first use."""
    return (SearchLoop if is_search_sampler(model.sampler) else TokenLoop)(model)


def generate_tokens(loop, prompts, limits, stop_token_ids, stride=None):
    """Runs a loop on prompts and yields the tokens that it adds.

    Args:
        loop: what `make_token_loop` returned.
        prompts: list of lists of int, one per row, none empty.
        limits: list of int, the tokens to add to each row at most.
        stop_token_ids: list of int; a row ends with the first of them.
        stride: int, tokens between two yields; `None` yields once, at the end.

    Yields:
        For each row the list of its new tokens since the last time, the stop id
        included.
    """
    if max(limits) == 0:
        yield [[] for _ in prompts]
    elif isinstance(loop, SearchLoop):
        # One by one: KerasHub's searches go on with a finished row until the others
        # are finished too, which changes its result.
        yield [
            loop.search(prompt, limit, stop_token_ids) if limit else []
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
    else:
        yield from sample_tokens(loop, prompts, limits, stop_token_ids, stride)
