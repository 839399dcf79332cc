"""What a model consists of, wherever it is: what every conversion starts from."""

import collections
import dataclasses

import keras
import numpy as np

from keras_openllama.convert import weight_table
from keras_openllama.convert.matching import listed
from keras_openllama.convert.stored import numpy_dtype


@dataclasses.dataclass(frozen=True)
class Contents:
    """A model that is about to be written somewhere.

    Attributes:
        arguments: dict, arguments of `OpenLlamaBackbone`.
        tensors: dict by variable path of `stored.StoredTensor`s, `LiveTensor`s or
            whatever else has their `shape`, `dtype`, `nbytes`, `array`, `touch` and
            `drop`; in the order of `weight_table.weights`.
        tokenizer: bytes of the SentencePiece model, or `None`.
        origin: string, what the weights were loaded from, or `None`.
        files: list of paths that the tensors lie in.
    """

    arguments: dict
    tensors: dict
    tokenizer: bytes | None
    origin: str | None
    files: tuple = ()

    @property
    def parameters(self):
        """Number of parameters."""
        return sum(int(np.prod(tensor.shape)) for tensor in self.tensors.values())

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
    """A weight of a model in memory.

    Args:
        name: string, path of its variable.
        value: function without arguments that returns its tensor.
        shape: tuple of ints.
        dtype: string.
    """

    def __init__(self, name, value, shape, dtype):
        self.name = name
        self.shape = tuple(shape)
        self.dtype = dtype
        self.nbytes = int(np.prod(self.shape)) * numpy_dtype(dtype).itemsize
        self._value = value

    def array(self):
        """The weight as a NumPy array, gathered from all devices; on a CPU no copy."""
        value = self._value()
        if keras.config.backend() != "torch":
            return np.asarray(value)
        import torch

        value = value.detach().cpu()
        if value.dtype != torch.bfloat16:  # Which PyTorch cannot give to NumPy.
            return value.numpy()
        return value.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))

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
        ValueError: if the model is quantised.
    """
    arguments = lm.backbone.architecture()
    adapted = {
        layer.path: layer
        for layer in lm._flatten_layers()
        if getattr(layer, "lora_enabled", False)
    }
    own = {}
    for weight in lm.weights:
        layer, _, name = weight.path.rpartition("/")
        if layer in adapted and name.startswith("lora_"):
            continue
        own[weight.path] = LiveTensor(
            weight.path,
            _reader(weight, adapted.get(layer)),
            weight.shape,
            weight.dtype,
        )
    rows = weight_table.weights(arguments["num_layers"])
    unnamed = set(own) ^ {row.path for row in rows}
    if unnamed:
        raise ValueError(
            "Only floating-point models can be written in other formats, and this one "
            f"was quantised or altered: {listed(sorted(unnamed))}. Load it again "
            "without `quantize`."
        )
    tokenizer = lm.preprocessor and lm.preprocessor.tokenizer.proto
    return Contents(
        arguments,
        {row.path: own[row.path] for row in rows},
        tokenizer,
        lm.loaded_from,
    )


def _reader(weight, adapted_layer):
    if adapted_layer is None:
        return lambda: weight.value
    return lambda: keras.ops.convert_to_tensor(adapted_layer.kernel)


def of_source(source, origin, tokenizer=True):
    """The contents of a model in files. No tensor is read yet.

    Args:
        source: a source of `keras_openllama.sources`.
        origin: string, what the user calls it.
        tokenizer: bool, whether its tokenizer is wanted.

    Returns:
        `Contents`.

    Raises:
        OSError: if a file is missing or cannot be read.
        ValueError: if a file is damaged, or its tensors are not those of the network.
    """
    arguments = source.arguments()
    proto = None
    if tokenizer:
        try:
            proto = source.tokenizer_file().read_bytes()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} To convert the weights alone, leave the tokenizer out "
                "(tokenizer=False, or --no-tokenizer)."
            ) from error
    tensors = source.read_tensors(arguments)
    files = sorted({tensor.file.path for tensor in tensors.values()})
    return Contents(arguments, tensors, proto, origin, tuple(files))
