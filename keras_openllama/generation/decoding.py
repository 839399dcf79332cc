"""From prompts to texts or token ids: by the token loop, a draft or the engine."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_openllama.generation.generation_result import (
    Generation,
    GenerationRecorder,
)
from keras_openllama.generation.new_tokens import NewTokens
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
from keras_openllama.text.input_kinds import ChatPrompts, Texts, TokenArrays
from keras_openllama.text.token_arrays import pad_sequences

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM
    from keras_openllama.generation.continuous_batching.token_loop import (
        EngineTokenLoop,
    )
    from keras_openllama.generation.drafting import Draft
    from keras_openllama.generation.limits import GenerationLimits
    from keras_openllama.generation.sampling.options import SamplingOptions


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The arguments of `generate` or `stream`, resolved, and their use on prompts.

    Attributes:
        model: `OpenLlamaCausalLM`.
        limits: where generation ends.
        options: how tokens are chosen.
        draft: what proposes tokens; `None` for no speculation.
        engine_loop: what generates instead of the model's token loop, or `None`.

    Example:
        >>> from keras_openllama.generation.limits import GenerationLimits
        >>> from keras_openllama.generation.sampling.options import SamplingOptions
        >>> limits = GenerationLimits(max_new_tokens=2)
        >>> decoding = Decoding(lm, limits, SamplingOptions())
        >>> decoding.generate_texts(Texts(["The sea"], batched=False))
        ['The sea shines']
    """

    model: CausalLM
    limits: GenerationLimits
    options: SamplingOptions
    draft: Draft | None = None
    engine_loop: EngineTokenLoop | None = None

    def generate_texts(
        self, prompts: Texts | ChatPrompts, strip_prompt: bool = False
    ) -> list[Any]:
        """Returns the result for each prompt.

        Args:
            prompts: texts or chats; replies to chats never include the prompt.
            strip_prompt: see `OpenLlamaCausalLM.generate`.

        Returns:
            A text for each prompt, a `Generation` with `logprobs`, or a list of these
            with `num_samples`.

        Raises:
            ValueError: for an empty prompt, or limits or options that do not suit.
        """
        recorders, steps = self.start(prompts)
        for _ in steps:
            pass
        if strip_prompt or isinstance(prompts, ChatPrompts):
            prefixes = [""] * len(recorders)
        else:
            prefixes = self._for_each_sample(prompts.texts)
        results = [
            prefix + recorder.text
            if self.options.logprobs is None
            else recorder.result(prefix)
            for prefix, recorder in zip(prefixes, recorders, strict=True)
        ]
        n = self.options.num_samples
        if n == 1:
            return results
        return [results[start : start + n] for start in range(0, len(results), n)]

    def generate_arrays(
        self, prompts: TokenArrays, strip_prompt: bool = False
    ) -> dict[str, np.ndarray] | list[Generation]:
        """Returns the result for each prompt, as arrays of token ids.

        Args:
            prompts: token ids.
            strip_prompt: see `OpenLlamaCausalLM.generate`.

        Returns:
            A dict of `"token_ids"` and `"padding_mask"`; with `logprobs` a list of
            `Generation`s.

        Raises:
            ValueError: for stop strings, or limits or options that do not suit.
        """
        if self.limits.stop is not None:
            raise ValueError(
                "`stop` is supported for text only, but the inputs are token ids. Use "
                f"`stop_token_ids` instead. Received: stop={self.limits.stop!r}"
            )
        prompt_ids, width = prompts.sequences, prompts.width
        token_limits, stop_ids = self.limits.resolve(self.model, prompt_ids, width)
        inputs = (prompt_ids, token_limits, stop_ids)
        if self.draft is None:
            (outputs,) = self._new_tokens(*inputs)
        else:
            runs = self._speculate(*inputs)
            outputs = [NewTokens.joined(new for (new,) in run) for run in runs]
        if self.options.logprobs is not None:
            return [_generation_of_ids(new, stop_ids) for new in outputs]
        longest = max(
            len(ids) + limit
            for ids, limit in zip(prompt_ids, token_limits, strict=True)
        )
        sequences = [new.ids for new in outputs]
        if not strip_prompt:
            prompt_ids = self._for_each_sample(prompt_ids)
            sequences = [a + b for a, b in zip(prompt_ids, sequences, strict=True)]
        return pad_sequences(sequences, max(width, longest))

    def start(
        self, prompts: Texts | ChatPrompts, stride: int | None = None
    ) -> tuple[list[GenerationRecorder], Iterator[None]]:
        """Checks the arguments; nothing is computed before the iterator is advanced.

        Args:
            prompts: texts or chats.
            stride: number of new tokens between two steps of the iterator; `None` for
                as few steps as stop strings allow.

        Returns:
            A recorder for each sequence, and an iterator that advances them.

        Raises:
            ValueError: see `generate_texts`.
        """
        preprocessor = self.model.preprocessor
        prompt_ids = _prompt_ids(preprocessor, prompts)
        stop_strings = normalize_stop_strings(self.limits.stop)
        if stride is None and stop_strings:
            stride = TOKENS_BETWEEN_STOP_CHECKS
        token_limits, stop_ids = self.limits.resolve(
            self.model, prompt_ids, preprocessor.sequence_length
        )
        recorders = [
            GenerationRecorder(
                StopStringDecoder(preprocessor.tokenizer, ids, stop_strings), stop_ids
            )
            for ids in self._for_each_sample(prompt_ids)
        ]
        inputs = (prompt_ids, token_limits, stop_ids)
        if self.draft is None:
            new_tokens = self._new_tokens(
                *inputs, stride, lambda index: recorders[index].stopped
            )
            return recorders, decode_until_stopped(recorders, new_tokens)
        # One after the other: a stop string ends one of them only.
        runs = zip(recorders, self._speculate(*inputs), strict=True)
        return recorders, itertools.chain.from_iterable(
            decode_until_stopped([recorder], new) for recorder, new in runs
        )

    def _new_tokens(
        self,
        prompt_ids,
        token_limits,
        stop_ids,
        stride=None,
        is_stopped=lambda index: False,
    ):
        """Yields new tokens of each sequence; compiles nothing before it is advanced.

        `is_stopped` says of the number of a sequence whether it needs no further ones.
        """
        loop = self.model.make_generate_function()
        sampling = self.options.resolve(self.model, len(prompt_ids))
        arguments = (
            self._for_each_sample(prompt_ids),
            self._for_each_sample(token_limits),
            stop_ids,
            stride,
        )
        if self.engine_loop is not None:
            return self.engine_loop.generate(*arguments, sampling, is_stopped)
        if sampling is not None:
            return loop.generate_with_logprobs(*arguments, sampling)
        return (
            [NewTokens(ids) for ids in new_ids] for new_ids in loop.generate(*arguments)
        )

    def _speculate(self, prompt_ids, token_limits, stop_ids):
        """`_new_tokens` with a draft, an iterator for each sequence."""
        return generate_speculatively(
            self.model,
            self.draft,
            self._for_each_sample(prompt_ids),
            self._for_each_sample(token_limits),
            stop_ids,
            resolve_sampling(self.model, self.options, len(prompt_ids)),
        )

    def _for_each_sample(self, values):
        """Repeats the value of each prompt `num_samples` times."""
        return [value for value in values for _ in range(self.options.num_samples)]


def _prompt_ids(preprocessor, prompts):
    if isinstance(prompts, ChatPrompts):
        chats = zip(prompts.chats, prompts.tools, strict=True)
        return [preprocessor.chat_ids(*chat) for chat in chats]
    return preprocessor.prompt_ids(prompts.texts, name="inputs")


def _generation_of_ids(new: NewTokens, stop_ids: list[int]) -> Generation:
    recorder = GenerationRecorder(None, stop_ids)
    recorder.push(new)
    return recorder.result()
