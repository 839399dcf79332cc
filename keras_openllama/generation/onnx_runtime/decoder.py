"""Decodes a quantized model, or one in bfloat16, on a CPU with ONNX Runtime.

The graph of `graph.py` is written to a temporary directory, from which ONNX Runtime
reads it, with the quantized weights in the order of the products. That copy is the only
one in memory, since those of the variables are moved to a file. Weights in bfloat16 are
not copied: the products read those of the variables.
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
from onnx import TensorProto

from keras_openllama.generation.kv_cache import MAX_VERIFIED, MIN_CACHE_LENGTH
from keras_openllama.generation.onnx_runtime.file import GRAPH_FILE
from keras_openllama.generation.onnx_runtime.graph import (
    CACHES,
    cache_dtype,
    decoder_graph,
    padded_half_head,
    rotary_tables,
)
from keras_openllama.generation.onnx_runtime.weights_in_memory import (
    float_matrices,
    move_to_blocks,
)
from keras_openllama.generation.onnx_runtime.weights_on_disk import move_to_disk
from keras_openllama.native.library import (
    NativeLibrary,
    native_library,
)
from keras_openllama.utils.host_memory import allocate_block, release_freed_memory
from keras_openllama.utils.mapping import large_files_directory
from keras_openllama.utils.staging import scratch_directory

if TYPE_CHECKING:
    from pathlib import Path

    from keras_openllama.backend.keras_hub import CausalLM

# Heuristic: tokens of a prompt that are fed at once. Products with more rows are not
# faster, and the scores of attention take memory.
CHUNK = 512
_ERRORS_ONLY = 3


def open_session(
    path: str | Path,
    library: NativeLibrary | None,
    weights: dict[str, onnxruntime.OrtValue],
) -> onnxruntime.InferenceSession:
    """Opens a graph on the CPU, on all physical cores.

    Args:
        path: path of the file.
        library: the compiled operators, if the graph uses them.
        weights: weights that are not read from the graph's file; they must exist as
            long as the session.

    Returns:
        The session.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if library:
        options.register_custom_ops_library(str(library.path))
    for name, value in weights.items():
        options.add_initializer(name, value)
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )


class OnnxDecoder:
    """A model in ONNX Runtime.

    Args:
        model: `OpenLlamaCausalLM` on a CPU, for which `uses_onnx_runtime` holds.

    Attributes:
        has_compiled_attention: whether the graph has an attention of its own.
        half_head: size of half a head in the cache.
        cache_dtype: dtype of the cache.

    Raises:
        OSError: if there is no space for the quantized weights in the directory for
            temporary files.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model, self._tables = model, {}
        library = native_library()
        self.has_compiled_attention = library is not None
        head_dim = model.backbone.head_dim
        if library:
            move_to_blocks(float_matrices(model))
            self.half_head, self.cache_dtype = head_dim // 2, cache_dtype(model)
        else:
            self.half_head, self.cache_dtype = padded_half_head(head_dim), "float32"
        graph = decoder_graph(model, lanes=library and library.lanes)
        with scratch_directory(large_files_directory()) as directory:
            try:
                graph.save(directory, "")
            except OSError as error:
                raise OSError(
                    error.errno,
                    "Generation on a CPU writes what ONNX Runtime reads, quantized "
                    "weights among it, to a temporary directory first, which failed: "
                    f"{error.strerror}. Set the environment variable TMPDIR to a "
                    "directory with more space",
                    str(directory),
                ) from error
            _move_to_disk(model)
            release_freed_memory()
            self._arrays = graph.arrays(directory)
            self._weights = {k: ort_value(x) for k, x in self._arrays.items()}
            self.session = open_session(directory / GRAPH_FILE, library, self._weights)
        release_freed_memory()

    def rotary_tables(self, positions: int) -> dict[str, np.ndarray]:
        """Returns the inputs `cos` and `sin` of the graph, for at least some positions.

        Args:
            positions: number of positions.

        Returns:
            float32 arrays `(at least positions, half_head)`.
        """
        if positions > len(self._tables.get("cos", ())):
            positions = max(2 * positions, MIN_CACHE_LENGTH)
            self._tables = rotary_tables(self.model, positions, self.half_head)
        return self._tables


def ort_value(array: np.ndarray) -> onnxruntime.OrtValue:
    """Returns an array as a value of ONNX Runtime, in the same memory.

    Args:
        array: array, which must exist as long as the value.
    """
    if array.dtype.name == "bfloat16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            array.view("uint16"), TensorProto.BFLOAT16
        )
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _move_to_disk(model):
    try:
        move_to_disk(model)
    except OSError as error:
        warnings.warn(
            "The quantized weights could not be moved to a temporary file "
            f"({error.strerror}), so they are in memory twice. If space is missing, "
            "set the environment variable TMPDIR to a directory with more of it.",
            stacklevel=2,
        )


class OnnxCache:
    """The KV cache of some sequences, each from its first column on.

    Args:
        decoder: `OnnxDecoder`.
        batch: number of sequences.
        columns: number of tokens that each may have.

    Attributes:
        lengths: int64 `(batch,)`, tokens of each sequence in the cache.
    """

    def __init__(self, decoder: OnnxDecoder, batch: int, columns: int) -> None:
        self._decoder = decoder  # Its weights must exist as long as the session.
        backbone = decoder.model.backbone
        half = decoder.half_head
        shape = (batch, backbone.num_key_value_heads, columns, 2 * half)
        arrays = {}
        for index, kind in itertools.product(range(backbone.num_layers), CACHES):
            arrays[f"{index}.{kind}"] = shape, decoder.cache_dtype
            if decoder.cache_dtype == "int8":
                arrays[f"{index}.{kind}_scales"] = shape[:-1], "float32"
        parts = allocate_block(
            [math.prod(x) * np.dtype(dtype).itemsize for x, dtype in arrays.values()]
        )
        self._arrays = {
            name: part.view(dtype).reshape(shape)
            for part, (name, (shape, dtype)) in zip(parts, arrays.items(), strict=True)
        }
        self._tables = decoder.rotary_tables(columns)
        self._bindings = {}  # By first row, the one after the last, number of logits.
        rows = max(batch, MAX_VERIFIED)
        self._logits = np.zeros((rows, backbone.vocabulary_size), "float32")
        self.lengths = np.zeros(batch, "int64")

    def prefill(self, prompts: list[np.ndarray]) -> np.ndarray:
        """Writes tokens to the cache; short neighbours of the same length together.

        Args:
            prompts: token ids of each sequence, int64 arrays, which may be empty.

        Returns:
            Logits after the last token of each, float32 `(batch, vocabulary_size)`,
            which are zero for one without tokens.
        """
        vocabulary_size = self._decoder.model.backbone.vocabulary_size
        logits = np.zeros((len(prompts), vocabulary_size), "float32")
        row = 0
        for length, group in itertools.groupby(prompts, len):
            group = list(group)
            # Several sequences must be whole: ONNX Runtime reads further tokens of a
            # sequence only alone.
            together = max(1, CHUNK // max(length, 1))
            for first in range(0, len(group), together):
                tokens = np.stack(group[first : first + together])
                end = row + len(tokens)
                for start in range(0, length, CHUNK):
                    chunk = tokens[:, start : start + CHUNK]
                    lengths = np.full(len(tokens), start + chunk.shape[1])
                    binding = self._binding_of(row, end)
                    logits[row:end] = self._run(binding, chunk, lengths)[:, 0]
                row = end
        self.lengths[:] = [len(prompt) for prompt in prompts]
        return logits

    def feed(
        self, row: int, tokens: np.ndarray, start: int, num_logits: int = 1
    ) -> np.ndarray:
        """Writes tokens of one sequence to the cache.

        Args:
            row: number of the sequence.
            tokens: int `(length,)`.
            start: position of the first of them.
            num_logits: of how many of the last of them logits are returned.

        Returns:
            Logits float32 `(num_logits, vocabulary_size)`.
        """
        binding = self._binding_of(row, row + 1, num_logits)
        lengths = np.array([start + len(tokens)])
        return self._run(binding, tokens[None], lengths, num_logits)[0].copy()

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Feeds one token of each sequence.

        Args:
            tokens: int `(batch,)`.

        Returns:
            Logits float32 `(batch, vocabulary_size)`, until the next call.
        """
        self.lengths += 1
        return self.step_rows(tokens, self.lengths)

    def step_rows(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Feeds one token of each of the first sequences.

        Args:
            tokens: int `(rows,)`.
            lengths: int64 `(rows,)`, lengths of these sequences with these tokens.

        Returns:
            Logits float32 `(rows, vocabulary_size)`, until the next call.
        """
        binding = self._binding_of(0, len(tokens))
        return self._run(binding, tokens[:, None], lengths)[:, 0]

    def layers(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns the keys and values of each layer.

        Returns:
            Pairs of arrays `(batch, num_key_value_heads, columns, 2 * half_head)`.
        """
        layers = range(self._decoder.model.backbone.num_layers)
        return [tuple(self._arrays[f"{i}.{kind}"] for kind in CACHES) for i in layers]

    def _binding_of(self, first, end, num_logits=1):
        if num_logits > MAX_VERIFIED:  # Too many to keep memory for them.
            logits = np.zeros((num_logits, self._logits.shape[1]), "float32")
            return self._bind(first, end, logits)
        key = first, end, num_logits
        if key not in self._bindings:
            logits = self._logits[: (end - first) * num_logits]
            self._bindings[key] = self._bind(first, end, logits)
        return self._bindings[key]

    def _bind(self, first, end, logits):
        """Returns the cache of some sequences bound to the graph, and the output."""
        binding = self._decoder.session.io_binding()
        for name, array in self._arrays.items():
            value = ort_value(array[first:end])
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            if not self._decoder.has_compiled_attention:  # That writes to its inputs.
                binding.bind_ortvalue_output(f"present.{name}", value)
        for name, table in self._tables.items():
            binding.bind_cpu_input(name, table)
        logits = logits.reshape(end - first, -1, logits.shape[1])
        binding.bind_ortvalue_output("logits", ort_value(logits))
        return binding, logits

    def _run(self, bound, tokens, lengths, num_logits=1):
        binding, logits = bound
        inputs = {
            "input_ids": np.ascontiguousarray(tokens, "int64"),
            "first_logit": np.array([-num_logits]),
        }
        if self._decoder.has_compiled_attention:
            inputs["last_positions"] = (lengths - 1).astype("int32")
        else:
            mask = np.arange(lengths.max()) < lengths[:, None]
            inputs["attention_mask"] = mask.astype("int64")
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        self._decoder.session.run_with_iobinding(binding)
        return logits
