"""Validates the type and the range of arguments and settings.

A validator is a function of a name and a value. It returns the value, or raises
`ValueError` with the name, the requirement and the value received.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeAlias

_FLOAT32_MAX = 3.4e38

Validator: TypeAlias = Callable[[str, Any], Any]


def raise_invalid(name: str, value: object, requirement: str) -> NoReturn:
    """Raises the `ValueError` for an invalid argument or setting.

    Args:
        name: Name of the argument or setting.
        value: The value received.
        requirement: What it must be, such as `"a positive integer"`.

    Raises:
        ValueError: Always.

    Example:
        >>> raise_invalid("steps", 0, "a positive integer")
        Traceback (most recent call last):
        ...
        ValueError: `steps` must be a positive integer. Received: steps=0
    """
    raise ValueError(f"`{name}` must be {requirement}. Received: {name}={value!r}")


def check_integer(
    name: str, value: object, least: int = 1, most: int | None = None
) -> int:
    """Validates an integer of Python, NumPy or a backend.

    Args:
        name: Name of the argument or setting.
        value: The value. Booleans, strings and floats are rejected.
        least: The least valid integer.
        most: The greatest valid integer. Defaults to no limit.

    Returns:
        The value as an `int`.

    Raises:
        ValueError: If it is not an integer, or out of range.

    Example:
        >>> check_integer("steps", 500)
        500
        >>> check_integer("context", 33, most=32)
        Traceback (most recent call last):
        ...
        ValueError: `context` must be an integer from 1 to 32. Received: context=33
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is not None and least <= number and (most is None or number <= most):
        return number
    kinds = {0: "a non-negative integer", 1: "a positive integer"}
    requirement = kinds.get(least, f"an integer of at least {least}")
    if most is not None:
        requirement = f"an integer from {least} to {most}"
    raise_invalid(name, value, requirement)


def integer_at_least(least: int) -> Validator:
    """Returns `check_integer` as a validator for integers of at least `least`.

    Example:
        >>> integer_at_least(0)("seed", 7)
        7
    """
    return functools.partial(check_integer, least=least)


# Steps are counted in int32 on devices.
step_count = functools.partial(check_integer, least=1, most=2**31 - 1)


def _number(requirement, allowed):
    """Returns a validator for numbers in the range of float32."""

    def validate(name, value):
        try:
            # YAML 1.1 parses 3e-4, which has no decimal point, as a string.
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and allowed(number)):
            raise_invalid(name, value, requirement)
        if abs(number) > _FLOAT32_MAX:
            raise_invalid(name, value, f"{requirement} of at most {_FLOAT32_MAX}")
        return number

    return validate


def check_positive(name: str, value: object) -> int | float:
    """Validates a positive number, which must not be a string.

    Args:
        name: Name of the argument or setting.
        value: The value.

    Returns:
        The value; an `int` if it is an integer.

    Raises:
        ValueError: If it is not a positive number.

    Example:
        >>> check_positive("alpha", 16.0)
        16
    """
    if isinstance(value, (str, bytes)):
        raise_invalid(name, value, "a positive number, without quotation marks")
    number = positive_number(name, value)
    return int(number) if number.is_integer() else number


def one_of(*choices: object) -> Validator:
    """Returns a validator for one of some values of the same type.

    Example:
        >>> one_of("adamw", "muon")("optimizer", "muon")
        'muon'
    """

    def validate(name, value):
        if type(value) is not type(choices[0]) or value not in choices:
            raise_invalid(name, value, f"one of {', '.join(map(repr, choices))}")
        return value

    return validate


def name_or_json_path(names: Callable[[], Iterable[str]]) -> Validator:
    """Returns a validator for a known name, the path of a JSON file, or `None`.

    Args:
        names: Function without arguments that returns the known names.

    Example:
        >>> name_or_json_path(lambda: ["v1", "v2"])("mixture", "mine.json")
        'mine.json'
    """

    def validate(name, value):
        known = names()
        is_path = isinstance(value, str) and value.endswith(".json")
        if not (value is None or value in known or is_path):
            listed = ", ".join(map(repr, known))
            requirement = f"one of {listed}, the path of a JSON file, or null"
            raise_invalid(name, value, requirement)
        return value

    return validate


positive_number = _number("a positive number", lambda value: value > 0)
non_negative = _number("a non-negative number", lambda value: value >= 0)
fraction = _number("a number in [0, 1)", lambda value: 0 <= value < 1)
threshold = _number(
    "a number above 1, or 0 to disable it", lambda value: value == 0 or value > 1
)
