"""The model that a server offers: prompts to token ids, requests to the engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from keras_openllama.generation.continuous_batching.engine import Engine, EngineRequest
from keras_openllama.serving.choices import ChoiceDecoder
from keras_openllama.serving.constraints import ConstraintFactory, grammar_of
from keras_openllama.serving.errors import ApiError, from_value_error
from keras_openllama.serving.generation import RequestGeneration
from keras_openllama.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    GenerationOptions,
)
from keras_openllama.text.token_bytes import token_bytes

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM
    from keras_openllama.serving.metrics import ServerMetrics


class ServedModel:
    """A model with its engine and the name that clients call it by.

    Args:
        lm: The model, with a preprocessor.
        engine: The engine, which generates with this model.
        name: The name.

    Raises:
        ValueError: If the model has no preprocessor.

    Example:
        >>> from keras_openllama.generation.continuous_batching.engine import Engine
        >>> served = ServedModel(lm, Engine(lm), "nano")
        >>> served.completion_ids(CompletionRequest(("The sea",), GenerationOptions()))
        [[1, 357, 1239]]
    """

    def __init__(self, lm: OpenLlamaCausalLM, engine: Engine, name: str) -> None:
        if lm.preprocessor is None:
            raise ValueError(
                "A server needs a model with a `preprocessor`. Received: "
                "lm.preprocessor=None"
            )
        self.engine = engine
        self.name = name
        self.created = int(time.time())
        self.context = engine.context
        self.tokenizer = lm.preprocessor.tokenizer
        self._lm = lm
        self._preprocessor = lm.preprocessor

    @property
    def has_chat_template(self) -> bool:
        """Whether the model can continue chats."""
        return self._preprocessor.chat_template is not None

    @property
    def names(self) -> dict[str, str | None]:
        """The names that requests choose by, with the adapters that each stands for."""
        adapters = self.engine.adapter_names
        return {self.name: None} | {f"{self.name}+{name}": name for name in adapters}

    def description(self, name: str) -> dict[str, Any]:
        """Returns an entry of `/v1/models`, with two fields beside OpenAI's.

        Args:
            name: One of `names`.
        """
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "keras_openllama",
            "max_model_len": self.context,
            "has_chat_template": self.has_chat_template,
        }

    def checked_name(self, name: str | None) -> str:
        """Returns the name in the field `model` of a request; by default `name`.

        Raises:
            ApiError: If it is none of `names`.
        """
        if name is None:
            return self.name
        if name not in self.names:
            raise ApiError(
                f"The model {name[:200]!r} is not served here. Choose one of: "
                f"{', '.join(self.names)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return name

    # ----- Prompts

    def completion_ids(self, request: CompletionRequest) -> list[list[int]]:
        """Tokenizes the prompts of a completion. Lists of token ids stay as they are.

        Raises:
            ApiError: If a prompt is empty, too long, or has ids without a token.
        """
        ids = [
            self._prompt_ids(p, f"prompt[{i}]") for i, p in enumerate(request.prompts)
        ]
        self._check_lengths(ids, request.options.max_tokens, "prompt")
        return ids

    def prompt_texts(self, request: CompletionRequest) -> list[str]:
        """Returns the texts of the prompts of a completion, after `completion_ids`."""
        decode = self.tokenizer.detokenize
        return [p if isinstance(p, str) else decode(p) for p in request.prompts]

    def _prompt_ids(self, prompt, name):
        if isinstance(prompt, str):
            try:
                return self._preprocessor.prompt_ids([prompt], name="prompt")[0]
            except ValueError as error:
                raise from_value_error(error, param="prompt") from error
        size = self.tokenizer.vocabulary_size()
        for token_id in prompt:
            if not 0 <= token_id < size:
                raise ApiError(
                    f"`{name}` must have token ids from 0 to {size - 1}. Received: "
                    f"{str(token_id)[:30]}",
                    param="prompt",
                )
        return prompt

    def chat_ids(self, request: ChatRequest) -> list[int]:
        """Tokenizes a chat, up to the reply. Control strings in messages are text.

        Raises:
            ApiError: If the model has no chat template, the template cannot render the
                messages, or the chat is too long.
        """
        if not self.has_chat_template:
            raise ApiError(
                "This model has no chat template. Start the server with "
                "--chat-template FILE, or use /v1/completions.",
                code="no_chat_template",
            )
        messages = [dict(message) for message in request.messages]
        try:
            ids = self._preprocessor.chat_ids(messages, parse_special=False)
        except ValueError as error:
            raise from_value_error(error, param="messages") from error
        self._check_lengths([ids], request.options.max_tokens, "messages")
        return ids

    def _check_lengths(self, prompts, max_tokens, param):
        longest = max(map(len, prompts))
        least = 1 if max_tokens is None else max_tokens
        if longest + least > self.context:
            asked = f" and {max_tokens} new tokens" if max_tokens else ""
            raise ApiError(
                f"The context of this model is {self.context} tokens. The request has "
                f"{longest} tokens in `{param}`{asked}. Shorten it.",
                param=param,
                code="context_length_exceeded",
            )

    # ----- Generation

    def generate(
        self,
        prompts: Sequence[list[int]],
        options: GenerationOptions,
        metrics: ServerMetrics,
        grammar: str | None = None,
        echoes: Sequence[str] | None = None,
    ) -> RequestGeneration:
        """Submits requests to the engine.

        Args:
            prompts: Token ids of each prompt.
            options: The options of the request.
            metrics: Where tokens and times are counted.
            grammar: Result of `grammar`.
            echoes: The texts of the prompts, if each text begins with its own.

        Returns:
            The texts: those of the first prompt, then those of the next one.

        Raises:
            ApiError: If the queue of the engine is full, or a value is invalid.
        """
        self._check_ids(options.sampling)
        requests, decoders = [], []
        for index, prompt in enumerate(prompts):
            echo = None if echoes is None else echoes[index]
            for number in range(options.num_choices):
                requests.append(
                    self._engine_request(
                        prompt, options, number, grammar, is_scored=echo is not None
                    )
                )
                decoders.append(
                    ChoiceDecoder(
                        self.tokenizer,
                        prompt,
                        options.stop,
                        self._stop_ids,
                        has_logprobs=options.top_logprobs is not None,
                        echo=echo,
                    )
                )
        return RequestGeneration(self.engine, requests, decoders, metrics)

    def _engine_request(self, prompt, options, number, grammar, is_scored):
        constraint = None
        if grammar:
            banned = options.sampling.banned_tokens
            constraint = self._constraints.make(grammar, banned)
        left = self.context - len(prompt)
        return EngineRequest(
            prompt_ids=prompt,
            max_new_tokens=left if options.max_tokens is None else options.max_tokens,
            sampling=options.sampling,
            stop_token_ids=self._stop_ids,
            top_logprobs=options.top_logprobs,
            prompt_logprobs=options.top_logprobs if is_scored else None,
            constraint=constraint,
            sample=number,
            adapter=self.names[self.checked_name(options.model)],
        )

    @property
    def _stop_ids(self):
        return tuple(self._lm.end_token_ids)

    def grammar(self, options: GenerationOptions) -> str | None:
        """Returns the grammar of a request's `response_format`; `None` without one.

        Raises:
            ApiError: If it is not a valid one.
        """
        if options.response_format is None:
            return None
        grammar = grammar_of(options.response_format)
        if options.sampling.min_new_tokens:
            raise ApiError(
                "`min_tokens` cannot be combined with `response_format`, which says "
                "where the text ends.",
                param="min_tokens",
            )
        self._constraints.make(grammar)  # Whether it is too complex.
        return grammar

    @cached_property
    def _constraints(self):
        return ConstraintFactory(
            token_bytes(self.tokenizer.vocabulary),
            self._lm.end_token_ids,
            self._lm.backbone.vocabulary_size,
            self.tokenizer.tokenize_continuation,
        )

    @cached_property
    def token_names(self) -> list[bytes]:
        """Bytes of each token, for log-probabilities; control tokens by their names."""
        names = token_bytes(self.tokenizer.vocabulary)
        unused = range(len(names), self._lm.backbone.vocabulary_size)
        return [
            data or self.tokenizer.id_to_token(i).encode()
            for i, data in enumerate(names)
        ] + [b"<unused %d>" % i for i in unused]

    def _check_ids(self, sampling):
        size = self._lm.backbone.vocabulary_size
        for name in ("logit_bias", "banned_tokens"):
            for token_id in getattr(sampling, name):
                if token_id >= size:
                    raise ApiError(
                        f"`{name}` must have token ids below {size}. Received: "
                        f"{token_id}",
                        param=name,
                    )
