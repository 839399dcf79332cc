"""Limits of generation: how many tokens, and which ids end a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from keras_openllama.text.token_arrays import as_unique_ids
from keras_openllama.utils.validation import check_integer

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM


class ContextLengthError(ValueError):
    """A prompt, or a prompt and the tokens to generate, exceed the context of a model.

    Args:
        message: the message.
        prompt_tokens: length of the longest prompt, in tokens.
        context: the longest supported sequence, in tokens.
    """

    def __init__(self, message: str, prompt_tokens: int, context: int) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.context = context


@dataclasses.dataclass(frozen=True)
class GenerationLimits:
    """Where generation ends.

    Attributes:
        max_length: see `OpenLlamaCausalLM.generate`, as for all attributes.
        max_new_tokens: see there.
        stop_token_ids: see there.
        stop: see there.

    Example:
        >>> limits = GenerationLimits(max_length=10)
        >>> limits.resolve(lm, [[1, 357, 1239]], default_length=256)
        ([7], [2])
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    stop_token_ids: int | Sequence[int] | str | None = "auto"
    stop: str | Sequence[str] | None = None

    def resolve(
        self, model: CausalLM, prompts: list[list[int]], default_length: int
    ) -> tuple[list[int], list[int]]:
        """Applies the limits to prompts.

        Args:
            model: `OpenLlamaCausalLM`.
            prompts: token ids of each prompt.
            default_length: `max_length` if neither limit is set.

        Returns:
            The maximum number of new tokens for each prompt, and the stop ids.

        Raises:
            ValueError: for limits that are malformed or exceed the context.
        """
        limits = new_token_limits(
            [len(prompt) for prompt in prompts],
            self.max_length,
            self.max_new_tokens,
            default_length,
            model.backbone.context_length,
        )
        size = model.backbone.vocabulary_size
        return limits, resolve_stop_ids(self.stop_token_ids, model.end_token_ids, size)


def new_token_limits(
    lengths: list[int],
    max_length: int | None,
    max_new_tokens: int | None,
    default_length: int,
    context: int,
) -> list[int]:
    """Computes how many tokens may be generated for each prompt.

    Args:
        lengths: lengths of the prompts, in tokens.
        max_length: see `OpenLlamaCausalLM.generate`.
        max_new_tokens: see `OpenLlamaCausalLM.generate`.
        default_length: `max_length` if neither limit is set.
        context: the longest supported sequence, in tokens.

    Returns:
        The maximum number of new tokens for each prompt.

    Raises:
        ValueError: for limits that are not positive integers, a prompt longer than
            `max_length` or the context, or limits beyond the context.

    Example:
        >>> new_token_limits(
        ...     [3, 10], max_length=12, max_new_tokens=4, default_length=32, context=64
        ... )
        [4, 2]
    """
    if max_length is not None:
        max_length = check_integer("max_length", max_length)
    if max_new_tokens is not None:
        max_new_tokens = check_integer("max_new_tokens", max_new_tokens)
    longest = max(lengths)
    remedy = (
        "Shorten the prompt, or load the model with `rope_scaling` to extend its "
        "context."
    )
    if longest > context:
        raise ContextLengthError(
            f"`inputs` has a prompt of {longest} tokens, but the context of this model "
            f"is {context} tokens. {remedy}",
            longest,
            context,
        )
    if max_length is None and max_new_tokens is None:
        max_length = min(default_length, context)
    if max_length is not None:
        if longest > max_length:
            raise ValueError(
                f"`inputs` has a prompt of {longest} tokens, more than max_length="
                f"{max_length}. Increase `max_length` or shorten the prompt."
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
        raise ContextLengthError(
            f"`{name}`={value} allows sequences of up to {needed} tokens, but the "
            f"context of this model is {context} tokens. Reduce it. {remedy}",
            longest,
            context,
        )
    return limits


def resolve_stop_ids(
    stop_token_ids: int | Sequence[int] | str | None,
    end_token_ids: Sequence[int],
    vocabulary_size: int,
) -> list[int]:
    """Converts `stop_token_ids` of `OpenLlamaCausalLM.generate` to a list of ids.

    Args:
        stop_token_ids: ids, `None`, or `"auto"` for the end tokens of the model.
        end_token_ids: the end tokens of the model; empty if they are unknown.
        vocabulary_size: number of tokens.

    Returns:
        The ids, possibly none.

    Raises:
        ValueError: for other values, or ids outside the vocabulary.

    Example:
        >>> resolve_stop_ids("auto", lm.end_token_ids, 3072)
        [2]
    """
    if stop_token_ids is None:
        return []
    if isinstance(stop_token_ids, str):
        if stop_token_ids != "auto" or not end_token_ids:
            raise ValueError(
                "`stop_token_ids` must be a list of ids, None, or, for a model with "
                '`end_token_ids` or a `preprocessor`, "auto". Received: '
                f"stop_token_ids={stop_token_ids!r}, end_token_ids={end_token_ids}"
            )
        return list(end_token_ids)
    return as_unique_ids(stop_token_ids, vocabulary_size, "stop_token_ids")
