"""Generates text as a task of lm-evaluation-harness requests it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from keras_openllama.generation.stop_strings import (
    TOKENS_BETWEEN_STOP_CHECKS,
    decode_until_stopped,
)

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM


class GenerationOptions(NamedTuple):
    """How a task generates text.

    Attributes:
        max_new_tokens: the maximum number of new tokens.
        stop: stop strings. They are not part of the generated text.
        sampler: arguments of `samplers.use_sampler`, inside which to generate.
    """

    max_new_tokens: int
    stop: tuple[str, ...]
    sampler: dict[str, Any]

    @classmethod
    def from_gen_kwargs(
        cls, gen_kwargs: dict[str, Any], max_new_tokens: int
    ) -> GenerationOptions:
        """Converts the harness's dict.

        Args:
            gen_kwargs: `generation_kwargs` of a task.
            max_new_tokens: the default if the task has no `max_gen_toks`.

        Returns:
            The options.

        Raises:
            ValueError: if `gen_kwargs` has unsupported keys or invalid values.

        Example:
            >>> GenerationOptions.from_gen_kwargs({"until": ["Q:"]}, 64)[:2]
            (64, ('Q:',))
        """
        options = normalize_gen_kwargs(gen_kwargs, max_new_tokens)
        limit, stop = options.pop("max_gen_toks"), options.pop("until", None) or ()
        if limit < 1:
            raise ValueError(
                f"`max_gen_toks` of a task must be positive. Received: {limit}"
            )
        # Normalization adds no temperature if there is none, and 0 without sampling.
        if options.pop("do_sample") and options.get("temperature") is None:
            options["temperature"] = 1.0
        sampler = {
            name: options.pop(name)
            for name in ("temperature", "top_p", "top_k", "seed")
            if name in options
        }
        if options:
            raise ValueError(
                "The keys of `generation_kwargs` must be among until, max_gen_toks, "
                "do_sample, temperature, top_p, top_k and seed. Received: "
                f"{sorted(options)}"
            )
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        return cls(limit, tuple(filter(None, stop)), sampler)


def generate_until(
    lm: OpenLlamaCausalLM,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
) -> list[str]:
    """Generates text from prompts of token ids.

    Args:
        lm: the model.
        prompts: token ids of each prompt.
        options: when to stop. The sampler is not applied here.

    Returns:
        The new text of each prompt up to the first stop string. Only the new tokens are
        detokenized, so that a leading space is lost, as in the harness.

    Example:
        >>> options = GenerationOptions(2, stop=(), sampler={})
        >>> [text] = generate_until(lm, [[1, 300, 301]], options)
    """
    tokenizer = lm.preprocessor.tokenizer
    limits = [options.max_new_tokens] * len(prompts)
    stride = TOKENS_BETWEEN_STOP_CHECKS if options.stop else None
    # As in the harness: the end tokens of the model, and that of the tokenizer.
    end = list(dict.fromkeys([*lm.end_token_ids, tokenizer.end_token_id]))
    texts = [_GeneratedText(tokenizer, options.stop, end) for _ in prompts]
    new = lm.make_generate_function().generate(prompts, limits, end, stride)
    for _ in decode_until_stopped(texts, new):
        pass
    stop = list(options.stop)
    return [postprocess_generated_text(text.text, stop, None) for text in texts]


class _GeneratedText:
    """The text of the new tokens, detokenized all together as the harness does."""

    def __init__(self, tokenizer, stop_strings, end_token_ids):
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        self._end_token_ids = end_token_ids
        self._ids, self.text, self.stopped = [], "", False

    def push(self, ids):
        self._ids += ids
        self.text = self._tokenizer.detokenize(self._ids)
        ended = bool(self._ids) and self._ids[-1] in self._end_token_ids
        self.stopped = ended or any(stop in self.text for stop in self._stop_strings)

    def flush(self):
        """Does nothing: `text` always includes all tokens."""
