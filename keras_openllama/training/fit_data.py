"""What `fit` is passed, as arrays or batches that Keras trains on."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_openllama.backend.arrays import is_graph_tensor, to_numpy
from keras_openllama.text.examples import BatchWarnings
from keras_openllama.text.input_kinds import Batches, Examples, RawInputs, Texts
from keras_openllama.text.inputs import is_tf_dataset, normalize_training_data
from keras_openllama.text.token_arrays import as_token_ids
from keras_openllama.training.batch_padding import (
    data_parallel_size,
    pad_batch,
    pad_tf_dataset,
)
from keras_openllama.training.target_weights import no_targets_error
from keras_openllama.utils.validation import check_integer


class FitData(NamedTuple):
    """Arguments of `keras.Model.fit`, and the size of their text.

    Attributes:
        x: dict of `"token_ids"` and `"padding_mask"`, or batches.
        y: targets; `None` for batches, which yield their targets.
        sample_weight: weights of the targets, or `None`.
        bytes_per_target: UTF-8 bytes of text per target token; `None` if unknown.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None
    bytes_per_target: float | None = None

    @property
    def has_arrays(self) -> bool:
        """Whether the sequences are in arrays, which can be split and padded."""
        return isinstance(self.x, dict) and self.y is not None

    def check_targets(self, name: str) -> None:
        """Raises a `ValueError` if no target of the arrays has a weight."""
        if not self.has_arrays or "padding_mask" not in self.x:
            return
        weights = to_numpy(self.x["padding_mask"]) != 0
        if self.sample_weight is not None:
            weights = weights * to_numpy(self.sample_weight)
        if not np.any(weights):
            raise no_targets_error(f"`{name}` has")

    def validation_data(self) -> Any:
        """Returns the argument `validation_data` of `keras.Model.fit`."""
        if self.y is None and self.sample_weight is None:
            return self.x
        return self.x, self.y, self.sample_weight

    def split(self, fraction: float) -> tuple[FitData, FitData]:
        """Splits off the last `fraction` of the sequences, as Keras does."""
        count = len(self.y)
        num_train = math.floor(count * (1 - fraction))
        if not 0 < num_train < count:
            raise ValueError(
                "`validation_split` must leave sequences for training and for "
                f"validation. Received: validation_split={fraction}, {count} sequences"
            )
        return self._slice(slice(num_train)), self._slice(slice(num_train, None))

    def _slice(self, part):
        x = {name: ops.convert_to_numpy(array)[part] for name, array in self.x.items()}
        weights = self.sample_weight
        if weights is not None:
            weights = ops.convert_to_numpy(weights)[part]
        return FitData(x, ops.convert_to_numpy(self.y)[part], weights)


class FitDataMixin:
    """The methods of `OpenLlamaCausalLM` that prepare the data of `fit`."""

    def preprocess_samples(
        self, x: Any, y: Any = None, sample_weight: Any = None
    ) -> tuple | Any:
        """Preprocesses text; arrays are checked and returned unchanged.

        Args:
            x: see `fit`.
            y: see `fit`.
            sample_weight: see `fit`.

        Returns:
            `(x, y, sample_weight)`, without trailing `None`.

        Raises:
            ValueError: for malformed data, or token ids outside the vocabulary.

        Example:
            >>> x, y, sample_weight = lm.preprocess_samples(["The sea"])
            >>> y.shape
            (1, 256)
        """
        if not isinstance(self._normalize(x, y), RawInputs):
            return self.preprocessor(x, y=y, sample_weight=sample_weight)
        if y is not None and not is_graph_tensor(y):
            x, y, sample_weight = self._check_arrays(x, y, sample_weight)
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    def _normalize(self, x, y=None):
        return normalize_training_data(x, y, self.preprocessor is not None)

    def _as_data(self, x, y=None, sample_weight=None, pack=False):
        """Tokenizes text and checks arrays; returns `FitData`."""
        data = self._normalize(x, y)
        is_text = isinstance(data, (Texts, Examples))
        if pack and (sample_weight is not None or not is_text):
            raise ValueError(
                "`pack` needs a list of texts, pairs or chats, without "
                f"`sample_weight`. Received: x of type {type(x).__name__}, "
                f"sample_weight={sample_weight!r:.80}"
            )
        if isinstance(data, Batches):
            batches = self._map_batches(x, self._batch_size_divisor())
            return FitData(batches, y, sample_weight)
        if isinstance(data, RawInputs):
            return FitData(*self._check_arrays(x, y, sample_weight))
        examples = self.preprocessor.tokenize_examples(data)
        examples.warn()
        if pack:
            x, y, weights = examples.packed()
        else:
            x, y, weights = self.preprocessor.pad_examples(examples, sample_weight)
        targets = float(weights.sum())
        is_unweighted = sample_weight is None and targets > 0
        bytes_per_target = examples.num_bytes / targets if is_unweighted else None
        return FitData(x, y, weights, bytes_per_target)

    def _as_validation_data(self, validation_data, pack):
        """Returns `FitData` of the argument `validation_data`; packs text only."""
        if not isinstance(validation_data, tuple):
            validation_data = (validation_data,)
        x, y, sample_weight = (*validation_data, None, None)[:3]
        is_text = isinstance(self._normalize(x), (Texts, Examples))
        return self._as_data(x, y, sample_weight, pack and is_text)

    def _pad_to_full_batches(self, data, batch_size):
        """Appends sequences with zero weight, so that all batches have full size.

        A mesh and micro-batches need batches of full size.
        """
        if batch_size is not None:
            check_integer("batch_size", batch_size)
        parts = self._batch_size_divisor()
        if not data.has_arrays or parts == 1:
            return data
        count = len(data.y)
        size = 32 if batch_size is None else batch_size  # Keras's default.
        if size % parts:
            raise ValueError(
                f"`batch_size` must be a multiple of {parts}, the number of "
                "data-parallel devices times `micro_batches`. Received: "
                f"batch_size={size}"
            )
        batch = (data.x, data.y, data.sample_weight)
        batch = pad_batch(batch, size if count > size else parts)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        return data._replace(x=x, y=y, sample_weight=sample_weight)

    def _batch_size_divisor(self):
        """Returns the number that must divide the batch size."""
        options = self.train_plan.step_options
        return (options.micro_batches if options else 1) * data_parallel_size()

    def _check_arrays(self, x, y, sample_weight):
        """Checks arrays: backends would clamp invalid token ids."""
        if isinstance(x, dict) and "token_ids" in x:
            as_token_ids(x["token_ids"], self.backbone.vocabulary_size)
        if y is not None:
            as_token_ids(y, self.backbone.vocabulary_size, "y")
        if sample_weight is not None and (to_numpy(sample_weight) < 0).any():
            raise ValueError(
                "`sample_weight` must not be negative. Received: a minimum of "
                f"{to_numpy(sample_weight).min()}"
            )
        if y is not None and np.ndim(sample_weight) == 1:  # One per sequence.
            weights = ops.convert_to_numpy(sample_weight)
            sample_weight = np.broadcast_to(weights[:, None], np.shape(y))
        return x, y, sample_weight

    def _map_batches(self, batches, multiple):
        """Converts batches of text to batches of arrays that include the targets.

        Sequences with zero weight are appended, so that `multiple` divides their sizes.
        """
        batch_warnings = BatchWarnings()

        def preprocess(batch):
            return pad_batch(preprocess_without_padding(batch), multiple)

        def preprocess_without_padding(batch):
            batch = batch if isinstance(batch, tuple) else (batch,)
            x, y, sample_weight = (*batch, None, None)[:3]
            data = self._normalize(x, y)
            if isinstance(data, RawInputs):
                return self.preprocess_samples(x, y, sample_weight)
            examples = self.preprocessor.tokenize_examples(data)
            batch_warnings.add(examples)
            return self.preprocessor.pad_examples(examples, sample_weight)

        if is_tf_dataset(batches):
            batches = batches.map(self.preprocess_samples, num_parallel_calls=-1)
            return batches if multiple == 1 else pad_tf_dataset(batches, multiple)
        if isinstance(batches, keras.utils.PyDataset):
            return _MappedPyDataset(batches, preprocess)
        if inspect.isgenerator(batches):
            return (preprocess(batch) for batch in batches)
        return batches.map(preprocess)

    def _padded_samples(self, x, y, sample_weight):
        """Preprocesses a batch and pads it, if devices or micro-batches share it."""
        multiple = self._batch_size_divisor()
        if multiple == 1:
            return x, y, sample_weight
        batch = pad_batch(self.preprocess_samples(x, y, sample_weight), multiple)
        return keras.utils.unpack_x_y_sample_weight(batch)


def round_up(batch_size: int | None, multiple: int) -> int | None:
    """Rounds a batch size up to a multiple.

    Args:
        batch_size: the batch size; `None` is Keras's default.
        multiple: a positive integer.

    Returns:
        The batch size as it is for a multiple of 1.

    Example:
        >>> round_up(30, 4)
        32
    """
    if multiple == 1:
        return batch_size
    size = 32 if batch_size is None else check_integer("batch_size", batch_size)
    return -(-size // multiple) * multiple


class _MappedPyDataset(keras.utils.PyDataset):
    """A `PyDataset` whose batches are mapped by a function."""

    def __init__(self, dataset, function):
        super().__init__(
            workers=dataset.workers,
            use_multiprocessing=dataset.use_multiprocessing,
            max_queue_size=dataset.max_queue_size,
        )
        self._dataset, self._function = dataset, function

    @property
    def num_batches(self):
        return self._dataset.num_batches

    def __getitem__(self, index):
        return self._function(self._dataset[index])

    def on_epoch_begin(self):
        self._dataset.on_epoch_begin()

    def on_epoch_end(self):
        self._dataset.on_epoch_end()
