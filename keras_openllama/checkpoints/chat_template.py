"""Reads and writes chat templates in the files of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from keras_openllama.text.jinja_template import ChatTemplateError, JinjaTemplate
from keras_openllama.utils.files import read_json_object
from keras_openllama.utils.text_files import decode_text

if TYPE_CHECKING:
    from keras_openllama.checkpoints.repository import Repository

TEMPLATE_FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_JSON_FILE = "chat_template.json"  # Of processors, before there was the Jinja file.
_TOKENS = ("bos_token", "eos_token")


def read_chat_template(repository: Repository) -> str | None:
    """Reads the chat template of a model.

    Args:
        repository: The directory or repository.

    Returns:
        The template in Jinja, or `None` if there is none. Start and end tokens other
        than `<s>` and `</s>` are set at its beginning. A template that is not valid is
        ignored with a warning: the model can be used without it.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is damaged.
    """
    path = repository.optional(_CONFIG)
    config = read_json_object(path) if path else {}
    template = default_template(config.get("chat_template"))
    if path := repository.optional(_JSON_FILE):
        other = default_template(read_json_object(path).get("chat_template"))
        template = template or other
    if path := repository.optional(TEMPLATE_FILE):
        template = decode_text(path.read_bytes(), path)
    return usable_template(template, config, repository)


def usable_template(
    template: str | None, tokens: Mapping[str, Any], where: Any
) -> str | None:
    """Returns a template that does not depend on other files.

    Args:
        template: A template in Jinja, if there is one.
        tokens: The texts of `bos_token` and `eos_token`.
        where: Names the model in a warning.

    Returns:
        The template, in which start and end tokens other than `<s>` and `</s>` are set
        at the beginning. `None`, with a warning, if it is not valid.
    """
    if not template:
        return None
    try:
        JinjaTemplate(template)
    except ChatTemplateError as error:
        warnings.warn(f"{where}: {error}. It is ignored.", stacklevel=2)
        return None
    return _token_settings(tokens, template) + template


def default_template(templates: Any) -> str | None:
    """Returns the default of the templates in a file.

    Args:
        templates: A template, or several `{"name": …, "template": …}`.

    Returns:
        The template, or `None` if there is none.

    Example:
        >>> default_template([{"name": "default", "template": "{{ messages }}"}])
        '{{ messages }}'
    """
    if isinstance(templates, list):
        templates = {
            entry["name"]: entry["template"]
            for entry in templates
            if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
        }
    if isinstance(templates, dict):
        templates = templates.get("default")
    return templates if isinstance(templates, str) else None


def exported_template(preprocessing: Mapping[str, Any]) -> str | None:
    """Returns the chat template of a preprocessor in Jinja.

    Args:
        preprocessing: Settings of the preprocessor, see `PREPROCESSOR_SETTINGS`.

    Returns:
        The template, or `None` if there is none.
    """
    template = preprocessing.get("chat_template")
    if template is None:
        return None
    add_tokens = (
        preprocessing.get(name, True) for name in ("add_start_token", "add_end_token")
    )
    return as_jinja(template, *add_tokens)


def as_jinja(
    template: dict[str, str] | str, add_start_token: bool = True, add_end: bool = True
) -> str:
    r"""Converts a chat template to Jinja.

    Args:
        template: Text by role, or a template in Jinja, which is returned.
        add_start_token: Whether a chat begins with the start token.
        add_end: Whether a reply ends with the end token.

    Returns:
        The template in Jinja.

    Example:
        >>> template = {"user": "Q: {content}\n", "assistant": "A: {content}"}
        >>> rendered = JinjaTemplate(as_jinja(template), {"bos_token": "<s>"})
        >>> rendered.render([{"role": "user", "content": "Hi"}], True)
        '<s>Q: Hi\nA: '
    """
    if isinstance(template, str):
        return template
    lines = ["{{ bos_token }}"] if add_start_token else []
    lines.append("{% for message in messages %}")
    keyword = "if"
    for role, text in template.items():
        before, after = map(repr, text.split("{content}"))
        end = " + eos_token" if add_end and role == "assistant" else ""
        content = f"{before} + message['content'] + {after}{end}"
        lines += [
            f"{{% {keyword} message['role'] == {role!r} %}}",
            f"{{{{ {content} }}}}",
        ]
        keyword = "elif"
    before, _ = map(repr, template["assistant"].split("{content}"))
    roles = ", ".join(template)
    lines += [
        "{% else %}",
        f"{{{{ raise_exception({f'The roles are {roles}.'!r}) }}}}",
        "{% endif %}",
        "{% endfor %}",
        f"{{% if add_generation_prompt %}}{{{{ {before} }}}}{{% endif %}}",
    ]
    return "".join(lines)


def _token_settings(config, template):
    """Sets the tokens of a template that are not those of all these models."""
    settings = ""
    for name, usual in zip(_TOKENS, ("<s>", "</s>"), strict=True):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        is_set = template.startswith("{% set " + name)
        if isinstance(token, str) and token != usual and name in template:
            settings += "" if is_set else "{% set " + f"{name} = {token!r}" + " %}"
    return settings
