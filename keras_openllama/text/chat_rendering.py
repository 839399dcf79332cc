"""Supervised fine-tuning examples as text: texts, pairs and chats.

An example becomes a list of exchanges: a prompt, which is masked out of the loss, and a
response. A plain text is a response without a prompt. A chat with a template in Jinja
becomes a text in which the replies are marked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from keras_openllama.text.chat_template import EXAMPLE_TEMPLATE
from keras_openllama.text.input_kinds import ChatExample, Examples, Pair, Texts
from keras_openllama.text.inputs import check_errors
from keras_openllama.text.jinja_template import (
    ChatTemplateError,
    JinjaTemplate,
    Span,
)
from keras_openllama.text.messages import (
    ASSISTANT,
    ROLES,
    SYSTEM,
    Message,
    UnusableExampleError,
    is_reply,
)

# Text by role, or a template in Jinja.
ChatTemplate: TypeAlias = dict[str, str] | JinjaTemplate


class Exchange(NamedTuple):
    """A prompt and the response to it; either may be empty.

    Attributes:
        prompt: the prompt.
        response: the response.
        is_learned: whether the response contributes to the loss.
    """

    prompt: str
    response: str
    is_learned: bool = True


@dataclasses.dataclass(frozen=True)
class RenderedChat:
    """A chat as the text of a template in Jinja, with all special tokens.

    Attributes:
        text: the text.
        replies: start and end, in characters, of the replies to learn.
    """

    text: str
    replies: tuple[Span, ...]


# An example before it is tokenized.
RenderedExample: TypeAlias = list[Exchange] | RenderedChat


def render_examples(
    data: Texts | Examples, template: ChatTemplate | None = None
) -> list[RenderedExample]:
    """Converts texts, pairs or chats to exchanges or rendered chats.

    Args:
        data: the normalized input.
        template: a chat template. Needed for chats only.

    Returns:
        For each example a list of exchanges, or a rendered chat.

    Raises:
        ValueError: if chats cannot be rendered or learned, or there is no template for
            them. The message counts them.

    Example:
        >>> render_examples(Texts(["Llamas hum."], batched=True))
        [[Exchange(prompt='', response='Llamas hum.', is_learned=True)]]
    """
    if isinstance(data, Texts):
        return [[Exchange("", text)] for text in data.texts]
    rendered, errors = [], []
    for example in data.examples:
        try:
            rendered.append(render_example(example, template))
        except ValueError as error:
            errors.append(str(error))
    check_errors(errors, len(data.examples))
    return rendered


def render_example(
    example: str | Pair | ChatExample, template: ChatTemplate | None = None
) -> RenderedExample:
    """Converts one example, see `render_examples`.

    Args:
        example: a text, a pair or a chat.
        template: see `render_examples`.

    Returns:
        A list of exchanges, or a rendered chat.

    Raises:
        UnusableExampleError: if there is nothing to learn from the example.
        ValueError: if there is no template for a chat.
    """
    if isinstance(example, ChatExample) and template is None and example.pair:
        example = example.pair
    if isinstance(example, str):
        return [Exchange("", example)]
    if isinstance(example, Pair):
        return [Exchange(example.prompt, example.response)]
    messages = _until_last_reply(example.messages, example.name)
    if isinstance(template, JinjaTemplate):
        return _render_chat(messages, template, example)
    return chat_exchanges(messages, template, example.name)


def _until_last_reply(messages, name):
    """Drops the messages after the last reply, which have no reply to learn from."""
    replies = [i for i, m in enumerate(messages) if is_reply(m)]
    if not any(messages[i].get("weight") != 0 for i in replies):
        raise UnusableExampleError(
            "no reply of the assistant",
            f"`{name}` has no reply of the assistant to learn from",
        )
    return messages[: replies[-1] + 1]


def chat_exchanges(
    messages: Sequence[Message],
    template: dict[str, str] | None,
    name: str = "messages",
) -> list[Exchange]:
    r"""Converts a chat to exchanges. The last one may lack a response.

    Args:
        messages: see `messages.normalize_messages`.
        template: text by role, each with `{content}` exactly once. Text before the
            assistant's content belongs to the prompt, text after it to the response.
        name: name of the argument in error messages.

    Returns:
        List of exchanges. A missing response is `""`.

    Raises:
        UnusableExampleError: if the template cannot render a message.
        ValueError: if there is no template.

    Example:
        >>> template = {"user": "Q: {content}\n", "assistant": "A: {content}"}
        >>> chat_exchanges([{"role": "user", "content": "Hi"}], template)
        [Exchange(prompt='Q: Hi\nA: ', response='', is_learned=True)]
    """
    if template is None:
        raise ValueError(
            "Chats need a chat template. Set `preprocessor.chat_template` "
            "(--chat-template) to a template in Jinja, or for example to "
            f"{EXAMPLE_TEMPLATE}."
        )
    before, after = template[ASSISTANT].split("{content}")
    exchanges, prompt = [], ""
    for i, message in enumerate(messages):
        role = _role_in(template, message["role"])
        content = message["content"]
        _check_message(message, role in template, f"{name}[{i}]", template)
        if role == ASSISTANT:
            response = content + after if content else ""
            is_learned = message.get("weight") != 0
            exchanges.append(Exchange(prompt + before, response, is_learned))
            prompt = ""
        else:
            prompt += template[role].replace("{content}", content)
    if prompt:
        exchanges.append(Exchange(prompt + before, ""))
    return exchanges


def _check_message(message, has_role, name, template):
    role = message["role"]
    if not has_role:
        raise UnusableExampleError(
            f"role {role!r} is not in the chat template",
            f"`{name}` must have a role of {sorted(template)}. Received: "
            f"{message!r:.200}",
        )
    if "tool_calls" in message:
        raise UnusableExampleError(
            "calls of tools",
            f"`{name}` calls tools, which only a chat template in Jinja can render. "
            f"Received: {message!r:.200}",
        )
    if not message["content"] and role != ASSISTANT:
        raise UnusableExampleError(
            "empty message",
            f"`{name}` must have non-empty content. Received: {message!r:.200}",
        )


def _role_in(template, role):
    """The name of a role in a dict of roles, which may be an older one."""
    if role in template:
        return role
    if role == "developer":
        return _role_in(template, SYSTEM)
    older = (name for name, new in ROLES.items() if new == role and name in template)
    return next(older, role)


# ----- Templates in Jinja


def _render_chat(messages, template, example):
    """Renders a chat to learn from."""
    if any("tool_calls" in m for m in messages) and not template.mentions("tool_calls"):
        raise UnusableExampleError(
            "calls of tools",
            f"`{example.name}` has calls of tools, which the chat template does not "
            "render",
        )
    try:
        text, spans = template.render_replies(
            _for_template(messages, template), example.tools
        )
    except ChatTemplateError as error:
        raise UnusableExampleError(str(error), f"`{example.name}`: {error}") from error
    replies = [message for message in messages if message["role"] == ASSISTANT]
    learned = [is_reply(m) and m.get("weight") != 0 for m in replies]
    if len(spans) != len(replies):
        if not all(learned):
            raise UnusableExampleError(
                "replies that cannot be told apart",
                f"`{example.name}`: the chat template marks {len(spans)} parts of "
                f"{len(replies)} replies by {{% generation %}}, and some replies are "
                "not to be learned",
            )
        learned = [True] * len(spans)
    kept = [s for s, is_kept in zip(spans, learned, strict=True) if is_kept]
    return RenderedChat(text, tuple(kept))


def render_prompt(
    messages: Sequence[Message],
    template: JinjaTemplate,
    tools: Sequence[Any] | None = None,
) -> str:
    """Renders a chat up to the reply that is to be generated.

    Args:
        messages: see `messages.normalize_messages`.
        template: a template in Jinja.
        tools: descriptions of the tools that the chat may use.

    Returns:
        The text, with all special tokens.

    Raises:
        ValueError: if the chat is empty, ends with a reply, or cannot be rendered.
    """
    if not messages or messages[-1]["role"] == ASSISTANT:
        raise not_a_prompt_error(messages)
    return template.render(_for_template(messages, template), True, tools)


def _for_template(messages, template):
    """Messages as published templates expect them."""
    messages = [
        {k: v for k, v in m.items() if k != "content" or v or "tool_calls" not in m}
        for m in messages
    ]
    if template.mentions("developer"):
        return messages
    # OpenAI's newer name, which templates of these models do not know.
    return [{**m, "role": SYSTEM} if m["role"] == "developer" else m for m in messages]


def not_a_prompt_error(chat: Sequence[Any]) -> ValueError:
    """Returns the error of a chat that cannot be continued."""
    return ValueError(
        "A chat to continue must not be empty or end with a message of the assistant. "
        f"Received: {chat!r:.200}"
    )
