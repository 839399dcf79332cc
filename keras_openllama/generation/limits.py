"""How many tokens are added to each prompt, and which ids end it."""

import dataclasses

import numpy as np

from keras_openllama.text.token_arrays import as_token_ids


@dataclasses.dataclass(frozen=True)
class GenerationLimits:
    """Where generation ends; see `OpenLlamaCausalLM.generate`."""

    max_length: int | None = None
    max_new_tokens: int | None = None
    stop_token_ids: object = "auto"
    stop: object = None

    def resolve(self, model, rows, default_length):
        """The tokens to add to each prompt at most, and the ids that end one.

        Raises:
            ValueError: for limits that are malformed or beyond the context.
        """
        tokenizer = getattr(model.preprocessor, "tokenizer", None)
        limits = new_token_limits(
            [len(row) for row in rows],
            self.max_length,
            self.max_new_tokens,
            default_length,
            model.backbone.context_length,
        )
        size = model.backbone.vocabulary_size
        return limits, resolve_stop_ids(self.stop_token_ids, tokenizer, size)


def new_token_limits(lengths, max_length, max_new_tokens, default_length, context):
    """How many tokens may be added to each prompt.

    Args:
        lengths: list of int, tokens of the prompts.
        max_length, max_new_tokens: see `OpenLlamaCausalLM.generate`.
        default_length: int, what `max_length` is where neither is given.
        context: int, the longest sequence the model can take.

    Raises:
        ValueError: for limits that are no positive integers, a prompt longer than
            `max_length` or the context, or limits beyond the context.
    """
    for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if value is not None and not (is_int and value >= 1):
            raise ValueError(
                f"`{name}` must be an integer of at least 1, or None. "
                f"Received: {name}={value!r}"
            )
    longest = max(lengths)
    remedy = (
        "Shorten the prompt, or load the model with `rope_scaling` to stretch its "
        "context."
    )
    if longest > context:
        raise ValueError(
            f"`inputs` has a prompt of {longest} tokens, and the context of this model "
            f"is {context} tokens. {remedy}"
        )
    if max_length is None and max_new_tokens is None:
        max_length = min(default_length, context)
    if max_length is not None:
        if longest > max_length:
            raise ValueError(
                f"`inputs` has a prompt of {longest} tokens, more than max_length="
                f"{max_length}. Raise `max_length` or shorten the prompt."
            )
        limits = [max_length - length for length in lengths]
        if max_new_tokens is not None:
            limits = [min(limit, max_new_tokens) for limit in limits]
    else:
        limits = [max_new_tokens] * len(lengths)
    needed = max(n + limit for n, limit in zip(lengths, limits, strict=True))
    if needed > context:
        name = "max_new_tokens" if max_length is None else "max_length"
        value = max_new_tokens if max_length is None else max_length
        raise ValueError(
            f"`{name}`={value} asks for sequences of up to {needed} tokens, and the "
            f"context of this model is {context} tokens. Lower it. {remedy}"
        )
    return limits


def resolve_stop_ids(stop_token_ids, tokenizer, vocabulary_size):
    """`stop_token_ids` of `OpenLlamaCausalLM.generate` as a list of int.

    Args:
        stop_token_ids: list of ids, `None`, or `"auto"` for the tokenizer's end token.
        tokenizer: `OpenLlamaTokenizer`, or `None` where the model has none.
        vocabulary_size: int.

    Raises:
        ValueError: for anything else, or ids outside the vocabulary.
    """
    if stop_token_ids is None:
        return []
    if isinstance(stop_token_ids, str):
        if stop_token_ids != "auto" or tokenizer is None:
            raise ValueError(
                "`stop_token_ids` must be a list of ids, None, or, with a "
                '`preprocessor`, "auto". Received: stop_token_ids='
                f"{stop_token_ids!r}, tokenizer={tokenizer}"
            )
        return [tokenizer.end_token_id]
    ids = [list(stop_token_ids)]
    return as_token_ids(ids, vocabulary_size, "stop_token_ids")[0].tolist()
