"""Checks of the settings that concern devices: meshes, rematerialization.

A check takes a setting's name and value, and returns the value or raises `ValueError`.
"""

import math

from keras_openllama.config import MESH_AXES, REMATERIALIZATION
from keras_openllama.utils import validation

rematerialize = validation.one_of(*REMATERIALIZATION)


def mesh_of(text):
    """A mesh from such as `data=4,fsdp=64`: dict of the axes that are named.

    Raises:
        ValueError: for an axis that there is not, or a size below 1.
    """
    mesh = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"a mesh is such as data=4,fsdp=64,model=1. Received: {text!r}"
            )
        mesh[axis] = int(size)
    return mesh


def meshes(name, value):
    if not isinstance(value, dict):
        validation.raise_invalid(
            name, value, "meshes by number of chips, such as {8: {fsdp: 8}}"
        )
    return {
        str(chips): _mesh(f"{name}[{chips}]", chips, value[chips]) for chips in value
    }


def _mesh(name, chips, axes):
    mesh = {**dict.fromkeys(MESH_AXES, 1), **axes} if isinstance(axes, dict) else {}
    sizes = [size for size in mesh.values() if type(size) is int and size >= 1]
    if (
        tuple(mesh) != MESH_AXES
        or len(sizes) != 3
        or str(math.prod(sizes)) != str(chips)
    ):
        requirement = (
            f"sizes of {', '.join(MESH_AXES)} whose product is the number of chips"
        )
        validation.raise_invalid(name, axes, requirement)
    return mesh


def planned(name, value):
    """By number of chips, how much a device does at once; see `Recipe.planned`."""
    if not isinstance(value, dict) or not all(str(n).isdecimal() for n in value):
        validation.raise_invalid(
            name,
            value,
            "by number of chips, such as {8: {rows: 2, rematerialize: full}}",
        )
    return {str(chips): _plan(f"{name}[{chips}]", value[chips]) for chips in value}


def _plan(name, plan):
    if not isinstance(plan, dict) or set(plan) != {"rows", "rematerialize"}:
        validation.raise_invalid(name, plan, "of rows and rematerialize")
    validation.integer_at_least(1)(f"{name}: rows", plan["rows"])
    rematerialize(f"{name}: rematerialize", plan["rematerialize"])
    return dict(plan)
