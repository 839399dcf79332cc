"""Chat templates in Jinja, as checkpoints of transformers have them.

A template is rendered as `apply_chat_template` of transformers renders it: in a sandbox
(templates come from other people), with the same filters and functions, and without
keys of messages that are `None`.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

# Start and end of a part of a text, in characters.
Span: TypeAlias = tuple[int, int]

# Noncharacters, which Unicode reserves for such marks inside of a program.
_START, _END = "\ufdd0", "\ufdd1"
_DROP_MARKS = {ord(_START): None, ord(_END): None}
# Names of the same text, of which a template reads one.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplateError(ValueError):
    """A chat template is invalid, or cannot render a chat; the message says why."""


class JinjaTemplate:
    r"""A chat template in Jinja.

    Args:
        source: The template.
        variables: What the template knows beside the messages: the special tokens, such
            as `{"bos_token": "<s>", "eos_token": "</s>"}`.

    Raises:
        ChatTemplateError: If the template is not valid Jinja.
        ImportError: If Jinja is not installed.

    Example:
        >>> template = JinjaTemplate(
        ...     "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
        ...     "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        ...     {"eos_token": "</s>"},
        ... )
        >>> messages = [{"role": "user", "content": "Hi"}]
        >>> template.render(messages, add_generation_prompt=True)
        'user: Hi</s>assistant: '

    Source: `transformers.utils.chat_template_utils`.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None):
        self.source = source
        self.variables = dict(variables or {})
        self._template = _compile(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """Renders a chat as text.

        Args:
            messages: Dicts `{"role": …, "content": …}`. Other keys are passed to the
                template.
            add_generation_prompt: Whether to end with what begins a reply.
            tools: Descriptions of tools in JSON, for templates that know tools.
            **variables: Further variables of the template.

        Returns:
            The text, with the special tokens that the template writes.

        Raises:
            ChatTemplateError: If the template refuses the messages, or fails.
        """
        text = self._render(messages, add_generation_prompt, tools, variables)
        return text.translate(_DROP_MARKS)

    def render_replies(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """Renders a chat, and finds the assistant's replies in the text.

        A reply is what a model generates: the content with the token that ends it. The
        template says where it is with the tag `{% generation %}`. In a template without
        this tag, a reply lies between the chat before it, rendered with
        `add_generation_prompt`, and the chat that ends with it.

        Args:
            messages: See `render`.
            tools: See `render`.

        Returns:
            The text, and the `(start, end)` of each reply in it: one for each message
            of the assistant, or one for each `{% generation %}` block.

        Raises:
            ChatTemplateError: See `render`; or if a reply cannot be found.

        Example:
            >>> template = JinjaTemplate(
            ...     "{% for m in messages %}[{{ m.role }}] {{ m.content }};{% endfor %}"
            ...     "{% if add_generation_prompt %}[assistant] {% endif %}"
            ... )
            >>> messages = [
            ...     {"role": "user", "content": "Hi"},
            ...     {"role": "assistant", "content": "Hello"},
            ... ]
            >>> text, [(start, end)] = template.render_replies(messages)
            >>> text, text[start:end]
            ('[user] Hi;[assistant] Hello;', 'Hello;')
        """
        marked = self._render(messages, False, tools, {})
        if _START in marked:
            return _without_marks(marked)
        replies = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        return marked, [self._find_reply(messages, i, tools, marked) for i in replies]

    def mentions(self, word: str) -> bool:
        """Whether the template has a word, such as the name of a role or of a key."""
        return word in self.source

    def _find_reply(self, messages, index, tools, text):
        """Returns the `(start, end)` of the reply `messages[index]` in a text."""
        before = self._part(messages[:index], True, tools)
        until = self._part(messages[: index + 1], False, tools)
        content = _core(messages[index])
        is_prefix = until is not None and text.startswith(until)
        if is_prefix and before is not None and until.startswith(before):
            return len(before), _end_of_reply(until, len(before), content)
        found = self._find_content(messages, index, tools, text)
        if is_prefix and found:
            # The generation prompt differs, as with a prompt to reason.
            return found[0], _end_of_reply(until, found[0], content)
        if not found:
            raise ChatTemplateError(
                f"the reply of message {index} cannot be found in what the chat "
                "template renders. Mark the replies in the template: {% generation %}"
                "{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
            )
        # The template renders this reply in another way when more messages follow.
        start, end = found
        if until is not None and content in until:
            rest = until[until.rindex(content) + len(content) :]
            end += _common_length(rest, text[end:])
        return start, _end_of_reply(text[:end], start, content)

    def _part(self, messages, add_generation_prompt, tools):
        """The first messages as text; `None` if the template refuses them alone."""
        try:
            return self.render(messages, add_generation_prompt, tools)
        except ChatTemplateError:
            return None

    def _find_content(self, messages, index, tools, text):
        """Finds the content of a message by marking it; `None` if it is changed."""
        message = messages[index]
        content, core = message.get("content"), _core(message)
        if not core:
            return None
        marked = content.replace(core, f"{_START}{core}{_END}", 1)
        changed = [*messages]
        changed[index] = {**message, "content": marked}
        try:
            rendered = self._render(changed, False, tools, {})
        except ChatTemplateError:
            return None
        if rendered.count(_START) != 1 or rendered.count(_END) != 1:
            return None
        found, spans = _without_marks(rendered)
        return spans[0] if found == text else None

    def _render(self, messages, add_generation_prompt, tools, variables):
        """Renders a chat, with marks around each `{% generation %}` block."""
        values = {**self.variables, **variables}
        try:
            return self._template.render(
                messages=[_message(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **values,
            )
        except Exception as error:  # Templates raise errors of all kinds.
            raise ChatTemplateError(
                f"the chat template cannot render the chat: {error}"
            ) from error


def _message(message):
    """Drops keys without a value, and names the reasoning as all templates do."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _core(message):
    """The content of a message, without spaces around it, which templates remove."""
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def _common_length(one, other):
    """Number of characters with which two texts begin alike."""
    pairs = zip(one, other, strict=False)
    return next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other))
    )


def _end_of_reply(text, start, content):
    """Drops line ends that follow the token at the end of a reply."""
    position = text.rfind(content, start) if content else -1
    after = text[position + len(content) :] if position >= 0 else ""
    return len(text.rstrip()) if after.strip() else len(text)


def _without_marks(marked):
    """Returns a text without marks, and the parts that they enclosed."""
    spans, parts, position, start = [], [], 0, 0
    for part in re.split(f"([{_START}{_END}])", marked):
        if part == _START:
            start = position
        elif part == _END:
            spans.append((start, position))
        else:
            parts.append(part)
            position += len(part)
    return "".join(parts), spans


# ----- Jinja


@functools.lru_cache(maxsize=32)
def _compile(source):
    from jinja2 import TemplateError

    try:
        return _environment().from_string(source)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise ChatTemplateError(
            f"the chat template is not valid Jinja: {error}"
            + (f" (line {line})" if line else "")
        ) from error


@functools.cache
def _environment():
    """The environment in which transformers compiles chat templates."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation_tag(), jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda form: datetime.datetime.now().strftime(form),
        # Without the attributes of the class, through which a sandbox is left.
        dict=lambda *pairs, **values: dict(*pairs, **values),
        namespace=_namespace(),
    )
    return environment


def _generation_tag():
    """Jinja's extension for `{% generation %}`, which marks what a model generates."""
    import jinja2.ext
    from jinja2 import nodes

    class GenerationTag(jinja2.ext.Extension):
        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, caller):
            return f"{_START}{caller()}{_END}"

    return GenerationTag


def _namespace():
    """Jinja's `namespace` without names that begin with an underscore."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name):
        if str(name).startswith("_"):
            raise SecurityError(f"{name!r} begins with an underscore")

    class TemplateNamespace(Namespace):
        def __init__(*args, **values):
            for name in dict(*args[1:], **values):
                check(name)
            Namespace.__init__(*args, **values)

        def __setitem__(self, name, value):
            check(name)
            super().__setitem__(name, value)

    return TemplateNamespace


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message):
    from jinja2 import TemplateError

    raise TemplateError(message)
