"""The cost and the memory of a training step, compiled at full or reduced depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from keras_openllama.planning.aot_compile import (
    OutOfDeviceMemoryError,
    compile_step_ahead_of_time,
    slice_shape,
)
from keras_openllama.planning.compilation_cache import CompilationCache
from keras_openllama.planning.cost_model import (
    CostAssumptions,
    StepCost,
    TpuChip,
    estimate_cost,
)
from keras_openllama.planning.execution_choice import ExecutionChoice
from keras_openllama.planning.reduced_depth import DEPTHS, extrapolate
from keras_openllama.planning.step_formulas import layer_memory, parameters_per_layer
from keras_openllama.runs.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """What a step costs.

    Attributes:
        cost: its time, by parts.
        peak_memory: peak memory of a chip in bytes.
        parameters: number of parameters of the model.
        compile_seconds: compile time of all programs.
        cached: whether all programs were read from a cache.
        hlo: text of the compiled program; `None` if it was extrapolated.
        depths: numbers of layers that it was extrapolated from; empty if it was
            compiled at full depth.
    """

    cost: StepCost
    peak_memory: int
    parameters: int
    compile_seconds: float
    cached: bool
    hlo: str | None
    depths: tuple[int, ...] = ()


class StepEstimator:
    """Estimates the step of a recipe on a slice for choices of its execution.

    Args:
        config: arguments of `OpenLlamaBackbone`.
        recipe: the recipe.
        chip: the chip type.
        devices: JAX devices, see `topology_devices`.
        assumptions: the cost of what the compiler does not estimate.
        cache: finished compilations; `None` compiles always.

    Example:
        >>> from keras_openllama import presets
        >>> from keras_openllama.planning.aot_compile import topology_devices
        >>> from keras_openllama.runs.recipe import preset_recipe
        >>> chip, devices = topology_devices("v4:4x8x8")  # doctest: +SKIP
        >>> estimator = StepEstimator(  # doctest: +SKIP
        ...     presets.find("7b").config, preset_recipe("7b"), chip, devices
        ... )
        >>> mesh = {"data": 4, "fsdp": 64, "model": 1}
        >>> choice = ExecutionChoice(mesh, "products", 2)
        >>> estimator.extrapolated(choice).cost.step_seconds  # doctest: +SKIP
        3.85
    """

    def __init__(
        self,
        config: dict[str, Any],
        recipe: Recipe,
        chip: TpuChip,
        devices: Sequence[Any],
        assumptions: CostAssumptions = CostAssumptions(),  # noqa: B008
        cache: CompilationCache | None = None,
    ):
        self.config, self.recipe, self.chip = config, recipe, chip
        self.devices, self.assumptions, self.cache = devices, assumptions, cache

    def compiled(
        self,
        choice: ExecutionChoice,
        num_layers: int | None = None,
        trip_counts: Mapping[int, int] | None = None,
    ) -> StepEstimate:
        """Compiles the step.

        Args:
            choice: mesh, rematerialization and micro-batches.
            num_layers: layers to compile; all by default.
            trip_counts: see `estimate_cost`.

        Returns:
            The estimate.

        Raises:
            OutOfDeviceMemoryError: if the step does not fit into the memory of a chip.
        """
        step = compile_step_ahead_of_time(
            {**self.config, "num_layers": num_layers or self.config["num_layers"]},
            choice.apply_to(self.recipe),
            choice.mesh,
            self.devices,
            self.cache,
        )
        shape = slice_shape(self.devices)
        cost = estimate_cost(step.hlo, self.chip, self.assumptions, trip_counts, shape)
        return StepEstimate(cost=cost, **dataclasses.asdict(step))

    def extrapolated(self, choice: ExecutionChoice) -> StepEstimate:
        """Extrapolates the step from `reduced_depth.DEPTHS`; compiles a shallow model.

        Args:
            choice: mesh, rematerialization and micro-batches.

        Returns:
            The estimate.

        Raises:
            OutOfDeviceMemoryError: if the step does not fit into the memory of a chip.
        """
        layers = self.config["num_layers"]
        if layers <= max(DEPTHS):
            return self.compiled(choice)
        parts = [self.compiled(choice, depth) for depth in DEPTHS]

        def at_full_depth(name):
            values = tuple(getattr(part, name) for part in parts)
            return extrapolate(values, DEPTHS, layers)

        peak = at_full_depth("peak_memory")
        self._check_memory(peak, DEPTHS, choice)
        return StepEstimate(
            cost=at_full_depth("cost"),
            peak_memory=peak,
            parameters=at_full_depth("parameters"),
            compile_seconds=sum(part.compile_seconds for part in parts),
            cached=all(part.cached for part in parts),
            hlo=None,
            depths=DEPTHS,
        )

    def from_one_depth(self, choice: ExecutionChoice) -> StepEstimate:
        """Estimates the step from one compilation, half the time of `extrapolated`.

        The loops over the layers are counted as often as there are layers. What each
        layer adds outside of them, such as its part of the optimizer, is not counted,
        and its memory is estimated.

        Args:
            choice: mesh, rematerialization and micro-batches.

        Returns:
            The estimate.

        Raises:
            OutOfDeviceMemoryError: if the step does not fit into the memory of a chip.
        """
        layers = self.config["num_layers"]
        # The loop over micro-batches must not be taken for one over layers.
        depth = 3 if choice.micro_batches != 3 else 5
        if layers <= depth:
            return self.compiled(choice)
        step = self.compiled(choice, depth, {depth: layers})
        more = layers - depth
        config = {**self.config, "num_layers": more}
        parameters = more * parameters_per_layer(self.config)
        peak = step.peak_memory + layer_memory(choice, config, self.recipe, parameters)
        self._check_memory(peak, (depth,), choice)
        return dataclasses.replace(
            step,
            peak_memory=peak,
            parameters=step.parameters + parameters,
            hlo=None,
            depths=(depth,),
        )

    def _check_memory(self, peak, depths, choice):
        usable = self.chip.usable_memory
        if peak > usable:
            raise OutOfDeviceMemoryError(
                "The step does not fit into a chip's memory: extrapolated from "
                f"{_join(depths)} layers, it needs {peak / 2**30:.1f} of "
                f"{usable / 2**30:.1f} GiB. Received: {choice}.",
                peak - usable,
            )


def _join(numbers):
    return " and ".join(map(str, numbers))
