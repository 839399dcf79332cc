"""The stream of training batches: each a pure function of its step."""

import logging
import sys

import grain
import numpy as np
from absl import flags

from keras_openllama.config import PACKINGS
from keras_openllama.data import sequence_index as rows
from keras_openllama.data import shuffling
from keras_openllama.data.mixture import Interleaving
from keras_openllama.data.prepared_data import PreparedData
from keras_openllama.utils import files

_ENDLESS = 1 << 40  # Steps; Grain wants a number.

_log = logging.getLogger(__name__)


class TokenStream:
    """Batches of rows of a mixture, for one of the hosts of a run.

    Which rows the batch of a step holds depends on the seed, the step and the schedule
    of the mixture alone: not on the number of hosts or workers, nor on where reading
    began. To begin at any step costs the same.

    Args:
        data: `prepared_data.PreparedData`, or its directory.
        sequence_length: int, tokens that a row reads and predicts.
        batch_size: int, rows of a batch, over all hosts.
        seed: int.
        mixture: `mixture.Mixture`; the data's own unless given. Sources that the data
            lack are left out, the others' weights grow.
        packing: `"concatenate"` joins the documents of a source and cuts every
            `sequence_length` tokens, as LLaMA did. `"best_fit"` cuts no document that
            fits into a row, and pads.
        mask_documents: bool, whether tokens see their own document only. Then the
            `padding_mask` numbers the documents of a row from 1, positions restart with
            each, and the first token of a document is no target.
        split: `"train"` or `"validation"`.
        sources: list of names, to read nothing else of the mixture.
        hosts, host: ints, how many processes share the batch, and which one this is.
            Those of `jax.distributed` unless given, where it is in use.

    Raises:
        ValueError: for arguments that do not fit the data or each other.

    Example:

    ```python
    stream = TokenStream("data", sequence_length=2048, batch_size=8)
    x, y, sample_weight = stream.batch(1000)
    lm.fit(stream.dataset(from_step=1000, workers=2), steps_per_epoch=100)
    ```
    """

    def __init__(
        self,
        data,
        sequence_length=2048,
        batch_size=8,
        *,
        seed=0,
        mixture=None,
        packing="concatenate",
        mask_documents=False,
        split="train",
        sources=None,
        hosts=None,
        host=None,
    ):
        if not isinstance(data, PreparedData):
            data = PreparedData.open(data)
        for name, value in (
            ("sequence_length", sequence_length),
            ("batch_size", batch_size),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is an int from 1 on. Received: {value!r}")
        if packing not in PACKINGS:
            raise ValueError(
                f"`packing` takes one of {', '.join(PACKINGS)}. Received: {packing!r}"
            )
        self.data, self.split = data, split
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.mask_documents = mask_documents
        self._first_row, self._host_rows = _share(batch_size, hosts, host)
        mixture = mixture or data.mixture
        if sources is not None:
            mixture = mixture.only(sources)
        available = _available(data, split, mixture, everything=sources is None)
        self.mixture = mixture.restricted_to(available)
        self.sources = self.mixture.names
        self._documents = [data.documents(name, split) for name in self.sources]
        self._rows = [
            self._sequence_index(name, documents, packing, seed)
            for name, documents in zip(self.sources, self._documents, strict=True)
        ]
        self._interleaving = Interleaving(self._row_schedule(), self.sources)

    def _sequence_index(self, name, documents, packing, seed):
        key = shuffling.key(seed, name, self.split)
        if packing == "concatenate":
            return rows.Concatenated(documents, self.sequence_length, key)
        cache = f"{self.split}.rows-{self.sequence_length}"
        cache = files.join(self.data.path_of(name), cache)
        return rows.BestFit(documents, self.sequence_length, key, cache)

    def _row_schedule(self):
        """The schedule in rows: weights are shares of tokens; rows may be padded."""
        tokens = {
            name: source.row_tokens()
            for name, source in zip(self.sources, self._rows, strict=True)
        }
        return [
            (
                step * self.batch_size,
                {name: weight / tokens[name] for name, weight in weights.items()},
            )
            for step, weights in self.mixture.schedule
        ]

    def batch(self, step):
        """This host's rows of the batch of a step.

        Args:
            step: int, from 0 on.

        Returns:
            `(x, y, sample_weight)` as `fit` takes it: a dict of int32 `"token_ids"` and
            `"padding_mask"`, int32 targets, and float32 weights, 1 on real targets; all
            are `(rows of this host, sequence_length)`.

        Raises:
            DamagedFile: if a shard is.
        """
        sources, numbers = self._host_part(step)
        shape = len(sources), self.sequence_length + 1
        tokens, segments = np.zeros(shape, "int32"), np.zeros(shape, "int32")
        for source in np.unique(sources).tolist():
            places = np.flatnonzero(sources == source)
            self._fill(source, places, numbers[places], tokens, segments)
        weights = np.minimum(segments, 1, dtype="float32")
        if self.mask_documents:
            weights[:, 1:] *= segments[:, 1:] == segments[:, :-1]
        else:
            segments = np.minimum(segments, 1)
        # Grain puts whole arrays into shared memory, which it leaks at exit, but not
        # parts of arrays.
        x = {"token_ids": tokens[:, :-1], "padding_mask": segments[:, :-1]}
        return x, tokens[:, 1:], weights[:, 1:]

    def _fill(self, source, places, numbers, tokens, segments):
        """Reads the rows of a source into their places."""
        spans = [self._rows[source].spans(number) for number in numbers.tolist()]
        documents = sorted({span[0] for row in spans for span in row})
        read = self._documents[source].read(documents)
        texts = {
            number: tokens for number, (tokens, _) in zip(documents, read, strict=True)
        }
        for place, row in zip(places.tolist(), spans, strict=True):
            column = 0
            for segment, (document, start, size) in enumerate(row, 1):
                part = texts[document][start : start + size]
                tokens[place, column : column + size] = part
                segments[place, column : column + size] = segment
                column += size

    def _host_part(self, step):
        first = step * self.batch_size + self._first_row
        return self._interleaving.rows(first, first + self._host_rows)

    def sequences_read(self, step):
        """Where this host's rows of a step come from.

        Returns:
            List of pairs of the source's name and the row's spans, tuples of
            `(document, first token, tokens)`.
        """
        sources, numbers = self._host_part(step)
        return [
            (self.sources[source], self._rows[source].spans(number))
            for source, number in zip(sources.tolist(), numbers.tolist(), strict=True)
        ]

    def epochs_at(self, step):
        """How often each source has been read before a step: dict of floats."""
        before = self._interleaving.rows_before(step * self.batch_size).tolist()
        return {
            name: count / source.epoch_rows
            for name, count, source in zip(
                self.sources, before, self._rows, strict=True
            )
        }

    def dataset(self, from_step=0, steps=None, *, workers=0, prefetch=2, threads=2):
        """The batches in the order of their steps, as Grain gives them.

        When a source has been read to its end it begins again in another order, and
        this is said.

        Args:
            from_step: int, the first step.
            steps: int, how many; endless if `None`.
            workers: int, processes that read; 0 reads in threads of this one.
            prefetch: int, batches that a worker reads ahead.
            threads: int, threads that read, in each process.

        Returns:
            A `grain.IterDataset` of what `batch` returns.
        """
        last = from_step + (_ENDLESS if steps is None else steps)
        dataset = grain.MapDataset.range(from_step, last).map(self.batch)
        dataset = dataset.to_iter_dataset(
            grain.ReadOptions(
                num_threads=threads, prefetch_buffer_size=max(prefetch, threads)
            )
        )
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain looks at flags that nobody gave.
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=workers, per_worker_buffer_size=prefetch
                )
            )
        return dataset.map_with_index(_Watch(self, from_step))


class _Watch:
    """Says when a source has been read to its end."""

    def __init__(self, stream, from_step):
        self._stream, self._from_step = stream, from_step

    def __call__(self, index, batch):
        step = self._from_step + index
        after = self._stream.epochs_at(step + 1)
        for name, before in self._stream.epochs_at(step).items():
            if int(after[name]) > int(before):
                _log.warning(
                    "Step %d: source %s has been read %d times to its end, and begins "
                    "again in another order.",
                    *(step, name, int(after[name])),
                )
        return batch


def _share(batch_size, hosts, host):
    """First row and number of rows of a host's part of a batch."""
    if (hosts is None) != (host is None):
        raise ValueError(
            "`hosts` and `host` are given together or not at all. Received: "
            f"hosts={hosts}, host={host}"
        )
    if hosts is None:
        hosts, host = _processes()
    if not 0 <= host < hosts or batch_size % hosts:
        raise ValueError(
            "The hosts share a batch evenly and are numbered from 0 on. Received: "
            f"batch_size={batch_size}, hosts={hosts}, host={host}"
        )
    rows = batch_size // hosts
    return host * rows, rows


def _processes():
    """How many processes `jax.distributed` joins, and which one this is."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return 1, 0
    return jax.process_count(), jax.process_index()


def _available(data, split, mixture, everything=True):
    """Names of the mixture's sources that have documents in a split."""
    names = [name for name in data.sources if data.split(name, split)["documents"]]
    left_out = [name for name in names if name not in mixture.names]
    if left_out and everything:
        _log.warning(
            "Mixture %s does not have %s of %s, which is not read.",
            *(mixture.name, ", ".join(left_out), data.directory),
        )
    names = [name for name in names if name in mixture.names]
    if not names:
        raise ValueError(
            f"{data.directory} has no documents for {split} of mixture "
            f"{mixture.name!r}: {', '.join(mixture.names)}."
        )
    return names
