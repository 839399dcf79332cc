"""OpenLLaMA as a causal language model: constructor, loading, `compile`.

Its other methods are in mixins, beside what they call: `fit` in `training.fit`,
`generate` in `generation.generate`, `score` in `models.scoring`, exports and PEFT's
adapters in `models.exports`, `quantize` and saving in `models.functional_model`.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras

from keras_openllama import presets
from keras_openllama.backend.jit import compile_function
from keras_openllama.backend.keras_hub import CausalLM, classproperty, get_sampler
from keras_openllama.generation.generate import GenerateMixin
from keras_openllama.generation.kv_cache import check_cache_dtype
from keras_openllama.generation.sampling.config import SamplingConfig
from keras_openllama.generation.sampling.samplers import check_sampler
from keras_openllama.layers.projection import Projection
from keras_openllama.layers.remat import check_policy
from keras_openllama.loading.load import (
    describe_origin,
    find_source,
    load_task,
)
from keras_openllama.models.backbone import OpenLlamaBackbone
from keras_openllama.models.causal_lm_preprocessor import OpenLlamaCausalLMPreprocessor
from keras_openllama.models.exports import ExportMixin
from keras_openllama.models.functional_model import FunctionalModel
from keras_openllama.models.scoring import ScoreMixin
from keras_openllama.text.token_arrays import as_unique_ids
from keras_openllama.training.fit import FitMixin, default_optimizer
from keras_openllama.training.train_plan import plan_training
from keras_openllama.utils.types import PathLike

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import Sampler


@keras.saving.register_keras_serializable(package="keras_openllama")
class OpenLlamaCausalLM(
    FitMixin, GenerateMixin, ScoreMixin, ExportMixin, FunctionalModel, CausalLM
):
    """OpenLLaMA with its language-model head: train, score, generate, export.

    Calling the model takes the inputs of `OpenLlamaBackbone` and returns logits
    `(batch, length, vocabulary_size)` in the compute dtype; `logits` and `score` return
    float32.

    Args:
        backbone: the network below the head.
        preprocessor: tokenizer and preprocessing; `None` to work on token ids.
        end_token_ids: ids of the tokens that end a text; `None` for the end token of
            the tokenizer. Can be set later.
        **kwargs: further arguments of `keras_hub.models.CausalLM`, such as `name`.

    Example:
        >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
        >>> lm.generate("The sea", max_new_tokens=4)
        'The sea shines, and'
        >>> lm.preprocessor.sequence_length = 16
        >>> history = lm.fit(["some text", "more text"], verbose=0)
        >>> sorted(history.history)
        ['loss', 'perplexity', 'sparse_categorical_accuracy']

    Source: LLaMA (arXiv:2302.13971); weights by `openlm-research/open_llama`.
    """

    backbone_cls = OpenLlamaBackbone
    preprocessor_cls = OpenLlamaCausalLMPreprocessor
    # The source that `from_preset` read the weights from; exports record it.
    loaded_from = None
    _compile_arguments = None  # Set by `compile`.

    def __init__(
        self,
        backbone: OpenLlamaBackbone,
        preprocessor: OpenLlamaCausalLMPreprocessor | None = None,
        end_token_ids: int | Sequence[int] | None = None,
        **kwargs: Any,
    ):
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.lm_head = Projection(
            backbone.vocabulary_size,
            backbone.initializer_std,
            dtype=backbone.dtype_policy,
            name="lm_head",
            quantization_role="head",
        )
        backbone.register_head(self.lm_head)

        # === Functional model ===
        super().__init__(
            inputs=backbone.input, outputs=self.lm_head(backbone.output), **kwargs
        )

        if not self.compiled:  # `score` does not need what `compile` configures.
            self.logits_function = compile_function(self.logits, self)

        # === Config ===
        self.end_token_ids = end_token_ids

    @property
    def end_token_ids(self) -> list[int]:
        """Ids of the tokens that end a text: `generate` stops at each of them.

        `from_preset` reads them from the files of a model, such as `eos_token_id` of
        `generation_config.json`, and every export writes them. If the files declare
        none, it is the end token of the tokenizer; empty without a tokenizer.

        Example:
            >>> lm.end_token_ids
            [2]
        """
        if self._end_token_ids is not None:
            return list(self._end_token_ids)
        if self.preprocessor is None:
            return []
        return [self.preprocessor.tokenizer.end_token_id]

    @end_token_ids.setter
    def end_token_ids(self, value: int | Sequence[int] | None) -> None:
        if value is not None:
            size = self.backbone.vocabulary_size
            value = as_unique_ids(value, size, "end_token_ids")
        self._end_token_ids = value or None

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        # Also the tokenizer's: the model may be loaded without it.
        return {**super().get_config(), "end_token_ids": self.end_token_ids or None}

    @classmethod
    def from_preset(
        cls,
        preset: PathLike,
        *,
        dtype: str | keras.DTypePolicy | None = None,
        load_weights: bool = True,
        revision: str | None = None,
        preprocessor: OpenLlamaCausalLMPreprocessor | str | None = "auto",
        quantization: str | keras.quantizers.QuantizationConfig | None = "auto",
        **kwargs: Any,
    ) -> OpenLlamaCausalLM:
        """Loads a model.

        Weights are read tensor by tensor into the requested dtype, and quantized one by
        one. Loading needs memory for the model and one more tensor.

        Args:
            preset: a name in `OpenLlamaCausalLM.presets`; a directory in KerasHub or
                transformers format (safetensors or `.bin`, one file or several); the
                directory of a training run or of one of its checkpoints; a GGUF file;
                `"hf://user/repo"`, or `"hf://user/repo/file.gguf"`.
            dtype: dtype or dtype policy; `None` is Keras's global policy, which is
                float32 unless set.
            load_weights: whether to load the weights instead of initializing them.
            revision: branch, tag or commit of a repository on the Hugging Face Hub.
            preprocessor: `"auto"` loads it with its tokenizer; `None` loads neither; or
                an `OpenLlamaCausalLMPreprocessor` to use.
            quantization: `"int8"`, `"int4"` or a configuration, as for `quantize`;
                `None` for floating-point weights; `"auto"` for weights as in the files.
            **kwargs: arguments of `OpenLlamaBackbone` that override the preset's, such
                as `rope_scaling`; `name` and `trainable` of the model; `compile=False`
                to leave it uncompiled.

        Returns:
            An `OpenLlamaCausalLM`.

        Raises:
            ValueError: for an unknown preset, files of another model, or another
                quantization.
            OSError: if a file is unavailable or cannot be read.

        Example:
            >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano", dtype="bfloat16")
            >>> lm.count_params()
            4524288
            >>> lm = OpenLlamaCausalLM.from_preset(
            ...     "open_llama_7b_v2", dtype="bfloat16", quantization="int4"
            ... )  # doctest: +SKIP
        """
        return load_task(
            cls,
            find_source(preset, revision),
            describe_origin(preset, revision),
            dtype=dtype,
            load_weights=load_weights,
            preprocessor=preprocessor,
            quantization=quantization,
            **kwargs,
        )

    @classproperty
    def presets(cls) -> dict[str, dict]:
        """Names of the presets, with description, parameter count and handles.

        Example:
            >>> OpenLlamaCausalLM.presets["open_llama_nano"]["parameters"]
            4524288
        """
        return presets.descriptions()

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "auto",
        loss: str | keras.losses.Loss = "auto",
        *,
        weighted_metrics: str | list | None = "auto",
        sampler: str | Sampler | SamplingConfig = "greedy",
        kv_cache_dtype: str | None = None,
        micro_batches: int = 1,
        rematerialize: str = "none",
        z_loss: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """Configures training and generation.

        With the default loss and metrics, a training step whose loss or gradient is not
        finite is skipped: it changes no variable, and a warning reports it. On JAX,
        training and evaluation then compute the loss in chunks and never hold the
        logits of a whole batch; a model quantized to float8 uses the train step of
        Keras instead. As in Keras, the optimizer of a `mixed_float16` model scales the
        loss.

        Args:
            optimizer: see `keras.Model.compile`; `"auto"` is `optimizers.AdamW` without
                weight decay, which clips gradients to a global norm of 1, at a constant
                learning rate of 2e-5, or 2e-4 for a model with adapters.
            loss: see `keras.Model.compile`; `"auto"` is the cross-entropy of the next
                token in nats, the weighted mean over all target tokens of an epoch. The
                perplexity is reported with it.
            weighted_metrics: see `keras.Model.compile`; `"auto"` is token accuracy.
            sampler: name or instance of a `keras_hub.samplers.Sampler`, of which a
                temperature of 0 is greedy decoding; or a `SamplingConfig`, the default
                of the argument `sampling` of `generate` and `stream`.
            kv_cache_dtype: dtype of the KV cache of `generate` and `stream`: `None` is
                the compute dtype of the model, but for quantized weights on a CPU,
                where it is float16, or float32 without a C compiler; `"int8"` rounds
                keys and values to 8 bits, with a scale for each token and head, for a
                cache of about a quarter of the size of float32.
            micro_batches: number of parts into which a batch is split for gradient
                accumulation, to save memory. There is one update per batch. JAX only.
            rematerialize: which activations the backward pass recomputes instead of
                saving (gradient checkpointing), one of
                `keras_openllama.config.REMATERIALIZATION`. JAX only.
            z_loss: coefficient of the z-loss `log(Z) ** 2`, where Z is the denominator
                of the softmax (1e-4 in PaLM, arXiv:2204.02311). It is added to the
                training objective, not to the reported loss. JAX only.
            **kwargs: further arguments of `keras.Model.compile`.

        Raises:
            ValueError: for a sampler that `generate` does not support, or whose
                arguments are out of range; for an unknown `kv_cache_dtype`; or for an
                option that needs JAX on another backend, or in combination with a loss
                or metrics for which the train step of Keras is used.

        Example:
            >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
            >>> lm.compile(optimizer="sgd", sampler="top_p", micro_batches=2)
        """
        check_policy(rematerialize)
        cross_entropy = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        )
        config = sampler if isinstance(sampler, SamplingConfig) else None
        sampler = get_sampler("greedy" if config else sampler)
        check_sampler(sampler, self.backbone.vocabulary_size)
        check_cache_dtype(kv_cache_dtype)
        self.default_sampling = config
        self.kv_cache_dtype = kv_cache_dtype
        auto_learning_rate = optimizer == "auto"
        if auto_learning_rate:
            optimizer = default_optimizer(self)
        super().compile(
            optimizer=optimizer,
            loss=cross_entropy if loss == "auto" else loss,
            weighted_metrics=weighted_metrics,
            sampler=sampler,
            **kwargs,
        )
        self.train_plan = plan_training(
            self,
            loss,
            kwargs.get("metrics"),
            weighted_metrics,
            auto_learning_rate,
            micro_batches=micro_batches,
            rematerialize=rematerialize,
            z_loss=z_loss,
        )
        self.logits_function = compile_function(self.logits, self)
        # Read-only, because Keras would track the objects in a dict.
        self._compile_arguments = types.MappingProxyType(
            {
                "optimizer": "auto" if auto_learning_rate else optimizer,
                "loss": loss,
                "weighted_metrics": weighted_metrics,
                "sampler": config or sampler,
                "kv_cache_dtype": kv_cache_dtype,
                "micro_batches": micro_batches,
                "rematerialize": rematerialize,
                "z_loss": z_loss,
                **kwargs,
            }
        )

    def get_compile_config(self) -> dict[str, Any]:
        """Returns the arguments of `compile`, which `.keras` files store.

        Example:
            >>> lm.get_compile_config()["sampler"]["class_name"]
            'GreedySampler'
        """
        if not self.compiled:
            return {}
        return {
            **keras.saving.serialize_keras_object(dict(self._compile_arguments)),
            # Memory for its state is allocated on loading only if there is a state.
            "optimizer_is_built": getattr(self.optimizer, "built", False),
        }

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Calls `compile` with the result of `get_compile_config`."""
        if "sampler" not in config:  # Of version 0.1: the arguments of Keras alone.
            super().compile_from_config(config)
            return
        arguments = keras.saving.deserialize_keras_object(config)
        optimizer_is_built = arguments.pop("optimizer_is_built")
        self.compile(**arguments)
        if optimizer_is_built:
            self.optimizer.build(self.trainable_variables)

    def merge_lora(self, reversible: bool = True) -> None:
        """Merges the adapters and removes them: `OpenLlamaBackbone.merge_lora`.

        All variables are trainable then: call `compile` again before `fit`.

        Args:
            reversible: see `OpenLlamaBackbone.merge_lora`.
        """
        self.backbone.merge_lora(reversible)

    def unmerge_lora(self) -> None:
        """Restores adapters and weights: `OpenLlamaBackbone.unmerge_lora`."""
        self.backbone.unmerge_lora()
