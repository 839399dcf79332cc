"""The LLaMA network up to its last hidden states."""

import functools
import weakref

import keras
from keras import ops

from keras_openllama import presets
from keras_openllama.backend.keras_hub import Backbone, classproperty, lora_rank
from keras_openllama.backend.keras_private import (
    disable_autocast,
    embeddings_variable,
    flatten_layers,
)
from keras_openllama.config import (
    BACKBONE_ARGUMENTS,
    PROJECTIONS,
    validate_architecture,
)
from keras_openllama.distribution import layout_map
from keras_openllama.layers import DecoderLayer, RMSNorm, RotaryEmbedding, lora
from keras_openllama.layers.attention import causal_mask
from keras_openllama.layers.execution import LayerExecution
from keras_openllama.layers.remat import apply_remat_policy, check_policy
from keras_openllama.loading.load import load_backbone

if keras.config.backend() == "jax":
    from keras_openllama.layers.scan import functional_call, scan_layers


@keras.saving.register_keras_serializable(package="keras_openllama")
class OpenLlamaBackbone(Backbone):
    """The decoder of OpenLLaMA: token ids to hidden states.

    Defaults are those common to all OpenLLaMA models.

    Args:
        vocabulary_size: int, number of tokens.
        num_layers: int, number of decoder layers.
        num_query_heads: int, attention heads.
        hidden_dim: int, width of the network.
        intermediate_dim: int, width of the feed-forward networks.
        num_key_value_heads: int, heads of keys and values; a divisor of
            `num_query_heads`. Defaults to `num_query_heads`.
        head_dim: int, size of a head. Defaults to `hidden_dim / num_query_heads`,
            which must then be a whole number.
        rope_max_wavelength: float, base of the rotary frequencies ("theta").
        rope_scaling: `None`, or a dict such as
            `{"rope_type": "linear", "factor": 2.0}` for contexts longer than
            `max_sequence_length`; see `keras_openllama.layers.RotaryEmbedding`.
        layer_norm_epsilon: float, epsilon of the norms.
        max_sequence_length: int, context of the trained weights, in tokens.
        initializer_std: float, standard deviation of the initial weights.
        dtype: dtype or dtype policy. Norms, rotary embedding and softmax are
            float32 whatever it is.

    Call arguments:
        A dict of `"token_ids"`, int `(batch, length)`, and `"padding_mask"`, bool or
        int `(batch, length)`, true on real tokens. Where documents share a row it
        numbers them, 1, 2 and so on: a token sees its own document only, and positions
        begin anew with each.

    Returns:
        Hidden states `(batch, length, hidden_dim)`, in the compute dtype.

    Raises:
        ValueError: if head counts or sizes do not fit together.

    Example:
        backbone = OpenLlamaBackbone.from_preset("open_llama_nano")
        backbone({"token_ids": [[1, 5, 6]], "padding_mask": [[1, 1, 1]]})

    Source: LLaMA (arXiv:2302.13971); sizes in `openlm-research/open_llama`.
    """

    def __init__(
        self,
        vocabulary_size,
        num_layers,
        num_query_heads,
        hidden_dim,
        intermediate_dim,
        num_key_value_heads=None,
        head_dim=None,
        rope_max_wavelength=10000.0,
        rope_scaling=None,
        layer_norm_epsilon=1e-6,
        max_sequence_length=2048,
        initializer_std=0.02,
        dtype=None,
        **kwargs,
    ):
        sizes = validate_architecture(
            {
                "vocabulary_size": vocabulary_size,
                "num_layers": num_layers,
                "num_query_heads": num_query_heads,
                "hidden_dim": hidden_dim,
                "intermediate_dim": intermediate_dim,
                "num_key_value_heads": num_key_value_heads,
                "head_dim": head_dim,
                "rope_max_wavelength": rope_max_wavelength,
                "rope_scaling": rope_scaling,
                "layer_norm_epsilon": layer_norm_epsilon,
                "max_sequence_length": max_sequence_length,
                "initializer_std": initializer_std,
            }
        )

        # === Layers ===
        self.token_embedding = keras.layers.Embedding(
            sizes["vocabulary_size"],
            sizes["hidden_dim"],
            embeddings_initializer=keras.initializers.RandomNormal(
                stddev=sizes["initializer_std"]
            ),
            dtype=dtype,
            name="token_embedding",
        )
        self.rotary_embedding = RotaryEmbedding(
            sizes["head_dim"],
            max_wavelength=sizes["rope_max_wavelength"],
            scaling=sizes["rope_scaling"],
            max_sequence_length=sizes["max_sequence_length"],
            name="rotary_embedding",
        )
        self.transformer_layers = [
            DecoderLayer(
                sizes["num_query_heads"],
                sizes["num_key_value_heads"],
                sizes["head_dim"],
                sizes["intermediate_dim"],
                layer_norm_epsilon=sizes["layer_norm_epsilon"],
                initializer_std=sizes["initializer_std"],
                dtype=dtype,
                name=f"transformer_layer_{i}",
            )
            for i in range(sizes["num_layers"])
        ]
        self.final_norm = RMSNorm(
            sizes["layer_norm_epsilon"], dtype=dtype, name="final_norm"
        )

        # === Functional model ===
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=self.hidden_states(token_ids, padding_mask),
            dtype=dtype,
            **kwargs,
        )
        # Under a mixed policy gradients of a token's rows would add up in bfloat16. (A
        # layer's own `autocast=False` counts only where another layer calls it.)
        disable_autocast(embeddings_variable(self.token_embedding))

        # === Config ===
        for name, value in sizes.items():
            setattr(self, name, value)
        # The layers that tasks have put on top, see `add_head`. Weakly: Keras would
        # track them as layers of the backbone, and save them with it.
        self._heads = weakref.WeakSet()
        self._merged = ()  # Of `lora.merge_adapters`.

    @classmethod
    def from_preset(
        cls, preset, *, dtype=None, load_weights=True, revision=None, **kwargs
    ):
        """Loads a backbone; see `OpenLlamaCausalLM.from_preset`."""
        return load_backbone(
            cls,
            preset,
            dtype=dtype,
            load_weights=load_weights,
            revision=revision,
            **kwargs,
        )

    @classproperty
    def presets(cls):
        """Names of the presets, each with description, parameters and handles."""
        return presets.descriptions()

    @property
    def context_length(self):
        """int, the longest sequence the model can take, in tokens."""
        factor = 1.0 if self.rope_scaling is None else self.rope_scaling["factor"]
        return int(self.max_sequence_length * factor)

    def hidden_states(
        self,
        token_ids,
        padding_mask,
        mask=None,
        layer_intercept_fn=None,
        execution=None,
    ):
        """What the model computes, with a look at each layer where wanted.

        Args:
            token_ids: int tensor `(batch, length)`.
            padding_mask: tensor `(batch, length)`: bool, true on real tokens; or int,
                see `causal_mask`. Positions begin anew with each document.
            mask: bool `(batch, 1, length, length)`, True where a token may look at
                one that is not after it; `None` is `causal_mask`. A token's position is
                the number of tokens it sees beside itself. Not with an
                `execution.attention_fn`, which may know no other mask.
            layer_intercept_fn: callable `(hidden_states, index) -> hidden_states`,
                called with the embeddings (index -1) and with each layer's output
                (its index, or `None` in a scan).
            execution: `LayerExecution`, how the layers are computed; `None` is layer
                by layer, and all that a backward pass needs is kept.

        Returns:
            Hidden states `(batch, length, hidden_dim)` after the final norm.

        Raises:
            ValueError: for a rematerialization that is not known, or cannot be had
                here; for both `mask` and `execution.attention_fn`.
        """
        execution = execution or LayerExecution()
        check_policy(execution.rematerialize)
        if mask is not None and execution.attention_fn is not None:
            raise ValueError(
                "`mask` and `execution.attention_fn` exclude each other. Received: both"
            )
        # 0, 1, 2 … as a sum, because the length may not be known here.
        columns = ops.expand_dims(ops.cumsum(ops.ones_like(token_ids[0])) - 1, 0)
        if mask is None:
            mask = causal_mask(columns, padding_mask)
        # As many as there are tokens of the same document before.
        seen = ops.sum(ops.cast(mask[:, 0], "int32"), axis=-1)
        positions = ops.maximum(seen - 1, 0)
        real = ops.cast(ops.cast(padding_mask, "bool"), "int32")
        final_lengths = ops.sum(real, axis=-1)
        cos, sin = self.rotary_embedding(positions, final_lengths)
        intercept = layer_intercept_fn or (lambda x, index: x)
        options = {"in_scan": execution.scan, "rematerialize": execution.rematerialize}
        if execution.attention_fn is not None:
            documents = ops.cast(padding_mask, "int32")
            options["attention_fn"] = lambda *heads: execution.attention_fn(
                *heads, documents
            )
        block = functools.partial(apply_remat_policy, execution.rematerialize)
        x = intercept((execution.embedding_fn or self.token_embedding)(token_ids), -1)
        if execution.scan:
            first = self.transformer_layers[0]
            apply_layer = functional_call(
                first, lambda x: intercept(first(x, cos, sin, mask, **options), None)
            )
            apply_layer = block(apply_layer, "full", in_scan=True)
            return self.final_norm(scan_layers(self.transformer_layers, apply_layer, x))
        for index, layer in enumerate(self.transformer_layers):
            apply_layer = functools.partial(layer, **options)
            x = intercept(block(apply_layer, "full")(x, cos, sin, mask), index)
        return self.final_norm(x)

    def add_head(self, layer):
        """Tells the backbone of a layer on top of it, which `enable_lora` freezes too.

        Args:
            layer: the `keras.layers.Layer` that a task applies to the hidden states.
        """
        self._heads.add(layer)

    def enable_lora(self, rank, target_layer_names=None, alpha=None):
        """Adds low-rank adapters (LoRA, arXiv:2106.09685) and freezes all the rest.

        Afterwards the trainable variables of the backbone, and of a task around it,
        are exactly the adapters. They are float32 whatever the model is; so it may be
        bfloat16, or quantized to int8.

        Args:
            rank: int, rank of the adapters.
            target_layer_names: list of strings among `"query"`, `"key"`, `"value"`,
                `"output"`, `"gate"`, `"up"`, `"down"`. Defaults to query and value.
            alpha: float; what adapters add is scaled by `alpha / rank`. Defaults to
                `rank`.

        Raises:
            ValueError: for a name that is no projection of this network, a rank or
                alpha that is not positive, or if there are adapters already.

        Example:

        ```python
        lm.backbone.enable_lora(16, ["query", "key", "value", "output"], alpha=32)
        ```
        """
        names = target_layer_names
        if names is not None and (
            isinstance(names, str) or not names or set(names) - set(PROJECTIONS)
        ):
            raise ValueError(
                "`target_layer_names` takes a list of names among "
                f"{PROJECTIONS}. Received: {names!r}"
            )
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"`rank` is a whole number from 1 on. Received: {rank!r}")
        if alpha is not None and not alpha > 0:
            raise ValueError(f"`alpha` is a positive number. Received: alpha={alpha!r}")
        if lora.adapted_layers(self) or self._merged:
            raise ValueError(
                f"This model has adapters (rank {lora_rank(self)}). They can be added "
                "once: load the model again for others, or put them into its weights "
                "for good with `merge_lora(reversible=False)`."
            )
        super().enable_lora(rank, target_layer_names)
        for layer in lora.adapted_layers(self):
            layer.lora_alpha = rank if alpha is None else alpha
        for head in self._heads:
            head.trainable = False

    def merge_lora(self, reversible=True):
        """Puts the adapters into the weights, and takes them off.

        The model is then as if it never had any: as fast, and all of it trainable.

        Args:
            reversible: bool, whether to keep the weights as they are now, on the host,
                for `unmerge_lora`: as much memory as the adapted matrices have.

        Raises:
            ValueError: if there are no adapters, or the model is quantized.
        """
        merged = lora.merge_adapters(self, reversible)
        # Each by itself: on TensorFlow Keras does not pass it down.
        for layer in (*flatten_layers(self), *self._heads):
            layer.trainable = True
        self._merged = merged

    def unmerge_lora(self):
        """Takes the adapters out of the weights again, to the bit.

        Raises:
            ValueError: if none were merged, or not reversibly.
        """
        if not self._merged:
            raise ValueError(
                "No adapters were merged reversibly, so there is nothing to undo."
            )
        lora.unmerge_adapters(self, self._merged)
        self._merged = ()
        for head in self._heads:
            head.trainable = False

    @staticmethod
    def get_layout_map(
        device_mesh, model_parallel_dim_name="model", data_parallel_dim_name="batch"
    ):
        """Layouts for `keras.distribution.ModelParallel`, as in KerasHub.

        Args:
            device_mesh: `keras.distribution.DeviceMesh`.
            model_parallel_dim_name: string, the axis of the mesh that divides heads,
                widths and the vocabulary.
            data_parallel_dim_name: string, the axis that divides the rest of each
                matrix, and the batch.

        Returns:
            `keras.distribution.LayoutMap`, for the head of a task too. For a batch
            over two axes see `keras_openllama.distribution`.
        """
        return layout_map(device_mesh, model_parallel_dim_name, data_parallel_dim_name)

    def get_config(self):
        # Not KerasHub's: it makes a map without a default policy, and serialising such
        # a map makes the live layers forget which dtype they compute in.
        config = {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self._policy_with_quantized()),
        }
        return {**config, **self.architecture()}

    def architecture(self):
        """The constructor's arguments that make the network what it is.

        Returns:
            Dict of numbers, and of `rope_scaling`; JSON can hold it.
        """
        return {name: getattr(self, name) for name in BACKBONE_ARGUMENTS}

    def _policy_with_quantized(self):
        """The dtype policy, by layer where some are quantized, heads among them."""
        quantized = {
            layer.path: layer.dtype_policy
            for layer in [*flatten_layers(self), *self._heads]
            if layer.quantization_mode is not None
        }
        is_map = isinstance(self.dtype_policy, keras.dtype_policies.DTypePolicyMap)
        if is_map or not quantized:
            return self.dtype_policy
        return keras.dtype_policies.DTypePolicyMap(
            default_policy=self.dtype_policy, policy_map=quantized
        )
