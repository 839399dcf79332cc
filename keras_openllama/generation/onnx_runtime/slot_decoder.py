"""`SlotDecoder` with ONNX Runtime, for models for which `uses_onnx_runtime` holds.

The caches of all slots are rows of one array for each layer. The graph updates them in
place, and needs the rows of a step to be neighbours: the sequences that are decoded are
moved to the first rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_openllama.generation.onnx_runtime.decoder import (
    CHUNK,
    OnnxCache,
    OnnxDecoder,
)
from keras_openllama.generation.onnx_runtime.token_loop import OnnxTokenLoop

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM


class OnnxSlotDecoder:
    """See `SlotDecoder`.

    Args:
        model: `OpenLlamaCausalLM`, for which `uses_onnx_runtime` holds.
        num_slots: number of sequences.
        context: most tokens of a sequence.
    """

    chunks = (CHUNK // 4, CHUNK)
    chunk_beside_steps = CHUNK // 4
    follows_adapters = False

    def __init__(self, model: CausalLM, num_slots: int, context: int) -> None:
        self.num_slots, self.context = num_slots, context
        self._decoder = _decoder_of(model)
        self.reset()

    def reset(self) -> None:
        """See `SlotDecoder.reset`."""
        self.lengths = [0] * self.num_slots
        self._rows = list(range(self.num_slots))  # The row of each slot.
        self._cache = OnnxCache(self._decoder, self.num_slots, self.context)

    def open(self, slot: int, final_length: int) -> None:
        """See `SlotDecoder.open`; the tables do not depend on the final length."""
        self.lengths[slot] = 0

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> None:
        """See `SlotDecoder.prefill`."""
        self._cache.feed(self._rows[slot], np.asarray(tokens), start)
        self.lengths[slot] = start + len(tokens)

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """See `SlotDecoder.step`."""
        self._move_to_first_rows(slots)
        fed = np.zeros(len(slots), "int64")
        lengths = np.zeros(len(slots), "int64")
        for slot, token in zip(slots, tokens, strict=True):
            self.lengths[slot] += 1
            fed[self._rows[slot]] = token
            lengths[self._rows[slot]] = self.lengths[slot]
        logits = self._cache.step_rows(fed, lengths)
        return logits[[self._rows[slot] for slot in slots]]

    def verify(self, slot: int, tokens: Sequence[int], start: int) -> np.ndarray:
        """See `SlotDecoder.verify`."""
        self.lengths[slot] = start + len(tokens)
        row, tokens = self._rows[slot], np.asarray(tokens)
        return self._cache.feed(row, tokens, start, num_logits=len(tokens))

    def read_prefix(self, slot: int, length: int) -> Any:
        """See `SlotDecoder.read_prefix`."""
        row = self._rows[slot]
        return tuple(
            tuple(x[row, :, :length].copy() for x in pair)
            for pair in self._cache.layers()
        )

    def write_prefix(self, slot: int, prefix: Any, length: int) -> None:
        """See `SlotDecoder.write_prefix`."""
        row = self._rows[slot]
        for pair, values in zip(self._cache.layers(), prefix, strict=True):
            for whole, value in zip(pair, values, strict=True):
                whole[row, :, :length] = value[:, :length]
        self.lengths[slot] = length

    def _move_to_first_rows(self, slots):
        outside = [slot for slot in slots if self._rows[slot] >= len(slots)]
        inside = [
            slot
            for slot in range(self.num_slots)
            if self._rows[slot] < len(slots) and slot not in slots
        ]
        for slot, other in zip(outside, inside, strict=True):
            self._exchange(slot, other)

    def _exchange(self, slot, other):
        rows = self._rows[slot], self._rows[other]
        length, other_length = self.lengths[slot], self.lengths[other]
        for pair in self._cache.layers():
            for whole in pair:
                saved = whole[rows[1], :, :other_length].copy()
                whole[rows[1], :, :length] = whole[rows[0], :, :length]
                whole[rows[0], :, :other_length] = saved
        self._rows[slot], self._rows[other] = rows[1], rows[0]


def _decoder_of(model: CausalLM) -> OnnxDecoder:
    """The model in ONNX Runtime, the same as that of `generate` if it has one."""
    loop = model.make_generate_function()
    if not isinstance(loop, OnnxTokenLoop):  # The sampler is a search.
        loop = OnnxTokenLoop(model)
    return loop.decoder()
