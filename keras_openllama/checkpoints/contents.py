"""The contents of a model, in memory or in files: the input of every export."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.keras_private import flatten_layers
from keras_openllama.checkpoints import weight_names
from keras_openllama.checkpoints.matching import format_names
from keras_openllama.checkpoints.tensors import ReadableTensor, dense_bytes
from keras_openllama.config import END_TOKEN_ID, START_TOKEN_ID
from keras_openllama.layers.lora import adapted_layers
from keras_openllama.layers.quantizable import is_quantized
from keras_openllama.text.sentencepiece_model import check_vocabulary

if TYPE_CHECKING:
    import keras

    from keras_openllama.quantization.quantized_matrix import QuantizedMatrix
    from keras_openllama.utils.types import PathLike

# The settings of the preprocessor that are exported with a model.
PREPROCESSOR_SETTINGS = (
    "sequence_length",
    "add_start_token",
    "add_end_token",
    "chat_template",
)
# The settings of the tokenizer beside its SentencePiece model.
TOKENIZER_SETTINGS = ("added_tokens", "prepend_scheme", "add_eos")


@dataclasses.dataclass(frozen=True)
class ModelContents:
    """A model that is going to be exported.

    Attributes:
        arguments: Arguments of `OpenLlamaBackbone`, from `validate_architecture`.
        tensors: The weights by variable path, in the order of
            `weight_names.weight_specs`.
        tokenizer: The serialized SentencePiece model, if any.
        origin: What the weights were loaded from, see `loading.load.describe_origin`;
            `None` for a model that was initialized at random.
        start_token_id: Id of the start token, used if there is no tokenizer.
        end_token_ids: Ids of the tokens that end a text.
        tokenizer_settings: Settings of the tokenizer, some of `TOKENIZER_SETTINGS`.
        preprocessing: Settings of the preprocessor, some of `PREPROCESSOR_SETTINGS`.
        paths: Paths that are read, which the export must not replace.
    """

    arguments: dict[str, Any]
    tensors: Mapping[str, ReadableTensor]
    tokenizer: bytes | None = None
    origin: str | None = None
    start_token_id: int = START_TOKEN_ID
    end_token_ids: tuple[int, ...] = (END_TOKEN_ID,)
    tokenizer_settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=dict)
    paths: tuple[PathLike, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        sizes = weight_names.axis_sizes(self.arguments)
        rows = weight_names.weight_specs(self.arguments["num_layers"])
        return sum(int(np.prod(row.shape(sizes))) for row in rows)

    def dtype(self) -> str:
        """Returns the name of the dtype that all tensors have.

        Raises:
            ValueError: If they have several dtypes.
        """
        counts = collections.Counter(t.dtype for t in self.tensors.values())
        if len(counts) > 1:
            found = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise ValueError(
                f"The tensors have several dtypes ({found}), and an export has one: "
                "choose it with `dtype`."
            )
        return next(iter(counts))


class LiveTensor:
    """A weight of a model in memory, as a `tensors.ReadableTensor`.

    Args:
        variable: The weight, or its quantized values.
        layer: Its layer, if it is quantized, or LoRA adapters of the layer are to be
            merged into it.
    """

    def __init__(
        self, variable: keras.Variable, layer: keras.layers.Layer | None = None
    ):
        is_matrix = is_quantized(layer)
        shape = layer.matrix_shape if is_matrix else variable.shape
        self.name = variable.path
        self.dtype = layer.variable_dtype if is_matrix else variable.dtype
        self.nbytes = dense_bytes(shape, self.dtype)
        self._variable = variable
        self._layer = layer

    def array(self) -> np.ndarray:
        """Returns the weight, gathered from all devices; on a CPU without a copy."""
        if self._layer is None:
            return as_numpy(self._variable.value)
        if self._layer.lora_enabled:
            return self._layer.merged_kernel()  # In float32; the writer casts it.
        return self.quantized_matrix().dequantize()

    def quantized_matrix(self) -> QuantizedMatrix | None:
        """Returns the weight as it is quantized; `None` if it is not, or is merged."""
        if self._layer is None or self._layer.lora_enabled:
            return None
        return self._layer.quantized_matrix()

    def prefetch(self) -> None:
        """Does nothing: the weight is in memory."""

    def release(self) -> None:
        """Does nothing: the model owns the memory."""


def contents_of_model(lm: keras.Model) -> ModelContents:
    """Returns the contents of a model in memory.

    LoRA adapters are merged into a weight when it is read, and quantized weights are
    dequantized.

    Args:
        lm: `OpenLlamaCausalLM`.

    Returns:
        Its contents.

    Raises:
        ValueError: If the model was modified, or its tokenizer does not match it.

    Example:
        >>> contents_of_model(lm).dtype()
        'float32'
    """
    arguments = lm.backbone.architecture()
    changed = {layer.path: layer for layer in adapted_layers(lm)}
    changed |= {la.path: la for la in flatten_layers(lm) if is_quantized(la)}
    own = {}
    for weight in lm.weights:
        layer, _, name = weight.path.rpartition("/")
        if layer not in changed or name in ("kernel", "embeddings"):
            own[weight.path] = LiveTensor(weight, changed.get(layer))
    rows = weight_names.weight_specs(arguments["num_layers"])
    unnamed = set(own) ^ {row.path for row in rows}
    if unnamed:
        raise ValueError(
            "The weights of this model are not those of its architecture: "
            f"{format_names(sorted(unnamed))}. Models that are modified or quantized "
            "to float8 cannot be exported. Load it again."
        )
    contents = ModelContents(
        arguments,
        {row.path: own[row.path] for row in rows},
        origin=lm.loaded_from,
        end_token_ids=tuple(lm.end_token_ids) or (END_TOKEN_ID,),
    )
    if lm.preprocessor is None:
        return contents
    tokenizer = lm.preprocessor.tokenizer
    check_vocabulary(tokenizer.vocabulary_size(), arguments["vocabulary_size"])
    return dataclasses.replace(
        contents,
        tokenizer=tokenizer.proto,
        tokenizer_settings=tokenizer.settings(),
        preprocessing={n: getattr(lm.preprocessor, n) for n in PREPROCESSOR_SETTINGS},
    )
