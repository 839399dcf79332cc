"""Validators of device settings: meshes, rematerialization, planned memory settings.

A validator takes the name and the value of a setting. It returns the value or raises
`ValueError`.
"""

from __future__ import annotations

import math
from typing import Any

from keras_openllama.config import MESH_AXES, REMATERIALIZATION
from keras_openllama.utils import validation

check_rematerialize = validation.one_of(*REMATERIALIZATION)

_SEQUENCES = "sequences_per_device"
_OLD_NAMES = {"rows": _SEQUENCES}  # In runs and YAML files of earlier versions.


def parse_mesh(text: str) -> dict[str, int]:
    """Parses the text form of a mesh.

    Args:
        text: Axes with their sizes, such as `"data=4,fsdp=64"`.

    Returns:
        Sizes of the axes that are named.

    Raises:
        ValueError: for an unknown axis, or a size below 1.

    Example:
        >>> parse_mesh("data=4,fsdp=64")
        {'data': 4, 'fsdp': 64}
    """
    mesh = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"A mesh must have the form data=4,fsdp=64,model=1. Received: {text!r}"
            )
        mesh[axis] = int(size)
    return mesh


def check_meshes(name: str, value: Any) -> dict[str, dict[str, int]]:
    """Validates meshes by number of devices.

    Args:
        name: Name of the setting, for error messages.
        value: Dict from a number of devices to the sizes of the mesh axes.

    Returns:
        The meshes, each with all axes, by number of devices as a string.

    Raises:
        ValueError: if an axis is unknown, or the sizes do not multiply to the number.

    Example:
        >>> check_meshes("meshes", {8: {"fsdp": 8}})
        {'8': {'data': 1, 'fsdp': 8, 'model': 1}}
    """
    if not isinstance(value, dict):
        validation.raise_invalid(
            name, value, "a dict of meshes by number of chips, such as {8: {fsdp: 8}}"
        )
    return {
        str(chips): _check_axes(f"{name}[{chips}]", chips, value[chips])
        for chips in value
    }


def _check_axes(name, chips, axes):
    mesh = {**dict.fromkeys(MESH_AXES, 1), **axes} if isinstance(axes, dict) else {}
    sizes = [size for size in mesh.values() if type(size) is int and size >= 1]
    if (
        tuple(mesh) != MESH_AXES
        or len(sizes) != 3
        or str(math.prod(sizes)) != str(chips)
    ):
        requirement = (
            f"a dict of sizes of {', '.join(MESH_AXES)} whose product is the number of "
            "chips"
        )
        validation.raise_invalid(name, axes, requirement)
    return mesh


def check_planned(name: str, value: Any) -> dict[str, dict[str, Any]]:
    """Validates planned memory settings by number of devices, see `Recipe.planned`.

    Args:
        name: Name of the setting, for error messages.
        value: Dict from a number of devices to `"sequences_per_device"` (or its old
            name `"rows"`) and `"rematerialize"`.

    Returns:
        The settings by number of devices as a string.

    Raises:
        ValueError: if an entry is invalid.

    Example:
        >>> plan = {"sequences_per_device": 2, "rematerialize": "full"}
        >>> check_planned("planned", {8: plan})
        {'8': {'sequences_per_device': 2, 'rematerialize': 'full'}}
    """
    if not isinstance(value, dict) or not all(str(n).isdecimal() for n in value):
        validation.raise_invalid(
            name,
            value,
            "a dict by number of chips, such as "
            "{8: {sequences_per_device: 2, rematerialize: full}}",
        )
    return {
        str(chips): _check_plan(f"{name}[{chips}]", value[chips]) for chips in value
    }


def _check_plan(name, plan):
    keys = {_SEQUENCES, "rematerialize"}
    found = plan if isinstance(plan, dict) else {}
    found = {_OLD_NAMES.get(key, key): value for key, value in found.items()}
    if set(found) != keys or len(plan) != len(keys):
        validation.raise_invalid(
            name, plan, f"a dict of {_SEQUENCES!r} and 'rematerialize'"
        )
    sequences = validation.check_integer(f"{name}: {_SEQUENCES}", found[_SEQUENCES])
    policy = check_rematerialize(f"{name}: rematerialize", found["rematerialize"])
    return {_SEQUENCES: sequences, "rematerialize": policy}
