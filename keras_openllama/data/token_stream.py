"""The stream of training batches. Each batch is a pure function of its step."""

import logging
import sys
from collections.abc import Collection
from typing import TypeAlias

import grain
import numpy as np
from absl import flags

from keras_openllama.config import PACKINGS
from keras_openllama.data import sequence_index, shuffling
from keras_openllama.data.mixture import Interleaving, Mixture
from keras_openllama.data.prepared_data import PreparedData
from keras_openllama.data.sequence_index import Span
from keras_openllama.utils import files
from keras_openllama.utils.types import PathLike
from keras_openllama.utils.validation import check_integer

_ENDLESS = 1 << 40  # `MapDataset.range` needs a finite stop.

Batch: TypeAlias = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]

_log = logging.getLogger(__name__)


class TokenStream:
    """Batches of training sequences from a mixture of sources.

    The batch of a step depends only on the data, the seed, the step and the schedule of
    the mixture: not on the number of processes or workers, nor on the first step.
    Starting at any step has the same cost.

    Args:
        data: `prepared_data.PreparedData`, or its directory.
        sequence_length: input tokens, and targets, per sequence.
        batch_size: sequences per batch, over all processes.
        seed: seed of the shuffling.
        mixture: the weights of the sources. Defaults to the data's own mixture. Sources
            that the data does not have are removed with a warning.
        packing: `"concatenate"` concatenates the documents of a source and cuts every
            `sequence_length` tokens, as EasyLM does. `"best_fit"` cuts no document that
            fits into a sequence, and pads.
        mask_documents: whether tokens attend to their own document only. If so, the
            `padding_mask` holds segment ids: 1, 2, … for the documents of a sequence,
            0 for padding. Positions restart with each document, and the first token of
            a document is not a target.
        split: `"train"` or `"validation"`.
        sources: names of the sources to read. Defaults to all sources of the mixture.
        process_count: number of processes that share a batch. Defaults to the processes
            of `jax.distributed`, or 1 if it is not initialized.
        process_index: index of this process.

    Attributes:
        data: the prepared dataset.
        split: the argument.
        sequence_length: the argument.
        batch_size: the argument.
        mask_documents: the argument.
        mixture: the mixture of the available sources.
        sources: names of the available sources.

    Raises:
        ValueError: if an argument is invalid or does not match the data.

    Example:
        >>> stream = TokenStream("data", 2048, batch_size=8)  # doctest: +SKIP
        >>> x, y, sample_weight = stream.batch(1000)  # doctest: +SKIP
        >>> dataset = stream.dataset(from_step=1000, workers=2)  # doctest: +SKIP
        >>> lm.fit(dataset, steps_per_epoch=100)  # doctest: +SKIP
    """

    def __init__(
        self,
        data: PreparedData | PathLike,
        sequence_length: int = 2048,
        batch_size: int = 8,
        *,
        seed: int = 0,
        mixture: Mixture | None = None,
        packing: str = "concatenate",
        mask_documents: bool = False,
        split: str = "train",
        sources: Collection[str] | None = None,
        process_count: int | None = None,
        process_index: int | None = None,
    ):
        if not isinstance(data, PreparedData):
            data = PreparedData.open(data)
        sequence_length = check_integer("sequence_length", sequence_length)
        batch_size = check_integer("batch_size", batch_size)
        if packing not in PACKINGS:
            raise ValueError(
                f"`packing` must be one of {', '.join(PACKINGS)}. Received: {packing!r}"
            )
        self.data, self.split = data, split
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.mask_documents = mask_documents
        self._first, self._count = _share(batch_size, process_count, process_index)
        mixture = mixture or data.mixture
        if sources is not None:
            mixture = mixture.select(sources)
        available = _available(data, split, mixture, warn=sources is None)
        self.mixture = mixture.restricted_to(available)
        self.sources = self.mixture.names
        self._documents = [data.documents(name, split) for name in self.sources]
        self._indexes = [
            self._sequence_index(name, documents, packing, seed)
            for name, documents in zip(self.sources, self._documents, strict=True)
        ]
        self._interleaving = Interleaving(self._sequence_schedule(), self.sources)

    def _sequence_index(self, name, documents, packing, seed):
        key = shuffling.make_key(seed, name, self.split)
        if packing == "concatenate":
            return sequence_index.ConcatenatedIndex(
                documents, self.sequence_length, key
            )
        cache = f"{self.split}.rows-{self.sequence_length}"
        cache = files.join(self.data.source_path(name), cache)
        return sequence_index.BestFitIndex(documents, self.sequence_length, key, cache)

    def _sequence_schedule(self):
        """Converts shares of tokens to shares of sequences, which may have padding."""
        tokens = {
            name: index.tokens_per_sequence()
            for name, index in zip(self.sources, self._indexes, strict=True)
        }
        return [
            (
                step * self.batch_size,
                {name: weight / tokens[name] for name, weight in weights.items()},
            )
            for step, weights in self.mixture.schedule
        ]

    def batch(self, step: int) -> Batch:
        """Returns this process's part of the batch of a step.

        Args:
            step: step of the run, from 0.

        Returns:
            `(x, y, sample_weight)` as `fit` takes them: a dict of int32 `"token_ids"`
            and `"padding_mask"`, int32 targets, and float32 weights, 1 on targets and 0
            elsewhere. All have the shape
            `(batch_size / process_count, sequence_length)`.

        Raises:
            DamagedFileError: if a shard is damaged.
        """
        sources, numbers = self._process_part(step)
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
        # Returns views, because Grain copies contiguous arrays into shared memory and
        # leaks it at exit.
        x = {"token_ids": tokens[:, :-1], "padding_mask": segments[:, :-1]}
        return x, tokens[:, 1:], weights[:, 1:]

    def _fill(self, source, places, numbers, tokens, segments):
        """Reads the sequences of a source into their places in the batch."""
        spans = [self._indexes[source].spans(number) for number in numbers.tolist()]
        documents = sorted({span[0] for sequence in spans for span in sequence})
        contents = self._documents[source].read_many(documents)
        token_ids = {
            number: tokens
            for number, (tokens, _) in zip(documents, contents, strict=True)
        }
        for place, sequence in zip(places.tolist(), spans, strict=True):
            column = 0
            for segment, (document, start, size) in enumerate(sequence, 1):
                part = token_ids[document][start : start + size]
                tokens[place, column : column + size] = part
                segments[place, column : column + size] = segment
                column += size

    def _process_part(self, step):
        first = step * self.batch_size + self._first
        return self._interleaving.sequences(first, first + self._count)

    def sequences_read(self, step: int) -> list[tuple[str, list[Span]]]:
        """Returns the origin of this process's sequences of a step.

        Args:
            step: step of the run, from 0.

        Returns:
            For each sequence, the name of its source, and its spans: tuples
            `(document, first token, number of tokens)`.
        """
        sources, numbers = self._process_part(step)
        return [
            (self.sources[source], self._indexes[source].spans(number))
            for source, number in zip(sources.tolist(), numbers.tolist(), strict=True)
        ]

    def epochs_at(self, step: int) -> dict[str, float]:
        """Returns the (fractional) epochs of each source completed before a step."""
        before = self._interleaving.sequences_before(step * self.batch_size).tolist()
        return {
            name: count / index.sequences_per_epoch
            for name, count, index in zip(
                self.sources, before, self._indexes, strict=True
            )
        }

    def dataset(
        self,
        from_step: int = 0,
        steps: int | None = None,
        *,
        workers: int = 0,
        prefetch: int = 2,
        threads: int = 2,
    ) -> grain.IterDataset:
        """Returns the batches in the order of their steps, as a Grain dataset.

        At the end of a source's epoch, the dataset warns and continues with a new
        order.

        Args:
            from_step: the first step.
            steps: number of steps. Endless if `None`.
            workers: number of reader processes. 0 reads in threads of this process.
            prefetch: batches that each worker prefetches.
            threads: reader threads per process.

        Returns:
            A dataset with elements as `batch` returns them.
        """
        last = from_step + (_ENDLESS if steps is None else steps)
        dataset = grain.MapDataset.range(from_step, last).map(self.batch)
        dataset = dataset.to_iter_dataset(
            grain.ReadOptions(
                num_threads=threads, prefetch_buffer_size=max(prefetch, threads)
            )
        )
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain reads absl flags.
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=workers, per_worker_buffer_size=prefetch
                )
            )
        return dataset.map_with_index(_WarnAtEpochEnd(self, from_step))


class _WarnAtEpochEnd:
    """Warns at the end of a source's epoch."""

    def __init__(self, stream, from_step):
        self._stream, self._from_step = stream, from_step

    def __call__(self, index, batch):
        step = self._from_step + index
        after = self._stream.epochs_at(step + 1)
        for name, before in self._stream.epochs_at(step).items():
            if int(after[name]) > int(before):
                _log.warning(
                    "Step %d: source %s has completed epoch %d and continues in a new "
                    "order.",
                    *(step, name, int(after[name])),
                )
        return batch


def _share(batch_size, process_count, process_index):
    """First sequence and number of sequences of a process's part of a batch."""
    if (process_count is None) != (process_index is None):
        raise ValueError(
            "`process_count` and `process_index` must be passed together. Received: "
            f"process_count={process_count}, process_index={process_index}"
        )
    if process_count is None:
        process_count, process_index = _processes()
    if not 0 <= process_index < process_count or batch_size % process_count:
        raise ValueError(
            "`batch_size` must be a multiple of `process_count`, and `process_index` "
            "must be from 0 to process_count - 1. Received: "
            f"batch_size={batch_size}, process_count={process_count}, "
            f"process_index={process_index}"
        )
    count = batch_size // process_count
    return process_index * count, count


def _processes():
    """Process count and index of `jax.distributed`, if it is initialized."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return 1, 0
    return jax.process_count(), jax.process_index()


def _available(data, split, mixture, warn=True):
    """Names of the mixture's sources that have documents in a split."""
    names = [name for name in data.sources if data.split_info(name, split)["documents"]]
    unused = [name for name in names if name not in mixture.names]
    if unused and warn:
        _log.warning(
            "Sources of %s are not in mixture %s and are ignored: %s.",
            *(data.directory, mixture.name, ", ".join(unused)),
        )
    names = [name for name in names if name in mixture.names]
    if not names:
        raise ValueError(
            f"{data.directory} has no {split} documents for any source of mixture "
            f"{mixture.name!r} ({', '.join(mixture.names)}). Pass another mixture, or "
            f"prepare a {split} split."
        )
    return names
