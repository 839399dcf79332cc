"""Mixtures: weights of sources, optionally changing during training."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_openllama import presets
from keras_openllama.data import shuffling
from keras_openllama.utils import files
from keras_openllama.utils.types import PathLike

# Heuristic: the source order repeats after this many sequences, so weights are exact to
# 1/65536.
PERIOD = 1 << 16
_ROUNDING = 1e-9  # Weights read from a file have a sum of 1 within this tolerance.

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A schedule of source weights.

    Attributes:
        name: name of the mixture.
        schedule: tuple of `(from_step, weights)`, starting at step 0. `weights` is a
            dict of shares of the tokens by source, and is normalized to a sum of 1.
        sources: dict by source of metadata: `"title"`, `"text_field"`, `"url"`,
            `"provenance"`.

    Example:
        >>> mixture = load_mixture("v2").select(["refinedweb", "starcoder"])
        >>> mixture = mixture.with_weights(200_000, {"refinedweb": 3, "starcoder": 1})
        >>> mixture.weights_at(200_000)
        {'refinedweb': 0.75, 'starcoder': 0.25}
    """

    name: str
    schedule: tuple[tuple[int, dict[str, float]], ...]
    sources: dict[str, dict[str, Any]]

    def __post_init__(self):
        steps = [step for step, _ in self.schedule]
        if not steps or steps[0] != 0 or sorted({*steps}) != steps:
            raise ValueError(
                f"The schedule of mixture {self.name!r} must start at step 0 and "
                f"increase. Received: from_step {steps}"
            )
        normalized = tuple(
            (int(step), _normalize_weights(weights, self.name))
            for step, weights in self.schedule
        )
        object.__setattr__(self, "schedule", normalized)

    @property
    def names(self) -> list[str]:
        """Names of all sources with a weight at any step, in order."""
        return list(dict.fromkeys(name for _, w in self.schedule for name in w))

    def weights_at(self, step: int) -> dict[str, float]:
        """Returns the share of the tokens of each source at a step."""
        return [weights for start, weights in self.schedule if start <= step][-1]

    def restricted_to(self, available: Collection[str]) -> Mixture:
        """Removes unavailable sources, with a warning.

        Args:
            available: names of the available sources.

        Returns:
            A mixture of the available sources, with normalized weights.

        Raises:
            ValueError: if a source is not in this mixture, or no source is left at some
                step.
        """
        unknown = sorted({*available} - {*self.names})
        if unknown:
            raise ValueError(
                f"Mixture {self.name!r} has no source {', '.join(map(repr, unknown))}. "
                f"Its sources: {', '.join(self.names)}."
            )
        missing = [name for name in self.names if name not in available]
        if not missing:
            return self
        schedule = tuple(
            (step, {name: w for name, w in weights.items() if name in available})
            for step, weights in self.schedule
        )
        restricted = Mixture(self.name, schedule, self.sources)
        weights = restricted.schedule[0][1]
        _log.warning(
            "Sources of mixture %s are not available: %s. The weights of the others "
            "are now %s.",
            self.name,
            ", ".join(missing),
            ", ".join(f"{name} {weight:.2%}" for name, weight in weights.items()),
        )
        return restricted

    def select(self, names: Collection[str]) -> Mixture:
        """Selects some sources, without a warning.

        Args:
            names: names of the sources.

        Returns:
            A mixture of these sources, with normalized weights.

        Raises:
            ValueError: if no source is left at some step.
        """
        schedule = tuple(
            (step, {name: w for name, w in weights.items() if name in names})
            for step, weights in self.schedule
        )
        return Mixture(self.name, schedule, self.sources)

    def with_weights(self, from_step: int, weights: dict[str, float]) -> Mixture:
        """Changes the weights from a step on.

        Args:
            from_step: first step with the new weights. Later changes of the schedule
                are dropped.
            weights: numbers by source, of any sum.

        Returns:
            The changed mixture.

        Raises:
            ValueError: if a weight is negative, or all are 0.
        """
        earlier = tuple(entry for entry in self.schedule if entry[0] < from_step)
        return dataclasses.replace(self, schedule=(*earlier, (from_step, weights)))

    def to_json(self) -> dict[str, Any]:
        """Returns a dict for JSON, the input of `mixture_from_json`."""
        return {
            "name": self.name,
            "schedule": [
                {"from_step": step, "weights": weights}
                for step, weights in self.schedule
            ],
            "sources": self.sources,
        }


def _normalize_weights(weights, name):
    valid = all(
        isinstance(w, (int, float)) and 0 <= w < float("inf") for w in weights.values()
    )
    total = sum(weights.values()) if valid else 0
    if not total > 0:
        raise ValueError(
            f"The weights of mixture {name!r} must be non-negative numbers, and at "
            f"least one must be positive. Received: {weights}"
        )
    if abs(total - 1) < _ROUNDING:  # Another division would change them.
        total = 1.0
    return {name: weight / total for name, weight in weights.items() if weight > 0}


def mixture_from_json(data: dict[str, Any]) -> Mixture:
    """Creates a mixture from a dict, such as a file of `presets/mixtures/`.

    Args:
        data: dict with `"name"` and `"sources"`, a dict of dicts by source. The weights
            are `"schedule"`, a list of `{"from_step": …, "weights": {…}}`, or, without
            a schedule, each source's `"weight"`, of any sum.

    Returns:
        The mixture.

    Raises:
        ValueError: if `data` has another form.

    Example:
        >>> mixture_from_json({"name": "web", "sources": {"web": {"weight": 5}}}).names
        ['web']
    """
    try:
        sources = data["sources"]
        schedule = data.get("schedule")
        if schedule is None:
            weights = {name: source["weight"] for name, source in sources.items()}
            schedule = [{"from_step": 0, "weights": weights}]
        schedule = tuple((entry["from_step"], entry["weights"]) for entry in schedule)
        return Mixture(data["name"], schedule, sources)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            "A mixture must be a JSON object with 'name' and 'sources', each with a "
            f"'weight', such as presets/mixtures/v2.json. Received: {str(data)[:200]} "
            f"({type(error).__name__}: {error})"
        ) from error


def mixture_from_weights(weights: dict[str, float], name: str = "custom") -> Mixture:
    """Creates a mixture from weights that stay constant.

    Args:
        weights: numbers by source, of any sum.
        name: name of the mixture.

    Returns:
        The mixture.

    Raises:
        ValueError: if a weight is negative, or all are 0.

    Example:
        >>> mixture_from_weights({"web": 3, "code": 1}).weights_at(0)
        {'web': 0.75, 'code': 0.25}
    """
    return Mixture(name, ((0, dict(weights)),), {source: {} for source in weights})


def load_mixture(name: PathLike) -> Mixture:
    """Loads a mixture.

    Args:
        name: `"v1"`, `"v2"`, or the path of a JSON file.

    Returns:
        The mixture.

    Raises:
        ValueError: if there is no such mixture or file, or the file has another form.

    Example:
        >>> load_mixture("v1").names[:2]
        ['commoncrawl', 'c4']
    """
    known = available_mixtures()
    path = known.get(str(name), str(name))
    if not str(path).endswith(".json") or not files.exists(path):
        raise ValueError(
            f"`mixture` must be one of {', '.join(known)}, or the path of a JSON file. "
            f"Received: mixture={str(name)!r}"
        )
    try:
        data = json.loads(files.read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    return mixture_from_json(data)


def available_mixtures() -> dict[str, Path]:
    """Returns the paths of the mixtures in this package, by name."""
    paths = sorted(Path(presets.folder(), "mixtures").glob("*.json"))
    return {path.stem: path for path in paths}


class Interleaving:
    """Assigns a source to each training sequence.

    Sequences of a source are spread evenly: in any range of sequences, each source has
    its share to within one or two sequences. The assignment is a pure function of the
    sequence's index.

    Args:
        schedule: tuples `(first_sequence, weights)`, starting at sequence 0. `weights`
            is a dict of shares of the sequences by source.
        sources: names of the sources. Sources are numbered in this order.

    Example:
        >>> schedule = [(0, {"web": 0.75, "code": 0.25})]
        >>> Interleaving(schedule, ["web", "code"]).sequences_before(1000)
        array([750, 250])
    """

    def __init__(
        self, schedule: Sequence[tuple[int, dict[str, float]]], sources: Sequence[str]
    ):
        self._starts = np.array([start for start, _ in schedule], "int64")
        self._patterns = [
            _Pattern(tuple(weights.get(name, 0.0) for name in sources))
            for _, weights in schedule
        ]
        # Sequences of each source before each part of the schedule.
        self._before = [np.zeros(len(sources), "int64")]
        for pattern, length in zip(
            self._patterns, np.diff(self._starts).tolist(), strict=False
        ):
            self._before.append(self._before[-1] + pattern.counts(length))

    def sequences_before(self, index: int) -> np.ndarray:
        """Counts the sequences of each source before a sequence: int64 `(sources,)`."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        start = int(self._starts[part])
        return self._before[part] + self._patterns[part].counts(index - start)

    def sequences(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the sources of the sequences `first` to `last - 1`.

        Args:
            first: index of the first sequence.
            last: index after the last sequence.

        Returns:
            Two int64 arrays `(last - first,)`: the number of the source, and the index
            of the sequence among all sequences of that source.
        """
        sources = np.concatenate(
            [
                pattern.sources(max(first, start) - start, min(last, end) - start)
                for pattern, start, end in zip(
                    self._patterns,
                    self._starts.tolist(),
                    [*self._starts[1:].tolist(), last],
                    strict=True,
                )
                if start < last and end > first
            ]
        )
        numbers = np.empty(len(sources), "int64")
        for source, before in enumerate(self.sequences_before(first).tolist()):
            (places,) = np.nonzero(sources == source)
            numbers[places] = before + np.arange(len(places))
        return sources, numbers


class _Pattern:
    """The order of sources in `PERIOD` sequences, which repeats."""

    def __init__(self, weights):
        self._quota = _quota(np.array(weights))
        self._order = _even_order(tuple(self._quota.tolist()))

    def counts(self, count):
        """Counts the sequences of each source among the first `count`."""
        periods, rest = divmod(count, PERIOD)
        counted = np.bincount(self._order[:rest], minlength=len(self._quota))
        return periods * self._quota + counted

    def sources(self, first, last):
        """Returns the sources of the sequences `first` to `last - 1`."""
        return self._order[np.arange(first, last) % PERIOD]


def _quota(weights):
    """Integers close to `PERIOD` times the weights, with a sum of `PERIOD`."""
    exact = weights / weights.sum() * PERIOD
    # Every source with a weight gets at least one sequence.
    quota = np.maximum(np.floor(exact), weights > 0).astype("int64")
    missing = PERIOD - quota.sum()
    if missing >= 0:
        largest_remainder = np.argsort(-(exact - quota), kind="stable")
        quota[largest_remainder[:missing]] += 1
    else:
        quota[np.argmax(quota)] += missing
    return quota


@functools.lru_cache(maxsize=16)
def _even_order(quota):
    """Source numbers, each as often as its quota, and evenly spread."""
    times = [
        (np.arange(count) + shuffling.make_key("offset", source) / 2**64)
        / max(count, 1)
        for source, count in enumerate(quota)
    ]
    sources = np.repeat(np.arange(len(quota)), quota)
    return sources[np.argsort(np.concatenate(times), kind="stable")]
