"""Files of `--chat-template`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from keras_openllama.cli.paths import require_file
from keras_openllama.utils.text_files import decode_text

_EXAMPLE = '{"user": "USER: {content}\\n", "assistant": "BOT: {content}"}'


def add_chat_template(group: argparse._ActionsContainer) -> None:
    """Adds the flag `--chat-template`, for `read_chat_template`, to a parser.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_chat_template(parser)
        >>> parser.parse_args(["--chat-template", "a.jinja"]).chat_template
        'a.jinja'
    """
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="file of a chat template in Jinja, or JSON file of a template by role, "
        f"such as {_EXAMPLE} (default: the chat template of the model, if it has one)",
    )


def read_chat_template(path: str) -> dict[str, str] | str:
    """Reads the file of `--chat-template`.

    Args:
        path: Path of a template in Jinja, of a JSON file of a template by role, or of
            a `tokenizer_config.json` or `chat_template.json` of transformers.

    Returns:
        The template, see `OpenLlamaCausalLMPreprocessor`.

    Raises:
        ValueError: If the file cannot be read, or holds no chat template.
    """
    require_file("--chat-template", path)
    from keras_openllama.checkpoints.chat_template import default_template
    from keras_openllama.text.chat_template import check_template

    try:
        text = decode_text(Path(path).read_bytes(), "the file")
        template = _json_or_jinja(text)
        if isinstance(template, dict) and "chat_template" in template:
            template = default_template(template["chat_template"])
        check_template(template or {})
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--chat-template: {path} is not valid JSON: {error}. It must map roles to "
            f"texts with {{content}}, such as {_EXAMPLE}, or be a template in "
            "Jinja"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"--chat-template: {path}: {error}") from error
    return template


def _json_or_jinja(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        if "{%" in text or "{{" in text:
            return text
        raise
