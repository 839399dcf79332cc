"""Reading of JSON bodies from clients that are not trusted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from keras_openllama.serving.errors import ApiError


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parses the body of a request.

    Args:
        data: The body.

    Returns:
        The object, without fields that are null: they stand for defaults.

    Raises:
        ApiError: If the body is not a JSON object, or has text that is not Unicode.

    Example:
        >>> parse_json_object(b'{"prompt": "The sea", "seed": null}')
        {'prompt': 'The sea'}
    """
    try:
        body = json.loads(data.decode(), parse_constant=_refuse_constant)
        # JSON may contain halves of surrogate pairs, which are not text.
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(f"The body must be valid JSON in UTF-8: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(
            f"The body must be a JSON object. Received: {type(body).__name__}"
        )
    return {name: value for name, value in body.items() if value is not None}


def _refuse_constant(name):
    raise ValueError(f"{name} is not a number of JSON")


class Fields:
    """Takes the fields of a JSON object one by one, and refuses those that remain.

    Args:
        body: Result of `parse_json_object`.

    Example:
        >>> fields = Fields({"n": 2, "best": 3})
        >>> fields.take("n", is_integer, "an integer", default=1)
        2
        >>> fields.refuse_others()
        Traceback (most recent call last):
        ...
        keras_openllama.serving.errors.ApiError: Unknown field: best
    """

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = dict(body)

    def take(
        self,
        name: str,
        is_valid: Callable[[Any], bool],
        requirement: str,
        default: Any = None,
    ) -> Any:
        """Removes a field and returns its value.

        Args:
            name: The field.
            is_valid: Whether a value is valid.
            requirement: What the value must be, for the error message.
            default: The value of a field that is not given.

        Raises:
            ApiError: If the value is not valid.
        """
        if name not in self._body:
            return default
        value = self._body.pop(name)
        if not is_valid(value):
            raise ApiError(
                f"`{name}` must be {requirement}. Received: {shorten(value)}",
                param=name,
            )
        return value

    def discard(self, *names: str) -> None:
        """Removes fields without an effect on the result."""
        for name in names:
            self._body.pop(name, None)

    def refuse(self, name: str, reason: str) -> None:
        """Raises an `ApiError` if a field is given."""
        if name in self._body:
            raise ApiError(f"`{name}` {reason}", param=name, code="unsupported_value")

    def refuse_others(self) -> None:
        """Raises an `ApiError` if fields remain."""
        for name in self._body:
            shown = shorten(name).strip('"')
            raise ApiError(f"Unknown field: {shown}", param=shown, code="unknown_field")


def shorten(value: Any, length: int = 100) -> str:
    """Returns a value of a body for an error message.

    Example:
        >>> shorten("a" * 200, length=6)
        '"aaaa…'
    """
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else text[: length - 1] + "…"


def is_integer(value: Any) -> bool:
    """Whether a value is an integer. A boolean is none.

    Example:
        >>> is_integer(3), is_integer(True), is_integer(3.0)
        (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool)


def is_integer_in(least: int, most: int) -> Callable[[Any], bool]:
    """Returns a function that tells whether a value is an integer of a range.

    Example:
        >>> is_integer_in(0, 5)(6)
        False
    """
    return lambda value: is_integer(value) and least <= value <= most


def is_bool(value: Any) -> bool:
    """Whether a value is true or false.

    Example:
        >>> is_bool(0)
        False
    """
    return isinstance(value, bool)


def is_string(value: Any) -> bool:
    """Whether a value is a string.

    Example:
        >>> is_string("")
        True
    """
    return isinstance(value, str)
