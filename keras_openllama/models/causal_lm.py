"""OpenLLaMA as a causal language model: training, scoring, generation."""

import keras
from keras import ops

from keras_openllama import presets
from keras_openllama.backend.jit import compile_function
from keras_openllama.backend.keras_hub import CausalLM, classproperty, get_sampler
from keras_openllama.generation import generate as generation
from keras_openllama.generation.beam_search import is_search_sampler
from keras_openllama.generation.limits import GenerationLimits
from keras_openllama.layers.projection import Projection
from keras_openllama.layers.remat import check_policy
from keras_openllama.loading.load import load_task
from keras_openllama.models import scoring
from keras_openllama.models.backbone import OpenLlamaBackbone
from keras_openllama.models.causal_lm_preprocessor import OpenLlamaCausalLMPreprocessor
from keras_openllama.training.fit import FitMixin, default_optimizer
from keras_openllama.training.train_plan import plan_training


@keras.saving.register_keras_serializable(package="keras_openllama")
class OpenLlamaCausalLM(FitMixin, CausalLM):
    """OpenLLaMA with its language-model head.

    Args:
        backbone: `OpenLlamaBackbone`.
        preprocessor: `OpenLlamaCausalLMPreprocessor`, or `None` to work on token ids.

    Call arguments: those of the backbone.

    Returns:
        Logits `(batch, length, vocabulary_size)`.

    Example:
        lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
        lm.generate("It was a dark night, and", max_new_tokens=32)
        lm.fit(["some text", "more text"])
    """

    backbone_cls = OpenLlamaBackbone
    preprocessor_cls = OpenLlamaCausalLMPreprocessor
    # What `from_preset` read the weights from; an export tells it.
    loaded_from = None

    def __init__(self, backbone, preprocessor=None, **kwargs):
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.lm_head = Projection(
            backbone.vocabulary_size,
            backbone.initializer_std,
            dtype=backbone.dtype_policy,
            name="lm_head",
        )
        backbone.add_head(self.lm_head)

        # === Functional model ===
        super().__init__(
            inputs=backbone.input, outputs=self.lm_head(backbone.output), **kwargs
        )

    @classmethod
    def from_preset(
        cls,
        preset,
        *,
        dtype=None,
        load_weights=True,
        revision=None,
        preprocessor="auto",
        **kwargs,
    ):
        """Loads a model.

        Weights are read tensor by tensor into the dtype asked for; memory holds one
        tensor more than the model.

        Args:
            preset: a name of `OpenLlamaCausalLM.presets`; a directory in KerasHub's or
                transformers' format (safetensors or `.bin`, one file or several), or
                that of a pretraining run, or of one of its checkpoints; or
                `"hf://user/repo"`.
            dtype: dtype or dtype policy; `None` is Keras's global policy, float32
                unless set.
            load_weights: whether to load the weights, rather than initialise them.
            revision: branch, tag or commit of a repository on the Hub.
            preprocessor: `"auto"` loads it; `None` loads no tokenizer.
            **kwargs: arguments of `OpenLlamaBackbone` to override, such as
                `rope_scaling`.

        Returns:
            An `OpenLlamaCausalLM`.

        Raises:
            ValueError: for an unknown preset, or files that are not this model.
            OSError: if a file cannot be had or read.

        Example:
            OpenLlamaCausalLM.from_preset("open_llama_7b_v2", dtype="bfloat16")
        """
        return load_task(
            cls,
            preset,
            dtype=dtype,
            load_weights=load_weights,
            revision=revision,
            preprocessor=preprocessor,
            **kwargs,
        )

    @classproperty
    def presets(cls):
        """Names of the presets, each with description, parameters and handles."""
        return presets.descriptions()

    def compile(
        self,
        optimizer="auto",
        loss="auto",
        *,
        weighted_metrics="auto",
        sampler="greedy",
        micro_batches=1,
        rematerialize="none",
        z_loss=0.0,
        **kwargs,
    ):
        """Configures training and generation.

        With the loss and the metrics below a step whose loss or gradient is not finite
        is left out: such a loss is shown, and no variable changes. On JAX training and
        evaluation do not keep the logits. An optimizer that scales the loss, as for
        float16, and on JAX a quantized head, take Keras's own step.

        Args:
            optimizer: see `keras.Model.compile`; `"auto"` is AdamW at 2e-5, and at
                2e-4 for a model with adapters.
            loss: see `keras.Model.compile`; `"auto"` is the cross-entropy of the next
                token, in nats, averaged over positions by their weight, over all of an
                epoch; perplexity comes with it.
            weighted_metrics: see `keras.Model.compile`; `"auto"` is token accuracy.
            sampler: name or instance of a `keras_hub.samplers.Sampler`.
            micro_batches: int, parts of a batch that training computes one after the
                other, to save memory; one update for all. JAX only.
            rematerialize: string, what training computes twice to save memory: see
                `keras_openllama.config.REMATERIALIZATION`. JAX only.
            z_loss: float, weight of the squared log of the softmax's denominator in
                the gradient (PaLM: 1e-4). JAX only.
            **kwargs: further arguments of `keras.Model.compile`.

        Raises:
            ValueError: for a sampler that `generate` cannot run, or if what is for JAX
                only is asked for elsewhere, or where Keras's own step is taken, as
                with a loss or metrics of your own.
        """
        check_policy(rematerialize)
        cross_entropy = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        )
        sampler = get_sampler(sampler)
        is_search_sampler(sampler)  # Refuses one that cannot run.
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
            (micro_batches, rematerialize, z_loss),
        )
        self.logits_function = compile_function(self.logits, self)

    # ----- Generation

    def make_generate_function(self):
        """The loop that chooses tokens; it compiles its programs at first use."""
        # KerasHub sets it to None where the model or the sampler changes.
        if self.generate_function is None:
            self.generate_function = generation.make_token_loop(self)
        return self.generate_function

    def generate(
        self,
        inputs,
        max_length=None,
        max_new_tokens=None,
        stop_token_ids="auto",
        stop=None,
        strip_prompt=False,
    ):
        """Continues one or more prompts.

        Each prompt of a batch is continued as it would be alone. Sizes are rounded up
        inside, so that other lengths seldom compile anew.

        Args:
            inputs: a string, a list or array of strings, a `tf.data.Dataset` of
                strings or of batches of them, or a dict of `"token_ids"` and
                `"padding_mask"`, both `(batch, length)` with padding on the right. Or
                a chat, `{"messages": [{"role": …, "content": …}, …]}`, or a list of
                chats, by the preprocessor's `chat_template`.
            max_length: int, tokens that a row may have in the end, prompt and BOS
                included. Defaults to `preprocessor.sequence_length`, or for a dict to
                its length.
            max_new_tokens: int, tokens that may be added to each prompt. Where both
                are given, the nearer limit counts.
            stop_token_ids: list of ids that end a row; `"auto"` is the tokenizer's end
                token, `None` is none.
            stop: string or list of strings that end a row; they are cut off.
            strip_prompt: whether to return the new text alone; for chats it always is.

        Returns:
            A string for a string or a chat, a list of strings for several; for a dict
            of arrays a dict with the same keys, NumPy arrays.

        Raises:
            ValueError: if a prompt is empty, or longer than the limits; if ids or mask
                are malformed; if the limits go beyond the model's context.

        Example:
            lm.generate(["Once upon", "The sea"], max_new_tokens=20, stop=".")
        """
        limits = GenerationLimits(max_length, max_new_tokens, stop_token_ids, stop)
        return generation.generate(self, inputs, limits, strip_prompt)

    def stream(
        self,
        inputs,
        max_length=None,
        max_new_tokens=None,
        stop_token_ids="auto",
        stop=None,
    ):
        """Continues one prompt and yields the new text while it arises.

        The pieces join to what `generate(..., strip_prompt=True)` returns. None ends
        within a character, and none shows a part of a stop string.

        Args:
            inputs: string.
            max_length, max_new_tokens, stop_token_ids, stop: see `generate`.

        Yields:
            Strings, none empty.

        Raises:
            ValueError: as `generate`, before the first piece.

        Example:
            for piece in lm.stream("Once upon", max_new_tokens=64):
                print(piece, end="", flush=True)
        """
        if self.preprocessor is None or not isinstance(inputs, str):
            raise ValueError(
                "`stream` takes one string, and needs a `preprocessor`. Received: "
                f"inputs={inputs!r}, preprocessor={self.preprocessor}"
            )
        limits = GenerationLimits(max_length, max_new_tokens, stop_token_ids, stop)
        return generation.stream(self, inputs, limits)

    # ----- Export

    def export_to_transformers(
        self, path, dtype=None, max_shard_size="5GB", tokenizer=True, force=False
    ):
        """Writes the model as a directory that transformers loads.

        `AutoModelForCausalLM.from_pretrained(path)` and
        `AutoTokenizer.from_pretrained(path)` need no other argument, and so does
        `from_preset(path)` here. Weights are written tensor by tensor, LoRA adapters
        merged. The directory takes its place when it is whole.

        Args:
            path: path of the directory.
            dtype: `"float32"`, `"bfloat16"` or `"float16"`; `None` is the model's own.
            max_shard_size: string such as `"5GB"`, or int, bytes that one file of
                weights holds at most.
            tokenizer: whether to write the tokenizer, if the model has one.
            force: whether to replace a model's directory that exists.

        Raises:
            ValueError: for an unknown dtype or size; if a value is beyond the dtype's
                range; if the model is quantised; if its tokenizer cannot be expressed
                in `tokenizer.json`.
            OSError: if the path exists already, or cannot be written.

        Example:
            lm.export_to_transformers("my_model_hf", dtype="bfloat16")
        """
        from keras_openllama.checkpoints import contents, writer

        request = writer.WriteRequest(
            path,
            "transformers",
            dtype=dtype,
            max_shard_size=max_shard_size,
            tokenizer=tokenizer,
            force=force,
        )
        writer.write_model(contents.of_model(self), request)

    # ----- Adapters

    def save_adapters(self, path, force=False):
        """Writes the LoRA adapters alone, as a directory that PEFT loads, too.

        Args:
            path: path of the directory.
            force: whether to replace a directory of adapters that exists.

        Raises:
            ValueError: if the model has none.
            OSError: if the path exists already, or cannot be written.

        Example:

        ```python
        lm.save_adapters("my_adapters")
        peft.PeftModel.from_pretrained(model_of_transformers, "my_adapters")
        ```
        """
        from keras_openllama.checkpoints import peft

        peft.save(self, path, force)

    def load_adapters(self, path, revision=None):
        """Takes LoRA adapters that were saved here or by PEFT.

        A model without adapters gets those of the files, as by `enable_lora`.

        Args:
            path: path of the directory, or `"hf://user/repo"`.
            revision: branch, tag or commit of a repository on the Hub.

        Raises:
            ValueError: if they are no LoRA adapters for this model. It is untouched
                then.
            OSError: if a file cannot be had or read.
        """
        from keras_openllama.checkpoints import peft
        from keras_openllama.loading.hub import open_repository

        peft.load(self, open_repository(path, revision))

    # ----- Scoring

    def score(
        self,
        inputs,
        padding_mask=None,
        scoring_mode="logits",
        layer_intercept_fn=None,
        target_ids=None,
    ):
        """Logits or losses of given sequences, as in KerasHub.

        Args:
            inputs: int array of token ids `(batch, length)`; or with a preprocessor a
                string or a list of strings.
            padding_mask: bool `(batch, length)`; `None` is no padding.
            scoring_mode: `"logits"`, or `"loss"` for the cross-entropy of each target,
                in nats.
            layer_intercept_fn: callable `(hidden_states, index) -> hidden_states`,
                called with the embeddings (index -1) and with each layer's output.
            target_ids: int `(batch, length)`, the right token after each position.
                `"loss"` needs it for token ids; for text it is the text itself.

        Returns:
            Logits `(batch, length, vocabulary_size)`, or losses `(batch, length)`, 0
            on padding; float32 tensors of the backend. For text, `length` is one less
            than the tokens of the longest: the last one has no successor.

        Raises:
            ValueError: for malformed ids, mask or targets, sequences longer than the
                context, or an unknown mode.

        Example:
            lm.score("The sea", scoring_mode="loss")
        """
        return scoring.score_sequences(
            self, inputs, padding_mask, scoring_mode, layer_intercept_fn, target_ids
        )

    def logits(self, token_ids, padding_mask, layer_intercept_fn=None):
        """Logits in float32; see `OpenLlamaBackbone.hidden_states`."""
        hidden = self.backbone.hidden_states(
            token_ids, padding_mask, layer_intercept_fn=layer_intercept_fn
        )
        return ops.cast(self.lm_head(hidden), "float32")
