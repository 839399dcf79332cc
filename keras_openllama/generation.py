"""From prompts to new tokens, whichever loop the sampler needs."""

import functools
import warnings

import keras

from keras_openllama.decoding import TokenLoop, choose_tokens
from keras_openllama.search import SearchLoop, steers_search

if keras.config.backend() == "torch":
    from keras_openllama.decoding_torch import TorchTokenLoop as TokenLoop


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
    _warn_of_slow_bfloat16(loop.model.compute_dtype)
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


@functools.cache
def _warn_of_slow_bfloat16(compute_dtype):
    """Says once that XLA's bfloat16 is slow on a CPU: 1.8 against 25 GB/s (ours)."""
    if keras.config.backend() != "jax" or compute_dtype != "bfloat16":
        return
    if keras.distribution.list_devices()[0].startswith("cpu"):
        warnings.warn(
            "bfloat16 is several times slower than float32 on a CPU with JAX. Load the "
            "model with dtype='float32', or use KERAS_BACKEND=torch for bfloat16.",
            stacklevel=6,
        )
