"""What a model consists of, wherever it is: what every export starts from."""

import collections
import dataclasses

import numpy as np

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.checkpoints import weight_names
from keras_openllama.checkpoints.matching import listed
from keras_openllama.checkpoints.tensors import dense_bytes
from keras_openllama.layers.lora import adapted_layers, merged_kernel
from keras_openllama.text.sentencepiece_model import check_vocabulary

# The preprocessor's settings that go along.
PREPROCESSING = ("sequence_length", "add_start_token", "add_end_token")


@dataclasses.dataclass(frozen=True)
class Contents:
    """A model that is about to be written somewhere.

    Attributes:
        arguments: dict, as `config.validate_architecture` returns.
        tensors: dict of `tensors.ReadableTensor`s by variable path, in the order of
            `weight_names.weights`.
        tokenizer: bytes of the SentencePiece model, or `None`.
        origin: string, what the weights were loaded from, see `loading.load.origin`;
            `None` for those that were made here.
        control_ids: pair of ints, the tokens of start and end, where there is no
            tokenizer that says so.
        preprocessing: dict, settings of the preprocessor, some of `PREPROCESSING`.
        paths: tuple of paths that are read, and so must not be written to.
    """

    arguments: dict
    tensors: dict
    tokenizer: bytes | None = None
    origin: str | None = None
    control_ids: tuple = (1, 2)
    preprocessing: dict = dataclasses.field(default_factory=dict)
    paths: tuple = ()

    @property
    def parameters(self):
        """Number of parameters."""
        sizes = weight_names.sizes(self.arguments)
        rows = weight_names.weights(self.arguments["num_layers"])
        return sum(int(np.prod(row.shape(sizes))) for row in rows)

    def dtype(self):
        """Name of the dtype that all tensors have.

        Raises:
            ValueError: if they have several.
        """
        counts = collections.Counter(t.dtype for t in self.tensors.values())
        if len(counts) > 1:
            found = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise ValueError(
                f"The tensors are of several dtypes ({found}), and one is written: "
                "choose it with `dtype`."
            )
        return next(iter(counts))


class LiveTensor:
    """A weight of a model in memory, a `tensors.ReadableTensor`.

    Args:
        variable: `keras.Variable`.
        layer: its layer, if that has LoRA adapters to be merged into it.
    """

    def __init__(self, variable, layer=None):
        self.name = variable.path
        self.dtype = variable.dtype
        self.nbytes = dense_bytes(variable.shape, self.dtype)
        self._variable = variable
        self._layer = layer

    def array(self):
        """The weight as a NumPy array, gathered from all devices; on a CPU no copy."""
        if self._layer is None:
            return as_numpy(self._variable.value)
        return merged_kernel(self._layer)  # float32: whoever writes it casts it.

    def touch(self):
        """It is in memory."""

    def drop(self):
        """It stays there."""


def of_model(lm):
    """The contents of a model in memory. LoRA adapters are merged as they are read.

    Args:
        lm: `OpenLlamaCausalLM`.

    Returns:
        `Contents`.

    Raises:
        ValueError: if the model is quantised, or its tokenizer another model's.
    """
    arguments = lm.backbone.architecture()
    adapted = {layer.path: layer for layer in adapted_layers(lm)}
    own = {}
    for weight in lm.weights:
        layer, _, name = weight.path.rpartition("/")
        if layer not in adapted or not name.startswith("lora_"):
            own[weight.path] = LiveTensor(weight, adapted.get(layer))
    rows = weight_names.weights(arguments["num_layers"])
    unnamed = set(own) ^ {row.path for row in rows}
    if unnamed:
        raise ValueError(
            "Only floating-point models can be written in other formats, and this one "
            f"was quantised or altered: {listed(sorted(unnamed))}. Load it again "
            "without `quantize`."
        )
    contents = Contents(
        arguments, {row.path: own[row.path] for row in rows}, origin=lm.loaded_from
    )
    if lm.preprocessor is None:
        return contents
    tokenizer = lm.preprocessor.tokenizer
    check_vocabulary(tokenizer.vocabulary_size(), arguments["vocabulary_size"])
    return dataclasses.replace(
        contents,
        tokenizer=tokenizer.proto,
        control_ids=(tokenizer.start_token_id, tokenizer.end_token_id),
        preprocessing={n: getattr(lm.preprocessor, n) for n in PREPROCESSING},
    )
