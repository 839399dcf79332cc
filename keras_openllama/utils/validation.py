"""Validates the type and the range of settings.

A validator is a function of a setting's name and value. It returns the value, or raises
`ValueError` with the name, the requirement and the value received.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeAlias

Validator: TypeAlias = Callable[[str, Any], Any]


def raise_invalid(name: str, value: object, requirement: str) -> NoReturn:
    """Raises the `ValueError` for an invalid setting.

    Args:
        name: Name of the setting.
        value: The value received.
        requirement: What the setting must be, such as `"a positive integer"`.

    Raises:
        ValueError: Always.

    Example:
        >>> raise_invalid("steps", 0, "a positive integer")
        Traceback (most recent call last):
        ...
        ValueError: `steps` must be a positive integer. Received: steps=0
    """
    raise ValueError(f"`{name}` must be {requirement}. Received: {name}={value!r}")


def integer_at_least(least: int) -> Validator:
    """Returns a validator for an `int` of at least `least`; `bool` is rejected.

    Example:
        >>> integer_at_least(1)("steps", 500)
        500
    """
    kinds = {0: "a non-negative integer", 1: "a positive integer"}
    requirement = kinds.get(least, f"an integer of at least {least}")

    def validate(name, value):
        if type(value) is not int or value < least:  # A bool is an int, too.
            raise_invalid(name, value, f"{requirement}, written in digits")
        return value

    return validate


def _number(requirement, allowed):
    def validate(name, value):
        try:
            # YAML 1.1 parses 3e-4, which has no decimal point, as a string.
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and allowed(number)):
            raise_invalid(name, value, requirement)
        return number

    return validate


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
