"""Models in EasyLM's checkpoints, in and out.

The only module that knows of EasyLM's conventions: matrices lie as
`(inputs, outputs)`, and in queries and keys the two numbers that a rotary angle turns
stand side by side, where ours (and those of transformers) are half a head apart.

Source: https://github.com/young-geng/EasyLM, `EasyLM/models/llama/llama_model.py` and
`convert_easylm_to_hf.py`.
"""

from keras_openllama.checkpoints import weight_names
from keras_openllama.checkpoints.array_io import contiguous
from keras_openllama.checkpoints.files import msgpack, msgpack_writer
from keras_openllama.checkpoints.formats import EASYLM_CONTENTS
from keras_openllama.checkpoints.matching import match
from keras_openllama.checkpoints.outputs import Output
from keras_openllama.checkpoints.tensors import RearrangedTensor


def read_tensors(path, arguments, head=True):
    """Describes the tensors of a checkpoint; none is read yet.

    Args:
        path: path of the file.
        arguments: dict, arguments of `OpenLlamaBackbone`.
        head: bool, whether the language-model head is wanted.

    Returns:
        Dict of `tensors.StoredTensor`s by variable path, laid out as ours.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is damaged, or its tensors are not those of the network that
            the arguments describe.
    """
    found = msgpack.read(path)
    prefix = EASYLM_CONTENTS["trainstate_params"]
    if not any(key[: len(prefix)] == prefix for key in found):
        prefix = ()
    # The rest of a train state belongs to its optimizer.
    tensors = {
        "/".join(key[len(prefix) :]): stored
        for key, stored in found.items()
        if key[: len(prefix)] == prefix
    }
    if not head:
        tensors.pop(weight_names.HEAD.easylm, None)
    rows = weight_names.weights(arguments["num_layers"], head)
    sizes = weight_names.sizes(arguments)
    matched = match(
        tensors, {row.path: (row.easylm, _shape_of(row, sizes)) for row in rows}, path
    )
    head_dim = arguments["head_dim"]
    return {row.path: _as_ours(row, matched[row.path], head_dim) for row in rows}


def plan(contents, dtype, content):
    """The one file of a checkpoint.

    Args:
        contents: `contents.Contents`.
        dtype: string, of the weights to write.
        content: one of `EASYLM_CONTENTS`.

    Returns:
        List of one `outputs.Output`.
    """
    rows = weight_names.weights(contents.arguments["num_layers"])
    sizes = weight_names.sizes(contents.arguments)
    head_dim = contents.arguments["head_dim"]
    specs = {
        (*EASYLM_CONTENTS[content], *row.easylm.split("/")): (
            _shape_of(row, sizes),
            dtype,
        )
        for row in rows
    }
    streaming = content != "flax_params"

    def write(file, values):
        arranged = (
            _as_easylm(row, value, head_dim)
            for row, value in zip(rows, values, strict=True)
        )
        msgpack_writer.write(file, specs, arranged, streaming)

    size = msgpack_writer.size(specs, streaming)
    return [Output("", size, write, tuple(row.path for row in rows))]


def _shape_of(row, sizes):
    """The shape of a weight in EasyLM.

    Args:
        row: `weight_names.Weight`.
        sizes: `weight_names.sizes(arguments)`.
    """
    shape = row.shape(sizes)
    return shape if row.easylm_layout == weight_names.SAME else shape[::-1]


def _as_ours(row, stored, head_dim):
    if row.easylm_layout == weight_names.SAME:
        return stored
    stored = stored.transposed()
    if row.easylm_layout == weight_names.TURNED:
        return stored
    return RearrangedTensor(
        stored, stored.shape, lambda array: halves_apart(array, head_dim)
    )


def _as_easylm(row, array, head_dim):
    """A weight as it lies in EasyLM's checkpoints.

    Args:
        row: `weight_names.Weight`.
        array: NumPy array, laid out as ours.
        head_dim: int, size of a head.

    Returns:
        NumPy array; a matrix comes as a transposed view.
    """
    if row.easylm_layout == weight_names.ROTARY:
        array = pairs_together(array, head_dim)
    return array if row.easylm_layout == weight_names.SAME else array.T


def halves_apart(kernel, head_dim):
    """Rows of each head from pairs side by side to first halves, then second halves.

    Args:
        kernel: NumPy array `(heads * head_dim, inputs)`, as EasyLM orders the rows.
        head_dim: int, even.

    Returns:
        NumPy array of the same shape, rows as ours.
    """
    outputs, inputs = kernel.shape
    pairs = contiguous(kernel).reshape(-1, head_dim // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(outputs, inputs)


def pairs_together(kernel, head_dim):
    """The inverse of `halves_apart`."""
    outputs, inputs = kernel.shape
    halves = contiguous(kernel).reshape(-1, 2, head_dim // 2, inputs)
    return halves.swapaxes(1, 2).reshape(outputs, inputs)
