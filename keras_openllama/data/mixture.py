"""Mixtures: how many of the tokens come from which source, and from which step on."""

import dataclasses
import functools
import json
import logging
from pathlib import Path

import numpy as np

from keras_openllama import presets
from keras_openllama.data import shuffling
from keras_openllama.utils import files

# Ours: weights are met exactly in this many rows, to 1/65536 = 0.0015 points in 100.
PERIOD = 1 << 16
_ROUNDING = 1e-9  # Weights that were stored add up to 1 within it.

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Weights of sources, as a schedule.

    Attributes:
        name: string.
        schedule: tuple of `(from_step, weights)`, the first from step 0 on; `weights`
            is a dict of floats by source that add up to 1.
        sources: dict by source of what else is known of it: `"title"`, `"text_field"`,
            `"url"`, `"provenance"`.

    Example:

    ```python
    mixture = load("v2").restricted_to(["refinedweb", "starcoder"])
    mixture = mixture.changed(200_000, {"refinedweb": 0.5, "starcoder": 0.5})
    ```
    """

    name: str
    schedule: tuple
    sources: dict

    def __post_init__(self):
        steps = [step for step, _ in self.schedule]
        if not steps or steps[0] != 0 or sorted({*steps}) != steps:
            raise ValueError(
                f"The schedule of mixture {self.name!r} must begin at step 0 and rise. "
                f"Received: from_step {steps}"
            )
        normalised = tuple(
            (int(step), _normalised(weights, self.name))
            for step, weights in self.schedule
        )
        object.__setattr__(self, "schedule", normalised)

    @property
    def names(self):
        """Names of all sources that have a weight at any step, in order."""
        return list(dict.fromkeys(name for _, w in self.schedule for name in w))

    def weights_at(self, step):
        """The weights at a step: dict of floats by source."""
        return [weights for start, weights in self.schedule if start <= step][-1]

    def restricted_to(self, available):
        """The same without the sources that are missing, which is said once.

        Args:
            available: names of the sources that there are.

        Raises:
            ValueError: if a source is not of this mixture, or none is left at some
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
            "Mixture %s is without %s; the weights of the rest become %s.",
            self.name,
            ", ".join(missing),
            ", ".join(f"{name} {weight:.2%}" for name, weight in weights.items()),
        )
        return restricted

    def only(self, names):
        """The mixture of some of its sources, by choice: nothing is said."""
        schedule = tuple(
            (step, {name: w for name, w in weights.items() if name in names})
            for step, weights in self.schedule
        )
        return Mixture(self.name, schedule, self.sources)

    def changed(self, from_step, weights):
        """The same with other weights from a step on.

        Args:
            from_step: int; what the schedule had from there on is dropped.
            weights: dict of numbers by source.
        """
        kept = tuple(entry for entry in self.schedule if entry[0] < from_step)
        return dataclasses.replace(self, schedule=(*kept, (from_step, weights)))

    def to_json(self):
        """A dict that JSON can hold, and `from_json` reads."""
        return {
            "name": self.name,
            "schedule": [
                {"from_step": step, "weights": weights}
                for step, weights in self.schedule
            ],
            "sources": self.sources,
        }


def _normalised(weights, name):
    good = all(
        isinstance(w, (int, float)) and 0 <= w < float("inf") for w in weights.values()
    )
    total = sum(weights.values()) if good else 0
    if not total > 0:
        raise ValueError(
            f"The weights of mixture {name!r} must be numbers from 0 on, and one of "
            f"them above. Received: {weights}"
        )
    if abs(total - 1) < _ROUNDING:  # Divided once more, they would not be the same.
        total = 1.0
    return {name: weight / total for name, weight in weights.items() if weight > 0}


def from_json(data):
    """The mixture of a dict: one of `presets/mixtures/`, or what `to_json` wrote.

    Args:
        data: dict with `"name"` and `"sources"`, a dict by source of dicts. The weights
            are `"schedule"`, a list of `{"from_step": …, "weights": {…}}`, or else
            each source's `"weight"`, whatever their sum.

    Raises:
        ValueError: if it is something else.
    """
    try:
        sources = data["sources"]
        schedule = data.get("schedule") or [
            {
                "from_step": 0,
                "weights": {name: source["weight"] for name, source in sources.items()},
            }
        ]
        schedule = tuple((entry["from_step"], entry["weights"]) for entry in schedule)
        return Mixture(data["name"], schedule, sources)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            "A mixture is a JSON object with 'name' and 'sources' that have a 'weight' "
            f"each, such as presets/mixtures/v2.json. Received: {str(data)[:200]} "
            f"({type(error).__name__}: {error})"
        ) from error


def from_weights(weights, name="custom"):
    """The mixture of a dict of numbers by source."""
    return Mixture(name, ((0, dict(weights)),), {source: {} for source in weights})


def load(name):
    """A mixture by name (`"v1"`, `"v2"`) or path of its JSON file.

    Raises:
        ValueError: if it is neither, or the file holds something else.
    """
    known = available()
    path = known.get(str(name), str(name))
    if not str(path).endswith(".json") or not files.exists(path):
        raise ValueError(
            f"`mixture` takes one of {', '.join(known)}, or the path of a JSON file. "
            f"Received: mixture={str(name)!r}"
        )
    try:
        data = json.loads(files.read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    return from_json(data)


def available():
    """Paths of the mixtures that come with the package, by name."""
    paths = sorted(Path(presets.folder(), "mixtures").glob("*.json"))
    return {path.stem: path for path in paths}


class Interleaving:
    """Which source each row of a run comes from.

    Rows of a source lie as evenly as they can, so any stretch of rows has the right
    shares to a row or two. It is a pure function of the row's number.

    Args:
        schedule: list of `(first_row, weights)`, the first from row 0 on; `weights` is
            a dict of floats by source.
        sources: list of names, in the order of the numbers that are returned.
    """

    def __init__(self, schedule, sources):
        self._starts = np.array([start for start, _ in schedule], "int64")
        self._patterns = [
            _Pattern(tuple(weights.get(name, 0.0) for name in sources))
            for _, weights in schedule
        ]
        # Rows of each source before each part of the schedule.
        self._before = [np.zeros(len(sources), "int64")]
        for pattern, length in zip(
            self._patterns, np.diff(self._starts).tolist(), strict=False
        ):
            self._before.append(self._before[-1] + pattern.counts(length))

    def rows_before(self, row):
        """How many of the rows 0 … `row` - 1 each source has: int64 `(sources,)`."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        start = int(self._starts[part])
        return self._before[part] + self._patterns[part].counts(row - start)

    def rows(self, first, last):
        """Where the rows `first` … `last` - 1 come from.

        Returns:
            Two int64 arrays `(last - first,)`: the number of the source, and how many
            rows of that source come before it.
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
        for source, before in enumerate(self.rows_before(first).tolist()):
            (places,) = np.nonzero(sources == source)
            numbers[places] = before + np.arange(len(places))
        return sources, numbers


class _Pattern:
    """The order of sources in `PERIOD` rows, which repeats."""

    def __init__(self, weights):
        self._quota = _quota(np.array(weights))
        self._order = _even_order(tuple(self._quota.tolist()))

    def counts(self, rows):
        """Rows of each source among the first `rows`."""
        whole, rest = divmod(rows, PERIOD)
        counted = np.bincount(self._order[:rest], minlength=len(self._quota))
        return whole * self._quota + counted

    def sources(self, first, last):
        """The sources of rows `first` … `last` - 1."""
        return self._order[np.arange(first, last) % PERIOD]


def _quota(weights):
    """Whole numbers near `PERIOD` times the weights that add up to `PERIOD`."""
    exact = weights / weights.sum() * PERIOD
    # No source may vanish because it is small.
    quota = np.maximum(np.floor(exact), weights > 0).astype("int64")
    short = PERIOD - quota.sum()
    if short >= 0:
        largest_remainder = np.argsort(-(exact - quota), kind="stable")
        quota[largest_remainder[:short]] += 1
    else:
        quota[np.argmax(quota)] += short
    return quota


@functools.lru_cache(maxsize=16)
def _even_order(quota):
    """The numbers of sources, each as often as its quota and evenly spread."""
    times = [
        (np.arange(count) + shuffling.key("offset", source) / 2**64) / max(count, 1)
        for source, count in enumerate(quota)
    ]
    sources = np.repeat(np.arange(len(quota)), quota)
    return sources[np.argsort(np.concatenate(times), kind="stable")]
