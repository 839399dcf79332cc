"""Estimates of a training step at full depth from two compilations of fewer layers.

Decoder layers are identical, so time and memory of a step are linear in their number:
each layer adds the same computation, collectives, states of the optimizer and saved
activations, and the embedding and the head are constant.
"""

from __future__ import annotations

import dataclasses
from typing import Any

# The compiler unrolls a loop of one step, and a step has two layers where gradients are
# reduced by all-to-alls. There, 2 and 4 layers estimate 3B and 7B on 8 chips of v4 8.5
# and 7 % slower than they are, and the memory of 7B 17 % smaller. docs/tpu.md has the
# deviations of this pair, which compiles nearly as fast.
DEPTHS = (4, 8)


def extrapolate(values: tuple[Any, Any], depths: tuple[int, int], depth: int) -> Any:
    """Returns the value of a linear function of the depth.

    Args:
        values: values at two depths: numbers, dicts of them, or dataclasses with such
            fields. A key that only one dict has is 0 in the other one.
        depths: the two depths.
        depth: the depth of the result.

    Returns:
        The value at that depth, of the type of the given ones; never below 0.

    Example:
        >>> extrapolate((3.0, 5.0), (2, 4), 32)
        33.0
        >>> extrapolate(({"fusion": 3}, {"fusion": 5, "copy": 1}), (2, 4), 6)
        {'fusion': 7, 'copy': 2}
    """
    first, second = values
    if dataclasses.is_dataclass(first):
        changes = {
            field.name: extrapolate(
                tuple(getattr(value, field.name) for value in values), depths, depth
            )
            for field in dataclasses.fields(first)
        }
        return dataclasses.replace(first, **changes)
    if isinstance(first, dict):
        keys = dict.fromkeys([*first, *second])
        return {
            key: extrapolate((first.get(key, 0), second.get(key, 0)), depths, depth)
            for key in keys
        }
    slope = (second - first) / (depths[1] - depths[0])
    value = max(0, first + slope * (depth - depths[0]))
    return round(value) if isinstance(first, int) else value
