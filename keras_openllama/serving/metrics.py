"""Metrics in the text format of Prometheus.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Heuristic: seconds, from a small model on a GPU to a long queue.
TIME_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metric(Protocol):
    """What `ServerMetrics` needs of a metric."""

    name: str
    kind: str
    help: str

    def samples(self) -> Iterator[tuple[str, float]]:
        """Yields what follows the name in a line, and the value."""


class Counter:
    """A number that only grows, for each combination of labels.

    Example:
        >>> requests = Counter("requests_total", "Requests.")
        >>> requests.add(1, status="200")
        >>> list(requests.samples())
        [('{status="200"}', 1)]
    """

    kind = "counter"

    def __init__(self, name: str, help: str) -> None:
        self.name = name
        self.help = help
        self._values: dict[str, float] = {}

    def add(self, amount: float, **labels: str) -> None:
        """Adds a number to the value of some labels, which must not be user text."""
        key = _labels(labels)
        self._values[key] = self._values.get(key, 0) + amount

    def samples(self) -> Iterator[tuple[str, float]]:
        """Yields the labels and the value."""
        yield from (self._values or {"": 0}).items()


class Gauge:
    """A number that is read when the metrics are.

    Example:
        >>> list(Gauge("queue", "Requests that wait.", lambda: 3).samples())
        [('', 3)]
    """

    kind = "gauge"

    def __init__(self, name: str, help: str, read: Callable[[], float]) -> None:
        self.name = name
        self.help = help
        self._read = read

    def samples(self) -> Iterator[tuple[str, float]]:
        """Yields the value."""
        yield "", self._read()


class Histogram:
    """How many values are at most as large as each of some limits.

    Example:
        >>> times = Histogram("seconds", "Times.", limits=(1, 2))
        >>> times.observe(1.5)
        >>> [sample for sample in times.samples() if sample[0].startswith("_b")]
        [('_bucket{le="1"}', 0), ('_bucket{le="2"}', 1), ('_bucket{le="+Inf"}', 1)]
    """

    kind = "histogram"

    def __init__(
        self, name: str, help: str, limits: Sequence[float] = TIME_BUCKETS
    ) -> None:
        self.name = name
        self.help = help
        self._limits = limits
        self._counts = [0] * (len(limits) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Adds a value."""
        self._counts[bisect.bisect_left(self._limits, value)] += 1
        self._sum += value

    def samples(self) -> Iterator[tuple[str, float]]:
        """Yields the cumulative counts, the sum and the count."""
        limits = [*map(str, self._limits), "+Inf"]
        counts = list(itertools.accumulate(self._counts))
        for limit, count in zip(limits, counts, strict=True):
            yield f'_bucket{{le="{limit}"}}', count
        yield "_sum", self._sum
        yield "_count", counts[-1]


def _labels(labels: Mapping[str, str]) -> str:
    listed = ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()))
    return f"{{{listed}}}" if listed else ""


class ServerMetrics:
    """The metrics of a server. They are changed in the thread of its event loop only.

    Args:
        gauges: Numbers that are read when the metrics are: name, description, function.

    Example:
        >>> metrics = ServerMetrics([("queue_length", "Waiting requests.", lambda: 2)])
        >>> "keras_openllama_queue_length 2" in metrics.text()
        True
    """

    PREFIX = "keras_openllama_"

    def __init__(
        self, gauges: Sequence[tuple[str, str, Callable[[], float]]] = ()
    ) -> None:
        self.requests = Counter("requests_total", "Requests, by path and status.")
        self.prompt_tokens = Counter("prompt_tokens_total", "Tokens of prompts.")
        self.cached_tokens = Counter(
            "cached_prompt_tokens_total", "Tokens of prompts that the cache had."
        )
        self.generated_tokens = Counter("generated_tokens_total", "Tokens generated.")
        self.disconnects = Counter(
            "client_disconnects_total", "Requests whose client left before their end."
        )
        self.time_to_first_token = Histogram(
            "time_to_first_token_seconds", "From a request to its first token."
        )
        self.time_between_tokens = Histogram(
            "time_between_tokens_seconds",
            "From one token of a text to the next.",
            (0.001, 0.0025, *TIME_BUCKETS),
        )
        self.request_time = Histogram("request_seconds", "Duration of requests.")
        self._metrics: list[Metric] = [
            self.requests,
            self.prompt_tokens,
            self.cached_tokens,
            self.generated_tokens,
            self.disconnects,
            self.time_to_first_token,
            self.time_between_tokens,
            self.request_time,
            *(Gauge(*gauge) for gauge in gauges),
        ]

    def text(self) -> str:
        """Returns all metrics in the format of Prometheus."""
        lines = []
        for metric in self._metrics:
            name = self.PREFIX + metric.name
            lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}"]
            lines += [f"{name}{rest} {value}" for rest, value in metric.samples()]
        return "\n".join(lines) + "\n"
