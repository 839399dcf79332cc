"""From prompts to new tokens, whichever loop the sampler needs."""

import keras

from keras_openllama.generation.beam_search import SearchLoop, steers_search
from keras_openllama.generation.token_loop import TokenLoop, choose_tokens

if keras.config.backend() == "torch":
    from keras_openllama.generation.token_loop_torch import TorchTokenLoop as TokenLoop


def loop_for(model):
    """The loop that a model's sampler needs; it compiles its programs at first use."""
    return (SearchLoop if steers_search(model.sampler) else TokenLoop)(model)


def new_tokens(loop, prompts, limits, stop_token_ids, stride=None):
    """Runs a loop on prompts and yields the tokens that it adds.

    Args:
        loop: what `loop_for` returned.
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
        yield from choose_tokens(loop, prompts, limits, stop_token_ids, stride)
