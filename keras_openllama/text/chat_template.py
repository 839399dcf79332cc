"""Checks chat templates, without Keras."""

from __future__ import annotations

from keras_openllama.text.jinja_template import JinjaTemplate
from keras_openllama.text.messages import ASSISTANT

EXAMPLE_TEMPLATE = '{"user": "USER: {content}\\n", "assistant": "ASSISTANT: {content}"}'


def check_template(template: dict[str, str] | str | None) -> None:
    """Checks a chat template.

    Args:
        template: a dict, see `chat_rendering.chat_exchanges`, or the source of a
            template in Jinja; `None` is valid.

    Raises:
        ValueError: if `template` is a string without a tag of Jinja or is not valid
            Jinja, or is not a dict of strings with the role `"assistant"`, each with
            `{content}` exactly once.
    """
    if template is None:
        return
    if isinstance(template, str):
        # Without one, each chat would be rendered as the template itself. JSON of a
        # template by role has none.
        if "{{" not in template and "{%" not in template:
            raise ValueError(
                "`chat_template` must be a template in Jinja, with `{{` or `{%`, or a "
                "dict of strings. Call `json.loads` if it is JSON. Received: "
                f"{template!r}"
            )
        JinjaTemplate(template)
        return
    if not isinstance(template, dict) or ASSISTANT not in template:
        raise ValueError(
            "`chat_template` must be a template in Jinja, or a dict of strings with "
            f'the role "assistant", such as {EXAMPLE_TEMPLATE}. Received: {template!r}'
        )
    for role, text in template.items():
        if not isinstance(text, str) or text.count("{content}") != 1:
            raise ValueError(
                f'`chat_template["{role}"]` must be a string that has {{content}} '
                f"exactly once. Received: {text!r}"
            )
