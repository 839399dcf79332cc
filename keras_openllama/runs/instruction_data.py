"""The batches of fine-tuning: arrays of examples that are all in memory."""

import itertools
import math

import numpy as np

from keras_openllama.training.step_metrics import perplexity_from_loss


class InstructionData:
    """The batch of each step, a function of the seed and the step alone.

    Each epoch goes through all sequences once, in an order of its own; the last batch
    of an epoch is filled up from the next one's order. It is `trainer.TrainData`.

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
        """Tokens that the first steps read, without padding: int."""
        epochs, rest = divmod(steps * self._batch_size, self.rows)
        part = self._counts[self._order(epochs)[:rest]].sum() if rest else 0
        return int(epochs * self._counts.sum() + part)

    def _order(self, epoch):
        if self._epoch != epoch:
            random = np.random.default_rng([self._seed, epoch])
            self._epoch, self._permutation = epoch, random.permutation(self.rows)
        return self._permutation


class InstructionValidation:
    """`trainer.ValidationData` of examples, all of which are evaluated each time.

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
            evaluate: function from a batch to `step_metrics.LossSums` and the sum of
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
    bits = {"bits_per_byte": nats / math.log(2) / size} if size else {}
    return {"loss": loss, "perplexity": perplexity_from_loss(loss), **bits}


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
