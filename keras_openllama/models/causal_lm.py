"""OpenLLaMA as a causal language model: training, scoring, generation."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_openllama import presets
from keras_openllama.backend.jit import compile_function
from keras_openllama.backend.keras_hub import CausalLM, classproperty, get_sampler
from keras_openllama.checkpoints import keras_adapters
from keras_openllama.checkpoints.atomic_saving import AtomicPreset, AtomicWeights
from keras_openllama.generation import generate as generation
from keras_openllama.generation.drafting import DraftModel, PromptLookup
from keras_openllama.generation.kv_cache import check_cache_dtype
from keras_openllama.generation.limits import GenerationLimits
from keras_openllama.generation.sampling.config import SamplingConfig
from keras_openllama.generation.sampling.options import SamplingOptions
from keras_openllama.generation.sampling.samplers import check_sampler
from keras_openllama.layers.adapter_merging import saving_merged
from keras_openllama.layers.projection import Projection
from keras_openllama.layers.remat import check_policy
from keras_openllama.loading.load import load_task
from keras_openllama.models import scoring
from keras_openllama.models.backbone import OpenLlamaBackbone
from keras_openllama.models.causal_lm_preprocessor import OpenLlamaCausalLMPreprocessor
from keras_openllama.models.functional_model import FunctionalModel
from keras_openllama.text.token_arrays import as_unique_ids
from keras_openllama.training.fit import FitMixin, default_optimizer
from keras_openllama.training.train_plan import plan_training
from keras_openllama.utils.types import PathLike, Tensor
from keras_openllama.utils.validation import raise_invalid

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import Sampler
    from keras_openllama.generation.beam_search import SearchLoop
    from keras_openllama.generation.drafting import Draft
    from keras_openllama.generation.prompt_cache import PromptCache
    from keras_openllama.generation.token_loop import TokenLoop


@keras.saving.register_keras_serializable(package="keras_openllama")
class OpenLlamaCausalLM(
    FitMixin, AtomicPreset, AtomicWeights, FunctionalModel, CausalLM
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
    # Set by `compile`.
    sampler = None
    kv_cache_dtype = None
    generate_function = None
    _compile_arguments = None
    _loaded_draft = None

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
            preset,
            dtype=dtype,
            load_weights=load_weights,
            revision=revision,
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
        sampler: str | Sampler = "greedy",
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
            sampler: name or instance of a `keras_hub.samplers.Sampler`. A temperature
                of 0 is greedy decoding.
            kv_cache_dtype: dtype of the KV cache of `generate` and `stream`: `None` is
                the compute dtype of the model; `"int8"` rounds keys and values to 8
                bits, with a scale for each token and head, for a cache of about a
                quarter of the size of float32.
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
        sampler = get_sampler(sampler)
        check_sampler(sampler, self.backbone.vocabulary_size)
        check_cache_dtype(kv_cache_dtype)
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
                "sampler": sampler,
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

    # ----- Generation

    def make_generate_function(self) -> TokenLoop | SearchLoop:
        """Returns the generation loop of the sampler, which compiles on first use.

        Returns:
            The loop that `generate` and `stream` run; the same object until `compile`
            or `quantize` changes the model.

        Raises:
            ValueError: if the model is not compiled.
            NotImplementedError: if a subclass overrides `generate_step` or
                `call_with_cache`.

        Example:
            >>> type(lm.make_generate_function()).__name__
            'TokenLoop'
        """
        if not self.compiled:
            raise ValueError(
                "You must call `compile()` before `generate`: it sets the sampler. "
                "Received: a model with compile=False"
            )
        # KerasHub resets it to None when the model or the sampler changes.
        if self.generate_function is None:
            for method in ("generate_step", "call_with_cache"):
                found = getattr(getattr(self, method), "__func__", None)
                if found is not getattr(OpenLlamaCausalLM, method):  # Overridden.
                    OpenLlamaCausalLM.generate_step(self)
            self.generate_function = generation.make_token_loop(self)
        return self.generate_function

    def generate_step(self, *args: Any, **kwargs: Any) -> None:
        """Raises an error: `generate` does not have this part of KerasHub's.

        Raises:
            NotImplementedError: always; it names the alternatives.
        """
        raise NotImplementedError(
            "`generate_step` and `call_with_cache` of KerasHub's models do not exist "
            "here, and overriding them has no effect: the generation loop has a KV "
            "cache of its own, for each layer. To choose tokens differently, pass a "
            "`keras_hub.samplers.Sampler` to `compile`. For logits of given tokens, "
            "use `score`, whose `layer_intercept_fn` also reads and changes hidden "
            "states. For each new token, use `stream`."
        )

    def call_with_cache(self, *args: Any, **kwargs: Any) -> None:
        """Raises an error: `generate` does not have this part of KerasHub's.

        Raises:
            NotImplementedError: always; it names the alternatives.
        """
        self.generate_step()

    def generate(
        self,
        inputs: Any,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        stop_token_ids: int | Sequence[int] | str | None = "auto",
        stop: str | Sequence[str] | None = None,
        strip_prompt: bool = False,
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        num_samples: int = 1,
        logprobs: int | None = None,
        draft: Draft | OpenLlamaCausalLM | str | None = None,
        cache: PromptCache | None = None,
    ) -> Any:
        """Generates text after one or more prompts.

        With greedy decoding, and with a `SamplingConfig` that has a seed, the result
        for a prompt does not depend on the other prompts of its batch, up to rounding.
        Random samplers of KerasHub draw once for the batch. Array sizes are rounded up
        internally, so that few lengths need a new compilation.

        Args:
            inputs: a string or UTF-8 bytes; a list or array of them; a
                `tf.data.Dataset` of strings or of batches of strings; or a dict of
                `"token_ids"` and `"padding_mask"`, both `(batch, length)`, padded on
                the right. Or a chat, `{"messages": [{"role": …, "content": …}, …]}`, or
                a list of chats, which use the preprocessor's `chat_template`. A chat
                may have `"tools"` for a template in Jinja, and be a list of messages
                alone, or ShareGPT's `{"conversations": [{"from": …, "value": …}, …]}`.
            max_length: maximum number of tokens of a sequence, including the prompt and
                `<s>`. Defaults to `preprocessor.sequence_length`, or to the length of
                the arrays.
            max_new_tokens: maximum number of generated tokens per prompt. If both
                limits are given, the stricter one applies.
            stop_token_ids: ids that end a sequence; `"auto"` is `end_token_ids` of the
                model; `None` disables it.
            stop: string or list of strings that end a sequence, and that are removed
                from it.
            strip_prompt: whether to return the new text without the prompt. Replies to
                chats never include the prompt.
            sampling: how tokens are chosen: a `SamplingConfig`, or a list with one for
                each prompt; `None` uses the sampler of `compile`. Its values do not
                need a new compilation.
            num_samples: number of texts for each prompt. With more than one, the result
                for a prompt is a list of them; arrays have so many rows for each one.
            logprobs: returns a `Generation` for each text, with the log-probabilities
                of its tokens, and of this many of the most likely tokens (from 0) at
                each position.
            draft: proposes tokens, which the model verifies several at once. The result
                is the same, up to rounding, and comes sooner if many proposals are
                right. `"prompt_lookup"` or a `PromptLookup` repeats what followed the
                last tokens before; a smaller model with the same tokenizer, its preset,
                or a `DraftModel` generates proposals. A preset is loaded at the first
                call. Several prompts are generated one after the other. Needs greedy
                decoding or a `SamplingConfig`.
            cache: a `keras_openllama.generation.prompt_cache.PromptCache`, in which
                the keys and values of prompts are found and saved. A prompt that begins
                as an earlier one is read from there on. Needs greedy decoding or a
                `SamplingConfig`, and no `draft`.

        Returns:
            A string for a string or a chat; a list of strings for several; for a dict
            of arrays, a dict of NumPy arrays with the same keys. With `logprobs`,
            `Generation`s instead of strings or rows of arrays.

        Raises:
            ValueError: if a prompt is empty or longer than the limits; if token ids or
                mask are malformed; if the limits exceed the model's context; if the
                sampling options are invalid, or need another sampler; if the draft has
                another tokenizer.

        Example:
            >>> lm.generate(["Once upon", "The sea"], max_new_tokens=4)
            ['Once upon the sea, the', 'The sea shines, and']
            >>> lm.generate("The sea", max_new_tokens=8, stop=",", strip_prompt=True)
            ' shines'
            >>> from keras_openllama import SamplingConfig
            >>> config = SamplingConfig(temperature=0.8, top_p=0.95, seed=1)
            >>> len(lm.generate("The", sampling=config, num_samples=3))
            3
            >>> lm.generate("The sea", max_new_tokens=4, draft="prompt_lookup")
            'The sea shines, and'
        """
        limits = GenerationLimits(max_length, max_new_tokens, stop_token_ids, stop)
        options = SamplingOptions(sampling, num_samples, logprobs)
        draft = self._resolve_draft(draft)
        return generation.generate(
            self, inputs, limits, strip_prompt, options, draft, cache
        )

    def stream(
        self,
        inputs: Any,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        stop_token_ids: int | Sequence[int] | str | None = "auto",
        stop: str | Sequence[str] | None = None,
        sampling: SamplingConfig | None = None,
        draft: Draft | OpenLlamaCausalLM | str | None = None,
        logprobs: None = None,
    ) -> Iterator[str] | Iterator[tuple[int, str]]:
        """Generates text after a prompt, or several, and yields it piece by piece.

        Joined, the pieces are what `generate(..., strip_prompt=True)` returns. A piece
        never ends within a character, and never contains a part of a stop string.

        Args:
            inputs: a string, or a chat as for `generate`; or a list of them, which are
                generated at once.
            max_length: see `generate`.
            max_new_tokens: see `generate`.
            stop_token_ids: see `generate`.
            stop: see `generate`.
            sampling: see `generate`.
            draft: see `generate`.
            logprobs: not supported, since the pieces are texts. `generate` returns
                log-probabilities, and so do the streams of `keras-openllama serve`.

        Returns:
            An iterator over the pieces, which are never empty; for a list, over pairs
            of the number of a prompt and a piece, each as soon as it is complete.

        Raises:
            ValueError: as `generate`, without a preprocessor, and for a list with
                `draft`, or if the model is compiled with a random sampler and
                `sampling` is `None`; already at the call, before the first piece.
            TypeError: with `logprobs`.

        Example:
            >>> for piece in lm.stream("The sea", max_new_tokens=4):
            ...     print(repr(piece))
            ' sh'
            'ines'
            ','
            ' and'
        """
        limits = GenerationLimits(max_length, max_new_tokens, stop_token_ids, stop)
        if logprobs is not None:
            raise TypeError(
                "`stream` yields texts, without log-probabilities. Call `generate` "
                f"with `logprobs`. Received: logprobs={logprobs!r}"
            )
        options, draft = SamplingOptions(sampling), self._resolve_draft(draft)
        return generation.stream(self, inputs, limits, options, draft)

    def _resolve_draft(self, draft):
        """Converts the argument `draft` of `generate`."""
        if draft is None or isinstance(draft, (PromptLookup, DraftModel)):
            return draft
        if draft == "prompt_lookup":
            return PromptLookup()
        if isinstance(draft, OpenLlamaCausalLM):
            return DraftModel(draft)
        if not isinstance(draft, (str, PurePath)):
            raise_invalid(
                "draft",
                draft,
                '"prompt_lookup", a `PromptLookup`, a model or its preset, a '
                "`DraftModel`, or None",
            )
        # In a function, which Keras does not track: the draft is no part of the model.
        loaded, lm = self._loaded_draft() if self._loaded_draft else (None, None)
        if loaded != draft:
            lm = OpenLlamaCausalLM.from_preset(draft, dtype=self.backbone.compute_dtype)
            self._loaded_draft = lambda: (draft, lm)
        return DraftModel(lm)

    # ----- Export

    def export_to_transformers(
        self,
        path: PathLike,
        dtype: str | None = None,
        max_shard_size: str | int = "5GB",
        tokenizer: bool = True,
        force: bool = False,
    ) -> None:
        """Writes a directory that Hugging Face transformers can load.

        `AutoModelForCausalLM.from_pretrained(path)`,
        `AutoTokenizer.from_pretrained(path)` and `OpenLlamaCausalLM.from_preset(path)`
        load it without further arguments. Weights are written tensor by tensor, with
        LoRA adapters merged and quantized weights dequantized. The directory appears at
        `path` only when it is complete.

        Args:
            path: path of the new directory.
            dtype: `"float32"`, `"bfloat16"` or `"float16"`; `None` is the model's own.
            max_shard_size: maximum size of a file of weights, in bytes or as a string
                such as `"5GB"`.
            tokenizer: whether to write the tokenizer, if the model has one.
            force: whether to replace an existing directory that contains a model.

        Raises:
            ValueError: for an unknown dtype or size; if a value exceeds the range of
                the dtype; if the tokenizer of the model cannot be expressed in
                `tokenizer.json`.
            OSError: if the path exists already, or cannot be written.

        Example:
            >>> import os
            >>> lm.export_to_transformers("my_model", dtype="bfloat16")
            >>> sorted(os.listdir("my_model"))[:3]
            ['README.md', 'config.json', 'generation_config.json']
        """
        from keras_openllama.checkpoints import contents, writer

        config = writer.ExportConfig(
            path,
            "transformers",
            dtype=dtype,
            max_shard_size=max_shard_size,
            tokenizer=tokenizer,
            force=force,
        )
        writer.write_model(contents.contents_of_model(self), config)

    def export_to_gguf(
        self,
        path: PathLike,
        quantization: str = "f16",
        tokenizer: bool = True,
        force: bool = False,
    ) -> None:
        """Writes a GGUF file, which llama.cpp and `from_preset` load.

        Weights are written tensor by tensor, with LoRA adapters merged. The file
        appears at `path` only when it is complete.

        Args:
            path: path of the new file.
            quantization: the type of the matrices: `"f32"`, `"f16"`, `"bf16"`,
                `"q8_0"`, `"q5_1"`, `"q5_0"`, `"q4_1"` or `"q4_0"`. Norms are float32.
                In the types of 4 and 5 bits, token embedding and head have 8 bits.
            tokenizer: whether to write the tokenizer, if the model has one.
            force: whether to replace an existing file.

        Raises:
            ValueError: for an unknown type; if a value exceeds the range of the type;
                if llama.cpp cannot apply the tokenizer.
            OSError: if the file exists already, or cannot be written.

        Example:
            >>> lm.export_to_gguf("nano.gguf", quantization="q8_0")
            >>> lm = OpenLlamaCausalLM.from_preset("nano.gguf")
        """
        from keras_openllama.checkpoints import contents, writer

        config = writer.ExportConfig(
            path, "gguf", quantization=quantization, tokenizer=tokenizer, force=force
        )
        writer.write_model(contents.contents_of_model(self), config)

    def export_to_onnx(self, path: PathLike, *, force: bool = False) -> None:
        """Writes the model as an ONNX graph, with its tokenizer.

        The graph computes a step with a KV cache. ONNX Runtime GenAI runs the directory
        without this package, and ONNX Runtime runs the graph; its inputs and outputs
        are described in `keras_openllama.generation.onnx_runtime.graph`. A quantized
        model stays quantized; other weights are written in float32. Adapters stay
        apart.

        Args:
            path: path of the new directory.
            force: whether to replace an existing directory that contains a model.

        Raises:
            ValueError: for dynamic RoPE scaling, or quantized groups whose size is not
                a multiple of 16.
            OSError: if the path exists already, or cannot be written.

        Example:
            >>> import os
            >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
            >>> lm.quantize("int4")
            >>> lm.export_to_onnx("nano_onnx")
            >>> sorted(os.listdir("nano_onnx"))[1:4]
            ['generation_config.json', 'model.onnx', 'model.onnx.data']
        """
        from keras_openllama.generation.onnx_runtime.export import export_to_onnx

        export_to_onnx(self, path, force)

    # ----- Weights

    def save_to_preset(
        self, preset_dir: PathLike, max_shard_size: float | None = 10
    ) -> None:
        """Saves the model as a preset, which `from_preset` loads.

        LoRA adapters are merged. `save` and `save_weights` keep them apart.

        Args:
            preset_dir: path of the directory.
            max_shard_size: maximum size of a file of weights in GiB; `None` for no
                limit.

        Example:
            >>> lm.save_to_preset("my_preset")
            >>> lm = OpenLlamaCausalLM.from_preset("my_preset")
        """
        with saving_merged():
            super().save_to_preset(preset_dir, max_shard_size=max_shard_size)

    def load_weights(
        self, filepath: PathLike, skip_mismatch: bool = False, **kwargs: Any
    ) -> None:
        """Loads weights that `save_weights` or `save` wrote.

        See `OpenLlamaBackbone.load_weights` for LoRA adapters.

        Args:
            filepath: path of the file, `.weights.h5`, `.weights.json` or `.keras`.
            skip_mismatch: whether to skip layers whose variables do not match.
            **kwargs: see `keras.Model.load_weights`.

        Raises:
            ValueError: if variables or adapters do not match the model.

        Example:
            >>> lm.save_weights("lm.weights.h5")
            >>> lm.load_weights("lm.weights.h5")
        """
        if not skip_mismatch:
            keras_adapters.check_adapters(self, filepath)
        super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)

    # ----- Adapters

    def merge_lora(self, reversible: bool = True) -> None:
        """Merges the adapters of the backbone into its weights and removes them.

        The same as `lm.backbone.merge_lora`. The merged model is as fast as one without
        adapters, and all its variables are trainable: call `compile` again before
        `fit`.

        Args:
            reversible: whether to save the original weights in host memory for
                `unmerge_lora`. This takes as much memory as the adapted matrices.

        Raises:
            ValueError: if the model has no adapters, or they are merged already, or the
                model is quantized.

        Example:
            >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
            >>> lm.backbone.enable_lora(4)
            >>> lm.merge_lora()
            >>> len(lm.trainable_variables) == len(lm.variables)
            True
        """
        self.backbone.merge_lora(reversible)

    def unmerge_lora(self) -> None:
        """Restores the adapters and the original weights, bit-exactly.

        The same as `lm.backbone.unmerge_lora`.

        Raises:
            ValueError: if no adapters were merged with `reversible=True`, or a weight
                was trained or quantized since.

        Example:
            >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
            >>> lm.backbone.enable_lora(4)
            >>> lm.merge_lora()
            >>> lm.unmerge_lora()
            >>> len(lm.trainable_variables)  # The adapters.
            16
        """
        self.backbone.unmerge_lora()

    def save_adapters(self, path: PathLike, force: bool = False) -> None:
        """Writes the LoRA adapters as a directory that PEFT can load.

        Args:
            path: path of the new directory.
            force: whether to replace an existing directory that contains adapters.

        Raises:
            ValueError: if the model has no adapters.
            OSError: if the path exists already, or cannot be written.

        Example:
            >>> import os
            >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
            >>> lm.backbone.enable_lora(4)
            >>> lm.save_adapters("my_adapters")
            >>> "adapter_model.safetensors" in os.listdir("my_adapters")
            True
        """
        from keras_openllama.checkpoints import peft

        peft.save_adapters(self, path, force)

    def load_adapters(self, path: PathLike, revision: str | None = None) -> None:
        """Loads LoRA adapters that were saved by `save_adapters` or by PEFT.

        If the model has no adapters, they are first added, as by `enable_lora`, with
        the rank and target layers of the files.

        Args:
            path: path of the directory, or `"hf://user/repo"`.
            revision: branch, tag or commit of a repository on the Hugging Face Hub.

        Raises:
            ValueError: if the files are not LoRA adapters for this model, which is then
                left unchanged.
            OSError: if a file is unavailable or cannot be read.

        Example:
            >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
            >>> lm.backbone.enable_lora(4, ["query"])
            >>> lm.save_adapters("other_adapters")
            >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
            >>> lm.load_adapters("other_adapters")
            >>> len(lm.trainable_variables)  # 4 layers, 2 matrices each
            8
        """
        from keras_openllama.checkpoints import peft
        from keras_openllama.loading.hub import open_repository

        peft.load_adapters(self, open_repository(path, revision))

    # ----- Scoring

    def score(
        self,
        inputs: Any = None,
        padding_mask: Any = None,
        scoring_mode: str = "logits",
        layer_intercept_fn: Callable[[Tensor, int | None], Tensor] | None = None,
        target_ids: Any = None,
        *,
        token_ids: Any = None,
    ) -> Tensor:
        """Computes logits or losses of given sequences, as in KerasHub.

        Args:
            inputs: token ids, int `(batch, length)`; or with a preprocessor a string or
                a list of strings.
            padding_mask: bool `(batch, length)`; `None` means no padding.
            scoring_mode: `"logits"`, or `"loss"` for the cross-entropy of each target,
                in nats.
            layer_intercept_fn: callable `(hidden_states, index) -> hidden_states`,
                called with the embeddings (index -1) and with each layer's output.
            target_ids: int `(batch, length)`, the correct token after each position.
                `"loss"` needs it for token ids; for text it is the text itself.
            token_ids: the same as `inputs`, by its name in KerasHub.

        Returns:
            Logits `(batch, length, vocabulary_size)`, or losses `(batch, length)`, 0 on
            padding; float32 tensors of the backend. For text, `length` is the number of
            tokens of the longest text minus one, since the last token has no target.

        Raises:
            ValueError: for malformed token ids, mask or targets, sequences longer than
                the context, or an unknown mode.

        Example:
            >>> lm.score("The sea", scoring_mode="loss").round(2)
            Array([[1.89, 6.02]], dtype=float32)
        """
        if (inputs is None) == (token_ids is None):
            raise ValueError(
                "`score` needs exactly one of `inputs` and `token_ids`. Received: "
                f"inputs={str(inputs)[:80]!r}, token_ids={str(token_ids)[:80]!r}"
            )
        inputs = token_ids if inputs is None else inputs
        return scoring.score_sequences(
            self, inputs, padding_mask, scoring_mode, layer_intercept_fn, target_ids
        )

    def logits(
        self,
        token_ids: Tensor,
        padding_mask: Tensor,
        layer_intercept_fn: Callable[[Tensor, int | None], Tensor] | None = None,
    ) -> Tensor:
        """Computes logits in float32, whatever the compute dtype.

        Args:
            token_ids: int `(batch, length)`.
            padding_mask: bool or int `(batch, length)`, see `OpenLlamaBackbone`.
            layer_intercept_fn: see `OpenLlamaBackbone.hidden_states`.

        Returns:
            float32 `(batch, length, vocabulary_size)`.

        Example:
            >>> import numpy as np
            >>> token_ids = np.array([[1, 357, 1239]])
            >>> lm.logits(token_ids, np.ones_like(token_ids)).shape
            (1, 3, 3072)
        """
        hidden = self.backbone.hidden_states(
            *(token_ids, padding_mask),
            layer_intercept_fn=layer_intercept_fn,
            execution=scoring.layer_execution(self.backbone),
        )
        return ops.cast(self.lm_head(hidden), "float32")
