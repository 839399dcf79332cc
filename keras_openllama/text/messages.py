"""Messages of chats in the forms that people have them, converted to one form.

These are the forms of OpenAI and transformers (`role`, `content`), and of ShareGPT
(`from`, `value`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

# `{"role": …, "content": …}`, and what a chat template may read beside them.
Message: TypeAlias = dict[str, Any]

ASSISTANT, SYSTEM, USER = "assistant", "system", "user"
# Other names of the same roles.
ROLES = {
    "human": USER,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bard": ASSISTANT,
    "bing": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "ai": ASSISTANT,
    "function_call": ASSISTANT,
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_TEXT_PARTS = ("text", "input_text", "output_text")


class UnusableExampleError(ValueError):
    """A model cannot learn from an example, although it is well-formed.

    Args:
        reason: Reason in a few words, by which examples are counted.
        details: What is wrong with this example; by default the reason.
    """

    def __init__(self, reason: str, details: str | None = None):
        super().__init__(details or reason)
        self.reason = reason


def is_message(value: Any) -> bool:
    """Whether a value looks like a message.

    Example:
        >>> is_message({"from": "human", "value": "Hi"}), is_message({"text": "Hi"})
        (True, False)
    """
    return isinstance(value, Mapping) and any(key in value for key in _ROLE_KEYS)


def is_reply(message: Message) -> bool:
    """Whether a normalized message is a reply of the assistant that says something."""
    return message["role"] == ASSISTANT and bool(
        message["content"] or "tool_calls" in message
    )


def normalize_messages(messages: Sequence[Any], name: str) -> list[Message]:
    """Converts a chat to messages with `role` and `content`.

    Keys without a value are dropped, and empty system messages. All other keys are
    kept: a chat template may read them.

    Args:
        messages: Messages of the form of OpenAI or ShareGPT. The content is a string
            or a list of text parts.
        name: Name of the argument in error messages.

    Returns:
        Messages `{"role": …, "content": …}`. A reply that must not be learned has
        `"weight": 0`.

    Raises:
        UnusableExampleError: If a message has other content than text.
        ValueError: If a message is malformed.

    Example:
        >>> chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
        >>> normalize_messages(chat, "conversations")
        [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Ho'}]
    """
    normalized = [_normalize(m, f"{name}[{i}]") for i, m in enumerate(messages)]
    return [
        message
        for message in normalized
        if message["content"] or message["role"] not in (SYSTEM, "developer")
    ]


def escape_strings(message: Message, escape: Callable[[str], str]) -> Message:
    """Applies a function to all strings of a message except its role.

    Args:
        message: Normalized message.
        escape: The function.

    Returns:
        The new message.

    Example:
        >>> escape_strings({"role": "user", "content": "Hi"}, str.upper)
        {'role': 'user', 'content': 'HI'}
    """

    def convert(value):
        if isinstance(value, str):
            return escape(value)
        if isinstance(value, Mapping):
            return {convert(key): convert(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [convert(item) for item in value]
        return value

    return {key: v if key == "role" else convert(v) for key, v in message.items()}


def _normalize(message, name):
    if not isinstance(message, Mapping):
        raise _malformed(message, name)
    role = next((message[key] for key in _ROLE_KEYS if key in message), None)
    has_content = any(key in message for key in (*_CONTENT_KEYS, "tool_calls"))
    if not isinstance(role, str) or not role or not has_content:
        raise _malformed(message, name)
    rest = {
        key: value
        for key, value in message.items()
        if value is not None and key not in (*_ROLE_KEYS, *_CONTENT_KEYS)
    }
    content = next((message[key] for key in _CONTENT_KEYS if key in message), None)
    content = _text(content, name) or _text(rest.get("refusal"), name)
    for key in ("refusal", "tool_calls", "function_call", "weight", "train"):
        rest.pop(key, None)
    return {
        "role": ROLES.get(role, role),
        "content": content,
        **rest,
        **_tool_calls(message, name),
        **_weight(message, name),
    }


def _malformed(message, name):
    return ValueError(
        f'`{name}` must be a dict with the keys "role" and "content" (or "from" and '
        f'"value"). Received: {message!r:.200}'
    )


def _text(content, name):
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, (list, tuple)):
        return "".join(_part(part, name) for part in content)
    raise ValueError(
        f"The content of `{name}` must be a string or a list of text parts. Received: "
        f"{content!r:.200}"
    )


def _part(part, name):
    """The text of one part of a message's content."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    text = None
    if kind in _TEXT_PARTS:
        text = part.get("text")
    elif kind == "refusal":
        text = part.get("refusal")
    elif isinstance(kind, str):
        raise UnusableExampleError(
            f"content of type {kind}",
            f"`{name}` has content of the type {kind!r}, and the model knows text only",
        )
    if isinstance(text, str):
        return text
    raise ValueError(
        f'A part of the content of `{name}` must be {{"type": "text", "text": …}}. '
        f"Received: {part!r:.200}"
    )


def _tool_calls(message, name):
    """The calls of tools, with the arguments of a call as a dict."""
    calls = message.get("tool_calls") or []
    if message.get("function_call"):  # OpenAI's form before there were several.
        calls = [{"type": "function", "function": message["function_call"]}]
    if not isinstance(calls, (list, tuple)) or not all(
        isinstance(call, Mapping) for call in calls
    ):
        raise ValueError(
            f"The tool calls of `{name}` must be a list of dicts. Received: "
            f"{calls!r:.200}"
        )
    return {"tool_calls": [_with_arguments(call) for call in calls]} if calls else {}


def _with_arguments(call):
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError):
        return dict(call)
    return {**call, "arguments": arguments}


def _weight(message, name):
    """`{"weight": 0}` for a reply that is not to be learned, else nothing."""
    for key in ("weight", "train"):
        value = message.get(key)
        if value is not None and value not in (0, 1):
            raise ValueError(
                f"The {key} of `{name}` must be 0 (not learned) or 1. Received: "
                f"{value!r:.60}"
            )
        if value == 0:
            return {"weight": 0}
    return {}
