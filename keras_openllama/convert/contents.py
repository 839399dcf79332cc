"""What a model consists of, wherever it is: what every conversion starts from."""

import collections
import dataclasses

import keras
import numpy as np

from keras_openllama.convert import weight_table
from keras_openllama.convert.matching import listed
from keras_openllama.convert.stored import dense_bytes, numpy_dtype
from keras_openllama.sentencepiece_file import check_vocabulary

# The preprocessor's settings that go along.
PREPROCESSING = ("sequence_length", "add_start_token", "add_end_token")


@dataclasses.dataclass(frozen=True)
class Contents:
    """A model that is about to be written somewhere.

    Attributes:
        arguments: dict, as `architecture.checked` returns.
        tensors: dict by variable path of `stored.StoredTensor`s, `LiveTensor`s or
            whatever else has their `name`, `dtype`, `nbytes`, `array`, `touch` and
            `drop`; in the order of `weight_table.weights`.
        tokenizer: bytes of the SentencePiece model, or `None`.
        origin: string, what the weights were loaded from, see `presets.origin`; `None`
            for those that were made here.
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
        sizes = weight_table.sizes(self.arguments)
        rows = weight_table.weights(self.arguments["num_layers"])
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
    """A weight of a model in memory.

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
        array = _as_numpy(self._variable.value)
        if self._layer is None:
            return array
        # As Keras merges them, but in float32: Keras does it in the dtype that the
        # layer computes in, which may be less than the weights have.
        first, second = (
            _as_numpy(factor.value).astype(np.float32)
            for factor in (self._layer.lora_kernel_a, self._layer.lora_kernel_b)
        )
        scale = self._layer.lora_alpha / self._layer.lora_rank
        merged = array.astype(np.float32) + scale * (first @ second)
        return merged  # Whoever writes it casts it.

    def touch(self):
        """It is in memory."""

    def drop(self):
        """It stays there."""


def _as_numpy(value):
    backend = {"jax": _from_jax, "torch": _from_torch}
    return backend.get(keras.config.backend(), np.asarray)(value)


def _from_jax(value):
    import jax

    if not value.is_fully_addressable:
        raise ValueError(
            "it is spread over several hosts, and one alone cannot write it: save a "
            "checkpoint, and convert that"
        )
    if len(value.devices()) == 1 and next(iter(value.devices())).platform == "cpu":
        return np.asarray(value)
    # An array keeps the NumPy array that was made of it, for as long as it lives. So
    # copies of its parts are asked, which live a moment.
    result = np.empty(value.shape, value.dtype)
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            result[shard.index] = np.asarray(jax.numpy.array(shard.data, copy=True))
    return result


def _from_torch(value):
    import torch

    value = value.detach().cpu()
    if value.dtype != torch.bfloat16:
        return value.numpy()
    # PyTorch cannot give it to NumPy.
    return value.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))


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
    adapted = {
        layer.path: layer
        for layer in lm._flatten_layers()
        if getattr(layer, "lora_enabled", False)
    }
    own = {}
    for weight in lm.weights:
        layer, _, name = weight.path.rpartition("/")
        if layer not in adapted or not name.startswith("lora_"):
            own[weight.path] = LiveTensor(weight, adapted.get(layer))
    rows = weight_table.weights(arguments["num_layers"])
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
