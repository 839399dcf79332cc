"""What the backbone and the task share as functional Keras models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_openllama.backend.keras_private import (
    AnyFloatQuantization,
    CloningRefused,
    finish_quantization,
    is_selected,
)
from keras_openllama.checkpoints import keras_adapters
from keras_openllama.checkpoints.atomic_saving import AtomicPreset, AtomicWeights
from keras_openllama.layers.adapter_merging import saving_merged
from keras_openllama.layers.lora import adapted_layers
from keras_openllama.layers.quantizable import is_quantized
from keras_openllama.models import calibration
from keras_openllama.quantization.settings import resolve_config, rounding_of_gptq
from keras_openllama.utils.types import PathLike

if keras.config.backend() == "torch":
    import torch


class FunctionalModel(
    AtomicPreset, AtomicWeights, AnyFloatQuantization, CloningRefused
):
    """The methods of `keras.Model` that the backbone and the task change."""

    def __new__(cls, *args: Any, **kwargs: Any) -> FunctionalModel:
        """Lets `quantize` resolve its arguments before Keras does."""
        model = super().__new__(cls, *args, **kwargs)
        # Keras wraps the method, and replaces `config=None` by its own default.
        wrapper = model.quantize

        @functools.wraps(wrapper)
        def quantize(mode=None, config=None, **options):
            resolved = resolve_config(mode, config)
            # With its own configuration, Keras checks that the mode is the same.
            keep_mode = resolved is None or resolved is config
            wrapper(mode if keep_mode else None, resolved, **options)

        model.quantize = quantize
        return model

    def quantize(
        self,
        mode: str | None = None,
        config: Any = None,
        filters: str | Sequence[str] | Callable[..., bool] | None = None,
        **kwargs: Any,
    ) -> None:
        """Quantizes the weights; see `keras.Model.quantize`.

        Norms stay float32, and activations in the compute dtype. With `"int4"`, the
        token embedding and the head get 8 bits. Call `compile` afterwards if the model
        has been trained.

        Args:
            mode: `"int8"` or `"int4"`, to save memory; or `"float8"`, which trains all
                weights with products in float8.
            config: a configuration instead of a mode:
                `keras_openllama.quantization.WeightQuantizationConfig`, which chooses
                groups, zero points, and the bits of embedding and head;
                `keras.quantizers.Int4QuantizationConfig(block_size=64)`; or
                `keras.quantizers.GPTQConfig`, which rounds the projections of the
                layers by their inputs on calibration texts. The result of GPTQ is a
                model in `"int4"` or `"int8"`, embedding and head in 8 bits.
            filters: names of the layers to quantize, see `keras.Model.quantize`.
            **kwargs: see `keras.Model.quantize`.

        Raises:
            ValueError: for another mode, such as `"awq"`; for a configuration that
                quantizes activations; for GPTQ of 2 or 3 bits, of sequences longer than
                the context, or of projections that are quantized already; or for
                `"float8"` with adapters.

        Example:
            >>> from keras_openllama import OpenLlamaBackbone
            >>> backbone = OpenLlamaBackbone.from_preset("open_llama_nano")
            >>> backbone.quantize("int8")
            >>> backbone.token_embedding.quantization_mode
            'int8'
        """
        if mode == "float8" and adapted_layers(self):
            raise ValueError(
                "A model with adapters cannot be quantized to float8, whose scales are "
                "trained together with all weights. Use 'int8' or 'int4'. "
                f"Received: mode={mode!r}"
            )
        if mode == "gptq":
            self._quantize_by_gptq(config, filters)
        else:
            super().quantize(mode, config=config, filters=filters, **kwargs)

    def _quantize_by_gptq(self, config, filters):
        backbone = getattr(self, "backbone", self)
        rounding = rounding_of_gptq(config)
        sequences = calibration.read_sequences(backbone, config)
        projections = calibration.projections_of(backbone)
        selected = [p for p in projections if is_selected(p, filters)]
        for projection in selected:
            if is_quantized(projection):
                raise ValueError(
                    f"{projection.path} is quantized already. Load the model with "
                    "quantization=None for GPTQ."
                )
        others = {id(projection) for projection in projections}
        super().quantize(
            rounding.mode,
            config=rounding,
            filters=lambda la: id(la) not in others and is_selected(la, filters),
        )
        calibration.quantize_projections(
            backbone, selected, sequences, rounding, config
        )
        finish_quantization(self, rounding.mode)

    def export(
        self,
        filepath: PathLike,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Exports the forward pass as a program; see `keras.Model.export`.

        The program takes the inputs of a call, a dict of `"token_ids"` and
        `"padding_mask"` of any batch size and length, and returns what a call returns.
        For the weights themselves, use `export_to_transformers`.

        Args:
            filepath: path of the new directory or file.
            format: `"tf_saved_model"` on JAX and TensorFlow, `"torch"` on PyTorch, or
                another format of `keras.Model.export`.
            verbose: whether to print a message.
            input_signature: list with a dict of `keras.InputSpec`, for fixed sizes.
            **kwargs: see `keras.Model.export`.

        Raises:
            ValueError: for `"tf_saved_model"` on PyTorch.

        Example:
            >>> import os
            >>> lm.export("saved_model", verbose=False)
            >>> "saved_model.pb" in os.listdir("saved_model")
            True
        """
        backend = keras.config.backend()
        if format == "tf_saved_model" and backend == "torch":
            raise ValueError(
                "Keras on PyTorch does not export models whose inputs are a dict to "
                'a SavedModel. Use format="torch", or run the export with '
                "KERAS_BACKEND=tensorflow or KERAS_BACKEND=jax. Received: "
                f"format={format!r}"
            )
        # Keras would give the two inputs different lengths, or fix them.
        if format == "tf_saved_model" and backend == "jax":
            inputs = self.input if input_signature is None else input_signature[0]
            shapes = {name: _symbolic_shape(spec) for name, spec in inputs.items()}
            options = kwargs.get("jax2tf_kwargs") or {}
            kwargs["jax2tf_kwargs"] = {"polymorphic_shapes": [shapes], **options}
        elif format == "torch" and input_signature is None:
            sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
            kwargs.setdefault("dynamic_shapes", [(dict.fromkeys(self.input, sizes),)])
        super().export(
            filepath,
            format=format,
            verbose=verbose,
            input_signature=input_signature,
            **kwargs,
        )

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
            >>> from keras_openllama import OpenLlamaCausalLM
            >>> lm.save_to_preset("my_preset")
            >>> lm = OpenLlamaCausalLM.from_preset("my_preset")
        """
        with saving_merged():
            super().save_to_preset(preset_dir, max_shard_size=max_shard_size)

    def load_weights(
        self, filepath: PathLike, skip_mismatch: bool = False, **kwargs: Any
    ) -> None:
        """Loads weights that `save_weights` or `save` wrote.

        Files of a model with LoRA adapters have the kernels and the adapters apart.
        They load bit-exactly into a model with adapters of the same rank, alpha and
        targets. Into a model without adapters they are merged, with a warning.

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


def _symbolic_shape(spec):
    """Returns a shape in the notation of `jax2tf`, such as `"(batch, length)"`."""
    names = zip(spec.shape, ("batch", "length"), strict=True)
    sizes = [name if size is None else str(size) for size, name in names]
    return f"({', '.join(sizes)})"
