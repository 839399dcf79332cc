"""Checks of settings: of their type and range.

A check takes a setting's name and value, and returns the value or raises `ValueError`.
"""

import math


def refuse(name, value, requirement):
    """Raises the `ValueError` for a setting."""
    raise ValueError(f"`{name}` must be {requirement}. Received: {name}={value!r}")


def whole(least):
    def check(name, value):
        if type(value) is not int or value < least:  # A bool is an int, too.
            refuse(name, value, f"a whole number from {least} on, written in digits")
        return value

    return check


def _number(requirement, allowed):
    def check(name, value):
        try:
            # YAML 1.1 takes 3e-4, which has no point, for a string.
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and allowed(number)):
            refuse(name, value, f"a number {requirement}")
        return number

    return check


def one_of(*choices):
    def check(name, value):
        if type(value) is not type(choices[0]) or value not in choices:
            refuse(name, value, f"one of {', '.join(map(repr, choices))}")
        return value

    return check


def name_or_json_path(names):
    """A check for one of some names, the path of a JSON file, or `None`.

    Args:
        names: function without arguments that returns the names that are known.
    """

    def check(name, value):
        known = names()
        is_path = isinstance(value, str) and value.endswith(".json")
        if not (value is None or value in known or is_path):
            listed = ", ".join(map(repr, known))
            refuse(name, value, f"one of {listed}, the path of a JSON file, or null")
        return value

    return check


positive = _number("above 0", lambda value: value > 0)
from_zero = _number("from 0 on", lambda value: value >= 0)
fraction = _number("from 0 to below 1", lambda value: 0 <= value < 1)
threshold = _number("above 1, or 0 for never", lambda value: value == 0 or value > 1)
