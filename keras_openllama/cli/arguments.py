"""Types of arguments: functions that parse a text, for `type` of `add_argument`.

Errors state what the value must be and what was received.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import Any

from keras_openllama.runs.device_settings import parse_mesh

# JAX counts in int32, and computes in float32.
_INT32_MAX = 2**31 - 1
_FLOAT32_MIN, _FLOAT32_MAX = 1.2e-38, 3.4e38
_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def _fail(requirement, text):
    raise argparse.ArgumentTypeError(f"must be {requirement}. Received: {text!r}")


def _integer(least, most, requirement):
    def parse(text):
        number = int(text) if re.fullmatch(r"[+-]?\d{1,4000}", text) else least - 1
        if number < least:
            _fail(requirement, text)
        if most is not None and number > most:
            _fail(f"an integer from {least} to {most}", text)
        return number

    return parse


def number(is_valid: Callable[[float], bool], requirement: str) -> Callable[[str], Any]:
    """Returns a type for floating-point numbers.

    Args:
        is_valid: Whether a number is valid. It is called for finite numbers only.
        requirement: What the number must be, for the error message.

    Returns:
        A function of a text that returns a `float`.

    Example:
        >>> number(lambda value: value > 0, "positive")("1e-3")
        0.001
    """

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and is_valid(value)):
            _fail(requirement, text)
        return value

    return parse


positive_int = _integer(1, _INT32_MAX, "a positive integer")
non_negative_int = _integer(0, _INT32_MAX, "a non-negative integer")
port = _integer(0, 65535, "an integer from 0 to 65535")
# Seeds of runs, which are hashed, and of samplers.
run_seed = _integer(0, None, "a non-negative integer")
sampler_seed = _integer(0, 2**32 - 1, "a non-negative integer")
positive_number = number(
    lambda value: _FLOAT32_MIN <= value <= _FLOAT32_MAX,
    "a positive number in the range of float32",
)
non_negative_number = number(
    lambda value: 0 <= value <= _FLOAT32_MAX,
    "a non-negative number in the range of float32",
)
finite_number = number(lambda value: abs(value) <= _FLOAT32_MAX, "a number")
temperature = number(lambda value: 0 <= value <= _FLOAT32_MAX, "a number of at least 0")
probability = number(lambda value: 0 < value <= 1, "a number in (0, 1]")
share = number(lambda value: 0 <= value <= 1, "a number from 0 to 1")
fraction = number(lambda value: 0 <= value < 1, "a number in [0, 1)")


def logit_bias(text: str) -> tuple[int, float]:
    """Parses a bias of a token's logit.

    Raises:
        argparse.ArgumentTypeError: If the text is not `ID=VALUE`.

    Example:
        >>> logit_bias("13=-2.5")
        (13, -2.5)
    """
    token, _, value = text.partition("=")
    try:
        return non_negative_int(token), finite_number(value)
    except argparse.ArgumentTypeError:
        _fail("ID=VALUE, such as 13=-2.5", text)


def not_empty(text: str) -> str:
    """Parses a text that must not be empty.

    Raises:
        argparse.ArgumentTypeError: If it is.

    Example:
        >>> not_empty("The sea")
        'The sea'
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def number_of_bytes(text: str) -> int:
    """Parses a size in bytes, with an optional suffix k, M or G.

    Raises:
        argparse.ArgumentTypeError: If the text is not a size.

    Example:
        >>> number_of_bytes("500M")
        500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)b?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _MULTIPLES[match[2].lower()]) if match else 0
    if not 1 <= size < 2**63:
        _fail("a size in bytes such as 1G, 500M or 20000", text)
    return size


def mesh(text: str) -> dict[str, int]:
    """Parses a device mesh; returns the sizes of the axes that are given.

    Raises:
        argparse.ArgumentTypeError: If the text is not a mesh.

    Example:
        >>> mesh("data=4,fsdp=64")
        {'data': 4, 'fsdp': 64}
    """
    try:
        return parse_mesh(text)
    except ValueError:
        _fail("of the form data=4,fsdp=64,model=1", text)


def add_quantization(group: argparse._ArgumentGroup) -> None:
    """Adds `--quantization` of a command that loads a model.

    Args:
        group: The group of the flags of the model.
    """
    group.add_argument(
        "--quantization",
        choices=("int8", "int4"),
        help="quantize the weights while they are loaded, to 8 or 4 bits (default: as "
        "in the files); see also --dtype, in which the model computes",
    )
