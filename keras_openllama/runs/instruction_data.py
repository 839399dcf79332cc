"""The batches of fine-tuning, from tokenized examples in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from keras_openllama.training.step_metrics import LossSums, perplexity_from_loss

# `(x, y, sample_weight)`: `x` is a dict of `token_ids` and `padding_mask`; each array
# has the shape `(sequences, sequence_length)`.
Batch: TypeAlias = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]


class InstructionData:
    """`trainer.TrainData` of examples: each batch depends on the seed and step only.

    Each epoch reads all sequences once, in its own random order. The last batch of an
    epoch is completed from the start of the next one.

    Args:
        arrays: `(x, y, sample_weight)` from the preprocessor, each array of the shape
            `(sequences, sequence_length)`.
        batch_size: Sequences per batch, over all processes.
        seed: Seed of the order.
        validation: By source, arrays as above, and the size of their text in bytes.
        process_count: Number of processes that share a batch.
        process_index: Index of this process.

    Attributes:
        num_sequences: Number of sequences.
        validation: The held-out `InstructionValidation`.

    Raises:
        ValueError: if the processes cannot share a batch evenly.

    Example:
        >>> ones = np.ones((3, 4), "int32")
        >>> arrays = {"token_ids": ones, "padding_mask": ones}, ones, ones
        >>> data = InstructionData(arrays, batch_size=2, seed=0)
        >>> data.steps(epochs=2)
        3
        >>> data.tokens(steps=1)
        8
    """

    def __init__(
        self,
        arrays: Batch,
        batch_size: int,
        seed: int,
        validation: Mapping[str, tuple[Batch, int]] | None = None,
        process_count: int = 1,
        process_index: int = 0,
    ):
        x, y, weights = arrays
        self._arrays = _as_arrays(x, y, weights)
        self._batch_size, self._seed = batch_size, seed
        self._share = _process_slice(batch_size, process_count, process_index)
        self.num_sequences = len(y)
        self._epoch = None  # The epoch of `_permutation`.
        self._counts = np.count_nonzero(x["padding_mask"], axis=1)
        self.validation = InstructionValidation(
            validation or {}, batch_size, self._share
        )

    def steps(self, epochs: float) -> int:
        """Returns the number of steps in a number of epochs."""
        return max(1, -(-round(epochs * self.num_sequences) // self._batch_size))

    def batches(self, from_step: int) -> Iterator[Batch]:
        """Returns an endless iterator of this process's batches after some steps."""
        return map(self.batch, itertools.count(from_step))

    def batch(self, step: int) -> Batch:
        """Returns this process's part of the batch of step `step` (from 0)."""
        return _batch(self._arrays, self.sequences_read(step)[self._share])

    def sequences_read(self, step: int) -> list[int]:
        """Returns the indices of all processes' sequences of step `step` (from 0)."""
        first = step * self._batch_size
        places = range(first, first + self._batch_size)
        return [
            int(self._order(place // self.num_sequences)[place % self.num_sequences])
            for place in places
        ]

    def tokens(self, steps: int) -> int:
        """Returns the number of tokens in the first `steps` steps, without padding."""
        epochs, rest = divmod(steps * self._batch_size, self.num_sequences)
        part = self._counts[self._order(epochs)[:rest]].sum() if rest else 0
        return int(epochs * self._counts.sum() + part)

    def _order(self, epoch):
        if self._epoch != epoch:
            random = np.random.default_rng([self._seed, epoch])
            self._epoch, self._permutation = (
                epoch,
                random.permutation(self.num_sequences),
            )
        return self._permutation


class InstructionValidation:
    """`trainer.ValidationData` of examples; each validation evaluates all of them.

    Args:
        sources: Arrays and size by source, see `InstructionData`.
        batch_size: Sequences per batch, over all processes.
        share: Slice of this process's sequences in a batch.

    Attributes:
        sources: Names of the sources that have any targets.
    """

    def __init__(
        self, sources: Mapping[str, tuple[Batch, int]], batch_size: int, share: slice
    ):
        self._batch_size, self._share = batch_size, share
        self._sources = {
            name: (_as_arrays(*arrays), size)
            for name, (arrays, size) in sources.items()
            if arrays[2].any()
        }
        self.sources = list(self._sources)

    def measure(
        self, evaluate: Callable[[Batch], tuple[LossSums, Any]]
    ) -> dict[str, Any]:
        """Evaluates all examples.

        Args:
            evaluate: Function from a batch to the sums over its targets, and the sum
                of their weights.

        Returns:
            `loss` (nats per token), `perplexity` and `bits_per_byte` of all examples
            together, and `sources`, the same of each source.
        """
        sums = {
            name: (*self._sum_targets(arrays, evaluate), size)
            for name, (arrays, size) in self._sources.items()
        }
        total = [sum(column) for column in zip(*sums.values(), strict=True)]
        sources = {name: _rates(*values) for name, values in sums.items()}
        return {**_rates(*total), "sources": sources}

    def _sum_targets(self, arrays, evaluate):
        """Sums nats and targets of a source; zero weights pad the last batch."""
        count = len(arrays[-1])
        nats = targets = 0.0
        for first in range(0, count, self._batch_size):
            indices = np.arange(first, first + self._batch_size)[self._share]
            x, y, weights = _batch(arrays, np.minimum(indices, count - 1))
            weights[indices >= count] = 0
            sums, weight = evaluate((x, y, weights))
            nats, targets = nats + float(sums.loss), targets + float(weight)
        return nats, targets


def _rates(nats, targets, size):
    loss = nats / targets
    bits = {"bits_per_byte": nats / math.log(2) / size} if size else {}
    return {"loss": loss, "perplexity": perplexity_from_loss(loss), **bits}


def _as_arrays(x, y, weights):
    ids, mask = (np.asarray(x[k], "int32") for k in ("token_ids", "padding_mask"))
    return ids, mask, np.asarray(y, "int32"), np.asarray(weights, "float32")


def _batch(arrays, indices):
    token_ids, padding_mask, y, weights = (array[indices] for array in arrays)
    return {"token_ids": token_ids, "padding_mask": padding_mask}, y, weights


def _process_slice(batch_size, process_count, process_index):
    """Slice of a process's sequences in a batch."""
    if batch_size % process_count:
        raise ValueError(
            "`batch_size` (--batch-size) must be a multiple of `process_count`. "
            f"Received: batch_size={batch_size}, process_count={process_count}"
        )
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)
