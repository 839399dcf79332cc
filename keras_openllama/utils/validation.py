"""What a setting of a recipe may be.

A check takes a setting's name and value, and returns the value or raises `ValueError`.
"""

import math

AXES = ("data", "fsdp", "model")


def mesh_of(text):
    """A mesh from such as `data=4,fsdp=64`: dict of the axes that are named.

    Raises:
        ValueError: for an axis that there is not, or a size below 1.
    """
    mesh = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--mesh takes such as data=4,fsdp=64,model=1. Received: {text!r}"
            )
        mesh[axis] = int(size)
    return mesh


def _refuse(name, value, requirement):
    raise ValueError(f"`{name}` must be {requirement}. Received: {name}={value!r}")


def whole(least):
    def check(name, value):
        if type(value) is not int or value < least:  # A bool is an int, too.
            _refuse(name, value, f"a whole number from {least} on, written in digits")
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
            _refuse(name, value, f"a number {requirement}")
        return number

    return check


def one_of(*choices):
    def check(name, value):
        if type(value) is not type(choices[0]) or value not in choices:
            _refuse(name, value, f"one of {', '.join(map(repr, choices))}")
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
            _refuse(name, value, f"one of {listed}, the path of a JSON file, or null")
        return value

    return check


def meshes(name, value):
    if not isinstance(value, dict):
        _refuse(name, value, "meshes by number of chips, such as {8: {fsdp: 8}}")
    return {
        str(chips): _mesh(f"{name}[{chips}]", chips, value[chips]) for chips in value
    }


def _mesh(name, chips, axes):
    mesh = {**dict.fromkeys(AXES, 1), **axes} if isinstance(axes, dict) else {}
    sizes = [size for size in mesh.values() if type(size) is int and size >= 1]
    if tuple(mesh) != AXES or len(sizes) != 3 or str(math.prod(sizes)) != str(chips):
        requirement = f"sizes of {', '.join(AXES)} whose product is the number of chips"
        _refuse(name, axes, requirement)
    return mesh


def planned(name, value):
    """By number of chips, how much a device does at once; see `Recipe.planned`."""
    if not isinstance(value, dict) or not all(str(n).isdecimal() for n in value):
        _refuse(
            name,
            value,
            "by number of chips, such as {8: {rows: 2, rematerialize: full}}",
        )
    return {str(chips): _plan(f"{name}[{chips}]", value[chips]) for chips in value}


def _plan(name, plan):
    if not isinstance(plan, dict) or set(plan) != {"rows", "rematerialize"}:
        _refuse(name, plan, "of rows and rematerialize")
    whole(1)(f"{name}: rows", plan["rows"])
    rematerialize(f"{name}: rematerialize", plan["rematerialize"])
    return dict(plan)


# The policies of `rematerialization`, which imports Keras.
rematerialize = one_of("none", "products", "projections", "full")
positive = _number("above 0", lambda value: value > 0)
from_zero = _number("from 0 on", lambda value: value >= 0)
fraction = _number("from 0 to below 1", lambda value: 0 <= value < 1)
threshold = _number("above 1, or 0 for never", lambda value: value == 0 or value > 1)
