"""Requests of lm-evaluation-harness, of which equal ones are computed once."""

from __future__ import annotations

from typing import Any


class UniqueRequests:
    """Requests in the order of the harness, by the key of their response.

    Attributes:
        keys: the key of each request, in order. Equal requests have equal keys.
        inputs: by key, what the model computes the response from.

    Example:
        >>> requests = UniqueRequests()
        >>> for text in ("The sea", "A ship", "The sea"):
        ...     requests.add(text.lower(), inputs=text, arguments=(text, {}))
        >>> requests.keys
        ['the sea', 'a ship', 'the sea']
        >>> requests.inputs
        {'the sea': 'The sea', 'a ship': 'A ship'}
        >>> requests.arguments("the sea")
        [('The sea', {}), ('The sea', {})]
    """

    def __init__(self):
        self.keys: list[str] = []
        self.inputs: dict[str, Any] = {}
        self._arguments: dict[str, list[Any]] = {}

    def add(self, key: str, inputs: Any, arguments: Any):
        """Adds a request.

        Args:
            key: the key of its response, see `response_cache.request_key`.
            inputs: what the model computes the response from.
            arguments: the arguments of the harness's `Instance`. `None` for a part of a
                request.
        """
        self.keys.append(key)
        self.inputs[key] = inputs
        self._arguments.setdefault(key, []).append(arguments)

    def arguments(self, key: str) -> list[Any]:
        """Returns the arguments of all requests with a key, in order."""
        return self._arguments[key]
