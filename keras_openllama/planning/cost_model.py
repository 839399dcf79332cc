"""A cost model for TPUs, based on the compiled program of a step.

The TPU compiler annotates most fusions with an estimate of their clock cycles. Kernels
and collectives have no annotation: `CostAssumptions` gives their cost. Its `describe`
lists all assumptions, and what is not counted. The program is traversed in scheduled
order, with one clock for the core and one for the interconnect. An asynchronous
collective costs the time that the core waits for it.

Instructions that have neither an annotation nor an assumption cost nothing here:
embedding lookups and their gradients, and copies between the memories of a chip, which
the compiler starts ahead of time. `StepCost.uncosted_bytes` says how much they write.

Calibration (`tests/planning/test_calibration.py`): for EasyLM's published 7B step on
256 chips, the compiler's cycles give 2300 tokens/s/chip, and 2070 if no collective is
hidden. Over 2200 were measured.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from keras_openllama.planning.hlo import (
    HloInstruction,
    HloProgram,
    parse_shapes,
    shape_bytes,
)
from keras_openllama.runs.throughput import peak_flops

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter"),
    *("all-to-all", "collective-permute"),
)
# Instructions without work of their own. Copies count where they end.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "copy-start", "slice-start"),
    *("custom-call AllocateBuffer", "custom-call ConcatBitcast"),
}


@dataclasses.dataclass(frozen=True)
class TpuChip:
    """A type of TPU chip.

    Source: https://cloud.google.com/tpu/docs, the pages of v4, v5e, v5p and v6e.

    Attributes:
        name: the name in topologies, such as `"v4"`.
        peak_flops: peak of bfloat16 matrix products, in FLOP/s.
        clock: clock frequency in Hz, from the peak and the FLOPs per cycle of the
            matrix units.
        memory: HBM in bytes.
        usable_memory: what the compiler lets a program use of it, in bytes.
        link: bandwidth of one link in bytes/s, in each direction.
        wrap: a slice has wrap-around links if its axes are multiples of this.
    """

    name: str
    peak_flops: float
    clock: float
    memory: int
    usable_memory: int
    link: float
    wrap: int

    def links(self, axes: Sequence[int]) -> int:
        """Returns the number of links of a chip along axes of a slice.

        Args:
            axes: sizes of the axes.

        Returns:
            Two links along each axis; one without wrap-around links.

        Example:
            >>> CHIPS["v4"].links((4, 4, 4)), CHIPS["v4"].links((2, 2, 4))
            (6, 3)
        """
        return len(axes) * (1 if any(size % self.wrap for size in axes) else 2)


_GIB = 1 << 30
CHIPS = {
    chip.name: chip
    for chip in (
        # Two cores with four matrix units of 128 x 128; 2400 Gbit/s over six links.
        TpuChip(
            "v4", peak_flops("TPU v4"), 1.05e9, 32 * _GIB, int(30.75 * _GIB), 50e9, 4
        ),
        # One core with four such units; 1600 Gbit/s over four links.
        TpuChip(
            "v5e", peak_flops("TPU v5e"), 1.5e9, 16 * _GIB, int(15.75 * _GIB), 50e9, 16
        ),
        # Two cores with four such units; 4800 Gbit/s over six links.
        TpuChip("v5p", peak_flops("TPU v5p"), 1.75e9, 95 * _GIB, 95 * _GIB, 100e9, 4),
        # One core with two units of 256 x 256; 3584 Gbit/s over four links. Heuristic:
        # the published peak implies two products per unit and cycle.
        TpuChip(
            "v6e",
            peak_flops("TPU v6e"),
            1.75e9,
            32 * _GIB,
            int(31.25 * _GIB),
            112e9,
            16,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class CostAssumptions:
    """The cost of what the compiler does not estimate.

    Attributes:
        kernel_efficiency: fraction of the peak that attention kernels reach on the
            FLOPs that a causal mask leaves. Heuristic.
        rings: number of links of a chip that a collective uses. A ring along one axis
            of the torus uses two. Where the compiler splits a collective into parts
            that take the axes in different order, it uses the links of all axes.
        hop_seconds: latency of each step of a ring, in seconds. Heuristic.
    """

    kernel_efficiency: float = 0.4
    rings: int = 2
    hop_seconds: float = 1e-6

    def describe(self) -> dict[str, str]:
        """Returns each assumption as text, by topic."""
        return {
            "compute": "the compiler's estimated cycles divided by the clock frequency",
            "kernels": f"{self.kernel_efficiency:.0%} of peak on causal FLOPs",
            "links": f"a collective uses {self.rings} links of a chip, each way, or "
            "those of all axes of the slice where the compiler splits it over them",
            "latency": f"{self.hop_seconds * 1e6:g} us for each step of a ring; an "
            "all-reduce over all chips of a slice uses the rings of its axes in turn",
            "permutations": "a collective-permute takes one step over one link, and an "
            "all-to-all moves each byte over a quarter of a ring; over all chips of a "
            "slice, half of the bytes cross the middle of its longest axis, without "
            "links around it",
            "overlap": "only where the schedule places other work between a "
            "collective's start and done ops",
            "branches": "the slowest branch of a conditional",
            "not counted": "the host, the input pipeline, embedding lookups and their "
            "gradients, copies between the memories of a chip, and custom calls other "
            "than attention kernels",
        }


@dataclasses.dataclass
class StepCost:
    """Time of a step, or of a part of it, on each chip.

    Attributes:
        matmul_seconds: fusions with matrix products.
        other_seconds: all other fusions.
        kernel_seconds: attention kernels.
        collective_seconds: collectives by opcode, overlapped or not.
        exposed_seconds: time that the core waits for collectives.
        uncosted_bytes: bytes written by instructions whose cost is unknown, and taken
            as 0: by opcode, with the target of a custom call or the name of a fusion.
    """

    matmul_seconds: float = 0.0
    other_seconds: float = 0.0
    kernel_seconds: float = 0.0
    collective_seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )
    exposed_seconds: float = 0.0
    uncosted_bytes: dict[str, int] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(int)
    )

    @property
    def compute_seconds(self) -> float:
        """Time of all fusions."""
        return self.matmul_seconds + self.other_seconds

    @property
    def step_seconds(self) -> float:
        """Total time: fusions, kernels and exposed collectives."""
        return self.compute_seconds + self.kernel_seconds + self.exposed_seconds

    def add(self, other: "StepCost", times: int = 1) -> None:
        """Adds the cost of a part of the step.

        Args:
            other: the cost of the part.
            times: how often it runs.

        Example:
            >>> cost = StepCost(matmul_seconds=0.5)
            >>> cost.add(StepCost(kernel_seconds=0.25), times=2)
            >>> cost.step_seconds
            1.0
        """
        for name in ("matmul", "other", "kernel", "exposed"):
            field = f"{name}_seconds"
            setattr(self, field, getattr(self, field) + times * getattr(other, field))
        for kind, seconds in other.collective_seconds.items():
            self.collective_seconds[kind] += times * seconds
        for kind, size in other.uncosted_bytes.items():
            self.uncosted_bytes[kind] += times * size


def estimate_cost(
    hlo: str,
    chip: TpuChip,
    assumptions: CostAssumptions = CostAssumptions(),
    trip_counts: Mapping[int, int] | None = None,
    slice_shape: tuple[int, ...] | None = None,
) -> StepCost:
    """Estimates the cost of a program.

    Args:
        hlo: `as_text()` of a program that was compiled for TPUs.
        chip: the chip.
        assumptions: the cost of what the compiler does not estimate.
        trip_counts: other numbers of iterations for loops, by the compiled one.
        slice_shape: number of chips along each axis of the slice. `None` takes
            all-to-alls to be on a ring.

    Returns:
        The cost.

    Raises:
        ValueError: if the program has an unknown kernel, trip count or group of a
            collective, or the end of a collective without its start.

    Example:
        >>> hlo = '''
        ... ENTRY %main (x: f32[8]) -> f32[8] {
        ...   %y = f32[8] fusion(%x), backend_config={"estimated_cycles":"2100"}
        ...   ROOT %z = f32[8] fusion(%y), calls=%gather_rows
        ... }'''
        >>> cost = estimate_cost(hlo, CHIPS["v4"])  # 1.05 GHz
        >>> cost.step_seconds
        2e-06
        >>> dict(cost.uncosted_bytes)
        {'fusion z': 32}
    """
    program = HloProgram(hlo)
    estimator = _CostEstimator(
        program, chip, assumptions, trip_counts or {}, slice_shape
    )
    return estimator.computation_cost(program.entry)


class _CostEstimator:
    """Adds up the cost of a computation in scheduled order."""

    def __init__(self, program, chip, assumptions, trip_counts, slice_shape):
        self.program, self.chip, self.assumptions = program, chip, assumptions
        self.trip_counts, self.slice_shape = trip_counts, slice_shape

    def computation_cost(self, computation):
        cost = StepCost()
        links_free = 0.0  # When all collectives so far end, in seconds of the step.
        in_flight = {}
        for instruction in computation:
            kind, collective = self._collective(instruction)
            if kind in ("synchronous", "start"):
                seconds = self._collective_seconds(collective, instruction)
                opcode = collective.opcode.removesuffix("-start")
                cost.collective_seconds[opcode] += seconds
                links_free = max(links_free, cost.step_seconds) + seconds
            if kind == "synchronous":
                cost.exposed_seconds += links_free - cost.step_seconds
            elif kind == "start":
                in_flight[instruction.name] = links_free
            elif kind == "done":
                end = in_flight.pop(_start_of(instruction, in_flight))
                cost.exposed_seconds += max(0.0, end - cost.step_seconds)
            elif kind is None:
                self._add_compute(instruction, cost)
        return cost

    def _add_compute(self, instruction, cost):
        if instruction.opcode == "while":
            body = instruction.attribute(r"body=%?([\w.\-]+)")
            iteration = self.computation_cost(self.program.computations[body])
            compiled = self.program.trip_count(instruction)
            cost.add(iteration, self.trip_counts.get(compiled, compiled))
        elif instruction.opcode == "conditional":
            names = re.findall(r"%([\w.\-]+)", _branches(instruction))
            branches = [
                self.computation_cost(self.program.computations[name]) for name in names
            ]
            cost.add(max(branches, key=lambda branch: branch.step_seconds))
        elif instruction.opcode == "custom-call":
            if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
                flops = kernel_flops(instruction)
                peak = self.chip.peak_flops * self.assumptions.kernel_efficiency
                cost.kernel_seconds += flops / peak
            else:
                _add_uncosted(instruction, cost)
        elif instruction.cycles:
            seconds = instruction.cycles / self.chip.clock
            inside = self.program.called_computation(instruction)
            if any(i.opcode in ("convolution", "dot") for i in inside):
                cost.matmul_seconds += seconds
            else:
                cost.other_seconds += seconds
        else:
            _add_uncosted(instruction, cost)

    def _collective(self, instruction):
        """Classifies an instruction as a collective.

        It is `"synchronous"`, the `"start"` or the `"done"` of an asynchronous one, or
        `None`. The collective itself is returned with the first two.

        The compiler also wraps these into fusions, and an all-reduce together with the
        slicing of its result. A fusion with a matrix product that advances a collective
        is compute.
        """
        opcode = instruction.opcode
        if opcode in COLLECTIVES:
            return "synchronous", instruction
        if opcode.removesuffix("-start") in COLLECTIVES:
            return "start", instruction
        if opcode.removesuffix("-done") in COLLECTIVES:
            return "done", None
        inside = self.program.called_computation(instruction)
        found = [i for i in inside if i.opcode in COLLECTIVES]
        if not found or instruction.cycles is not None:
            return None, None
        targets = {i.attribute(r'custom_call_target="(\w+)"') for i in inside}
        if "AsyncCollectiveStart" in targets:
            return "start", found[0]
        if "AsyncCollectiveDone" in targets:
            return "done", None
        return "synchronous", found[0]

    def _collective_seconds(self, collective, instruction):
        """Time of a collective on the links: bytes over bandwidth, and latency."""
        size = _group_size(collective)
        bandwidth = self.chip.link * self._links(instruction, size)
        hops = _hops(instruction, size) * self.assumptions.hop_seconds
        opcode = collective.opcode.removesuffix("-start")
        whole = _whole_bytes(collective, size)
        moved = whole * (size - 1) / size
        sliced = instruction.opcode == "fusion" and instruction.bytes < collective.bytes
        if opcode == "all-reduce" and not sliced:
            moved, hops = 2 * moved, 2 * hops
        if opcode == "all-to-all":
            moved = whole * size / 4  # The average distance is a quarter of the ring.
            if self.slice_shape and size == math.prod(self.slice_shape):
                moved, bandwidth = whole * max(self.slice_shape) / 4, self.chip.link
        if opcode == "collective-permute":
            moved, bandwidth, hops = (
                whole,
                self.chip.link,
                self.assumptions.hop_seconds,
            )
        return moved / bandwidth + hops

    def _links(self, collective, size):
        """Number of links of a chip that a collective uses at once."""
        axes = collective.attribute(r"dim_sizes:([\d,]+)")
        if axes is None:  # Two chips have one link to each other, not a ring.
            return max(1, min(self.assumptions.rings, size - 1))
        return self.chip.links([int(size) for size in axes.split(",")])


def _whole_bytes(collective, size):
    """Bytes of the tensors of a collective, after a gather or before a reduction.

    The compiler combines the reductions of several tensors: their sizes add up.
    """
    opcode = collective.opcode
    if opcode.startswith("reduce-scatter"):
        return collective.bytes * size
    if opcode in ("all-gather-start", "all-to-all-start", "collective-permute-start"):
        # Operands and results, and maybe scalars. All but gathers keep the size.
        share = size / (size + 1) if opcode == "all-gather-start" else 1 / 2
        tensors = [shape for shape in collective.shapes if shape[1]]
        return share * sum(map(shape_bytes, tensors))
    return collective.bytes


def _add_uncosted(instruction, cost):
    """Records an instruction without a cost, unless it has no work of its own."""
    kind = instruction.opcode
    if kind == "custom-call":
        kind += " " + (instruction.attribute(r'custom_call_target="(\w+)"') or "?")
    elif kind == "fusion":
        kind += " " + instruction.name.rstrip(".0123456789")
    if kind not in _FREE:
        cost.uncosted_bytes[kind] += instruction.bytes


def kernel_flops(kernel: HloInstruction) -> float:
    """Returns the FLOPs of an attention kernel that a causal mask leaves.

    Args:
        kernel: the instruction of a Pallas call.

    Returns:
        FLOPs of one call.

    Raises:
        ValueError: if the kernel is unknown.
    """
    products = next((n for name, n in _PRODUCTS.items() if name in kernel.name), None)
    operands = kernel.attribute(r"operand_layout_constraints=\{(.*?\})\}") or ""
    # The first floating-point operand is the query. A batch of one may have no axis.
    heads = [
        size
        for dtype, size in parse_shapes(operands)
        if dtype in ("bf16", "f32") and len(size) >= 3
    ]
    if products is None or not heads:
        raise ValueError(
            f"The cost of the kernel {kernel.name} is unknown. Supported kernels: "
            f"{', '.join(_PRODUCTS)}."
        )
    *batch_and_heads, length, head_dim = heads[0]
    product_flops = 2 * math.prod(batch_and_heads) * length * length * head_dim / 2
    return products * product_flops


# Number of matrix products of length x length x head_dim in Splash kernels, by a part
# of their names. Backward: scores, and gradients of values, weights, queries and keys.
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}


def _start_of(done, in_flight):
    """Name of the start of an asynchronous collective, for its end."""
    named = re.sub(r"-done\b", "-start", done.name)
    start = next((name for name in (*done.operands, named) if name in in_flight), None)
    if start is None:
        raise ValueError(f"The start of {done.name} is unknown.")
    return start


def _branches(conditional):
    several = conditional.attribute(r"branch_computations=\{(.*?)\}")
    return several or " ".join(
        conditional.attribute(rf"{branch}_computation=(%[\w.\-]+)")
        for branch in ("true", "false")
    )


def _hops(instruction, size):
    """Number of steps of a collective's rings, which the compiler may specify."""
    rings = instruction.attribute(r"phases:\d+ cores:\{([\d ]+)\}")
    if rings is None:
        return size - 1
    return sum(int(cores) - 1 for cores in rings.split())


def _group_size(collective):
    """Number of chips that take part in a collective."""
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
        raise ValueError(f"The group size of {collective.name} is unknown.")
    known = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
    return math.prod(int(known[axis]) for axis in re.findall(r"'(\w+)'", axes))
