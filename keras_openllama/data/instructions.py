"""Examples of fine-tuning: read from JSON lines, their batches, their validation."""

import itertools
import json
import math
import string
from pathlib import Path

import numpy as np

from keras_openllama.text.inputs import CHAT, PAIR

_KINDS = (PAIR, CHAT, {"text"})


def read(paths, templates=None):
    """Reads examples from JSON lines.

    Args:
        paths: list of paths. Each line is an object with `"prompt"` and `"response"`,
            with `"messages"`, or with `"text"`; other keys do not matter.
        templates: pair of strings such as `"{question}\\n"` and `" {answer}"`: prompt
            and response from the keys of an object. `None` takes it as it is.

    Returns:
        List of pairs `{"prompt", "response"}`, of chats `{"messages"}`, or of strings.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a line is no such object, or files hold several kinds. The
            message names file and line.
    """
    return [example for _, example in read_sources(paths, templates)]


def read_sources(paths, templates=None):
    """As `read`, with the source of each example: its file's name, without ending.

    Returns:
        List of `(source, example)`.
    """
    found = []
    for path in paths:
        source = Path(path).stem
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        found.append((source, _example(line.decode(), templates)))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"There is no example in {', '.join(map(str, paths))}.")
    kinds = {frozenset(e) if isinstance(e, dict) else "text" for _, e in found}
    if len(kinds) > 1:
        raise ValueError(
            "The files hold examples of several kinds (pairs, chats, texts). Give "
            "those of one."
        )
    return found


def _example(line, templates):
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"no JSON object: {line.strip()[:60]}")
    if templates is not None:
        prompt, response = (_filled(template, found) for template in templates)
        return {"prompt": prompt, "response": response}
    for keys in _KINDS:
        if keys <= set(found):
            chosen = {key: found[key] for key in sorted(keys)}
            _check_strings(chosen)
            return chosen["text"] if keys == {"text"} else chosen
    raise ValueError(
        'it has none of "prompt" and "response", "messages", or "text". It has: '
        f"{', '.join(found) or 'nothing'}. Say what to make of it by --prompt and "
        "--response."
    )


def _filled(template, found):
    names = _names(template)
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"it has no {', '.join(map(repr, missing))}, which the template "
            f"{template!r} asks for. It has: {', '.join(found)}"
        )
    _check_strings({name: found[name] for name in names})
    return template.format(**{name: found[name] for name in names})


def _names(template):
    """The keys that a template asks for; `ValueError` for what is no template."""
    found = [name for _, name, _, _ in string.Formatter().parse(template)]
    names = [name for name in found if name is not None]
    if not all(name.isidentifier() for name in names):
        raise ValueError(
            f"the template {template!r} takes names in braces, such as {{question}}, "
            "and {{ and }} for braces"
        )
    return names


def _check_strings(values):
    for name, value in values.items():
        if name == "messages" and not isinstance(value, list):
            raise ValueError(f"its {name!r} is no list: {value!r:.60}")
        if name != "messages" and not isinstance(value, str):
            raise ValueError(f"its {name!r} is no string: {value!r:.60}")


def divide(examples, share, seed):
    """Sets some examples apart for validation.

    Args:
        examples: list.
        share: float from 0 to less than 1.
        seed: int.

    Returns:
        Two lists, those to train on and those apart, both in their order.
    """
    count = round(share * len(examples))
    count = min(max(count, share > 0), len(examples) - 1)  # One is left to train on.
    chosen = set(
        np.random.default_rng(seed).permutation(len(examples))[:count].tolist()
    )
    kept = [e for i, e in enumerate(examples) if i not in chosen]
    return kept, [e for i, e in enumerate(examples) if i in chosen]


class InstructionData:
    """The batch of each step, a function of the seed and the step alone.

    Each epoch goes through all sequences once, in an order of its own; the last batch
    of an epoch is filled up from the next one's order. It is `runs.trainer.TrainData`.

    Args:
        arrays: `(x, y, weights)`, NumPy arrays of sequences, from the preprocessor.
        batch_size: int, over all hosts.
        seed: int.
        validation: dict by source of pairs: arrays as above, and the bytes of their
            text; empty for none.
        hosts, host: ints, how many processes share a batch, and which one this is.

    Attributes:
        rows: int, number of sequences.
        validation: `InstructionValidation`.
    """

    def __init__(self, arrays, batch_size, seed, validation=None, hosts=1, host=0):
        x, y, weights = arrays
        self._arrays = _as_arrays(x, y, weights)
        self._batch_size, self._seed = batch_size, seed
        self._share = _share(batch_size, hosts, host)
        self.rows = len(y)
        self._epoch = None  # That `_permutation` is of.
        self._counts = np.count_nonzero(x["padding_mask"], axis=1)
        self.validation = InstructionValidation(
            validation or {}, batch_size, self._share
        )

    def steps(self, epochs):
        """Steps that go `epochs` times through the sequences: int."""
        return max(1, -(-round(epochs * self.rows) // self._batch_size))

    def batches(self, from_step):
        """This host's part of each batch, from a step on, counted from 0; endless."""
        return map(self.batch, itertools.count(from_step))

    def batch(self, step):
        """This host's part of a step's batch: `(x, y, weights)`."""
        return _batch(self._arrays, self.sequences_read(step)[self._share])

    def sequences_read(self, step):
        """Numbers of the sequences that all hosts read in a step: list of ints."""
        first = step * self._batch_size
        places = range(first, first + self._batch_size)
        return [
            int(self._order(place // self.rows)[place % self.rows]) for place in places
        ]

    def tokens(self, steps):
        """Tokens that the first steps read, padding left out: int."""
        epochs, rest = divmod(steps * self._batch_size, self.rows)
        part = self._counts[self._order(epochs)[:rest]].sum() if rest else 0
        return int(epochs * self._counts.sum() + part)

    def _order(self, epoch):
        if self._epoch != epoch:
            random = np.random.default_rng([self._seed, epoch])
            self._epoch, self._permutation = epoch, random.permutation(self.rows)
        return self._permutation


class InstructionValidation:
    """Loss, perplexity and bits per byte of examples that were set aside, by source.

    Args:
        sources: dict by source of pairs, see `InstructionData`.
        batch_size: int, over all hosts.
        share: slice, this host's part of a batch.

    Attributes:
        sources: names of the sources that have anything to predict.
    """

    def __init__(self, sources, batch_size, share):
        self._batch_size, self._share = batch_size, share
        self._sources = {
            name: (_as_arrays(*arrays), size)
            for name, (arrays, size) in sources.items()
            if arrays[2].any()
        }
        self.sources = list(self._sources)

    def measure(self, evaluate):
        """Evaluates.

        Args:
            evaluate: function from a batch to `step_metrics.Sums` and the sum of
                weights.

        Returns:
            Dict: `loss` (nats per token), `perplexity` and `bits_per_byte` of all
            examples together, and `sources`, the same of each.
        """
        sums = {
            name: (*self._sums(arrays, evaluate), size)
            for name, (arrays, size) in self._sources.items()
        }
        total = [sum(column) for column in zip(*sums.values(), strict=True)]
        sources = {name: _rates(*values) for name, values in sums.items()}
        return {**_rates(*total), "sources": sources}

    def _sums(self, arrays, evaluate):
        """Nats and targets of a source; the last batch is filled with zero weight."""
        rows = len(arrays[-1])
        nats = targets = 0.0
        for first in range(0, rows, self._batch_size):
            places = np.arange(first, first + self._batch_size)[self._share]
            x, y, weights = _batch(arrays, np.minimum(places, rows - 1))
            weights[places >= rows] = 0
            sums, weight = evaluate((x, y, weights))
            nats, targets = nats + float(sums.loss), targets + float(weight)
        return nats, targets


def _rates(nats, targets, size):
    loss = nats / targets
    perplexity = math.inf if loss > 700 else math.exp(loss)  # Beyond, `exp` overflows.
    bits = {"bits_per_byte": nats / math.log(2) / size} if size else {}
    return {"loss": loss, "perplexity": perplexity, **bits}


def _as_arrays(x, y, weights):
    ids, mask = (np.asarray(x[k], "int32") for k in ("token_ids", "padding_mask"))
    return ids, mask, np.asarray(y, "int32"), np.asarray(weights, "float32")


def _batch(arrays, rows):
    token_ids, padding_mask, y, weights = (array[rows] for array in arrays)
    return {"token_ids": token_ids, "padding_mask": padding_mask}, y, weights


def _share(batch_size, hosts, host):
    """A host's part of a batch: slice."""
    if batch_size % hosts:
        raise ValueError(
            "The hosts must share a batch evenly. Change --batch-size. Received: "
            f"batch_size={batch_size}, hosts={hosts}"
        )
    rows = batch_size // hosts
    return slice(host * rows, (host + 1) * rows)
