"""`fit` and its kin, on whatever users hold: texts, pairs, chats, arrays, datasets."""

import inspect
import warnings

import keras
import numpy as np
from keras import ops

from keras_openllama.backend.arrays import is_graph_tensor, to_numpy
from keras_openllama.backend.keras_private import optimized_variables
from keras_openllama.layers.lora import adapted_layers
from keras_openllama.optimizers import AdamW
from keras_openllama.text.inputs import (
    Arrays,
    Batches,
    Examples,
    Texts,
    is_tf_dataset,
    normalize_training_data,
)
from keras_openllama.text.token_arrays import as_token_ids
from keras_openllama.training.callbacks import BitsPerByte, SkippedSteps
from keras_openllama.training.train_plan import TrainPlan

if keras.config.backend() == "jax":
    from keras_openllama.training.train_step_jax import JaxTrainStep as TrainStep
else:
    from keras_openllama.training.train_step_tf_torch import (
        TfTorchTrainStep as TrainStep,
    )

# Learning rates of "auto": Alpaca's for 7B; QLoRA's for adapters (arXiv:2305.14314).
LEARNING_RATE, ADAPTER_LEARNING_RATE = 2e-5, 2e-4


def default_optimizer(lm):
    """AdamW as `compile` takes it for `"auto"`; weights do not decay, as in Alpaca."""
    rate = ADAPTER_LEARNING_RATE if adapted_layers(lm) else LEARNING_RATE
    return AdamW(rate, weight_decay=0.0)


class FitMixin(TrainStep):
    """`OpenLlamaCausalLM`: what it is trained, evaluated and asked with."""

    _variables_seen = None  # By the programs that Keras has compiled.
    train_plan = TrainPlan()  # `compile` sets another one.

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        sample_weight=None,
        validation_data=None,
        pack=False,
        callbacks=None,
        **kwargs,
    ):
        """Trains the model; see `keras.Model.fit`.

        Beside loss and token accuracy, `History` has the perplexity, and where
        `validation_data` are texts or pairs the bits per byte of their text, which can
        be compared between tokenizers.

        Args:
            x: with a preprocessor texts, pairs or chats, see
                `OpenLlamaCausalLMPreprocessor`; or a dict of `"token_ids"` and
                `"padding_mask"`, both `(batch, length)`. Or batches of any of these: a
                `tf.data.Dataset`, Grain's datasets, a `keras.utils.PyDataset`, a
                generator.
            y: int `(batch, length)`, the token after each position; for texts
                responses to them, or `None`.
            batch_size: int, rows per step; Keras's default is 32.
            sample_weight: float, one per position or one per row. What weighs nothing
                counts nowhere, in loss or metrics.
            validation_data: as `x`, or a tuple of `x`, `y` and `sample_weight`.
            pack: bool, whether several examples share a row, of which each sees itself
                only; for lists of texts, pairs or chats.
            callbacks: see `keras.Model.fit`.
            **kwargs: see `keras.Model.fit`.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: for data that are malformed, or ids outside the vocabulary.
            FloatingPointError: if each step of an epoch had to be left out, since
                loss or gradient was not finite.

        Example:

        ```python
        lm.backbone.enable_lora(8)
        lm.fit({"prompt": ["2 + 2 ="], "response": [" 4"]}, epochs=3)
        ```
        """
        self._prepare_to_train()
        own_callbacks = [SkippedSteps()] if self.train_plan.auto_loss else []
        x, y, sample_weight, _ = self._as_data(x, y, sample_weight, pack)
        data = self._in_whole_batches(x, y, sample_weight, batch_size)
        x, y, sample_weight = data
        if validation_data is not None:
            if not isinstance(validation_data, tuple):
                validation_data = (validation_data,)
            x_val, *targets = (*validation_data, None, None)[:3]
            is_text = isinstance(self._normalized(x_val), (Texts, Examples))
            x_val, *targets, bytes_per_target = self._as_data(
                x_val, *targets, pack and is_text
            )
            if bytes_per_target and self.train_plan.auto_loss:
                own_callbacks.append(BitsPerByte(bytes_per_target))
            size = kwargs.get("validation_batch_size") or batch_size
            x_val, *targets = self._in_whole_batches(x_val, *targets, size)
            # A dataset or generator comes with its targets.
            whole = all(target is None for target in targets)
            validation_data = x_val if whole else (x_val, *targets)
        if type(x).__module__.startswith("grain"):
            kwargs.setdefault("shuffle", False)  # Keras cannot, and would warn.
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            given = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
            # First, so that others see what they say.
            callbacks = [*own_callbacks, *filter(None, given)]
        return self._call_keras(
            "fit",
            x,
            y,
            batch_size=batch_size,
            sample_weight=sample_weight,
            validation_data=validation_data,
            callbacks=callbacks,
            **kwargs,
        )

    def evaluate(
        self,
        x=None,
        y=None,
        batch_size=None,
        sample_weight=None,
        pack=False,
        return_dict=False,
        **kwargs,
    ):
        """Loss and metrics; takes what `fit` takes. See `keras.Model.evaluate`.

        Without `return_dict=True` they are a list: loss, token accuracy, perplexity.
        With it, and for texts or pairs, bits per byte are among them.
        """
        self._forget_stale_programs()
        *data, bytes_per_target = self._as_data(x, y, sample_weight, pack)
        x, y, sample_weight = self._in_whole_batches(*data, batch_size)
        results = self._call_keras(
            "evaluate",
            x,
            y,
            batch_size=batch_size,
            sample_weight=sample_weight,
            return_dict=return_dict or self.train_plan.auto_loss,
            **kwargs,
        )
        if not self.train_plan.auto_loss:
            return results
        if not return_dict:  # Where KerasHub has them, and perplexity behind them.
            perplexity = results.pop("perplexity")
            return [*results.values(), perplexity]
        if bytes_per_target:
            results["bits_per_byte"] = results["loss"] / np.log(2) / bytes_per_target
        return results

    def predict(self, x, batch_size=None, **kwargs):
        """Logits, as NumPy; takes what `fit` takes. See `keras.Model.predict`."""
        self._forget_stale_programs()
        x, *_ = self._as_data(x)
        return self._call_keras("predict", x, batch_size=batch_size, **kwargs)

    def _call_keras(self, method, *args, **kwargs):
        """`fit`, `evaluate` or `predict` of `keras.Model`, past KerasHub's class.

        KerasHub's `PipelineModel` would preprocess again what is arrays by now, makes a
        `tf.data.Dataset` of it, and refuses a `PyDataset` and generators.
        """
        return getattr(keras.Model, method)(self, *args, **kwargs)

    def train_on_batch(self, *args, **kwargs):
        """See `keras.Model.train_on_batch`."""
        self._prepare_to_train()
        return super().train_on_batch(*args, **kwargs)

    def test_on_batch(self, *args, **kwargs):
        """See `keras.Model.test_on_batch`."""
        self._forget_stale_programs()
        return super().test_on_batch(*args, **kwargs)

    def predict_on_batch(self, *args, **kwargs):
        """See `keras.Model.predict_on_batch`."""
        self._forget_stale_programs()
        return super().predict_on_batch(*args, **kwargs)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        """Text goes through the preprocessor; arrays are taken as they are."""
        if not isinstance(self._normalized(x, y), Arrays):
            return self.preprocessor(x, y=y, sample_weight=sample_weight)
        if y is not None and not is_graph_tensor(y):
            x, y, sample_weight = self._as_arrays(x, y, sample_weight)
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    def get_metrics_result(self):
        results = super().get_metrics_result()
        if self.train_plan.auto_loss:
            results["perplexity"] = ops.exp(results["loss"])
        return results

    # ----- Before anything is computed

    def _forget_stale_programs(self):
        """Keras's programs keep the variables that they saw; adapters change them."""
        seen = [(id(v), v.trainable) for v in self.weights]
        if seen != self._variables_seen:
            self.train_function = self.test_function = self.predict_function = None
            self._variables_seen = seen

    def _prepare_to_train(self):
        """Last looks at what is about to be trained."""
        self._forget_stale_programs()
        self._check_optimizer()
        dtypes = {variable.dtype for variable in self.trainable_variables}
        if dtypes - {"float32"}:
            warnings.warn(
                f"Variables of {', '.join(sorted(dtypes - {'float32'}))} are trained: "
                "small steps are rounded away, and the model hardly learns. Load it "
                'with dtype="mixed_bfloat16", or train adapters (`enable_lora`), which '
                "are float32.",
                stacklevel=3,
            )

    def _check_optimizer(self):
        """Whether the optimizer knows the variables: adapters may have come or gone."""
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        if optimizer is None:
            return  # Keras says that there is none.
        known = {id(v) for v in optimized_variables(optimizer)}
        stale = optimizer.built and known != {id(v) for v in self.trainable_variables}
        if self.train_plan.auto_learning_rate and (stale or not optimizer.built):
            self.optimizer = default_optimizer(self)
        elif stale:
            raise ValueError(
                "Other variables are to be trained than when the optimizer was built, "
                "since adapters came or went. Call `compile` again."
            )

    def _normalized(self, x, y=None):
        return normalize_training_data(x, y, self.preprocessor is not None)

    def _as_data(self, x, y=None, sample_weight=None, pack=False):
        """What Keras takes: x, y, weights; and bytes of text for each target."""
        data = self._normalized(x, y)
        is_text = isinstance(data, (Texts, Examples))
        if pack and (sample_weight is not None or not is_text):
            raise ValueError(
                "`pack` takes a list of texts, pairs or chats, and no `sample_weight`. "
                f"Received: x of type {type(x).__name__}, "
                f"sample_weight={sample_weight!r:.80}"
            )
        if isinstance(data, Batches):
            return self._mapped(x), y, sample_weight, None
        if isinstance(data, Arrays):
            return *self._as_arrays(x, y, sample_weight), None
        rows = self.preprocessor.tokenize_examples(data)
        rows.warn()
        if pack:
            x, y, weights = rows.packed()
        else:
            x, y, weights = self.preprocessor.pad_examples(rows, sample_weight)
        targets = float(weights.sum())
        whole = sample_weight is None and targets > 0
        return x, y, weights, rows.num_bytes / targets if whole else None

    def _in_whole_batches(self, x, y, sample_weight, batch_size):
        """Rows that weigh nothing behind the others, where batches have to be whole.

        That is so on a mesh, and for micro-batches.
        """
        parts = self._parts_of_a_batch()
        if not isinstance(x, dict) or y is None or parts == 1:
            return x, y, sample_weight
        rows, size = len(y), batch_size or 32  # Keras's default.
        if size % parts:
            raise ValueError(
                f"`batch_size` is a multiple of {parts}, the devices that share a "
                f"batch times `micro_batches`. Received: batch_size={size}"
            )
        more = -rows % (size if rows > size else parts)
        if sample_weight is None:
            sample_weight = np.ones(np.shape(y), "float32")
        sample_weight = _longer(sample_weight, more)
        sample_weight[rows:] = 0
        x = {name: _longer(array, more) for name, array in x.items()}
        return x, _longer(y, more), sample_weight

    def _parts_of_a_batch(self):
        """Parts of equal size that a batch has to be cut into: int."""
        options = self.train_plan.step_options
        parts = options.micro_batches if options else 1
        if keras.config.backend() == "jax":
            distribution = keras.distribution.distribution()
            parts *= getattr(distribution, "num_model_replicas", 1)
        return parts

    def _as_arrays(self, x, y, sample_weight):
        """Arrays, checked: backends would clamp an id that is none."""
        if isinstance(x, dict) and "token_ids" in x:
            as_token_ids(x["token_ids"], self.backbone.vocabulary_size)
        if y is not None:
            as_token_ids(y, self.backbone.vocabulary_size, "y")
        if sample_weight is not None and (to_numpy(sample_weight) < 0).any():
            raise ValueError("`sample_weight` holds weights below 0.")
        if y is not None and np.ndim(sample_weight) == 1:  # One per row.
            weights = ops.convert_to_numpy(sample_weight)
            sample_weight = np.broadcast_to(weights[:, None], np.shape(y))
        return x, y, sample_weight

    def _mapped(self, batches):
        """Batches of text as batches of arrays. (Keras refuses targets beside them.)"""

        told = []

        def preprocess(batch):
            batch = batch if isinstance(batch, tuple) else (batch,)
            x, y, sample_weight = (*batch, None, None)[:3]
            data = self._normalized(x, y)
            if isinstance(data, Arrays):
                return self.preprocess_samples(x, y, sample_weight)
            rows = self.preprocessor.tokenize_examples(data)
            if (rows.num_truncated or rows.num_without_targets) and not told:
                told.append(rows.warn())  # Of the first such batch alone.
            return self.preprocessor.pad_examples(rows, sample_weight)

        if is_tf_dataset(batches):
            return batches.map(self.preprocess_samples, num_parallel_calls=-1)
        if isinstance(batches, keras.utils.PyDataset):
            return _MappedPyDataset(batches, preprocess)
        if inspect.isgenerator(batches):
            return (preprocess(batch) for batch in batches)
        return batches.map(preprocess)


def _longer(array, more):
    """An array with its first row so many times more."""
    array = ops.convert_to_numpy(array)
    return np.concatenate([array, np.repeat(array[:1], more, axis=0)])


class _MappedPyDataset(keras.utils.PyDataset):
    """A `PyDataset` whose batches go through a function."""

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
