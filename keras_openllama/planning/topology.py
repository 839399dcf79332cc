"""The notation of TPU slices, such as `v4:4x8x8`."""

from __future__ import annotations

import re

from keras_openllama.planning.cost_model import CHIPS, TpuChip


def parse_topology(topology: str) -> TpuChip:
    """Checks the notation of a topology, without the compiler.

    Args:
        topology: Chip type and number of chips along each axis.

    Returns:
        The chip type.

    Raises:
        ValueError: If the chip type is unknown, or it is written in another way.

    Example:
        >>> parse_topology("v4:4x8x8").name
        'v4'
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(
            f"`topology` must be a chip type ({', '.join(CHIPS)}) and the number of "
            f"chips along each axis, such as v4:4x8x8. Received: {topology!r}"
        )
    return CHIPS[kind]
