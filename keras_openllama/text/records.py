"""Fine-tuning examples in the forms that people have them, converted to a few forms.

A record is the object of a line of JSON, or a dict that is passed to `fit`. The forms
are those of Alpaca, Dolly, OpenOrca, ShareGPT, OpenAI, TRL and question answering.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from keras_openllama.text.messages import (
    ASSISTANT,
    SYSTEM,
    USER,
    Message,
    UnusableExampleError,
    is_message,
    normalize_messages,
)

# A text, a pair `{"prompt", "response"}`, a chat `{"messages"}` (and "tools", if it has
# any), or both a pair and a chat: the chat if there is a chat template.
Example: TypeAlias = str | dict[str, Any]

CHAT_KEYS = ("messages", "conversations", "conversation")
_SYSTEM_KEYS = ("system", "system_prompt")
# Keys of a question, of what it is about, and of the answer. The prompt of the first
# form is used as it is.
_FORMS = (
    (("prompt",), (), ("response", "completion")),
    (("instruction",), ("input", "context"), ("output", "response", "completion")),
    (("question", "query"), ("context",), ("answer", "response", "output")),
    (("input",), (), ("output",)),
)

# The prompts of Stanford Alpaca.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def chat_key(record: Mapping[str, Any]) -> str | None:
    """The key of a record that holds a chat.

    Example:
        >>> chat_key({"id": 7, "conversations": []})
        'conversations'
    """
    return next((key for key in CHAT_KEYS if key in record), None)


def form_of(record: Mapping[str, Any]) -> tuple[str, str | None, str] | None:
    """The keys of a record that hold a question, what it is about, and the answer.

    Example:
        >>> form_of({"instruction": "Add.", "input": "2, 2", "output": "4", "id": 1})
        ('instruction', 'input', 'output')
    """
    for question, about, answer in _FORMS:
        keys = [
            next((key for key in choice if key in record), None)
            for choice in (question, about, answer)
        ]
        if keys[0] and keys[2]:
            return tuple(keys)
    return None


def example_from_record(record: Any, name: str = "") -> Example:
    r"""Converts a record to an example.

    Args:
        record: A dict, or a list of messages. Keys that no form has are ignored.
        name: Prefix of the keys in error messages, such as `"x[3]"`.

    Returns:
        The example.

    Raises:
        UnusableExampleError: If there is nothing to learn from it.
        ValueError: If it is malformed, or of no known form.

    Example:
        >>> example_from_record({"prompt": "2 + 2 =", "completion": " 4", "id": 7})
        {'prompt': '2 + 2 =', 'response': ' 4'}
        >>> example_from_record({"question": "2 + 2?", "answer": "4"})["prompt"]
        'Question: 2 + 2?\nAnswer:'
    """
    if isinstance(record, list) and record and all(map(is_message, record)):
        record = {"messages": record}
    if not isinstance(record, Mapping):
        raise ValueError(f"not a JSON object: {record!r:.60}")
    if (form := form_of(record)) and form[0] == "prompt":
        return _prompt_and_response(record, form[0], form[2], name)
    if key := chat_key(record):
        return _with_tools(record, chat_messages(record, key, name), name)
    if form:
        return _question(record, *form, name)
    if "text" in record:
        return _string(record, "text", "text", name)
    raise ValueError(
        'it must have the keys "prompt" and "response", "instruction" and "output", '
        '"question" and "answer", "messages", "conversations", or "text". It has: '
        f"{', '.join(map(str, record)) or 'none'}. For other keys, pass the templates "
        "--prompt and --response."
    )


def check_text(value: Any, key: str, what: str, name: str = "") -> str:
    """Checks a text of an example.

    Args:
        value: The value; `None` is an empty text.
        key: Its key, for error messages.
        what: What it is, such as `"response"`.
        name: See `example_from_record`.

    Returns:
        The text.

    Raises:
        UnusableExampleError: If it is empty.
        ValueError: If it is not a string.
    """
    shown = f"`{name}[{key!r}]`" if name else f"its {key!r}"
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{shown} must be a string: {value!r:.60}")
    if not value or not value.strip():
        raise UnusableExampleError(f"empty {what}", f"{shown} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{shown} is not valid Unicode text: {error}") from error
    return value


def _string(record, key, what, name):
    return check_text(record[key], key, what, name)


def _optional(record, keys, name):
    """The first text under some keys that is not empty, or `""`."""
    for key in keys:
        if key is not None and record.get(key) not in (None, ""):
            try:
                return _string(record, key, key, name)
            except UnusableExampleError:
                continue
    return ""


def _prompt_and_response(record, prompt, response, name):
    if isinstance(record[prompt], list) or isinstance(record[response], list):
        return _split_chat(record, prompt, response, name)
    return {
        "prompt": _string(record, prompt, "prompt", name),
        "response": _string(record, response, "response", name),
    }


def _split_chat(record, prompt, response, name):
    """TRL's form: the messages of the prompt, and those of the response."""
    for key in (prompt, response):
        if not isinstance(record[key], list):
            raise ValueError(f"its {key!r} must be a list, too: {record[key]!r:.60}")
    before = normalize_messages(record[prompt], _named(prompt, name))
    before = [{**m, "weight": 0} if m["role"] == ASSISTANT else m for m in before]
    after = normalize_messages(record[response], _named(response, name))
    return _with_tools(record, before + after, name)


def _named(key, name):
    return f"{name}[{key!r}]" if name else key


def chat_messages(record: Mapping[str, Any], key: str, name: str = "") -> list[Message]:
    """Returns the normalized messages of a record, with its system prompt.

    Args:
        record: A dict.
        key: Its key that holds the chat.
        name: See `example_from_record`.

    Returns:
        The messages, see `messages.normalize_messages`.

    Raises:
        UnusableExampleError: If a message has other content than text.
        ValueError: If the chat is malformed.

    Example:
        >>> chat_messages({"system": "Be brief.", "conversations": []}, "conversations")
        [{'role': 'system', 'content': 'Be brief.'}]
    """
    messages = record[key]
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"its {key!r} must be a list: {messages!r:.60}")
    if messages and all(isinstance(message, str) for message in messages):
        # LIMA's form: the user and the assistant in turn.
        messages = [
            {"role": (USER, ASSISTANT)[i % 2], "content": text}
            for i, text in enumerate(messages)
        ]
    messages = normalize_messages(messages, _named(key, name))
    system = _optional(record, _SYSTEM_KEYS, name)
    if system and not any(message["role"] == SYSTEM for message in messages):
        messages.insert(0, {"role": SYSTEM, "content": system})
    return messages


def _with_tools(record, messages, name):
    tools = tools_of(record, name)
    return {"messages": messages, **({"tools": tools} if tools else {})}


def tools_of(record: Mapping[str, Any], name: str = "") -> list[Any] | None:
    """Returns the descriptions of tools in a record, if it has any.

    Args:
        record: A dict; `"tools"` is a list, or a list in JSON.
        name: See `example_from_record`.

    Returns:
        The list, or `None`.

    Raises:
        ValueError: If they are not a list.
    """
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            shown = _named("tools", name)
            raise ValueError(f"`{shown}` is not valid JSON: {error}") from error
    if tools and not isinstance(tools, list):
        raise ValueError(
            f"`{_named('tools', name)}` must be a list of dicts: {tools!r:.60}"
        )
    return tools or None


def _question(record, question, about, answer, name):
    """A pair in the form of Alpaca or of question answering, and the same as a chat."""
    response = _string(record, answer, "response", name)
    context = _optional(record, [about], name)
    asked = record[question]
    if question == "instruction" and context and asked in (None, ""):
        asked, context = context, ""
    asked = check_text(asked, question, "prompt", name)
    system = _optional(record, _SYSTEM_KEYS, name)
    if question in ("question", "query"):
        prompt = f"{context}\n\n" if context else ""
        pair = {
            "prompt": f"{prompt}Question: {asked}\nAnswer:",
            "response": f" {response}",
        }
        content = f"{context}\n\n{asked}" if context else asked
    else:
        template = _ALPACA_WITH_INPUT if context else _ALPACA
        prompt = template.format(instruction=asked, input=context)
        pair = {"prompt": prompt, "response": response}
        content = f"{asked}\n\n{context}" if context else asked
    messages = [
        {"role": USER, "content": content},
        {"role": ASSISTANT, "content": response},
    ]
    if system:
        pair["prompt"] = f"{system}\n\n{pair['prompt']}"
        messages.insert(0, {"role": SYSTEM, "content": system})
    return {**pair, "messages": messages}
