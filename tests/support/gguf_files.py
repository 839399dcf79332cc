"""GGUF files for the tests, written with the `gguf` package alone."""

import gguf
import numpy as np


def write_file(path, metadata, tensors, architecture="llama"):
    """Writes a GGUF file.

    Args:
        path: where the file goes.
        metadata: dict of values by key.
        tensors: dict by name, of arrays, or of pairs: bytes of blocks as uint8 of shape
            `(rows, bytes per row)`, and a `gguf.GGMLQuantizationType`.
        architecture: string.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_file(path):
    """Returns the metadata, and the tensors as pairs of stored data and type."""
    reader = gguf.GGUFReader(path)
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    return metadata, {t.name: (t.data, t.tensor_type) for t in reader.tensors}


def changed_copy(source, path, metadata=None, tensors=None, architecture="llama"):
    """Writes a copy of a file with other metadata or tensors; `None` removes one."""
    old_metadata, old_tensors = read_file(source)
    both = (old_metadata | (metadata or {}), old_tensors | (tensors or {}))
    kept = [{k: v for k, v in new.items() if v is not None} for new in both]
    write_file(path, *kept, architecture)
    return path


def interleaved(kernel, heads):
    """Returns a query or key kernel in the order of rows that llama.cpp expects."""
    rows, inputs = kernel.shape
    halves = kernel.reshape(heads, 2, rows // heads // 2, inputs)
    return halves.transpose(0, 2, 1, 3).reshape(rows, inputs)


def half_split(kernel, heads):
    """The inverse of `interleaved`."""
    rows, inputs = kernel.shape
    pairs = kernel.reshape(heads, rows // heads // 2, 2, inputs)
    return pairs.transpose(0, 2, 1, 3).reshape(rows, inputs)
