"""Random LLaMA models of any size, for this package and transformers."""

import math

import numpy as np

import train  # benchmarks/train.py
from keras_openllama.checkpoints import transformers, weight_names
from keras_openllama.checkpoints.contents import ModelContents
from keras_openllama.config import validate_architecture

SHARD_BYTES = 2 << 30
QUANTIZED = ("int8", "int4")


def add_size_options(parser):
    """Adds the sizes of a model to a parser; the default has 268 million parameters."""
    add = parser.add_argument
    add("--width", type=int, default=1024, help="hidden width (%(default)s)")
    add("--layers", type=int, default=16, help="decoder layers (%(default)s)")
    add("--heads", type=int, default=16, help="query heads (%(default)s)")
    add("--key-value-heads", type=int, help="default: the number of query heads")
    add("--intermediate", type=int, default=2752, help="width inside (%(default)s)")
    add("--vocabulary", type=int, default=32000, help="tokens (%(default)s)")
    add("--context", type=int, default=2048, help="longest sequence (%(default)s)")


def sizes_of(options):
    """Arguments of `OpenLlamaBackbone` for the flags of `add_size_options`."""
    return {
        **train.keras_sizes(options),
        "num_key_value_heads": options.key_value_heads,
        "max_sequence_length": options.context,
    }


def loading_arguments(dtype):
    """Arguments of `from_preset` for a dtype, or for one of `QUANTIZED`."""
    if dtype in QUANTIZED:
        return {"dtype": "bfloat16", "quantization": dtype}
    return {"dtype": dtype}


def transformers_config(sizes, **settings):
    """`LlamaConfig` of transformers for arguments of `OpenLlamaBackbone`.

    Args:
        sizes: dict of arguments of `OpenLlamaBackbone`.
        **settings: further arguments of `LlamaConfig`.
    """
    from transformers import LlamaConfig

    config = transformers.config_settings(validate_architecture(sizes), "float32")
    return LlamaConfig(**config | settings)


def write_checkpoint(directory, sizes, dtype):
    """Writes a random model in transformers' format, one tensor at a time.

    Args:
        directory: path of a new directory.
        sizes: dict of arguments of `OpenLlamaBackbone`.
        dtype: string, dtype of the weights.

    Returns:
        The number of parameters that a decoding step reads: all but the embeddings.
    """
    arguments = validate_architecture(sizes)
    random = np.random.default_rng(0)
    pool = 0.02 * random.standard_normal(1 << 24, np.float32)
    pool = pool.astype(dtype)

    class RandomTensor:
        def __init__(self, shape):
            self.shape, self.dtype = shape, dtype
            # Other values in each matrix: ONNX Runtime stores equal ones once.
            self._start = int(random.integers(len(pool)))

        def array(self):
            if len(self.shape) == 1:  # A norm.
                return np.ones(self.shape, dtype)
            return np.resize(np.roll(pool, -self._start), self.shape)

    axes = weight_names.axis_sizes(arguments)
    tensors = {
        spec.path: RandomTensor(spec.shape(axes))
        for spec in weight_names.weight_specs(arguments["num_layers"])
    }
    directory.mkdir()
    contents = ModelContents(arguments, tensors)
    for output in transformers.output_files(contents, dtype, SHARD_BYTES):
        values = (tensors[path].array() for path in output.tensors)
        with open(directory / output.name, "wb") as file:
            output.write(file, values)
    return sum(
        math.prod(tensor.shape)
        for path, tensor in tensors.items()
        if not path.startswith("token_embedding/")
    )
