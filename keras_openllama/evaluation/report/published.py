"""The results that OpenLLaMA published in 2023, and where today's harness has each."""

import dataclasses
import functools
import json
import math
from pathlib import Path

_SOURCE = Path(__file__).with_name("published.json")
_PREFIX = "open_llama_"  # Short forms drop it.
_HUB = "hf://openlm-research/"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A row of the published table.

    Attributes:
        name: string, as published, such as `"truthfulqa_mc/mc1"`.
        task: string, its task in the harness of today, such as `"truthfulqa_mc1"`.
        metric: string, the metric of that task, such as `"acc"`.
        version: float, version of the task that was compared with that of 2023.
        shift: string, what differs from 2023 in this metric alone, or `None`.
        values: dict, the published value by column.
    """

    name: str
    task: str
    metric: str
    version: float
    shift: str | None
    values: dict

    @property
    def key(self):
        """Task and metric of today, as a tuple."""
        return self.task, self.metric


@dataclasses.dataclass(frozen=True)
class Shift:
    """What differs from 2023 in every metric of some columns.

    Attributes:
        columns: tuple of strings.
        together: bool, whether only where answers are tokenized with their questions.
        text: string.
    """

    columns: tuple
    together: bool
    text: str


@dataclasses.dataclass(frozen=True)
class Published:
    """The published table.

    Attributes:
        source: string, where it was published, and how it was made.
        harness: string, version of lm-evaluation-harness that `metrics` are named for.
        columns: tuple of strings, names of the models, in order.
        presets: dict, column by preset.
        shifts: tuple of `Shift`.
        average: dict, the published average by column.
        metrics: tuple of `Metric`, in order.
    """

    source: str
    harness: str
    columns: tuple
    presets: dict
    shifts: tuple
    average: dict
    metrics: tuple

    @property
    def tasks(self):
        """Names of today's tasks, each once, in order."""
        return tuple(dict.fromkeys(metric.task for metric in self.metrics))


@functools.cache
def load():
    """Reads the published table.

    Returns:
        `Published`.

    Source:
        https://github.com/openlm-research/open_llama, the table of its README.

    Example:
        for metric in published.load().metrics:
            print(metric.name, metric.values["7Bv2"])
    """
    data = json.loads(_SOURCE.read_text("utf-8"))
    shifts = (
        Shift(**{**row, "columns": tuple(row["columns"])}) for row in data.pop("shifts")
    )
    metrics = (Metric(**row) for row in data.pop("metrics"))
    columns = tuple(data.pop("columns"))
    return Published(
        columns=columns, shifts=tuple(shifts), metrics=tuple(metrics), **data
    )


def column_of(preset):
    """The published column of a preset.

    Args:
        preset: string, such as `"open_llama_7b_v2"`, `"7b_v2"` or
            `"hf://openlm-research/open_llama_7b_v2"`; or whatever else a model was
            loaded from.

    Returns:
        String such as `"7Bv2"`, or `None` for what has none.

    Example:
        column_of("3b_v3")  # "3Bv2": these are one release.
    """
    name = str(preset).removeprefix(_HUB)
    presets = load().presets
    return presets.get(name) or presets.get(_PREFIX + name)


def average(values):
    """The mean, as the last row of the published table has it.

    Args:
        values: list of floats.

    Returns:
        Float.

    Raises:
        ValueError: if `values` is empty.
    """
    values = list(values)
    if not values:
        raise ValueError("values is empty; give at least one")
    return math.fsum(values) / len(values)
