"""LoRA adapters of the backbone."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from keras_openllama.backend.keras_hub import lora_rank
from keras_openllama.backend.keras_private import flatten_layers
from keras_openllama.checkpoints import keras_adapters
from keras_openllama.config import PROJECTIONS
from keras_openllama.layers import lora
from keras_openllama.layers.projection import is_float8
from keras_openllama.utils.types import PathLike
from keras_openllama.utils.validation import check_integer, check_positive


class LoraMixin:
    """The methods of `OpenLlamaBackbone` that add, merge, save and load adapters."""

    def register_head(self, layer: keras.layers.Layer) -> None:
        """Registers a layer on top of the backbone, so that LoRA freezes it too.

        Args:
            layer: the layer that a task applies to the hidden states.

        Example:
            >>> import keras
            >>> from keras_openllama import OpenLlamaBackbone
            >>> backbone = OpenLlamaBackbone(
            ...     vocabulary_size=100, num_layers=1, num_query_heads=4,
            ...     hidden_dim=32, intermediate_dim=64,
            ... )
            >>> classifier = keras.layers.Dense(2)
            >>> backbone.register_head(classifier)
            >>> backbone.enable_lora(4)
            >>> classifier.trainable
            False
        """
        self._heads.add(layer)
        if lora.adapted_layers(self):
            layer.trainable = False

    def default_lora_layer_names(self) -> list[str]:
        """Returns the names of the projections to which `enable_lora` adds adapters.

        Example:
            >>> lm.backbone.default_lora_layer_names()
            ['query', 'value']
        """
        return ["query", "value"]

    def enable_lora(
        self,
        rank: int,
        target_layer_names: Sequence[str] | None = None,
        alpha: float | None = None,
    ) -> None:
        """Adds low-rank adapters (LoRA) and freezes all other variables.

        Afterwards the trainable variables of the backbone, and of a task around it,
        are exactly the adapters. Adapters are always float32, so the model itself may
        be bfloat16 or quantized to int8.

        Args:
            rank: rank of the adapters.
            target_layer_names: names among `"query"`, `"key"`, `"value"`, `"output"`,
                `"gate"`, `"up"`, `"down"`. Defaults to `default_lora_layer_names()`.
            alpha: the adapters' output is scaled by `alpha / rank`. Defaults to `rank`.

        Raises:
            ValueError: for a name that is no projection of this network, a rank or
                alpha that is not positive, or if the model already has adapters, merged
                reversibly or not, or is quantized to float8.

        Example:
            >>> from keras_openllama import OpenLlamaBackbone
            >>> backbone = OpenLlamaBackbone.from_preset("open_llama_nano")
            >>> backbone.enable_lora(16, ["query", "output"], alpha=32)
            >>> len(backbone.trainable_variables)  # 2 matrices per adapter
            16

        Source: LoRA (arXiv:2106.09685).
        """
        names = target_layer_names
        if names is not None and (
            isinstance(names, str) or not names or set(names) - set(PROJECTIONS)
        ):
            raise ValueError(
                "`target_layer_names` must be a list of names among "
                f"{PROJECTIONS}. Received: {names!r}"
            )
        rank = check_integer("rank", rank)
        if alpha is not None:
            alpha = check_positive("alpha", alpha)
        if self._merged:
            raise ValueError(
                "Adapters are merged reversibly into this model. To add others, call "
                "`unmerge_lora()` and then `merge_lora(reversible=False)`, or reload "
                f"the model. Received: rank={rank!r}"
            )
        if lora.adapted_layers(self):
            raise ValueError(
                f"The model already has adapters (rank {lora_rank(self)}). Reload the "
                "model to use other adapters, or merge these into its weights with "
                f"`merge_lora(reversible=False)`. Received: rank={rank!r}"
            )
        if is_float8(self):
            raise ValueError(
                "A model that is quantized to float8 trains all weights and cannot "
                "have adapters. Quantize it to 'int8' or 'int4' instead. "
                f"Received: rank={rank!r}"
            )
        super().enable_lora(rank, target_layer_names)
        for layer in lora.adapted_layers(self):
            layer.lora_alpha = rank if alpha is None else alpha
        for head in self._heads:
            head.trainable = False

    def merge_lora(self, reversible: bool = True) -> None:
        """Merges the adapters into the weights and removes them.

        The merged model is as fast as one without adapters, and all its variables are
        trainable.

        Args:
            reversible: whether to save the original weights in host memory for
                `unmerge_lora`. This takes as much memory as the adapted matrices.

        Raises:
            ValueError: if the model has no adapters, or they are merged already, or the
                model is quantized.

        Example:
            >>> from keras_openllama import OpenLlamaBackbone
            >>> backbone = OpenLlamaBackbone.from_preset("open_llama_nano")
            >>> backbone.enable_lora(4)
            >>> backbone.merge_lora()
            >>> len(backbone.trainable_variables) == len(backbone.variables)
            True
        """
        if self._merged:
            raise ValueError(
                "The adapters of this model are merged already. Call `unmerge_lora()` "
                f"to restore them. Received: reversible={reversible!r}"
            )
        merged = lora.merge_adapters(self, reversible)
        # Layer by layer: on TensorFlow, Keras does not propagate `trainable`.
        for layer in (*flatten_layers(self), *self._heads):
            layer.trainable = True
        self._merged = merged

    def unmerge_lora(self) -> None:
        """Restores the adapters and the original weights, bit-exactly.

        Raises:
            ValueError: if no adapters were merged with `reversible=True`, or a weight
                was trained or quantized since.

        Example:
            >>> from keras_openllama import OpenLlamaBackbone
            >>> backbone = OpenLlamaBackbone.from_preset("open_llama_nano")
            >>> backbone.enable_lora(4)
            >>> backbone.merge_lora()
            >>> backbone.unmerge_lora()
            >>> len(backbone.trainable_variables)  # The adapters.
            16
        """
        if not self._merged:
            raise ValueError(
                "There are no merged adapters to restore. Call "
                "`merge_lora(reversible=True)` first."
            )
        lora.unmerge_adapters(self, self._merged)
        self._merged = ()
        for head in self._heads:
            head.trainable = False

    def save_lora_weights(self, filepath: PathLike) -> None:
        """Saves the LoRA adapters alone, in KerasHub's format and with their alpha.

        Args:
            filepath: path of the file; ends in `.lora.h5`.

        Raises:
            ValueError: if the model has no adapters, or the file another extension.

        Example:
            >>> from keras_openllama import OpenLlamaBackbone
            >>> backbone = OpenLlamaBackbone.from_preset("open_llama_nano")
            >>> backbone.enable_lora(4)
            >>> backbone.save_lora_weights("my.lora.h5")
        """
        keras_adapters.save_lora_weights(self, filepath)

    def load_lora_weights(self, filepath: PathLike) -> None:
        """Loads LoRA adapters that `save_lora_weights` wrote.

        If the model has no adapters, they are first added, as by `enable_lora`. Files
        of KerasHub do not store alpha, which is then the rank.

        Args:
            filepath: path of the file.

        Raises:
            ValueError: if the adapters do not match the model, which is then left
                unchanged.
            OSError: if the file cannot be read.

        Example:
            >>> from keras_openllama import OpenLlamaBackbone
            >>> backbone = OpenLlamaBackbone.from_preset("open_llama_nano")
            >>> backbone.enable_lora(4, ["key"], alpha=8)
            >>> backbone.save_lora_weights("key.lora.h5")
            >>> backbone = OpenLlamaBackbone.from_preset("open_llama_nano")
            >>> backbone.load_lora_weights("key.lora.h5")
            >>> len(backbone.trainable_variables)  # 4 layers, 2 matrices each
            8
        """
        keras_adapters.load_lora_weights(self, filepath)
