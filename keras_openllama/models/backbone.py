"""The LLaMA network up to its last hidden states.

`enable_lora` and what belongs to it is in `models.adapters`, `quantize` and saving in
`models.functional_model`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_openllama import presets
from keras_openllama.backend.keras_hub import Backbone, classproperty
from keras_openllama.backend.keras_private import (
    disable_autocast,
    embeddings_variable,
    flatten_layers,
)
from keras_openllama.config import (
    BACKBONE_ARGUMENTS,
    context_length,
    validate_architecture,
)
from keras_openllama.distribution import layout_map
from keras_openllama.layers import DecoderLayer, RMSNorm, RotaryEmbedding, lora
from keras_openllama.layers.adapter_merging import is_saving_merged
from keras_openllama.layers.attention import causal_mask
from keras_openllama.layers.embedding import Embedding
from keras_openllama.layers.execution import LayerExecution
from keras_openllama.layers.remat import check_policy, maybe_rematerialize
from keras_openllama.loading.load import find_source, load_backbone
from keras_openllama.models.adapters import LoraMixin
from keras_openllama.models.functional_model import FunctionalModel
from keras_openllama.quantization.policies import policy_of
from keras_openllama.utils.types import PathLike, Tensor

if keras.config.backend() == "jax":
    from keras_openllama.layers.scan import functional_call, scan_layers


@keras.saving.register_keras_serializable(package="keras_openllama")
class OpenLlamaBackbone(LoraMixin, FunctionalModel, Backbone):
    """The decoder-only transformer of OpenLLaMA: token ids to hidden states.

    The defaults are the values that all published OpenLLaMA models share.

    Call arguments:

    - `token_ids`: int `(batch, length)`.
    - `padding_mask`: bool or int `(batch, length)`, nonzero on real tokens. In packed
      sequences it numbers the documents 1, 2 and so on: a token attends only to tokens
      of its own document, and positions restart with each document.

    Both are passed as one dict. The result is the hidden states after the final norm,
    `(batch, length, hidden_dim)`, in the compute dtype.

    Args:
        vocabulary_size: number of tokens.
        num_layers: number of decoder layers.
        num_query_heads: number of attention heads.
        hidden_dim: width of the hidden states.
        intermediate_dim: width of the feed-forward networks.
        num_key_value_heads: number of key and value heads (grouped-query attention), a
            divisor of `num_query_heads`. Defaults to `num_query_heads`.
        head_dim: size of a head. Defaults to `hidden_dim / num_query_heads`, which
            must then be an integer.
        rope_max_wavelength: base of the rotary frequencies ("theta").
        rope_scaling: `None`, or a dict such as
            `{"rope_type": "linear", "factor": 2.0}` for contexts longer than
            `max_sequence_length`; see `keras_openllama.layers.RotaryEmbedding`.
        layer_norm_epsilon: epsilon of the RMS norms.
        max_sequence_length: context length of the trained weights, in tokens.
        initializer_std: standard deviation of the initial weights.
        dtype: dtype or dtype policy. Norms, rotary embeddings and softmax are always
            computed in float32.
        **kwargs: further arguments of `keras.Model`, such as `name`.

    Raises:
        ValueError: if the sizes are not positive or do not fit together.

    Example:
        >>> import numpy as np
        >>> backbone = OpenLlamaBackbone(
        ...     vocabulary_size=100, num_layers=2, num_query_heads=4, hidden_dim=32,
        ...     intermediate_dim=64,
        ... )
        >>> backbone({
        ...     "token_ids": np.array([[1, 5, 6]]),
        ...     "padding_mask": np.array([[1, 1, 1]]),
        ... }).shape
        (1, 3, 32)

    Source: LLaMA (arXiv:2302.13971); sizes from `openlm-research/open_llama`.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_query_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        rope_max_wavelength: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        layer_norm_epsilon: float = 1e-6,
        max_sequence_length: int = 2048,
        initializer_std: float = 0.02,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
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
        self.token_embedding = Embedding(
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
            dtype=dtype,
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
        # Under a mixed policy the gradients of a token's embedding would be summed in
        # bfloat16. (`autocast=False` of the layer itself has no effect here, because
        # no other layer calls it.)
        disable_autocast(embeddings_variable(self.token_embedding))

        # === Config ===
        for name, value in sizes.items():
            setattr(self, name, value)
        # The heads that tasks have registered with `register_head`. Weak references,
        # since Keras would track and save the heads as layers of the backbone.
        self._heads = weakref.WeakSet()
        self._merged = ()  # What `lora.merge_adapters` returned.

    @classmethod
    def from_preset(
        cls,
        preset: PathLike,
        *,
        dtype: str | keras.DTypePolicy | None = None,
        load_weights: bool = True,
        revision: str | None = None,
        quantization: Any = "auto",
        **kwargs: Any,
    ) -> OpenLlamaBackbone:
        """Loads the backbone of a preset, without tokenizer and head.

        Args:
            preset: see `OpenLlamaCausalLM.from_preset`.
            dtype: dtype or dtype policy; `None` is Keras's global policy.
            quantization: see `OpenLlamaCausalLM.from_preset`.
            load_weights: whether to load the weights instead of initializing them.
            revision: branch, tag or commit of a repository on the Hugging Face Hub.
            **kwargs: arguments of `OpenLlamaBackbone` that override the preset's.

        Returns:
            An `OpenLlamaBackbone`.

        Raises:
            ValueError: for an unknown preset, or files of another model.
            OSError: if a file is unavailable or cannot be read.

        Example:
            >>> backbone = OpenLlamaBackbone.from_preset("open_llama_nano")
            >>> backbone.num_layers, backbone.hidden_dim
            (4, 256)
        """
        return load_backbone(
            cls,
            find_source(preset, revision),
            dtype=dtype,
            load_weights=load_weights,
            quantization=quantization,
            **kwargs,
        )

    @classproperty
    def presets(cls) -> dict[str, dict]:
        """Names of the presets, with description, parameter count and handles.

        Example:
            >>> OpenLlamaBackbone.presets["open_llama_nano"]["parameters"]
            4524288
        """
        return presets.descriptions()

    @property
    def context_length(self) -> int:
        """The longest supported sequence in tokens, RoPE scaling included.

        Example:
            >>> lm.backbone.context_length
            256
        """
        return context_length(self.architecture())

    def hidden_states(
        self,
        token_ids: Tensor,
        padding_mask: Tensor,
        mask: Tensor | None = None,
        layer_intercept_fn: Callable[[Tensor, int | None], Tensor] | None = None,
        execution: LayerExecution | None = None,
    ) -> Tensor:
        """Computes the hidden states; calling the model does the same by default.

        Args:
            token_ids: int `(batch, length)`.
            padding_mask: bool or int `(batch, length)`; see the class.
            mask: attention mask, bool `(batch, 1, length, length)`, True where a query
                may attend to an earlier key or to itself; `None` is
                `keras_openllama.layers.attention.causal_mask`. A token's position is
                the number of other tokens that it attends to. Cannot be combined with
                `execution.attention_fn`, whose kernels may support no other mask.
            layer_intercept_fn: callable `(hidden_states, index) -> hidden_states`,
                called with the embeddings (index -1) and with each layer's output
                (its index, or `None` in a scan).
            execution: how the layers are computed. By default they run one after the
                other, and all activations are saved for the backward pass.

        Returns:
            Hidden states after the final norm, `(batch, length, hidden_dim)`, in the
            compute dtype.

        Raises:
            ValueError: for a rematerialization policy that is unknown or not supported
                on this backend, or for both `mask` and `execution.attention_fn`.

        Example:
            >>> import numpy as np
            >>> token_ids = np.array([[1, 357, 1239]])
            >>> lm.backbone.hidden_states(token_ids, np.ones_like(token_ids)).shape
            (1, 3, 256)
        """
        execution = execution or LayerExecution()
        check_policy(execution.rematerialize)
        if mask is not None and execution.attention_fn is not None:
            raise ValueError(
                "`mask` and `execution.attention_fn` exclude each other. Received: both"
            )
        mask, positions = _mask_and_positions(token_ids, padding_mask, mask)
        real = ops.cast(ops.cast(padding_mask, "bool"), "int32")
        final_lengths = ops.sum(real, axis=-1)
        cos, sin = self.rotary_embedding(positions, final_lengths)
        options = _layer_options(execution, padding_mask)
        intercept = layer_intercept_fn or (lambda x, index: x)
        embed = execution.embedding_fn or self.token_embedding
        x = intercept(embed(token_ids), -1)
        run_layers = self._run_in_sequence
        if execution.scan:
            run_layers = functools.partial(
                self._run_in_scan, layers_per_step=execution.layers_per_step
            )
        x = run_layers(x, (cos, sin, mask), options, intercept)
        return self.final_norm(x)

    def _run_in_sequence(self, x, inputs, options, intercept):
        for index, layer in enumerate(self.transformer_layers):
            apply_layer = maybe_rematerialize(
                functools.partial(layer, **options),
                policy=options["rematerialize"],
                if_policy="full",
            )
            x = intercept(apply_layer(x, *inputs), index)
        return x

    def _run_in_scan(self, x, inputs, options, intercept, layers_per_step):
        first = self.transformer_layers[0]
        apply_layer = maybe_rematerialize(
            functional_call(
                first, lambda x: intercept(first(x, *inputs, **options), None)
            ),
            policy=options["rematerialize"],
            if_policy="full",
            in_scan=True,
        )
        return scan_layers(self.transformer_layers, apply_layer, x, layers_per_step)

    @staticmethod
    def get_layout_map(
        device_mesh: keras.distribution.DeviceMesh,
        model_parallel_dim_name: str = "model",
        data_parallel_dim_name: str = "batch",
    ) -> keras.distribution.LayoutMap:
        """Returns the layouts for `keras.distribution.ModelParallel`, as in KerasHub.

        Args:
            device_mesh: the mesh of devices.
            model_parallel_dim_name: mesh axis that shards heads, feed-forward widths
                and the vocabulary.
            data_parallel_dim_name: mesh axis that shards the other dimension of each
                matrix, and the batch.

        Returns:
            A layout map, which covers the head of a task too. To shard the batch over
            two axes, use `keras_openllama.distribution`.

        Example:
            >>> import keras
            >>> mesh = keras.distribution.DeviceMesh(
            ...     (1, 1), ("batch", "model"), keras.distribution.list_devices()[:1]
            ... )
            >>> layouts = OpenLlamaBackbone.get_layout_map(mesh)
            >>> layouts["token_embedding/embeddings"].axes
            ('model', 'batch')
        """
        return layout_map(device_mesh, model_parallel_dim_name, data_parallel_dim_name)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, and `"lora"` with adapters."""
        # KerasHub's `get_config` makes a dtype policy map without a default policy,
        # and serializing such a map resets the compute dtype of the live layers.
        config = {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self._policy_with_quantized()),
        }
        adapters = None if is_saving_merged() else lora.adapter_arguments(self)
        if adapters:
            config["lora"] = adapters
        return {**config, **self.architecture()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OpenLlamaBackbone:
        """Creates the backbone from `get_config`, with new adapters if it had any."""
        config = dict(config)
        adapters = config.pop("lora", None)
        backbone = super().from_config(config)
        if adapters:
            backbone.enable_lora(**adapters)
        return backbone

    def architecture(self) -> dict[str, Any]:
        """Returns the constructor's arguments that define the network.

        Returns:
            A dict of numbers, and `rope_scaling`, which can be written as JSON.

        Example:
            >>> lm.backbone.architecture()["num_key_value_heads"]
            2
        """
        return {name: getattr(self, name) for name in BACKBONE_ARGUMENTS}

    def _policy_with_quantized(self):
        """Returns the dtype policy, as a map by layer if any layer is quantized."""
        quantized = {
            layer.path: policy_of(layer)
            for layer in [*flatten_layers(self), *self._heads]
            if layer.quantization_mode is not None
        }
        policy = self.dtype_policy
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            if not is_saving_merged():
                return policy
            policy = policy.default_policy
        if quantized:
            return keras.dtype_policies.DTypePolicyMap(policy, quantized)
        if is_saving_merged():
            # The dtype of the weights: KerasHub cannot load presets of mixed policies.
            # It then uses `keras.config.dtype_policy()`.
            return keras.DTypePolicy(self.variable_dtype)
        return policy


def _mask_and_positions(token_ids, padding_mask, mask):
    """Returns the attention mask, causal if it is `None`, and the tokens' positions."""
    if mask is None:
        # 0, 1, 2 … as a cumulative sum, because the length may be unknown here.
        columns = ops.expand_dims(ops.cumsum(ops.ones_like(token_ids[0])) - 1, 0)
        mask = causal_mask(columns, padding_mask)
    # The position is the number of earlier tokens of the same document.
    attended = ops.sum(ops.cast(mask[:, 0], "int32"), axis=-1)
    return mask, ops.maximum(attended - 1, 0)


def _layer_options(execution, padding_mask):
    """Returns the options of `DecoderLayer` for a `LayerExecution`."""
    options = {"in_scan": execution.scan, "rematerialize": execution.rematerialize}
    if execution.attention_fn is not None:
        documents = ops.cast(padding_mask, "int32")
        options["attention_fn"] = lambda *heads: execution.attention_fn(
            *heads, documents
        )
    return options
