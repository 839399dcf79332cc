"""Padding of batches to a size that devices and micro-batches can share.

Copies of the first sequence are appended. They have zero weight, so that they do not
count in the loss and the metrics; predictions for them are removed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_openllama.backend.arrays import loaded_tensorflow, to_numpy
from keras_openllama.text.inputs import is_tf_dataset


def data_parallel_size() -> int:
    """Returns the number of parts that this process's batch is sharded into.

    Example:
        >>> data_parallel_size()  # Without a `keras.distribution`.
        1
    """
    if keras.config.backend() != "jax":
        return 1
    import jax

    distribution = keras.distribution.distribution()
    replicas = getattr(distribution, "num_model_replicas", 1)
    return max(1, replicas // jax.process_count())


def pad_batch(batch: Any, multiple: int) -> Any:
    """Pads a batch of arrays.

    Args:
        batch: `x`, or a tuple of `x`, `y` and `sample_weight`, as from a dataset; `x`
            is an array or a dict of arrays.
        multiple: number that is to divide the batch size.

    Returns:
        The batch; it has sample weights if sequences with targets were appended.

    Example:
        >>> x, y, sample_weight = pad_batch(([[1, 2]], [[2, 3]]), multiple=2)
        >>> x.shape, sample_weight.tolist()
        ((2, 2), [[1.0, 1.0], [0.0, 0.0]])
    """
    x, y, weights = keras.utils.unpack_x_y_sample_weight(batch)
    count = count_sequences(x)
    more = -count % multiple
    if not more:
        return batch
    if y is not None:
        weights = np.ones(np.shape(y), "float32") if weights is None else weights
        weights = append_copies(weights, more)
        weights[count:] = 0
        y = append_copies(y, more)
    if isinstance(x, dict):
        x = {name: append_copies(array, more) for name, array in x.items()}
    else:
        x = append_copies(x, more)
    return keras.utils.pack_x_y_sample_weight(x, y, weights)


def pad_tf_dataset(dataset: Any, multiple: int) -> Any:
    """Pads the batches of a `tf.data.Dataset` as `pad_batch`.

    Args:
        dataset: `tf.data.Dataset` of batches.
        multiple: number that is to divide the batch size.

    Returns:
        The dataset of padded batches. Batches with targets have sample weights.
    """
    tf = loaded_tensorflow()

    def pad(*batch):
        x, y, weights = (*batch, None, None)[:3]
        more = tf.math.floormod(-tf.shape(tf.nest.flatten(x)[0])[0], multiple)

        def append(array):
            return tf.concat([array, tf.repeat(array[:1], more, axis=0)], 0)

        x = tf.nest.map_structure(append, x)
        if y is None:
            return x
        weights = tf.ones(tf.shape(y), "float32") if weights is None else weights
        weights = tf.concat([weights, tf.zeros_like(append(weights)[:more])], 0)
        return x, append(y), weights

    return dataset.map(pad, num_parallel_calls=-1)


def append_copies(array: Any, count: int) -> np.ndarray:
    """Appends copies of the first element to an array.

    Args:
        array: array or tensor, `(batch, …)`.
        count: number of copies.

    Example:
        >>> append_copies([1, 2], 2).tolist()
        [1, 2, 1, 1]
    """
    array = to_numpy(array)
    return np.concatenate([array, np.repeat(array[:1], count, axis=0)])


def count_sequences(x: Any) -> int:
    """Returns the number of sequences in `x` of a batch, an array or a dict of them.

    Example:
        >>> count_sequences({"token_ids": np.ones((3, 4))})
        3
    """
    return len(next(iter(x.values())) if isinstance(x, dict) else x)


class PaddedInputs:
    """An iterator over the inputs of `predict`, padded; it knows what it padded.

    Args:
        batches: batches of arrays: a `tf.data.Dataset`, a `keras.utils.PyDataset`, a
            Grain dataset or a generator.
        multiple: number that is to divide the batch sizes.

    Attributes:
        steps: number of batches; `None` if it is unknown.

    Example:
        >>> inputs = PaddedInputs(iter([np.ones((3, 2))]), multiple=2)
        >>> [(x,)] = inputs.generate()
        >>> inputs.remove_padding(x).shape
        (3, 2)
    """

    def __init__(self, batches: Any, multiple: int):
        self._batches, self._multiple = batches, multiple
        self._sizes = []
        try:
            self.steps = len(batches)
        except TypeError:  # A generator, or a dataset of unknown size.
            self.steps = getattr(batches, "num_batches", None)

    def generate(self) -> Iterator[tuple[Any]]:
        """Yields each padded `x`, in a tuple."""
        for batch in self._iterate():
            x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
            self._sizes.append(count_sequences(x))
            yield (pad_batch(x, self._multiple),)

    def _iterate(self):
        if is_tf_dataset(self._batches):
            return self._batches.as_numpy_iterator()
        if isinstance(self._batches, keras.utils.PyDataset):
            indices = itertools.count() if self.steps is None else range(self.steps)
            return map(self._batches.__getitem__, indices)
        return iter(self._batches)

    def remove_padding(self, outputs: np.ndarray) -> np.ndarray:
        """Returns the outputs without those of padding.

        Args:
            outputs: those of all batches in a row, `(sequences, …)`.
        """
        return remove_padding(outputs, self._sizes, self._multiple)


def remove_padding(
    outputs: np.ndarray, sizes: Sequence[int], multiple: int
) -> np.ndarray:
    """Removes the outputs of padding.

    Args:
        outputs: outputs of padded batches in a row, `(sequences, …)`.
        sizes: sizes of the batches before padding; there may be further ones.
        multiple: number whose multiples the padded sizes are.

    Example:
        >>> remove_padding(np.arange(6), [3, 1], multiple=2).tolist()
        [0, 1, 2, 4]
    """
    kept, start = [], 0
    for size in sizes:
        if start < len(outputs):
            kept.append(outputs[start : start + size])
            start += size + -size % multiple
    return np.concatenate(kept)
