"""Tokens that a checkpoint adds to its SentencePiece model, as transformers does.

Chat models often name a few rows of the embedding that the SentencePiece model does not
have, such as `<|im_start|>`. A text is split at these tokens before SentencePiece
tokenizes what lies between them.

Source: `AddedVocabulary` of the `tokenizers` library, whose behavior this follows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is not part of the SentencePiece model.

    Attributes:
        content: its text.
        id: its token id, usually after those of the SentencePiece model.
        special: whether it is a control token: it is encoded only where control strings
            are parsed, and it has no text when decoded.
        normalized: whether it is found in the normalized text, in which spaces are
            `"▁"` and one precedes the text. So it must follow a space.
        lstrip: whether it includes the white space before it.
        rstrip: whether it includes the white space after it.
        single_word: whether it must not touch letters or digits.

    Example:
        >>> AddedToken("<|im_end|>", 32000).to_json()
        {'content': '<|im_end|>', 'id': 32000, 'special': True}
    """

    content: str
    id: int
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes that differ from `False`, for JSON."""
        flags = {name: True for name in _FLAGS if getattr(self, name)}
        if not self.special:
            flags["special"] = False
        return {"content": self.content, "id": self.id, **flags}

    @classmethod
    def from_json(cls, data: Any, name: str = "added_tokens") -> AddedToken:
        """Creates a token from a dict.

        Args:
            data: dict with `content`, `id` and any of the flags.
            name: name of the argument or file for error messages.

        Returns:
            The token.

        Raises:
            ValueError: if `data` does not describe a token.

        Example:
            >>> AddedToken.from_json({"content": "[PAD]", "id": 32000}).special
            True
        """
        names = {field.name for field in dataclasses.fields(cls)}
        is_valid = (
            isinstance(data, dict)
            and set(data) <= names
            and isinstance(data.get("content"), str)
            and data["content"]
            and isinstance(data.get("id"), int)
            and not isinstance(data["id"], bool)
            and data["id"] >= 0
            and all(isinstance(data.get(flag, False), bool) for flag in _FLAGS)
        )
        if not is_valid:
            raise ValueError(
                f"`{name}` must describe each token by its text `content`, its integer "
                f"`id` and flags ({', '.join(_FLAGS)}). Received: {data!r}"
            )
        return cls(**data)


def as_added_tokens(tokens: Iterable[Any], first_id: int) -> tuple[AddedToken, ...]:
    """Converts the argument `added_tokens` of a tokenizer.

    Args:
        tokens: each an `AddedToken`, a dict with its attributes, or a string: a special
            token with the next free id.
        first_id: the id of the first string, if no other token has a higher one.

    Returns:
        The tokens by ascending id.

    Raises:
        ValueError: if a token is malformed, or a text or an id occurs twice.

    Example:
        >>> [token.id for token in as_added_tokens(["<|user|>", "<|bot|>"], 32000)]
        [32000, 32001]
    """
    if isinstance(tokens, (str, dict)):
        raise ValueError(f"`added_tokens` must be a list. Received: {tokens!r}")
    result, names = [], []
    for token in tokens:
        if isinstance(token, str) and token:
            names.append(token)
        elif isinstance(token, AddedToken):
            result.append(token)
        else:
            result.append(AddedToken.from_json(token))
    next_id = max([first_id, *(token.id + 1 for token in result)])
    result += [AddedToken(name, next_id + i) for i, name in enumerate(names)]
    for attribute in ("content", "id"):
        values = [getattr(token, attribute) for token in result]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(
                f"`added_tokens` must not repeat a token's {attribute}. "
                f"Received twice: {', '.join(map(repr, twice))}"
            )
    return tuple(sorted(result, key=lambda token: token.id))


class TokenSplitter:
    """Finds tokens in a text: the leftmost, and the longest of those that begin there.

    Args:
        tokens: the tokens to find, by the text to search for.

    Example:
        >>> splitter = TokenSplitter({"<sep>": AddedToken("<sep>", 32000)})
        >>> list(splitter.split("a<sep>b"))
        [('a', None), ('<sep>', 32000), ('b', None)]
    """

    def __init__(self, tokens: dict[str, AddedToken]):
        ordered = sorted(tokens.items(), key=lambda item: len(item[0]), reverse=True)
        self._ids = [token.id for _, token in ordered]
        patterns = [_pattern(text, token) for text, token in ordered]
        self._pattern = re.compile("|".join(f"({p})" for p in patterns))

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yields the parts of a text.

        Args:
            text: any text.

        Yields:
            `(part, token_id)`; the id is `None` for text between tokens, which is never
            empty.
        """
        position = 0
        for match in self._pattern.finditer(text) if self._ids else ():
            if match.start() > position:
                yield text[position : match.start()], None
            yield match.group(), self._ids[match.lastindex - 1]
            position = match.end()
        if position < len(text):
            yield text[position:], None


def _pattern(text, token):
    pattern = re.escape(text)
    if token.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return r"\s*" * token.lstrip + pattern + r"\s*" * token.rstrip


def undefined_ids(tokens: Sequence[AddedToken], pieces: int) -> list[int]:
    """Returns the ids below the highest one that have no token.

    Args:
        tokens: the added tokens.
        pieces: number of pieces of the SentencePiece model.

    Returns:
        The ids in ascending order.

    Example:
        >>> undefined_ids([AddedToken("[PAD]", 32002)], pieces=32000)
        [32000, 32001]
    """
    named = {token.id for token in tokens}
    return [i for i in range(pieces, max(named, default=0)) if i not in named]


def undefined_token(id: int) -> str:
    """Returns the name of an id that has no token, for files that need one.

    Example:
        >>> undefined_token(32001)
        '<undefined 32001>'
    """
    return f"<undefined {id}>"
