"""Prompts of tasks as chats, rendered with the chat template of the model.

Source: `HFLM.apply_chat_template` of lm-evaluation-harness.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from keras_openllama.checkpoints.chat_template import as_jinja
from keras_openllama.text.jinja_template import ChatTemplateError, JinjaTemplate

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm_preprocessor import (
        OpenLlamaCausalLMPreprocessor,
    )

# A noncharacter of Unicode after the message to continue. A template that removes
# spaces around messages removes the space.
_END_MARK = "\ufdd2 "

logger = logging.getLogger(__name__)


class ChatPrompts:
    r"""Renders chats as prompts.

    Args:
        preprocessor: the preprocessor of the model, with a chat template.

    Raises:
        ValueError: if it has no chat template.

    Example:
        >>> from keras_openllama import OpenLlamaCausalLMPreprocessor
        >>> preprocessor = OpenLlamaCausalLMPreprocessor.from_preset("open_llama_nano")
        >>> preprocessor.chat_template = {
        ...     "user": "Q: {content}\n", "assistant": "A: {content}"
        ... }
        >>> chat = [{"role": "user", "content": "Hi"}]
        >>> ChatPrompts(preprocessor).render(chat)
        '<s>Q: Hi\nA: '
    """

    def __init__(self, preprocessor: OpenLlamaCausalLMPreprocessor):
        template = preprocessor.compiled_chat_template()
        if template is None:
            raise ValueError(
                "The model has no chat template, which --apply_chat_template "
                "(`apply_chat_template`) needs. Add a chat_template.jinja to its "
                "directory; or set `lm.preprocessor.chat_template` and pass `lm`; or "
                "evaluate without a chat template."
            )
        if isinstance(template, dict):
            start, end = preprocessor.tokenizer.special_tokens
            added = preprocessor.add_start_token, preprocessor.add_end_token
            tokens = {"bos_token": start, "eos_token": end}
            template = JinjaTemplate(as_jinja(template, *added), tokens)
        self._template = template

    @property
    def source(self) -> str:
        """The template in Jinja."""
        return self._template.source

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits that tell templates apart."""
        return hashlib.sha256(self.source.encode("utf-8", "replace")).hexdigest()[:8]

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a chat as text.

        Args:
            messages: dicts of `"role"` and `"content"`. If the template refuses them
                with a system message, they are rendered without it, with a warning.
            add_generation_prompt: whether to end with what begins a reply. Otherwise
                the text ends within the last message, for the model to continue it.

        Returns:
            The text, with all special tokens.

        Raises:
            ChatTemplateError: if the template refuses the chat.
        """
        render = self._render_prompt if add_generation_prompt else self._render_part
        try:
            return render(messages)
        except ChatTemplateError:
            rest = [m for m in messages if m["role"] != "system"]
            if len(rest) == len(messages):
                raise
            text = render(rest)
        logger.warning(
            "The chat template of the model has no system messages. They are dropped."
        )
        return text

    def _render_prompt(self, messages):
        return self._template.render(messages, add_generation_prompt=True)

    def _render_part(self, messages):
        """Renders a chat up to the end of the content of its last message."""
        *before, last = messages
        last = {**last, "content": last["content"] + _END_MARK}
        text = self._template.render([*before, last])
        mark = _END_MARK.strip()
        if mark not in text:
            raise ChatTemplateError(
                "the chat template does not render the last message, which is to be "
                f"continued: {messages[-1]!r:.200}"
            )
        position = text.rindex(mark)
        keeps_spaces = text[position:].startswith(_END_MARK)
        return text[:position] if keeps_spaces else text[:position].rstrip()
