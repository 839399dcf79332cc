"""Reads and writes GGUF files: metadata, and tensors in floats or quantized blocks.

The `gguf` package parses and writes the header, and converts blocks. It reads a file
without checking that it is complete, and writes only tensors that are all in memory, so
both are done here.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray

from keras_openllama.checkpoints import array_io
from keras_openllama.checkpoints.gguf_blocks import (
    MATRIX_FORMATS,
    blocks_from_matrix,
    matrix_from_blocks,
)
from keras_openllama.checkpoints.tensors import (
    MappedFile,
    MappedTensor,
    contiguous_strides,
    is_shape,
)
from keras_openllama.quantization.quantized_matrix import QuantizedMatrix
from keras_openllama.utils.file_types import GGUF_MAGIC
from keras_openllama.utils.types import PathLike

if TYPE_CHECKING:
    from keras_openllama.quantization.policies import MatrixFormat

# Types that are plain arrays, by their dtypes. Tensors of the others are blocks.
FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_RANGE_REMEDY = "use quantization='bf16' or quantization='f32'"


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file.

    Attributes:
        path: Its path.
        metadata: The metadata by key.
        tensors: The tensors by name, in the order of the header.
    """

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, MappedTensor | BlockTensor]


@dataclasses.dataclass(frozen=True)
class BlockTensor:
    """A `StoredTensor` that a file stores in quantized blocks. Reading is lazy.

    Attributes:
        name: Its name in the file.
        type: Name of its type, such as `"Q8_0"`.
        shape: Its shape. A block is a part of the last axis.
        offset: Offset of its first byte in the file.
        file: The file that holds it.
        arrange: Function that reorders the rows, if they are in another order.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    file: MappedFile
    arrange: Callable[[NDArray], NDArray] | None = None

    dtype = "float32"  # Of the values that `array` returns.

    @property
    def nbytes(self) -> int:
        """Number of bytes that the file has of the tensor."""
        return tensor_bytes(self.shape, self.type)

    def blocks(self) -> NDArray:
        """Returns the bytes of the blocks, as uint8 of shape `(…, bytes per row)`."""
        rows = self.shape[:-1]
        stored = self.file.array(self.offset, self.nbytes, np.uint8)
        stored = stored.reshape(*rows, self.nbytes // math.prod(rows))
        return stored if self.arrange is None else self.arrange(stored)

    def array(self) -> NDArray:
        """Returns the dequantized tensor."""
        blocks = self.blocks()
        result = np.empty(self.shape, np.float32)
        if blocks.ndim == 1:
            result[:] = gguf.dequantize(blocks, _type_of(self.type))
            return result
        for rows in array_io.row_blocks(blocks):
            result[rows] = gguf.dequantize(blocks[rows], _type_of(self.type))
        return result

    def rearranged(self, arrange: Callable[[NDArray], NDArray]) -> BlockTensor:
        """Returns the same tensor with its rows in another order.

        Args:
            arrange: Function that takes a matrix and returns it with reordered rows.
        """
        return dataclasses.replace(self, arrange=arrange)

    @property
    def format(self) -> MatrixFormat | None:
        """How a layer can have the tensor as it is; `None` if it cannot."""
        return MATRIX_FORMATS.get(self.type) if len(self.shape) == 2 else None

    def quantized_matrix(self) -> QuantizedMatrix | None:
        """Returns the tensor without rounding it; `None` if `format` is."""
        if self.format is None:
            return None
        return matrix_from_blocks(self.blocks(), self.type)

    def prefetch(self) -> None:
        """Reads the tensor into memory."""
        self.file.prefetch(self.offset, self.nbytes)

    def release(self) -> None:
        """Releases the memory of the tensor."""
        self.file.release(self.offset, self.nbytes)


def _type_of(name):
    return gguf.GGMLQuantizationType[name]


def block_sizes(type_name: str) -> tuple[int, int]:
    """Returns the number of values and of bytes of a block.

    Example:
        >>> block_sizes("Q8_0")
        (32, 34)
    """
    return gguf.GGML_QUANT_SIZES[_type_of(type_name)]


def tensor_bytes(shape: tuple[int, ...], type_name: str) -> int:
    """Returns the size of a tensor in bytes; `shape` must be a multiple of the block.

    Example:
        >>> tensor_bytes((2, 64), "Q4_0")
        72
    """
    values, nbytes = block_sizes(type_name)
    return math.prod(shape) // values * nbytes


# ----- Reading


def read_gguf(path: PathLike) -> GgufFile:
    """Opens a GGUF file, without reading the values of its tensors.

    Args:
        path: Path of the file.

    Returns:
        Its metadata and tensors.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is truncated or damaged, one part of several, or has a tensor
            of an unknown type. The message names the file, the tensor and the type.

    Example:
        >>> lm.export_to_gguf("nano.gguf")
        >>> file = read_gguf("nano.gguf")
        >>> file.metadata["llama.block_count"]
        4
        >>> file.tensors["output_norm.weight"].shape
        (256,)
    """
    file = MappedFile(path)
    try:
        if file.bytes(0, len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise ValueError("it does not begin with 'GGUF'")
        reader = _Reader(file.path)
        if reader.byte_order != "I":
            raise ValueError("it was written for a machine of the other byte order")
        metadata = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
        tensors = _tensors(file, reader)
    # Of damaged headers, the package raises each of these.
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        raise ValueError(
            f"{file.path} ({file.size:,} bytes) cannot be read as a GGUF file: "
            f"{_message(error)}. {file.remedy}"
        ) from error
    parts = metadata.get("split.count", 1)
    if parts != 1:
        raise ValueError(
            f"{file.path} is one of {parts} parts of a model. Merge them into one file "
            "with `llama-gguf-split --merge FIRST_PART MERGED.gguf` of llama.cpp."
        )
    return GgufFile(file.path, metadata, tensors)


def _message(error):
    text = error.args[0] if error.args else type(error).__name__
    return str(text).removesuffix(".")


class _Reader(gguf.GGUFReader):
    """Checks that what it reads is inside the file, and does not read tensors.

    The class of the package returns less than it should at the end of a file.
    """

    def _get(self, offset, dtype, count=1, override_order=None):
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"it ends inside its header, which needs {end:,} bytes")
        return super()._get(int(offset), dtype, count, override_order)

    def _build_tensors(self, start_offs, fields):
        self.data_start = int(start_offs)
        self.tensor_fields = fields


def _tensors(file, reader):
    """Returns the tensors by name, after checking each entry of the header."""
    tensors = {}
    for field in reader.tensor_fields:
        _, _, _, dims, type_id, offset = field.parts
        name = field.name
        if name in tensors:
            raise ValueError(f"it has two tensors {name}")
        shape = tuple(reversed(dims.tolist()))
        type_name = _type_name(name, int(type_id[0]))
        if not shape or not is_shape(shape) or 0 in shape:
            raise ValueError(f"the tensor {name} has the invalid shape {shape}")
        block, _ = block_sizes(type_name)
        if shape[-1] % block:
            raise ValueError(
                f"the tensor {name} of shape {shape} has the type {type_name}, whose "
                f"blocks of {block} values do not divide its rows of {shape[-1]}"
            )
        begin = reader.data_start + int(offset[0])
        end = begin + tensor_bytes(shape, type_name)
        if end > file.size:
            raise ValueError(
                f"it ends before or inside the tensor {name} ({type_name}, shape "
                f"{shape}), which has the bytes {begin:,} to {end:,}"
            )
        tensors[name] = _tensor(name, type_name, shape, begin, file)
    return tensors


def _type_name(name, type_id):
    """Returns the name of a type that can be read; raises an error for others."""
    try:
        kind = gguf.GGMLQuantizationType(type_id)
    except ValueError:
        version = importlib.metadata.version("gguf")
        raise ValueError(
            f"the tensor {name} has the type {type_id}, which version {version} of the "
            "gguf package does not know. If the type is newer, upgrade it: pip install "
            "--upgrade gguf. Otherwise, the file is damaged"
        ) from None
    if kind.name not in FLOAT_TYPES and not _is_readable(kind):
        raise ValueError(
            f"the tensor {name} has the type {kind.name}, which the gguf package "
            "cannot convert to floats. Convert the file to another type with "
            "`llama-quantize --allow-requantize` of llama.cpp"
        )
    return kind.name


@functools.cache
def _is_readable(kind):
    _, nbytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, nbytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _tensor(name, type_name, shape, offset, file):
    dtype = FLOAT_TYPES.get(type_name)
    if dtype is None:
        return BlockTensor(name, type_name, shape, offset, file)
    return MappedTensor(name, dtype, shape, contiguous_strides(shape), offset, file)


# ----- Writing


# Shape and name of the type of each tensor, by name.
TensorSpecs = Mapping[str, tuple[tuple[int, ...], str]]


def gguf_header(
    architecture: str,
    add_metadata: Callable[[gguf.GGUFWriter], None],
    specs: TensorSpecs,
) -> bytes:
    """Returns what a GGUF file contains before its tensors.

    Args:
        architecture: Architecture of the model, such as `"llama"`.
        add_metadata: Function that adds the metadata to a writer of the `gguf` package.
        specs: Shape and type of each tensor, by name.

    Returns:
        The header, padded to the alignment of the tensors.
    """
    writer = gguf.GGUFWriter(None, architecture)
    add_metadata(writer)
    for name, (shape, type_name) in specs.items():
        nbytes = tensor_bytes(shape, type_name)
        writer.add_tensor_info(
            name, shape, np.dtype(np.float32), nbytes, _type_of(type_name)
        )
    # The writer of the package writes to files only.
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "header")
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + _padding(len(header))


def gguf_size(header: bytes, specs: TensorSpecs) -> int:
    """Returns the size in bytes of the file that `write_gguf` writes."""
    sizes = [tensor_bytes(*spec) for spec in specs.values()]
    return len(header) + sum(size + len(_padding(size)) for size in sizes)


def _padding(position):
    return bytes(-position % gguf.GGUF_DEFAULT_ALIGNMENT)


def write_gguf(
    file: BinaryIO,
    header: bytes,
    specs: TensorSpecs,
    values: Iterable[NDArray | QuantizedMatrix],
) -> None:
    """Writes a GGUF file, one tensor at a time.

    Args:
        file: Binary file that is open for writing.
        header: The header, from `gguf_header`.
        specs: Shape and type of each tensor, by name.
        values: The tensors in the order of `specs`, as floats or quantized. A quantized
            matrix is written as it is if it has the type.

    Raises:
        ValueError: If a type cannot represent a value.
        OSError: If the file cannot be written.
    """
    file.write(header)
    for (shape, type_name), value in zip(specs.values(), values, strict=True):
        _write_tensor(file, value, shape, type_name)
        file.write(_padding(tensor_bytes(shape, type_name)))


def _write_tensor(file, value, shape, type_name):
    if value.shape != tuple(shape):
        raise ValueError(f"it has shape {value.shape}, expected {tuple(shape)}")
    if isinstance(value, QuantizedMatrix):
        blocks = blocks_from_matrix(value, type_name)
        if blocks is not None:
            file.write(blocks.reshape(-1))
            return
        value = value.dequantize()
    if type_name in FLOAT_TYPES:
        dtype = FLOAT_TYPES[type_name]
        array_io.write_array(file, value, shape, dtype, _RANGE_REMEDY)
    else:
        _quantize_and_write(file, value, type_name)


def _quantize_and_write(file, array, type_name):
    for block in array_io.row_blocks(array):
        rows = array_io.contiguous(array[block]).astype(np.float32)
        if not np.isfinite(rows).all():
            raise ValueError(
                f"it has NaN or infinite values, which {type_name} cannot represent"
            )
        # The scales of blocks are float16.
        array_io.cast(rows, np.float16, _RANGE_REMEDY)
        file.write(gguf.quantize(rows, _type_of(type_name)).reshape(-1))
