"""Continuations of prompts as a task of lm-evaluation-harness asks for them."""

from typing import NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from keras_openllama.generation import generate
from keras_openllama.generation.stop_strings import (
    TOKENS_BETWEEN_STOP_CHECKS,
    decode_until_stopped,
)


class Options(NamedTuple):
    """What a task says of its continuations.

    Attributes:
        max_new_tokens: int.
        stop: tuple of strings that end the text, and are no part of it.
        sampler: dict of arguments of `samplers.sampling`, to continue prompts within.
    """

    max_new_tokens: int
    stop: tuple
    sampler: dict

    @classmethod
    def of(cls, gen_kwargs, max_new_tokens):
        """From the harness's dict.

        Args:
            gen_kwargs: dict, `generation_kwargs` of a task.
            max_new_tokens: int, where it names no number.

        Raises:
            ValueError: for what our generation does not know.
        """
        options = normalize_gen_kwargs(gen_kwargs, max_new_tokens)
        limit, stop = options.pop("max_gen_toks"), options.pop("until", None) or ()
        if limit < 1:
            raise ValueError(
                f"A task asks for {limit} new tokens: `max_gen_toks` is 1 on."
            )
        # Normalising gives no temperature where there is none, and 0 without sampling.
        if options.pop("do_sample") and not options.get("temperature"):
            options["temperature"] = 1.0
        sampler = {
            name: options.pop(name)
            for name in ("temperature", "top_p", "top_k", "seed")
            if name in options
        }
        if options:
            raise ValueError(
                "`generation_kwargs` may have until, max_gen_toks, do_sample, "
                f"temperature, top_p, top_k and seed. Received: {sorted(options)}"
            )
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        return cls(limit, tuple(filter(None, stop)), sampler)


def continuations(lm, prompts, options):
    """Continues prompts of token ids.

    Args:
        lm: `OpenLlamaCausalLM`.
        prompts: list of lists of int.
        options: `Options`.

    Returns:
        List of strings: the new text up to the first stop string, as the new tokens
        alone read, so without the space that begins a text.
    """
    tokenizer = lm.preprocessor.tokenizer
    rows = [_TaskText(tokenizer, options.stop) for _ in prompts]
    limits = [options.max_new_tokens] * len(prompts)
    stride = TOKENS_BETWEEN_STOP_CHECKS if options.stop else None
    loop, end = lm.make_generate_function(), [tokenizer.end_token_id]
    new = generate.generate_tokens(loop, prompts, limits, end, stride)
    for _ in decode_until_stopped(rows, new):
        pass
    stop = list(options.stop)
    return [postprocess_generated_text(row.text, stop, None) for row in rows]


class _TaskText:
    """The text of new tokens alone, as the harness reads them: all decoded at once."""

    def __init__(self, tokenizer, stops):
        self._tokenizer, self._stops = tokenizer, stops
        self._ids, self.text, self.stopped = [], "", False

    def push(self, ids):
        end = self._tokenizer.end_token_id
        self._ids += ids
        ended = end in self._ids
        before = self._ids[: self._ids.index(end)] if ended else self._ids
        self.text = self._tokenizer.detokenize(before)
        self.stopped = ended or any(stop in self.text for stop in self._stops)

    def flush(self):
        """Nothing is held back: `text` is always that of all tokens."""
