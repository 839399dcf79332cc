"""Parses the text of a compiled XLA program (HLO)."""

import dataclasses
import functools
import math
import re
from typing import TypeAlias

# dtype and dimensions of a tensor.
Shape: TypeAlias = tuple[str, tuple[int, ...]]

_SHAPE = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class HloInstruction:
    """An instruction, one line of a computation.

    Attributes:
        name: its name.
        shapes: shape of its result; several for a tuple.
        opcode: its opcode, such as `"fusion"`.
        operands: names of other instructions of the same computation.
        attributes: the rest of the line.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of a regular expression in the attributes."""
        found = re.search(pattern, self.attributes)
        return found and found[1]

    @property
    def bytes(self) -> int:
        """Size of its result in bytes."""
        return sum(shape_bytes(shape) for shape in self.shapes)

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate for a fusion, in clock cycles."""
        cycles = self.attribute(r'"estimated_cycles":"(\d+)"')
        return cycles and int(cycles)


def shape_bytes(shape: Shape) -> int:
    """Returns the size of a tensor in bytes.

    Example:
        >>> shape_bytes(("bf16", (8, 128)))
        2048
    """
    dtype, dimensions = shape
    bits = re.search(r"\d+", dtype)  # The first number of f8e4m3fn; pred has none.
    return (int(bits[0]) // 8 if bits else 1) * math.prod(dimensions)


class HloProgram:
    """The computations of a program.

    Args:
        text: `as_text()` of a compiled program.

    Attributes:
        computations: instructions of each computation in scheduled order, by name.
        entry: the entry computation.

    Raises:
        ValueError: if the text has no entry computation.

    Example:
        >>> import jax
        >>> compiled = jax.jit(lambda x: x @ x).lower(jax.numpy.ones((2, 2))).compile()
        >>> HloProgram(compiled.as_text()).entry[-1].shapes
        (('f32', (2, 2)),)
    """

    def __init__(self, text: str):
        self.computations, entry, current = {}, None, None
        for line in text.splitlines():
            if line[:1].strip() and line.endswith("{") and "(" in line:
                is_entry, name = re.match(r"(ENTRY )?%?([\w.\-]+)", line).groups()
                current = self.computations[name] = []
                entry = name if is_entry else entry
            elif current is not None and line[:1] == " ":
                current.append(_parse_instruction(line))
        if entry is None:
            raise ValueError("The text is not a compiled program: it has no ENTRY.")
        self.entry = self.computations[entry]

    def called_computation(self, instruction: HloInstruction) -> list[HloInstruction]:
        """Returns the computation that a fusion or a start calls; empty if none."""
        return self.computations.get(
            instruction.attribute(r"calls=%?([\w.\-]+)") or "", []
        )

    def trip_count(self, loop: HloInstruction) -> int:
        """Returns the number of iterations of a `while`.

        Raises:
            ValueError: if the program does not specify it.
        """
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        # A scan counts from 0 and compares the index with a constant.
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        bounds = {
            int(i.attribute(r"^\((\d+)\)"))
            for i in condition
            if i.opcode == "constant" and i.attribute(r"^\((\d+)\)")
        }
        if len(bounds) != 1:
            raise ValueError(f"The trip count of the loop {loop.name} is unknown.")
        return bounds.pop()


def _parse_instruction(line):
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _end_of_type(rest)
    opcode, _, arguments = rest[end:].strip().partition("(")
    inside = arguments[: _closing_bracket(arguments)]
    return HloInstruction(
        name=name.lstrip("%"),
        shapes=parse_shapes(rest[:end]),
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        attributes="(" + arguments,
    )


def _end_of_type(text):
    """Index of the end of the type. The type of a tuple contains spaces."""
    if not text.startswith("("):
        return text.find(" ")
    return _closing_bracket(text[1:]) + 2


def _closing_bracket(text):
    """Index of the bracket that closes one opened before the text."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


@functools.cache
def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Returns the shapes of the tensors in a type.

    Example:
        >>> parse_shapes("(bf16[8,128]{1,0:T(8,128)}, pred[])")
        (('bf16', (8, 128)), ('pred', ()))
    """
    text = re.sub(r"\{[^{}]*\}", "", text)  # Layouts, which also have brackets.
    return tuple(
        (dtype, tuple(int(size) for size in dimensions.split(",") if size))
        for dtype, dimensions in _SHAPE.findall(text)
    )
