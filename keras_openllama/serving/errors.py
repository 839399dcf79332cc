"""Errors of the API, with the bodies of OpenAI's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """An error that the server returns to the client.

    Args:
        message: What is wrong, and what to do.
        status: The status code of HTTP.
        param: The field of the body that is wrong, or `None`.
        code: A short code for programs, such as `"context_length_exceeded"`.
        headers: Headers of the response.

    Example:
        >>> ApiError("Unknown model.", status=404, param="model").body()
        {'error': {'message': 'Unknown model.', 'type': 'invalid_request_error', \
'param': 'model', 'code': None}}

    Source: OpenAI's API reference, "Error codes".
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Returns the body of the response."""
        return {
            "error": {
                "message": self.message,
                "type": _type_of(self.status),
                "param": self.param,
                "code": self.code,
            }
        }


def _type_of(status):
    types = {401: "authentication_error", 429: "rate_limit_error"}
    return types.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )


def from_value_error(error: ValueError, param: str | None = None) -> ApiError:
    """Returns the error for a value that a function of the package refused.

    Args:
        error: The error. Its message may begin with the name of the argument in
            backquotes.
        param: The field of the body. By default, the name in the message.

    Example:
        >>> from_value_error(ValueError("`top_p` must be a number in (0, 1].")).param
        'top_p'
    """
    match = re.match(r"`(\w+)", str(error))
    return ApiError(str(error), param=param or (match[1] if match else None))
