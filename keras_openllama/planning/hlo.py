"""The text of a compiled XLA program, as instructions that can be asked things."""

import dataclasses
import functools
import math
import re

_SHAPE = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: string.
        shapes: tuple of `(dtype, dimensions)`, of what it gives; several of a tuple.
        opcode: string, such as `"fusion"`.
        operands: tuple of strings, names of instructions of the same computation.
        attributes: string, the rest of the line.
    """

    name: str
    shapes: tuple
    opcode: str
    operands: tuple
    attributes: str

    def attribute(self, pattern):
        """The first group of a pattern in the attributes, or `None`."""
        found = re.search(pattern, self.attributes)
        return found and found[1]

    @property
    def bytes(self):
        """Size of what it gives: int."""
        return sum(bytes_of(shape) for shape in self.shapes)

    @property
    def cycles(self):
        """The compiler's estimate for a fusion: int, or `None`."""
        cycles = self.attribute(r'"estimated_cycles":"(\d+)"')
        return cycles and int(cycles)


def bytes_of(shape):
    """Size of `(dtype, dimensions)`: int."""
    dtype, dimensions = shape
    bits = re.search(r"\d+", dtype)  # Of f8e4m3fn the first number; pred has none.
    return (int(bits[0]) // 8 if bits else 1) * math.prod(dimensions)


class Program:
    """Computations by name, each a list of `Instruction` in the scheduled order.

    Args:
        text: string, `as_text()` of a compiled program.

    Raises:
        ValueError: if the text has no entry computation.

    Example:

    ```python
    program = Program(jax.jit(step).lower(*arguments).compile().as_text())
    [i.name for i in program.entry if i.opcode == "fusion"]
    ```
    """

    def __init__(self, text):
        self.computations, entry, current = {}, None, None
        for line in text.splitlines():
            if line[:1].strip() and line.endswith("{") and "(" in line:
                is_entry, name = re.match(r"(ENTRY )?%?([\w.\-]+)", line).groups()
                current = self.computations[name] = []
                entry = name if is_entry else entry
            elif current is not None and line[:1] == " ":
                current.append(_instruction(line))
        if entry is None:
            raise ValueError("This is no text of a compiled program: it has no ENTRY.")
        self.entry = self.computations[entry]

    def called(self, instruction):
        """The computation that a fusion or a start calls; empty if none."""
        return self.computations.get(
            instruction.attribute(r"calls=%?([\w.\-]+)") or "", []
        )

    def trips(self, loop):
        """How often a `while` runs: int.

        Raises:
            ValueError: if the program does not say.
        """
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        # A scan counts from 0 and compares with a constant.
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        bounds = {
            int(i.attribute(r"^\((\d+)\)"))
            for i in condition
            if i.opcode == "constant" and i.attribute(r"^\((\d+)\)")
        }
        if len(bounds) != 1:
            raise ValueError(f"How often the loop {loop.name} runs is not known.")
        return bounds.pop()


def _instruction(line):
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _end_of_type(rest)
    opcode, _, arguments = rest[end:].strip().partition("(")
    inside = arguments[: _closing(arguments)]
    return Instruction(
        name=name.lstrip("%"),
        shapes=shapes_in(rest[:end]),
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        attributes="(" + arguments,
    )


def _end_of_type(text):
    """Where the type ends; that of a tuple has spaces within brackets."""
    if not text.startswith("("):
        return text.find(" ")
    return _closing(text[1:]) + 2


def _closing(text):
    """Where the bracket closes that was open before the text."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


@functools.cache
def shapes_in(text):
    """The tensors that a type names: tuple of `(dtype, dimensions)`."""
    text = re.sub(r"\{[^{}]*\}", "", text)  # Layouts, which have brackets, too.
    return tuple(
        (dtype, tuple(int(size) for size in dimensions.split(",") if size))
        for dtype, dimensions in _SHAPE.findall(text)
    )
