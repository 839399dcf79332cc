"""Bodies of requests: parsed and validated, with the field that is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_openllama.generation.sampling.config import SamplingConfig
from keras_openllama.serving.errors import ApiError, from_value_error
from keras_openllama.serving.json_body import (
    Fields,
    is_bool,
    is_integer,
    is_integer_in,
    is_string,
    shorten,
)

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1000
MAX_TOP_LOGPROBS = 20
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for completions.
ROLES = ("system", "developer", "user", "assistant")
SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "banned_tokens",
    "seed",
)
# They do not change the text; clients send them for OpenAI's own purposes.
FIELDS_WITHOUT_EFFECT = (
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """What completions and chats have in common.

    Attributes:
        model: Name of the model, with `+` and the name of adapters if they are chosen;
            `None` for the model alone.
        sampling: How tokens are chosen.
        max_tokens: Maximum number of new tokens; `None` for what the context leaves.
        num_choices: Number of texts for each prompt.
        stop: Strings that end a text.
        stream: Whether the text is sent as it is generated.
        include_usage: Whether a stream ends with the numbers of tokens.
        top_logprobs: Of how many likely tokens log-probabilities are returned; `None`
            for no log-probabilities.
        response_format: The form of the text, see `constraints.grammar_of`, or `None`.
    """

    model: str | None = None
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    max_tokens: int | None = None
    num_choices: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A body of `/v1/completions`.

    Attributes:
        prompts: Texts, or lists of token ids.
        options: See `GenerationOptions`.
        echo: Whether the text begins with the prompt.
    """

    prompts: tuple[str | list[int], ...]
    options: GenerationOptions
    echo: bool = False


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A body of `/v1/chat/completions`.

    Attributes:
        messages: Dicts of `"role"`, `"content"` and possibly `"name"`.
        options: See `GenerationOptions`.
    """

    messages: tuple[dict[str, str], ...]
    options: GenerationOptions


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    """Parses the body of a completion.

    Args:
        body: Result of `json_body.parse_json_object`.

    Raises:
        ApiError: If a field is malformed, unknown, or not supported.

    Example:
        >>> request = parse_completion({"prompt": "The sea", "max_tokens": 8})
        >>> request.prompts, request.options.max_tokens
        (('The sea',), 8)
    """
    fields = Fields(body)
    prompts = _prompts(fields)
    echo = fields.take("echo", is_bool, "true or false", False)
    fields.refuse("suffix", "is not supported: the model only continues texts.")
    requirement = f"an integer from 0 to {MAX_TOP_LOGPROBS}"
    is_count = is_integer_in(0, MAX_TOP_LOGPROBS)
    top_logprobs = fields.take("logprobs", is_count, requirement)
    # Without new tokens, `echo` and `logprobs` score the prompt.
    max_tokens = _max_tokens(fields, "max_tokens", least=0)
    if max_tokens is None:
        max_tokens = DEFAULT_COMPLETION_TOKENS
    options = _options(fields, max_tokens, top_logprobs)
    best_of = fields.take("best_of", is_integer, "an integer", options.num_choices)
    if best_of != options.num_choices:
        raise ApiError(
            f"`best_of` is not supported, unless it equals `n`. Received: {best_of}",
            param="best_of",
        )
    if echo and top_logprobs is not None and options.num_choices > 1:
        raise ApiError(
            "`echo` with `logprobs` scores the prompt, for one choice only. Received: "
            f"n={options.num_choices}",
            param="n",
        )
    fields.refuse_others()
    return CompletionRequest(prompts, options, echo)


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """Parses the body of a chat.

    Args:
        body: Result of `json_body.parse_json_object`.

    Raises:
        ApiError: If a field is malformed, unknown, or not supported.

    Example:
        >>> request = parse_chat({"messages": [{"role": "user", "content": "Hi"}]})
        >>> request.messages
        ({'role': 'user', 'content': 'Hi'},)
    """
    fields = Fields(body)
    messages = _messages(fields)
    _refuse_tools(fields)
    has_logprobs = fields.take("logprobs", is_bool, "true or false", False)
    requirement = f"an integer from 0 to {MAX_TOP_LOGPROBS}"
    is_count = is_integer_in(0, MAX_TOP_LOGPROBS)
    top_logprobs = fields.take("top_logprobs", is_count, requirement)
    if top_logprobs is not None and not has_logprobs:
        raise ApiError("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
    max_tokens = _max_tokens(fields, "max_completion_tokens")
    older_max_tokens = _max_tokens(fields, "max_tokens")
    options = _options(
        fields,
        max_tokens or older_max_tokens,
        (top_logprobs or 0) if has_logprobs else None,
    )
    fields.refuse_others()
    return ChatRequest(messages, options)


def _options(fields, max_tokens, top_logprobs):
    """Parses the fields of `GenerationOptions`."""
    stream = fields.take("stream", is_bool, "true or false", False)
    options = GenerationOptions(
        model=fields.take("model", is_string, "a string"),
        sampling=_sampling(fields),
        max_tokens=max_tokens,
        num_choices=fields.take(
            "n",
            is_integer_in(1, MAX_CHOICES),
            f"an integer from 1 to {MAX_CHOICES}",
            default=1,
        ),
        stop=_stop(fields),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        top_logprobs=top_logprobs,
        response_format=_response_format(fields),
    )
    fields.discard(*FIELDS_WITHOUT_EFFECT)
    return options


def _max_tokens(fields, name, least=1):
    requirement = "a positive integer" if least else "an integer from 0"
    return fields.take(name, lambda n: is_integer(n) and n >= least, requirement)


def _sampling(fields):
    values = {name: fields.take(name, lambda _: True, "") for name in SAMPLING_FIELDS}
    values["min_new_tokens"] = fields.take("min_tokens", lambda _: True, "")
    values["logit_bias"] = _logit_bias(fields)
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return SamplingConfig(**given)
    except ValueError as error:
        name = {"min_new_tokens": "min_tokens"}
        api_error = from_value_error(error)
        api_error.param = name.get(api_error.param, api_error.param)
        raise api_error from error


def _logit_bias(fields):
    requirement = "an object of token ids and numbers from -100 to 100"

    def is_valid(biases):
        return isinstance(biases, dict) and all(
            token.isascii() and token.isdecimal() and len(token) < 10 and _is_bias(bias)
            for token, bias in biases.items()
        )

    biases = fields.take("logit_bias", is_valid, requirement)
    return biases and {int(token): bias for token, bias in biases.items()}


def _is_bias(value):
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -100 <= value <= 100


def _stop(fields):
    def is_stop(text):
        return isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH

    def is_valid(stop):
        if isinstance(stop, list):
            return len(stop) <= MAX_STOP_STRINGS and all(map(is_stop, stop))
        return is_stop(stop)

    requirement = (
        f"a string, or a list of up to {MAX_STOP_STRINGS}, of 1 to {MAX_STOP_LENGTH} "
        "characters each"
    )
    stop = fields.take("stop", is_valid, requirement, default=[])
    return tuple(stop) if isinstance(stop, list) else (stop,)


def _include_usage(fields, stream):
    def is_valid(options):
        return isinstance(options, dict) and all(
            name in ("include_usage", "include_obfuscation") and is_bool(value)
            for name, value in options.items()
            if value is not None
        )

    requirement = 'an object such as {"include_usage": true}'
    options = fields.take("stream_options", is_valid, requirement)
    if options is not None and not stream:
        raise ApiError("`stream_options` needs `stream: true`.", param="stream_options")
    return bool(options and options.get("include_usage"))


def _response_format(fields):
    def is_valid(value):
        return isinstance(value, dict) and isinstance(value.get("type"), str)

    requirement = 'an object with a "type"'
    value = fields.take("response_format", is_valid, requirement)
    return None if value is None or value["type"] == "text" else value


def _prompts(fields):
    def is_tokens(value):
        return isinstance(value, list) and value and all(map(is_integer, value))

    def is_valid(value):
        if isinstance(value, str) or is_tokens(value):
            return True
        return (
            isinstance(value, list)
            and 0 < len(value) <= MAX_PROMPTS
            and all(isinstance(prompt, str) or is_tokens(prompt) for prompt in value)
        )

    requirement = (
        "a string, a list of token ids, or a list of up to "
        f"{MAX_PROMPTS} of these, not empty"
    )
    prompt = fields.take("prompt", is_valid, requirement)
    if prompt is None:
        raise ApiError("`prompt` is missing.", param="prompt")
    if isinstance(prompt, str) or is_integer(prompt[0]):
        return (prompt,)
    return tuple(prompt)


# ----- Chats


def _refuse_tools(fields):
    reason = "is not supported: these models do not call tools."
    fields.take(
        "tools", lambda tools: tools == [], "an empty list: tools are not supported"
    )
    fields.take(
        "functions",
        lambda tools: tools == [],
        "an empty list: functions are not supported",
    )
    fields.take(
        "tool_choice",
        lambda choice: choice == "none",
        '"none": tools are not supported',
    )
    fields.refuse("function_call", reason)
    fields.discard("parallel_tool_calls")
    fields.take("modalities", lambda value: value == ["text"], '["text"]')


def _messages(fields):
    def is_valid(value):
        return isinstance(value, list) and bool(value)

    messages = fields.take("messages", is_valid, "a list of messages, not empty")
    if messages is None:
        raise ApiError("`messages` is missing.", param="messages")
    return tuple(_message(m, f"messages[{i}]") for i, m in enumerate(messages))


def _message(message, name):
    if not isinstance(message, Mapping):
        raise ApiError(
            f"`{name}` must be an object. Received: {shorten(message)}", param=name
        )
    message = {key: value for key, value in message.items() if value is not None}
    role = message.pop("role", None)
    if role not in ROLES:
        raise ApiError(
            f"`{name}.role` must be one of {', '.join(ROLES)}. Received: "
            f"{shorten(role)}",
            param=f"{name}.role",
        )
    content = _text(message.pop("content", ""), f"{name}.content")
    refusal = _text(message.pop("refusal", ""), f"{name}.refusal")
    parsed = {"role": role, "content": content or refusal}
    if "name" in message:
        parsed["name"] = _text(message.pop("name"), f"{name}.name")
    _refuse_keys(message, name)
    return parsed


def _refuse_keys(message, name):
    # Clients return messages as they received them.
    empty = {"annotations": [], "tool_calls": []}
    for key, value in message.items():
        if key not in empty or value != empty[key]:
            raise ApiError(
                f"`{name}` must have a role, a content and possibly a name only. "
                f"Received: {shorten(key)}",
                param=name,
            )


def _text(content, name):
    """Joins the parts of a content."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(part, f"{name}[{i}]") for i, part in enumerate(content))
    raise ApiError(
        f"`{name}` must be a string or a list of parts. Received: {shorten(content)}",
        param=name,
    )


def _part(part, name):
    if isinstance(part, dict) and part.get("type") in ("text", "refusal"):
        text = part.get(part["type"])
        if isinstance(text, str):
            return text
    raise ApiError(
        f'`{name}` must be {{"type": "text", "text": "…"}}: the model knows text '
        f"only. Received: {shorten(part)}",
        param=name,
    )
