"""Causal attention and its gradients by the compiled function `causal_attention.c`."""

from __future__ import annotations

import ctypes
from pathlib import Path

from keras_openllama.native.heads import Heads, HeadsStructure, load_library


def _fields(kind, *names):
    return [(name, kind) for name in names]


class _CausalAttention(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "sequences", "heads", "group", "length", "head_dim"),
        ("threads", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("mask_sequence", ctypes.c_int64),
        *_fields(HeadsStructure, "query", "key", "value", "output"),
        ("log_sums", ctypes.c_void_p),
        *_fields(HeadsStructure, "output_gradient"),
        *_fields(HeadsStructure, "query_gradient", "key_gradient", "value_gradient"),
    )


class CausalAttention:
    """Causal attention of tensors whose memory the caller owns.

    Queries that may attend to no key have an output of 0 and pass no gradient on.
    Results do not depend on the number of threads.

    Args:
        library: path of a library that contains `causal_attention.c`.
        sizes: sequences, key/value heads, query heads per key/value head, length and
            head_dim.
        threads: number of threads to use at most.
        mask: address of bytes `(sequences or 1, length, length)`, not 0 where a query
            may attend to a key, 0 for later keys.
        is_mask_shared: whether the mask is one for all sequences.
        log_sums: address of float32 `(sequences, query heads, length)`, which the
            forward pass writes and the backward pass reads.
        query, key, value, output: the tensors.
    """

    def __init__(
        self,
        library: Path,
        sizes: tuple[int, int, int, int, int],
        threads: int,
        mask: int,
        is_mask_shared: bool,
        log_sums: int,
        **tensors: Heads,
    ) -> None:
        length = sizes[3]
        self._library = load_library(library)
        self._attention = _CausalAttention(
            *sizes,
            threads=threads,
            mask=mask,
            mask_sequence=0 if is_mask_shared else length * length,
            log_sums=log_sums,
        )
        self._set(tensors)

    def forward(self) -> None:
        """Computes the output and the logarithms of sums.

        Raises:
            MemoryError: if there is not enough memory.
        """
        self._call(self._library.causal_attention_forward)

    def backward(self, **gradients: Heads) -> None:
        """Computes `query_gradient`, `key_gradient` and `value_gradient`.

        Args:
            **gradients: these, and `output_gradient`, which is read.

        Raises:
            MemoryError: if there is not enough memory.
        """
        self._set(gradients)
        self._call(self._library.causal_attention_backward)

    def _set(self, tensors):
        for name, heads in tensors.items():
            setattr(self._attention, name, HeadsStructure.of(heads))

    def _call(self, function):
        if function(ctypes.byref(self._attention)):
            raise MemoryError("There is not enough memory for causal attention.")
