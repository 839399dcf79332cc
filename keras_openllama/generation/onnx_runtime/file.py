"""An ONNX graph under construction, and its two files.

The weights are written beside the graph, one array at a time, so that writing needs
memory for one matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from keras_openllama.utils.host_memory import allocate_block
from keras_openllama.utils.progress import progress_bar

GRAPH_FILE, WEIGHTS_FILE = "model.onnx", "model.onnx.data"
# The domain of ONNX Runtime's own operators.
MICROSOFT = "com.microsoft"
# The domain of the operators in `keras_openllama/native/`.
PACKAGE_DOMAIN = "keras_openllama"
# Versions of the operators, and of the file format, that ONNX Runtime reads since 1.20.
_OPSETS = {"": 21, MICROSOFT: 1, PACKAGE_DOMAIN: 1}
_FILE_FORMAT = 10
# Offsets of arrays in the file of weights, so that they can be mapped into memory.
_ALIGNMENT = 4096
_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """An array of the file of weights, which is made when it is written.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        make: returns it.
        in_memory: whether a session gets the array from `OnnxGraph.arrays`.
    """

    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], np.ndarray]
    in_memory: bool = False

    @classmethod
    def of(cls, array: np.ndarray) -> Weight:
        """Returns the weight that is an array."""
        return cls(array.shape, array.dtype.name, lambda: array)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * np.dtype(_numpy_dtype(self.dtype)).itemsize


class OnnxGraph:
    """A graph of ONNX operators that is built node by node.

    Example:
        >>> graph = OnnxGraph()
        >>> x = graph.input("x", "float32", ["rows", 2])
        >>> w = graph.weight("w", Weight.of(np.ones(2, "float32")))
        >>> graph.output(graph.add("Add", [x, w], "y"), "float32", ["rows", 2])
        >>> graph.save(".", "two numbers")
    """

    def __init__(self) -> None:
        self._nodes, self._inputs, self._outputs = [], [], []
        self._weights, self._constants, self._offsets = {}, {}, {}
        self._arrays = {}

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Adds an input and returns its name; strings in the shape name free sizes."""
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], shape))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declares a value to be an output."""
        self._outputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], shape))

    def weight(self, name: str, weight: Weight) -> str:
        """Adds an array to the file of weights and returns its name."""
        self._weights[name] = weight
        return name

    def array(self, name: str, array: np.ndarray) -> str:
        """Adds an array that stays where it is in memory, and returns its name.

        The graph has its shape only: a session must get it from `arrays`.
        """
        self._arrays[name] = array
        return name

    def constant(self, name: str, values: Any, dtype: str = "int64") -> str:
        """Adds a small array to the graph itself, once, and returns its name."""
        array = np.array(values, dtype)
        self._constants[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def add(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: str | Sequence[str],
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Adds a node.

        Args:
            operator: name of the operator.
            inputs: names of its inputs; an empty string omits one.
            outputs: the names that its outputs get; a string for a single one.
            domain: domain of the operator.
            **attributes: its attributes.

        Returns:
            `outputs`.
        """
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        node = helper.make_node(
            operator, list(inputs), names, domain=domain, name=names[0], **attributes
        )
        self._nodes.append(node)
        return outputs

    def cast(self, value: str, name: str, dtype: str) -> str:
        """Adds a conversion to another dtype and returns `name`."""
        return self.add("Cast", [value], name, to=_TYPES[dtype])

    def save(self, directory: str | Path, description: str) -> None:
        """Writes the graph and the weights.

        Args:
            directory: path of an existing directory.
            description: what the graph computes; it is stored in the file.

        Raises:
            OSError: if a file cannot be written.
        """
        directory = Path(directory)
        tensors = list(self._constants.values()) + self._write_weights(
            directory / WEIGHTS_FILE
        )
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, tensors
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(*opset) for opset in self._opsets()],
            ir_version=_FILE_FORMAT,
            producer_name="keras_openllama",
            doc_string=description,
        )
        (directory / GRAPH_FILE).write_bytes(model.SerializeToString())

    def arrays(self, directory: str | Path) -> dict[str, np.ndarray]:
        """Returns the arrays that a session of the saved graph must get.

        Weights that are `in_memory` are read from the file to parts of one array, for
        which NumPy asks Linux for huge pages: these are read up to twice as fast as the
        pages of a mapped file.

        Args:
            directory: the directory in which the graph was saved.

        Returns:
            The arrays by name.
        """
        weights = {k: w for k, w in self._weights.items() if w.in_memory}
        parts = allocate_block([weight.nbytes for weight in weights.values()])
        arrays = dict(self._arrays)
        with open(Path(directory) / WEIGHTS_FILE, "rb") as file:
            for (name, weight), part in zip(weights.items(), parts, strict=True):
                file.seek(self._offsets[name])
                file.readinto(part.data)
                arrays[name] = part.view(weight.dtype).reshape(weight.shape)
        return arrays

    def _opsets(self):
        domains = {node.domain for node in self._nodes}
        return [(name, version) for name, version in _OPSETS.items() if name in domains]

    def _write_weights(self, path):
        tensors = [
            _external_tensor(name, Weight.of(array), 0)
            for name, array in self._arrays.items()
        ]
        total = sum(weight.nbytes for weight in self._weights.values())
        with (
            open(path, "wb") as file,
            progress_bar("Writing the ONNX weights", total) as bar,
        ):
            for name, weight in self._weights.items():
                file.seek(-file.tell() % _ALIGNMENT, 1)
                self._offsets[name] = file.tell()
                tensors.append(_external_tensor(name, weight, file.tell()))
                array = np.ascontiguousarray(weight.make())
                if array.shape != weight.shape or array.dtype != weight.dtype:
                    raise ValueError(
                        f"{name} must be {weight.dtype} {weight.shape}. Received: "
                        f"{array.dtype} {array.shape}"
                    )
                file.write(array.view("uint8").data)
                bar.update(array.nbytes)
        return tensors


def _external_tensor(name, weight, offset):
    tensor = TensorProto(
        name=name,
        data_type=_TYPES[weight.dtype],
        dims=weight.shape,
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (
        ("location", WEIGHTS_FILE),
        ("offset", offset),
        ("length", weight.nbytes),
    ):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _numpy_dtype(name):
    return ml_dtypes.bfloat16 if name == "bfloat16" else name
