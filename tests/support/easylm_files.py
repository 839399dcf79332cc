"""Files in the formats of EasyLM and Flax, and arrays to write."""

import flax.serialization
import flax.traverse_util
import ml_dtypes
import msgpack
import numpy as np

DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}


def some_arrays(dtype="float32", large=300):
    """Arrays by key, with sizes that need every length of header."""
    random = np.random.default_rng(0)
    shapes = {
        ("transformer", "wte", "embedding"): (large, 300),
        ("transformer", "h", "0", "attention", "wq", "kernel"): (17, 9),
        ("transformer", "h", "0", "attention_norm", "kernel"): (1,),
        ("transformer", "h", "10", "ffn_norm", "kernel"): (130, 3),
        ("transformer", "ln_f", "kernel"): (70_000,),
        ("lm_head", "kernel"): (4, 5),
    }
    return {
        key: random.standard_normal(shape).astype(DTYPES[dtype])
        for key, shape in shapes.items()
    }


def write_stream(path, arrays):
    """Writes a train state as EasyLM's `save_train_state_to_file`."""
    packer = msgpack.Packer()
    with open(path, "wb") as file:
        for key, value in arrays.items():
            file.write(packer.pack((key, flax.serialization.to_bytes(value))))


def write_map(path, arrays):
    nested = flax.traverse_util.unflatten_dict(arrays)
    path.write_bytes(flax.serialization.msgpack_serialize(nested))
