"""Reads and writes EasyLM checkpoints.

Only this module depends on EasyLM's conventions. EasyLM stores matrices as
`(inputs, outputs)`. In the kernels of queries and keys, the two elements of a rotary
pair are adjacent (interleaved). Here and in transformers, they are half a head apart
(half-split).

Source: https://github.com/young-geng/EasyLM, `EasyLM/models/llama/llama_model.py` and
`convert_easylm_to_hf.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras_openllama.checkpoints import weight_names
from keras_openllama.checkpoints.files import msgpack, msgpack_writer
from keras_openllama.checkpoints.formats import EASYLM_CONTENTS
from keras_openllama.checkpoints.matching import match_tensors
from keras_openllama.checkpoints.outputs import OutputFile
from keras_openllama.checkpoints.rotary_order import (
    half_split_to_interleaved,
    interleaved_to_half_split,
)
from keras_openllama.checkpoints.tensors import RearrangedTensor

if TYPE_CHECKING:
    from keras_openllama.checkpoints.contents import ModelContents
    from keras_openllama.checkpoints.tensors import StoredTensor
    from keras_openllama.utils.types import PathLike


def read_tensors(
    path: PathLike, arguments: dict[str, Any], head: bool = True
) -> dict[str, StoredTensor]:
    """Opens a checkpoint and lists its tensors, without reading their values.

    Args:
        path: Path of the file.
        arguments: Arguments of `OpenLlamaBackbone`.
        head: Whether to include the language-model head.

    Returns:
        The tensors by variable path, in the layout of the Keras variables.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is damaged, or its tensors do not match the arguments.
    """
    found = msgpack.read_msgpack(path)
    prefix = EASYLM_CONTENTS["trainstate_params"]
    if not any(key[: len(prefix)] == prefix for key in found):
        prefix = ()
    # The rest of a train state is the state of the optimizer.
    tensors = {
        "/".join(key[len(prefix) :]): stored
        for key, stored in found.items()
        if key[: len(prefix)] == prefix
    }
    if not head:
        tensors.pop(weight_names.HEAD.easylm, None)
    rows = weight_names.weight_specs(arguments["num_layers"], head)
    sizes = weight_names.axis_sizes(arguments)
    matched = match_tensors(
        tensors, {row.path: (row.easylm, _shape_of(row, sizes)) for row in rows}, path
    )
    head_dim = arguments["head_dim"]
    return {row.path: _from_easylm(row, matched[row.path], head_dim) for row in rows}


def output_files(contents: ModelContents, dtype: str, content: str) -> list[OutputFile]:
    """Describes the single file of an export as an EasyLM checkpoint.

    Args:
        contents: The model.
        dtype: Name of the dtype of the exported weights.
        content: The kind of checkpoint, one of `EASYLM_CONTENTS`.

    Returns:
        A list of one file.
    """
    rows = weight_names.weight_specs(contents.arguments["num_layers"])
    sizes = weight_names.axis_sizes(contents.arguments)
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
            _to_easylm(row, value, head_dim)
            for row, value in zip(rows, values, strict=True)
        )
        msgpack_writer.write_msgpack(file, specs, arranged, streaming)

    size = msgpack_writer.msgpack_size(specs, streaming)
    return [OutputFile("", size, write, tuple(row.path for row in rows))]


def _shape_of(row, sizes):
    """Returns the shape of a weight in EasyLM."""
    shape = row.shape(sizes)
    return shape if row.easylm_layout == weight_names.SAME else shape[::-1]


def _from_easylm(row, stored, head_dim):
    if row.easylm_layout == weight_names.SAME:
        return stored
    stored = stored.transposed()
    if row.easylm_layout == weight_names.TRANSPOSED:
        return stored
    return RearrangedTensor(
        stored, stored.shape, lambda array: interleaved_to_half_split(array, head_dim)
    )


def _to_easylm(row, array, head_dim):
    """Returns a weight in EasyLM's layout; a matrix as a transposed view."""
    if row.is_rotary:
        array = half_split_to_interleaved(array, head_dim)
    return array if row.easylm_layout == weight_names.SAME else array.T
