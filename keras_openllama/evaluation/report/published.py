"""The results that OpenLLaMA published in 2023, by task of today's harness."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path

_SOURCE = Path(__file__).with_name("published.json")
_PREFIX = "open_llama_"  # Short preset names drop it.
_HUB = "hf://openlm-research/"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A row of the published table.

    Attributes:
        name: the published name, such as `"truthfulqa_mc/mc1"`.
        task: the task in today's harness, such as `"truthfulqa_mc1"`.
        metric: the metric of that task, such as `"acc"`.
        version: the task version that was compared with the version of 2023.
        difference: what differs from 2023 in this metric only, or `None`.
        values: the published value by column.
    """

    name: str
    task: str
    metric: str
    version: float
    difference: str | None
    values: dict[str, float]

    @property
    def key(self) -> tuple[str, str]:
        """Task and metric of today's harness."""
        return self.task, self.metric


@dataclasses.dataclass(frozen=True)
class Difference:
    """What differs from 2023 in every metric of some columns.

    Attributes:
        columns: the columns that it applies to.
        joint_tokenization_only: whether it applies only if contexts and continuations
            are tokenized together.
        text: the description, one sentence.
    """

    columns: tuple[str, ...]
    joint_tokenization_only: bool
    text: str


@dataclasses.dataclass(frozen=True)
class PublishedTable:
    """The published table.

    Attributes:
        source: where the table was published, and how it was measured.
        harness: the version of lm-evaluation-harness that `metrics` refer to.
        columns: names of the models, in order.
        presets: column by preset name.
        differences: what differs from 2023 in whole columns.
        average: the published average by column.
        metrics: rows of the table, in order.
    """

    source: str
    harness: str
    columns: tuple[str, ...]
    presets: dict[str, str]
    differences: tuple[Difference, ...]
    average: dict[str, float]
    metrics: tuple[Metric, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of today's tasks, each once, in order."""
        return tuple(dict.fromkeys(metric.task for metric in self.metrics))


@functools.cache
def load_published_table() -> PublishedTable:
    """Reads the published table from the package.

    Returns:
        The table of https://github.com/openlm-research/open_llama#evaluation.

    Example:
        >>> table = load_published_table()
        >>> [metric.values["7Bv2"] for metric in table.metrics[:3]]
        [0.34, 0.35, 0.39]
    """
    data = json.loads(_SOURCE.read_text("utf-8"))
    return PublishedTable(
        source=data["source"],
        harness=data["harness"],
        columns=tuple(data["columns"]),
        presets=data["presets"],
        differences=tuple(
            Difference(**row | {"columns": tuple(row["columns"])})
            for row in data["differences"]
        ),
        average=data["average"],
        metrics=tuple(Metric(**row) for row in data["metrics"]),
    )


def column_of_preset(preset: object) -> str | None:
    """Returns the published column of a preset.

    Args:
        preset: a preset such as `"open_llama_7b_v2"`, `"7b_v2"` or
            `"hf://openlm-research/open_llama_7b_v2"`, or any other source that a model
            was loaded from.

    Returns:
        A column such as `"7Bv2"`, or `None` if the model was not published.

    Example:
        >>> column_of_preset("3b_v3")  # 3b_v3 loads the release 3b_v2.
        '3Bv2'
    """
    name = str(preset).removeprefix(_HUB)
    presets = load_published_table().presets
    return presets.get(name) or presets.get(_PREFIX + name)


def average(values: Iterable[float]) -> float:
    """Computes the mean, as in the last row of the published table.

    Raises:
        ValueError: if `values` is empty.

    Example:
        >>> average([0.25, 0.75])
        0.5
    """
    values = list(values)
    if not values:
        raise ValueError("`values` must not be empty. Received: []")
    return math.fsum(values) / len(values)
