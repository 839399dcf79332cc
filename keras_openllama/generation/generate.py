"""`OpenLlamaCausalLM.generate` and `stream`: from what a user passes to new text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import keras

from keras_openllama.backend.keras_private import flatten_layers
from keras_openllama.generation.beam_search import SearchLoop
from keras_openllama.generation.continuous_batching.token_loop import EngineTokenLoop
from keras_openllama.generation.decoding import Decoding
from keras_openllama.generation.drafting import Draft, DraftModel, PromptLookup
from keras_openllama.generation.limits import GenerationLimits
from keras_openllama.generation.onnx_runtime.token_loop import (
    OnnxTokenLoop,
    uses_onnx_runtime,
)
from keras_openllama.generation.sampling.config import SamplingConfig
from keras_openllama.generation.sampling.options import SamplingOptions
from keras_openllama.generation.sampling.samplers import is_search_sampler
from keras_openllama.generation.token_loop import TokenLoop
from keras_openllama.layers.quantizable import is_quantized
from keras_openllama.text.input_kinds import Batches, ChatPrompts, Texts, TokenArrays
from keras_openllama.text.inputs import normalize_prompts
from keras_openllama.utils.validation import raise_invalid

if keras.config.backend() == "torch":
    from keras_openllama.generation.pytorch.token_loop import (
        TorchTokenLoop as TokenLoop,
    )

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM
    from keras_openllama.generation.prompt_cache import PromptCache


# For `compile(sampler=SamplingConfig(…))` in `.keras` files.
keras.saving.register_keras_serializable("keras_openllama")(SamplingConfig)


class GenerateMixin:
    """The methods of `OpenLlamaCausalLM` that generate."""

    # Set by `compile`.
    sampler = None
    default_sampling = None
    kv_cache_dtype = None
    generate_function = None
    _loaded_draft = None

    def make_generate_function(self) -> TokenLoop | SearchLoop:
        """Returns the generation loop of the sampler, which compiles on first use.

        Returns:
            The loop that `generate` and `stream` run; the same object until `compile`
            or `quantize` changes the model.

        Raises:
            ValueError: if the model is not compiled.
            NotImplementedError: if a subclass overrides `generate_step` or
                `call_with_cache`.

        Example:
            >>> type(lm.make_generate_function()).__name__
            'TokenLoop'
        """
        if not self.compiled:
            raise ValueError(
                "You must call `compile()` before `generate`: it sets the sampler. "
                "Received: a model with compile=False"
            )
        # KerasHub resets it to None when the model or the sampler changes.
        if self.generate_function is None:
            for method in ("generate_step", "call_with_cache"):
                found = getattr(getattr(self, method), "__func__", None)
                if found is not getattr(GenerateMixin, method):  # Overridden.
                    GenerateMixin.generate_step(self)
            self.generate_function = make_token_loop(self)
        return self.generate_function

    def generate_step(self, *args: Any, **kwargs: Any) -> None:
        """Raises an error: `generate` does not have this part of KerasHub's.

        Raises:
            NotImplementedError: always; it names the alternatives.
        """
        raise NotImplementedError(
            "`generate_step` and `call_with_cache` of KerasHub's models do not exist "
            "here, and overriding them has no effect: the generation loop has a KV "
            "cache of its own, for each layer. To choose tokens differently, pass a "
            "`keras_hub.samplers.Sampler` to `compile`. For logits of given tokens, "
            "use `score`, whose `layer_intercept_fn` also reads and changes hidden "
            "states. For each new token, use `stream`."
        )

    def call_with_cache(self, *args: Any, **kwargs: Any) -> None:
        """Raises an error: `generate` does not have this part of KerasHub's.

        Raises:
            NotImplementedError: always; it names the alternatives.
        """
        self.generate_step()

    def generate(
        self,
        inputs: Any,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        stop_token_ids: int | Sequence[int] | str | None = "auto",
        stop: str | Sequence[str] | None = None,
        strip_prompt: bool = False,
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        num_samples: int = 1,
        logprobs: int | None = None,
        draft: Draft | CausalLM | str | None = None,
        cache: PromptCache | None = None,
    ) -> Any:
        """Generates text after one or more prompts.

        With greedy decoding, and with a `SamplingConfig` that has a seed, the result
        for a prompt does not depend on the other prompts of its batch, up to rounding.
        Random samplers of KerasHub draw once for the batch. Array sizes are rounded up
        internally, so that few lengths need a new compilation.

        Args:
            inputs: a string or UTF-8 bytes; a list or array of them; a
                `tf.data.Dataset` of strings or of batches of strings; or a dict of
                `"token_ids"` and `"padding_mask"`, both `(batch, length)`, padded on
                the right. Or a chat, `{"messages": [{"role": …, "content": …}, …]}`, or
                a list of chats, which use the preprocessor's `chat_template`. A chat
                may have `"tools"` for a template in Jinja, and be a list of messages
                alone, or ShareGPT's `{"conversations": [{"from": …, "value": …}, …]}`.
            max_length: maximum number of tokens of a sequence, including the prompt and
                `<s>`. Defaults to `preprocessor.sequence_length`, or to the length of
                the arrays.
            max_new_tokens: maximum number of generated tokens per prompt. If both
                limits are given, the stricter one applies.
            stop_token_ids: ids that end a sequence; `"auto"` is `end_token_ids` of the
                model; `None` disables it.
            stop: string or list of strings that end a sequence, and that are removed
                from it.
            strip_prompt: whether to return the new text without the prompt. Replies to
                chats never include the prompt.
            sampling: how tokens are chosen: a `SamplingConfig`, or a list with one for
                each prompt; `None` uses the `sampler` of `compile`. Its values do not
                need a new compilation.
            num_samples: number of texts for each prompt. With more than one, the result
                for a prompt is a list of them; arrays have so many rows for each one.
            logprobs: returns a `Generation` for each text, with the log-probabilities
                of its tokens, and of this many of the most likely tokens (from 0) at
                each position.
            draft: proposes tokens, which the model verifies several at once. The result
                is the same, up to rounding, and comes sooner if many proposals are
                right. `"prompt_lookup"` or a `PromptLookup` repeats what followed the
                last tokens before; a smaller model with the same tokenizer, its preset,
                or a `DraftModel` generates proposals. A preset is loaded at the first
                call. Several prompts are generated one after the other. Needs greedy
                decoding or a `SamplingConfig`.
            cache: a `keras_openllama.generation.prompt_cache.PromptCache`, in which
                the keys and values of prompts are found and saved. A prompt that begins
                as an earlier one is read from there on. Needs greedy decoding or a
                `SamplingConfig`, and no `draft`.

        Returns:
            A string for a string or a chat; a list of strings for several; for a dict
            of arrays, a dict of NumPy arrays with the same keys. With `logprobs`,
            `Generation`s instead of strings or rows of arrays.

        Raises:
            ValueError: if a prompt is empty or longer than the limits; if token ids or
                mask are malformed; if the limits exceed the model's context; if the
                sampling options are invalid, or need another sampler; if the draft has
                another tokenizer.

        Example:
            >>> lm.generate(["Once upon", "The sea"], max_new_tokens=4)
            ['Once upon the sea, the', 'The sea shines, and']
            >>> lm.generate("The sea", max_new_tokens=8, stop=",", strip_prompt=True)
            ' shines'
            >>> from keras_openllama import SamplingConfig
            >>> config = SamplingConfig(temperature=0.8, top_p=0.95, seed=1)
            >>> len(lm.generate("The", sampling=config, num_samples=3))
            3
            >>> lm.generate("The sea", max_new_tokens=4, draft="prompt_lookup")
            'The sea shines, and'
        """
        limits = GenerationLimits(max_length, max_new_tokens, stop_token_ids, stop)
        sampling = self.default_sampling if sampling is None else sampling
        options = SamplingOptions(sampling, num_samples, logprobs)
        draft = self._resolve_draft(draft)
        size = self.backbone.vocabulary_size
        prompts = normalize_prompts(inputs, size, self.preprocessor is not None)
        if cache is not None and draft is not None:
            raise ValueError(
                "`draft` and `cache` cannot be combined. Pass one of them. Received: "
                f"draft={draft!r}, cache={cache!r}"
            )
        self._check_cache_dtype(draft=draft, cache=cache)
        loop = None if cache is None else EngineTokenLoop(self, cache)
        decoding = Decoding(self, limits, options, draft, loop)
        if isinstance(prompts, TokenArrays):
            return decoding.generate_arrays(prompts, strip_prompt)
        if isinstance(prompts, Batches):
            results = []
            for batch in prompts.batches:
                results += decoding.generate_texts(batch, strip_prompt)
            return results
        results = decoding.generate_texts(prompts, strip_prompt)
        return results if prompts.batched else results[0]

    def stream(
        self,
        inputs: Any,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        stop_token_ids: int | Sequence[int] | str | None = "auto",
        stop: str | Sequence[str] | None = None,
        sampling: SamplingConfig | None = None,
        draft: Draft | CausalLM | str | None = None,
        logprobs: None = None,
    ) -> Iterator[str] | Iterator[tuple[int, str]]:
        """Generates text after a prompt, or several, and yields it piece by piece.

        Joined, the pieces are what `generate(..., strip_prompt=True)` returns. A piece
        never ends within a character, and never contains a part of a stop string.

        Args:
            inputs: a string, or a chat as for `generate`; or a list of them, which are
                generated at once.
            max_length: see `generate`.
            max_new_tokens: see `generate`.
            stop_token_ids: see `generate`.
            stop: see `generate`.
            sampling: see `generate`.
            draft: see `generate`.
            logprobs: not supported, since the pieces are texts. `generate` returns
                log-probabilities, and so do the streams of `keras-openllama serve`.

        Returns:
            An iterator over the pieces, which are never empty; for a list, over pairs
            of the number of a prompt and a piece, each as soon as it is complete.

        Raises:
            ValueError: as `generate`, without a preprocessor, and for a list with
                `draft`, or if the model is compiled with a random sampler and
                `sampling` is `None`; already at the call, before the first piece.
            TypeError: with `logprobs`.

        Example:
            >>> for piece in lm.stream("The sea", max_new_tokens=4):
            ...     print(repr(piece))
            ' sh'
            'ines'
            ','
            ' and'
        """
        limits = GenerationLimits(max_length, max_new_tokens, stop_token_ids, stop)
        if logprobs is not None:
            raise TypeError(
                "`stream` yields texts, without log-probabilities. Call `generate` "
                f"with `logprobs`. Received: logprobs={logprobs!r}"
            )
        sampling = self.default_sampling if sampling is None else sampling
        options, draft = SamplingOptions(sampling), self._resolve_draft(draft)
        if self.preprocessor is None:
            raise ValueError(
                "`stream` needs a `preprocessor`, and this model was built without "
                "one. Use `generate` with token ids."
            )
        prompts = normalize_prompts(inputs, self.backbone.vocabulary_size)
        if not isinstance(prompts, (Texts, ChatPrompts)):
            raise ValueError(
                "`stream` takes texts or chats. Use `generate` for token ids and for "
                f"datasets. Received: inputs of type {type(inputs).__name__}"
            )
        if prompts.batched and draft is not None:
            raise ValueError(
                "`stream` with a `draft` takes one text or one chat. Received: inputs "
                f"of type {type(inputs).__name__}"
            )
        several = inputs if prompts.batched else None
        self._check_cache_dtype(draft=draft, inputs=several)
        loop = EngineTokenLoop(self) if prompts.batched else None
        decoding = Decoding(self, limits, options, draft, loop)
        recorders, steps = decoding.start(prompts, stride=1)
        pieces = _pieces(recorders, steps)
        return pieces if prompts.batched else (piece for _, piece in pieces)

    def _check_cache_dtype(self, **slot_arguments):
        """Checks arguments of which each needs a `SlotDecoder`."""
        given = [name for name, value in slot_arguments.items() if value is not None]
        if given and self.kv_cache_dtype is not None:
            raise ValueError(
                f"`{given[0]}` needs a KV cache that is not of 8 bits. "
                f"Call `compile` without `kv_cache_dtype`, or omit `{given[0]}`. "
                f"Received: {given[0]}={slot_arguments[given[0]]!r} and a model that "
                f"was compiled with kv_cache_dtype={self.kv_cache_dtype!r}"
            )

    def _resolve_draft(self, draft):
        """Converts the argument `draft` of `generate`."""
        if draft is None or isinstance(draft, Draft):
            return draft
        if draft == "prompt_lookup":
            return PromptLookup()
        if isinstance(draft, GenerateMixin):
            return DraftModel(draft)
        if not isinstance(draft, (str, PurePath)):
            raise_invalid(
                "draft",
                draft,
                '"prompt_lookup", a `PromptLookup`, a model or its preset, a '
                "`DraftModel`, or None",
            )
        # In a function, which Keras does not track: the draft is no part of the model.
        loaded, lm = self._loaded_draft() if self._loaded_draft else (None, None)
        if loaded != draft:
            lm = type(self).from_preset(draft, dtype=self.backbone.compute_dtype)
            self._loaded_draft = lambda: (draft, lm)
        return DraftModel(lm)


def _pieces(recorders, steps):
    """Yields pairs of the number of a sequence and its next piece of text."""
    yielded = [0] * len(recorders)
    for _ in steps:
        for index, recorder in enumerate(recorders):
            if len(recorder.text) > yielded[index]:
                yield index, recorder.text[yielded[index] :]
                yielded[index] = len(recorder.text)


def make_token_loop(model: CausalLM) -> TokenLoop | SearchLoop:
    """Creates the loop that a model's sampler needs; it compiles on first use.

    Args:
        model: `OpenLlamaCausalLM`, compiled with a sampler.

    Returns:
        A `SearchLoop` for beam and contrastive search; an `OnnxTokenLoop` for a
        model for which `uses_onnx_runtime` holds; otherwise a `TokenLoop`
        (`TorchTokenLoop` on PyTorch).

    Example:
        >>> type(make_token_loop(lm)).__name__
        'TokenLoop'
    """
    if is_search_sampler(model.sampler):
        if any(map(is_quantized, flatten_layers(model))) and uses_onnx_runtime(model):
            warnings.warn(
                "Beam and contrastive search run on the backend "
                f"({keras.config.backend()}) and not with ONNX Runtime, so that they "
                "are slow with quantized weights. Use another sampler, or a model "
                "that is not quantized.",
                stacklevel=2,
            )
        return SearchLoop(model)
    return (OnnxTokenLoop if uses_onnx_runtime(model) else TokenLoop)(model)
