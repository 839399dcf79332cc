"""What a step costs on a TPU that is not there, from its compiled program.

The TPU compiler writes its own estimate of cycles beside each fusion. Kernels and
collectives have none; they are priced by `Prices`, and nothing else is assumed. The
program is walked in its scheduled order, with a clock for the core and one for the
links: an asynchronous collective costs what is not done by the time it is waited for.
Copies between a chip's memories are prefetched, and cost nothing here; nor do the few
gathers and scatters of rows, for which the compiler has no estimate.

Calibration (`tests/planning/test_calibration.py`): EasyLM's published 7B step on 256
chips, priced by the compiler's cycles alone, comes to 2300 tokens/s/chip where over
2200 were measured; with all its collectives in the open, to 2070.
"""

import collections
import dataclasses
import math
import re

from keras_openllama.planning.hlo import Program, bytes_of, shapes_in
from keras_openllama.runs.throughput import peak_flops

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter"),
    *("all-to-all", "collective-permute"),
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
        name: string, as in the names of topologies.
        peak_flops: float, FLOP/s of matrix products in bfloat16.
        clock: float, Hz: the peak by the FLOPs that the matrix units do in a cycle.
        memory: int, bytes.
        link: float, bytes/s of one link, each way.

    Source: https://cloud.google.com/tpu/docs, the pages of v4, v5e, v5p and v6e.
    """

    name: str
    peak_flops: float
    clock: float
    memory: int
    link: float


_GIB = 1 << 30
CHIPS = {
    chip.name: chip
    for chip in (
        # Two cores of four units of 128 x 128; 2400 Gbit/s over six links.
        Chip("v4", peak_flops("TPU v4"), 1.05e9, 32 * _GIB, 50e9),
        # One core of four such units; 1600 Gbit/s over four links.
        Chip("v5e", peak_flops("TPU v5e"), 1.5e9, 16 * _GIB, 50e9),
        # Two cores of four such units; 4800 Gbit/s over six links.
        Chip("v5p", peak_flops("TPU v5p"), 1.75e9, 95 * _GIB, 100e9),
        # One core of two units of 256 x 256; 3584 Gbit/s over four links. Ours: the
        # peak is that of units that take two products a cycle.
        Chip("v6e", peak_flops("TPU v6e"), 1.75e9, 32 * _GIB, 112e9),
    )
}


@dataclasses.dataclass(frozen=True)
class Prices:
    """What the compiler does not price.

    Attributes:
        kernel_efficiency: float, share of the peak that attention kernels reach on the
            FLOPs that causality leaves. Ours.
        rings: int, links of a chip that a collective keeps busy: a ring along one axis
            of the torus uses two.
        hop_seconds: float, what each step of a ring costs beside its bytes. Ours.
    """

    kernel_efficiency: float = 0.4
    rings: int = 2
    hop_seconds: float = 1e-6

    def to_json(self):
        """A dict with each assumption in words."""
        return {
            "compute": "the compiler's estimated cycles, by the clock",
            "kernels": f"{self.kernel_efficiency:.0%} of peak on causal FLOPs",
            "links": f"{self.rings} of a chip's links carry a collective, each way",
            "latency": f"{self.hop_seconds * 1e6:g} us for each step of a ring; an "
            "all-reduce over a whole slice takes the rings of its axes one by one",
            "overlap": "only where the schedule starts and ends a collective apart",
            "not counted": "the host, input, and looking up rows of embeddings",
        }


@dataclasses.dataclass
class Cost:
    """Seconds of a step, or of a part of it, on each chip.

    Attributes:
        matmul_seconds: fusions around matrix products.
        other_seconds: all other fusions.
        kernel_seconds: attention kernels.
        collective_seconds: collectives, hidden or not, by kind: dict.
        exposed_seconds: the core's waiting for collectives.
    """

    matmul_seconds: float = 0.0
    other_seconds: float = 0.0
    kernel_seconds: float = 0.0
    collective_seconds: dict = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )
    exposed_seconds: float = 0.0

    @property
    def compute_seconds(self):
        """Fusions of both kinds."""
        return self.matmul_seconds + self.other_seconds

    @property
    def step_seconds(self):
        """All that follows each other."""
        return self.compute_seconds + self.kernel_seconds + self.exposed_seconds

    def add(self, other, times=1):
        """Adds a part that runs so many times."""
        for name in ("matmul", "other", "kernel", "exposed"):
            field = f"{name}_seconds"
            setattr(self, field, getattr(self, field) + times * getattr(other, field))
        for kind, seconds in other.collective_seconds.items():
            self.collective_seconds[kind] += times * seconds


def price(text, chip, prices=Prices()):
    """The cost of a program.

    Args:
        text: string, `as_text()` of a program compiled for TPUs.
        chip: `Chip`.
        prices: `Prices`.

    Returns:
        `Cost`.

    Raises:
        ValueError: for a kernel that has no price, or a loop without a known end.

    Example:

    ```python
    cost = price(compiled.as_text(), CHIPS["v4"])
    cost.step_seconds, cost.exposed_seconds
    ```
    """
    program = Program(text)
    return _Walk(program, chip, prices).through(program.entry)


class _Walk:
    """Goes through a computation in its order."""

    def __init__(self, program, chip, prices):
        self.program, self.chip, self.prices = program, chip, prices

    def through(self, computation):
        cost = Cost()
        shapes = {i.name: i for i in computation}
        links_free = 0.0  # When what the links carry is done, by the clock of the step.
        under_way = {}
        for instruction in computation:
            kind, collective = self._collective(instruction)
            if kind in ("alone", "start"):
                seconds = self._seconds(collective, instruction, shapes)
                opcode = collective.opcode.removesuffix("-start")
                cost.collective_seconds[opcode] += seconds
                links_free = max(links_free, cost.step_seconds) + seconds
            if kind == "alone":
                cost.exposed_seconds += links_free - cost.step_seconds
            elif kind == "start":
                under_way[instruction.name] = links_free
            elif kind == "done":
                end = under_way.pop(_start_of(instruction, under_way))
                cost.exposed_seconds += max(0.0, end - cost.step_seconds)
            elif kind is None:
                self._compute(instruction, cost)
        return cost

    def _compute(self, instruction, cost):
        if instruction.opcode == "while":
            body = instruction.attribute(r"body=%?([\w.\-]+)")
            each = self.through(self.program.computations[body])
            cost.add(each, self.program.trips(instruction))
        elif instruction.opcode == "conditional":
            names = re.findall(r"%([\w.\-]+)", _branches(instruction))
            parts = [self.through(self.program.computations[name]) for name in names]
            cost.add(max(parts, key=lambda part: part.step_seconds))
        elif instruction.opcode == "custom-call":
            if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
                flops = kernel_flops(instruction)
                peak = self.chip.peak_flops * self.prices.kernel_efficiency
                cost.kernel_seconds += flops / peak
        elif instruction.cycles:
            seconds = instruction.cycles / self.chip.clock
            inside = self.program.called(instruction)
            if any(i.opcode in ("convolution", "dot") for i in inside):
                cost.matmul_seconds += seconds
            else:
                cost.other_seconds += seconds

    def _collective(self, instruction):
        """Whether it is a collective `"alone"`, its `"start"` or `"done"`; and which.

        The compiler puts what starts and ends one into fusions, and a reduction whose
        result is cut into another; a fusion around a matrix product that drives one
        along is compute.
        """
        opcode = instruction.opcode
        if opcode in COLLECTIVES:
            return "alone", instruction
        if opcode.removesuffix("-start") in COLLECTIVES:
            return "start", instruction
        if opcode.removesuffix("-done") in COLLECTIVES:
            return "done", None
        inside = self.program.called(instruction)
        found = [i for i in inside if i.opcode in COLLECTIVES]
        if not found or instruction.cycles is not None:
            return None, None
        targets = {i.attribute(r'custom_call_target="(\w+)"') for i in inside}
        if "AsyncCollectiveStart" in targets:
            return "start", found[0]
        if "AsyncCollectiveDone" in targets:
            return "done", None
        return "alone", found[0]

    def _seconds(self, collective, instruction, shapes):
        """How long the links carry a collective: bytes over bandwidth, and hops."""
        size = _group_size(collective)
        bandwidth = self.chip.link * self.prices.rings
        hops = _hops(instruction, size) * self.prices.hop_seconds
        opcode = collective.opcode.removesuffix("-start")
        # What is gathered, or was not yet reduced: the larger side.
        operands = [shapes[name] for name in collective.operands if name in shapes]
        tensors = [shape for i in (collective, *operands) for shape in i.shapes]
        largest = max(bytes_of(shape) for shape in tensors)
        if opcode == "reduce-scatter":
            largest = collective.bytes * size
        moved = largest * (size - 1) / size
        cut = instruction.opcode == "fusion" and instruction.bytes < collective.bytes
        if opcode == "all-reduce" and not cut:
            moved, hops = 2 * moved, 2 * hops
        if opcode == "all-to-all":
            moved = largest * size / 4  # On average a byte goes so far on a ring.
        if opcode == "collective-permute":
            moved, bandwidth, hops = largest, self.chip.link, self.prices.hop_seconds
        return moved / bandwidth + hops


def kernel_flops(kernel):
    """FLOPs of an attention kernel that causality leaves.

    Args:
        kernel: `hlo.Instruction` of a Pallas call.

    Raises:
        ValueError: if it is none of those that are known here.
    """
    products = next((n for name, n in _PRODUCTS.items() if name in kernel.name), None)
    operands = kernel.attribute(r"operand_layout_constraints=\{(.*?\})\}") or ""
    # The first one of floats is the query; a batch of one may have no axis.
    heads = [
        size
        for dtype, size in shapes_in(operands)
        if dtype in ("bf16", "f32") and len(size) >= 3
    ]
    if products is None or not heads:
        raise ValueError(
            f"The kernel {kernel.name} has no price. Known are: {', '.join(_PRODUCTS)}."
        )
    *rows_and_heads, length, head_dim = heads[0]
    each = 2 * math.prod(rows_and_heads) * length * length * head_dim / 2
    return products * each


# Matrix products of length x length x head_dim in Splash's kernels, by what their names
# hold. Backward: scores, and the gradients of values, weights, queries and keys.
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}


def _start_of(done, under_way):
    """Name of what started the collective that is waited for."""
    named = re.sub(r"-done\b", "-start", done.name)
    start = next((name for name in (*done.operands, named) if name in under_way), None)
    if start is None:
        raise ValueError(f"What started {done.name} is not known.")
    return start


def _branches(conditional):
    several = conditional.attribute(r"branch_computations=\{(.*?)\}")
    return several or " ".join(
        conditional.attribute(rf"{branch}_computation=(%[\w.\-]+)")
        for branch in ("true", "false")
    )


def _hops(instruction, size):
    """Steps of a collective's rings: int. The compiler writes which rings it chose."""
    rings = instruction.attribute(r"phases:\d+ cores:\{([\d ]+)\}")
    if rings is None:
        return size - 1
    return sum(int(cores) - 1 for cores in rings.split())


def _group_size(collective):
    """How many chips take part: int.

    Raises:
        ValueError: if the program says it in a way that is not known here.
    """
    if "source_target_pairs" in collective.attributes:
        return 2
    listed = collective.attribute(r"replica_groups=\{\{([\d,]+)\}")
    if listed:
        return len(listed.split(","))
    strided = collective.attribute(r"replica_groups=\[\d+,(\d+)\]")
    if strided:
        return int(strided)
    sizes = collective.attribute(r"replica_groups=mesh\[(.*?)\]")
    axes = collective.attribute(
        r"replica_groups=mesh\[[^\]]*\](?:, device_ids=\(.*?\)\))? \{(.*?)\}"
    )
    if sizes is None or axes is None:
        raise ValueError(f"How many chips share {collective.name} is not known.")
    known = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
    return math.prod(int(known[axis]) for axis in re.findall(r"'(\w+)'", axes))
