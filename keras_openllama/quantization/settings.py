"""Which weights of a model get how many bits."""

from __future__ import annotations

from typing import Any

import keras
from keras.quantizers import GPTQConfig

from keras_openllama.config import GROUP_SIZES
from keras_openllama.quantization.policies import MODES, MatrixFormat
from keras_openllama.utils.validation import raise_invalid

# What a layer is for, see `WeightQuantizationConfig.format_for`.
ROLES = ("projection", "embedding", "head")


@keras.saving.register_keras_serializable(package="keras_openllama")
class WeightQuantizationConfig(keras.quantizers.QuantizationConfig):
    """Says how `quantize` and `from_preset` quantize the weights of a model.

    Activations stay in the compute dtype.

    Args:
        bits: 8 or 4, for the projections of the decoder layers.
        group_size: number of inputs that share a scale. `None` stands for all inputs of
            an output, and `"auto"` for 32 with 4 bits and `None` with 8 bits.
        symmetric: whether there are no zero points, as always with 8 bits.
        embedding_bits: 8, 4 or `None`, which leaves the token embedding as it is.
        head_bits: 8, 4 or `None`, for the head.

    Raises:
        ValueError: If an argument is invalid.

    Example:
        >>> config = WeightQuantizationConfig(bits=4, group_size=64, head_bits=None)
        >>> config.format_for("projection")
        MatrixFormat(bits=4, group_size=64, symmetric=True)
        >>> config.format_for("head") is None
        True
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | str | None = "auto",
        symmetric: bool = True,
        embedding_bits: int | None = 8,
        head_bits: int | None = 8,
    ) -> None:
        super().__init__()
        choices = {"bits": (8, 4), "embedding_bits": (8, 4, None)}
        choices["head_bits"] = choices["embedding_bits"]
        given = dict(bits=bits, embedding_bits=embedding_bits, head_bits=head_bits)
        for name, value in given.items():
            if value not in choices[name]:
                raise_invalid(name, value, f"one of {choices[name]}")
        if isinstance(group_size, str) and group_size != "auto":
            raise_invalid(
                "group_size", group_size, "a positive integer, 'auto' or None"
            )
        if group_size == "auto":
            group_size = GROUP_SIZES[bits]
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.embedding_bits = embedding_bits
        self.head_bits = head_bits
        self.format_for("projection")  # Checks the group size.

    @property
    def mode(self) -> str:
        """The quantization mode of Keras, `"int8"` or `"int4"`."""
        return f"int{self.bits}"

    def format_for(self, role: str) -> MatrixFormat | None:
        """Returns the format of the weights of a layer.

        Args:
            role: `"projection"`, `"embedding"` or `"head"`.

        Returns:
            The format; `None` if the weights stay as they are.
        """
        by_role = {"embedding": self.embedding_bits, "head": self.head_bits}
        bits = by_role.get(role, self.bits)
        if bits is None:
            return None
        if bits == self.bits:
            return MatrixFormat(bits, self.group_size, self.symmetric)
        # Zero points and the group size are for the other number of bits.
        return MatrixFormat(bits, GROUP_SIZES[bits])

    def __repr__(self) -> str:
        arguments = ", ".join(f"{n}={v!r}" for n, v in self.get_config().items())
        return f"{type(self).__name__}({arguments})"

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        names = ("bits", "group_size", "symmetric", "embedding_bits", "head_bits")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WeightQuantizationConfig:
        """Creates the object from `get_config`."""
        return cls(**config)


def resolve_config(
    mode: str | None, config: Any = None, whole_model: bool = True
) -> Any:
    """Returns the configuration that the arguments of `quantize` stand for.

    Args:
        mode: A quantization mode of Keras, or `None` if the configuration has it.
        config: `None`, a mode, or a `keras.quantizers.QuantizationConfig`.
        whole_model: Whether a whole model is quantized, and not one of its layers,
            which gets the number of bits of `mode` even if it is the embedding or the
            head.

    Returns:
        A `WeightQuantizationConfig` for int8 and int4. Otherwise `config`, for Keras
        to check.

    Raises:
        ValueError: For AWQ, for GPTQ without its configuration or of a single layer,
            for quantized activations and for other quantizers of weights.

    Example:
        >>> resolve_config("int8").bits
        8
        >>> config = keras.quantizers.Int4QuantizationConfig(block_size=64)
        >>> resolve_config(None, config).group_size
        64
    """
    if isinstance(config, str):
        mode, config = config, None
    used = mode or getattr(config, "mode", None)
    if used == "awq":
        raise ValueError(
            "`quantize` does not support 'awq'. Use 'int4', or `keras.quantizers."
            f"GPTQConfig`, which takes calibration texts, too. Received: mode={used!r}"
        )
    if used == "gptq" and not (whole_model and isinstance(config, GPTQConfig)):
        raise ValueError(
            "GPTQ quantizes a model that is loaded: lm.quantize(config="
            "keras.quantizers.GPTQConfig(dataset=texts, "
            f"tokenizer=lm.preprocessor.tokenizer)). Received: mode={used!r}, "
            f"config={config}"
        )
    if used not in MODES or (mode and config and config.mode != mode):
        return config  # Another mode, or a contradiction that Keras reports.
    if isinstance(config, WeightQuantizationConfig):
        return config
    bits = {"int8": 8, "int4": 4}[used]
    others = {} if whole_model else dict(embedding_bits=bits, head_bits=bits)
    if config is None:
        return WeightQuantizationConfig(bits, **others)
    _check_weights_only(config)
    if used == "int8":
        return WeightQuantizationConfig(bits, **others)
    block_size = None if config.block_size == -1 else config.block_size
    return WeightQuantizationConfig(bits, block_size, **others)


def rounding_of_gptq(config: keras.quantizers.GPTQConfig) -> WeightQuantizationConfig:
    """Returns the formats of the weights that GPTQ rounds.

    Args:
        config: Keras's configuration, whose group size -1 stands for all inputs of an
            output.

    Raises:
        ValueError: If there is no such format, or for options that are not supported.

    Example:
        >>> config = keras.quantizers.GPTQConfig(["a text"], tokenizer=None)
        >>> rounding_of_gptq(config).format_for("projection")
        MatrixFormat(bits=4, group_size=128, symmetric=False)
    """
    if config.weight_bits not in (8, 4):
        raise_invalid("weight_bits", config.weight_bits, "8 or 4")
    if config.weight_bits == 8 and not config.symmetric:
        raise_invalid("symmetric", config.symmetric, "True for 8 bits")
    if not config.per_channel:
        raise_invalid("per_channel", config.per_channel, "True")
    if config.quantization_layer_structure is not None:
        structure = config.quantization_layer_structure
        raise_invalid("quantization_layer_structure", structure, "None")
    group_size = None if config.group_size == -1 else config.group_size
    return WeightQuantizationConfig(config.weight_bits, group_size, config.symmetric)


def _check_weights_only(config):
    """Raises a `ValueError` if Keras's configuration has quantizers."""
    name = type(config).__name__
    if config.activation_quantizer is not None:
        raise ValueError(
            "Only weights are quantized, and activations stay in the compute dtype. "
            f"Use {name}(activation_quantizer=None), or quantize({config.mode!r}). "
            f"Received: activation_quantizer={config.activation_quantizer}"
        )
    if config.weight_quantizer is not None:
        raise ValueError(
            "Weights are rounded by this package. Use "
            "`keras_openllama.quantization.WeightQuantizationConfig` to choose groups "
            f"and zero points. Received: weight_quantizer={config.weight_quantizer}"
        )
