"""`fit`, `evaluate` and `predict` on texts, pairs, chats, arrays and datasets."""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_openllama.backend.keras_private import loss_tracker, optimized_variables
from keras_openllama.layers.lora import adapted_layers
from keras_openllama.optimizers import AdamW
from keras_openllama.text.input_kinds import Batches
from keras_openllama.training.batch_padding import (
    PaddedInputs,
    count_sequences,
    data_parallel_size,
    pad_batch,
)
from keras_openllama.training.callbacks import (
    BitsPerByte,
    NotFiniteLoss,
    SkippedSteps,
    warn_if_not_finite,
)
from keras_openllama.training.fit_data import FitDataMixin, round_up
from keras_openllama.training.loss_scaling import has_dynamic_loss_scale
from keras_openllama.training.target_weights import no_targets_error
from keras_openllama.training.train_plan import TrainPlan
from keras_openllama.utils.host_memory import keeping_freed_memory
from keras_openllama.utils.types import Tensor

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

if keras.config.backend() == "jax":
    from keras_openllama.training.train_step_jax import JaxTrainStep as TrainStep
elif keras.config.backend() == "torch":
    from keras_openllama.training.train_step_torch import TorchTrainStep as TrainStep
else:
    from keras_openllama.training.train_step_tensorflow import (
        TensorFlowTrainStep as TrainStep,
    )

# Learning rates of optimizer="auto": that of Alpaca for 7B, and that of QLoRA
# (arXiv:2305.14314) for adapters.
LEARNING_RATE, ADAPTER_LEARNING_RATE = 2e-5, 2e-4


def default_optimizer(lm: CausalLM) -> AdamW:
    """Creates the optimizer of `compile(optimizer="auto")`.

    Args:
        lm: `OpenLlamaCausalLM`.

    Returns:
        `optimizers.AdamW` with a constant learning rate and without weight decay (as in
        Alpaca). It clips gradients to a global norm of 1.

    Example:
        >>> float(default_optimizer(lm).learning_rate)
        1.9999999494757503e-05
    """
    rate = ADAPTER_LEARNING_RATE if adapted_layers(lm) else LEARNING_RATE
    return AdamW(rate, weight_decay=0.0)


class FitMixin(FitDataMixin, TrainStep):
    """The methods of `OpenLlamaCausalLM` that train, evaluate and predict."""

    # Variables of the compiled `train_function`, `test_function` and
    # `predict_function`.
    _compiled_variables = None
    generate_function = None  # Of a task that generates.
    train_plan = TrainPlan()  # Replaced by `compile`.

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        validation_data: Any = None,
        pack: bool = False,
        callbacks: Any = None,
        validation_split: float = 0.0,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains the model; see `keras.Model.fit`.

        In addition to loss and token accuracy, the history has the perplexity. If
        `validation_data` is texts, prompt/response dicts, or chats, it also has the
        bits per byte of their text, which can be compared between tokenizers.

        Args:
            x: with a preprocessor texts, prompt/response dicts, or chats, see
                `OpenLlamaCausalLMPreprocessor`; or a dict of `"token_ids"` and
                `"padding_mask"`, both int `(batch, length)`. Or batches of any of
                these: a `tf.data.Dataset`, a Grain dataset, a
                `keras.utils.PyDataset`, a generator.
            y: targets, int `(batch, length)`, the token after each position; if `x` is
                texts used as prompts, their responses.
            batch_size: sequences per step; 32 by default, as in Keras. Data-parallel
                devices and micro-batches must divide it. Batches of other sizes, such
                as the last one, are padded, and the padding is ignored.
            sample_weight: float `(batch, length)` or `(batch,)`. Tokens with zero
                weight are ignored in the loss and the metrics.
            validation_data: of the types of `x`, or a tuple of `x`, `y` and
                `sample_weight`.
            pack: whether several examples share a sequence (example packing); each
                attends only to itself. For lists of texts, prompt/response dicts, or
                chats.
            callbacks: see `keras.Model.fit`. A `keras.callbacks.CallbackList` omits the
                callbacks that `fit` adds (such as `SkippedSteps`).
            validation_split: fraction of the sequences to hold out from the end, if
                `validation_data` is not given: of the examples or arrays, or with
                `pack` of the packed sequences. Not for batches.
            **kwargs: see `keras.Model.fit`.

        Returns:
            The history of losses and metrics per epoch.

        Raises:
            ValueError: for malformed data, token ids outside the vocabulary, or data
                without target tokens, whose loss would be a mean over nothing.
            FloatingPointError: if every step of an epoch was skipped, because loss or
                gradient was not finite.

        Example:
            >>> from keras_openllama import OpenLlamaCausalLM
            >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
            >>> lm.preprocessor.sequence_length = 16
            >>> lm.backbone.enable_lora(4)
            >>> pairs = {"prompt": ["2 + 2 ="], "response": [" 4"]}
            >>> history = lm.fit(pairs, verbose=0)
            >>> sorted(history.history)
            ['loss', 'perplexity', 'sparse_categorical_accuracy']
        """
        self._prepare_to_train()
        self.add_trained_end_token()
        data = self._as_data(x, y, sample_weight, pack)
        data.check_targets("x")
        held_out = None
        if validation_data is not None:
            held_out = self._as_validation_data(validation_data, pack)
        elif validation_split and data.has_arrays:
            # Keras would split after the padding, and validate on the padding.
            data, held_out = data.split(validation_split)
            validation_split = 0.0
        if held_out is not None:
            held_out.check_targets("validation_data")
        x, y, sample_weight, _ = self._pad_to_full_batches(data, batch_size)
        auto_loss = self.train_plan.auto_loss
        own_callbacks = [SkippedSteps() if auto_loss else NotFiniteLoss()]
        if held_out is not None:
            if held_out.bytes_per_target and auto_loss:
                own_callbacks.append(BitsPerByte(held_out.bytes_per_target))
            size = kwargs.get("validation_batch_size")
            size = batch_size if size is None else size
            if held_out.has_arrays:
                size = round_up(size, self._batch_size_divisor())
                kwargs["validation_batch_size"] = size
            held_out = self._pad_to_full_batches(held_out, size)
            validation_data = held_out.validation_data()
        if type(x).__module__.startswith("grain"):
            # Keras cannot shuffle Grain's datasets, and would warn.
            kwargs.setdefault("shuffle", False)
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            given = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
            # Before the user's callbacks, which can then read the logs they add.
            callbacks = [*own_callbacks, *filter(None, given)]
        # It would keep the weights that JAX replaces.
        if hasattr(self.generate_function, "release"):
            self.generate_function.release()
        with self._keeping_freed_memory():
            return self._call_keras(
                "fit",
                x,
                y,
                batch_size=batch_size,
                sample_weight=sample_weight,
                validation_data=validation_data,
                validation_split=validation_split,
                callbacks=callbacks,
                **kwargs,
            )

    def add_trained_end_token(self) -> None:
        """Adds the token that ends the texts of `fit` to `end_token_ids`.

        A model whose files declare other end tokens would not stop at it.
        """
        preprocessor = self.preprocessor
        if preprocessor is None or not preprocessor.add_end_token:
            return
        trained = preprocessor.tokenizer.end_token_id
        if trained not in self.end_token_ids:
            self.end_token_ids = [*self.end_token_ids, trained]

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        pack: bool = False,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> list | dict[str, float]:
        """Computes loss and metrics; see `keras.Model.evaluate`.

        Args:
            x: see `fit`.
            y: see `fit`.
            batch_size: sequences per batch; 32 by default. It is rounded up to a
                multiple of the number of data-parallel devices.
            sample_weight: see `fit`.
            pack: see `fit`.
            return_dict: whether to return a dict instead of a list.
            **kwargs: see `keras.Model.evaluate`.

        Returns:
            A list of loss, token accuracy and perplexity; or a dict with these, and for
            texts, prompt/response dicts, or chats `"bits_per_byte"`.

        Raises:
            ValueError: for malformed data, token ids outside the vocabulary, or data
                without target tokens, whose loss would be a mean over nothing.

        Example:
            >>> results = lm.evaluate(["The sea"], verbose=0, return_dict=True)
            >>> round(results["loss"], 2)
            6.92
        """
        self._check_compiled()
        self._reset_stale_functions()
        data = self._as_data(x, y, sample_weight, pack)
        data.check_targets("x")
        if data.has_arrays:
            batch_size = round_up(batch_size, self._batch_size_divisor())
        x, y, sample_weight, bytes_per_target = self._pad_to_full_batches(
            data, batch_size
        )
        results = self._call_keras(
            "evaluate",
            x,
            y,
            batch_size=batch_size,
            sample_weight=sample_weight,
            return_dict=return_dict or self.train_plan.auto_loss,
            **kwargs,
        )
        if self.train_plan.auto_loss and not float(loss_tracker(self).count):
            raise no_targets_error("The batches have")
        warn_if_not_finite(self, float(loss_tracker(self).result()))
        if not self.train_plan.auto_loss:
            return results
        if not return_dict:  # The order of KerasHub, followed by the perplexity.
            perplexity = results.pop("perplexity")
            return [*results.values(), perplexity]
        if bytes_per_target:
            results["bits_per_byte"] = results["loss"] / np.log(2) / bytes_per_target
        return results

    def predict(
        self, x: Any, batch_size: int | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Computes logits; see `keras.Model.predict`.

        Args:
            x: see `fit`.
            batch_size: see `evaluate`.
            **kwargs: see `keras.Model.predict`.

        Returns:
            Logits `(batch, length, vocabulary_size)`. For text, `length` is the
            preprocessor's `sequence_length`.

        Raises:
            ValueError: for malformed data, or token ids outside the vocabulary.

        Example:
            >>> lm.predict(["The sea"], verbose=0).shape
            (1, 256, 3072)
        """
        self._reset_stale_functions()
        multiple = data_parallel_size()
        if multiple > 1 and isinstance(self._normalize(x), Batches):
            inputs = PaddedInputs(self._map_batches(x, multiple=1), multiple)
            kwargs.setdefault("steps", inputs.steps)
            outputs = self._call_keras("predict", inputs.generate(), **kwargs)
            return inputs.remove_padding(outputs)
        x = self._as_data(x).x
        if multiple == 1:
            return self._call_keras("predict", x, batch_size=batch_size, **kwargs)
        size = round_up(batch_size, multiple)
        outputs = self._call_keras(
            "predict", pad_batch(x, multiple), batch_size=size, **kwargs
        )
        return outputs[: count_sequences(x)]

    def _keeping_freed_memory(self):
        """Where PyTorch allocates each tensor by itself; XLA has its own buffers."""
        is_torch = keras.config.backend() == "torch"
        if is_torch and self.weights[0].value.device.type == "cpu":
            return keeping_freed_memory()
        return contextlib.nullcontext()

    def _call_keras(self, method, *args, **kwargs):
        """Calls `fit`, `evaluate` or `predict` of `keras.Model`, bypassing KerasHub.

        KerasHub's `PipelineModel` would preprocess the arrays again and convert them to
        a `tf.data.Dataset`, and does not support `PyDataset` and generators.
        """
        return getattr(keras.Model, method)(self, *args, **kwargs)

    def train_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, **kwargs: Any
    ) -> Any:
        """See `keras.Model.train_on_batch`."""
        self._prepare_to_train()
        batch = self._padded_samples(x, y, sample_weight)
        return super().train_on_batch(*batch, **kwargs)

    def test_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, **kwargs: Any
    ) -> Any:
        """See `keras.Model.test_on_batch`."""
        self._check_compiled()
        self._reset_stale_functions()
        batch = self._padded_samples(x, y, sample_weight)
        return super().test_on_batch(*batch, **kwargs)

    def predict_on_batch(self, x: Any, **kwargs: Any) -> Any:
        """See `keras.Model.predict_on_batch`."""
        self._reset_stale_functions()
        multiple = data_parallel_size()
        if multiple == 1:
            return super().predict_on_batch(x, **kwargs)
        x, _, _ = keras.utils.unpack_x_y_sample_weight(self.preprocess_samples(x))
        outputs = super().predict_on_batch(pad_batch(x, multiple), **kwargs)
        return outputs[: count_sequences(x)]

    def get_metrics_result(self) -> dict[str, Tensor]:
        """See `keras.Model.get_metrics_result`; adds the perplexity.

        Without target tokens, all results are NaN.
        """
        results = super().get_metrics_result()
        if self.train_plan.auto_loss:
            results["perplexity"] = ops.exp(results["loss"])
            # For Keras, a mean over nothing is 0, which would be the best loss of all.
            has_targets = ops.greater(loss_tracker(self).count, 0)
            results = {
                name: ops.where(has_targets, value, math.nan)
                for name, value in results.items()
            }
        return results

    # ----- Preparation

    def _reset_stale_functions(self):
        """Resets compiled functions whose variables have changed, as by adapters."""
        variables = [(id(v), v.trainable) for v in self.weights]
        if variables != self._compiled_variables:
            self.train_function = self.test_function = self.predict_function = None
            self._compiled_variables = variables

    def _prepare_to_train(self):
        """Checks compiled functions, optimizer and dtypes before training."""
        self._check_compiled()
        self._reset_stale_functions()
        self._check_optimizer()
        dtypes = {variable.dtype for variable in self.trainable_variables}
        if dtypes - {"float32"}:
            warnings.warn(
                "The trainable variables have dtype "
                f"{', '.join(sorted(dtypes - {'float32'}))}, which rounds small "
                "updates to zero, so the model barely trains. Load it with "
                'dtype="mixed_bfloat16", or train adapters (`enable_lora`), which are '
                "float32.",
                stacklevel=3,
            )

    def _check_compiled(self):
        if not self.compiled:
            raise ValueError(
                "You must call `compile()` before `fit` and `evaluate`: it sets the "
                "loss and the optimizer. Received: a model with compile=False"
            )

    def _check_optimizer(self):
        """Checks that the optimizer has the model's current trainable variables."""
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        if optimizer is None:
            return  # Keras raises the error.
        optimized = {id(v) for v in optimized_variables(optimizer)}
        trainable = {id(v) for v in self.trainable_variables}
        stale = optimizer.built and optimized != trainable
        if self.train_plan.auto_learning_rate and (stale or not optimizer.built):
            scales = has_dynamic_loss_scale(self.optimizer)
            self.optimizer = default_optimizer(self)
            if scales:  # As `compile` did.
                self.optimizer = keras.optimizers.LossScaleOptimizer(self.optimizer)
        elif stale:
            raise ValueError(
                "The trainable variables have changed since the optimizer was built, "
                "because adapters were added or removed. Call `compile` again."
            )
