"""`SlotDecoder` on JAX and TensorFlow.

Each slot has buffers of its own, so that a step updates them in place and attention
reads only the blocks of columns in use. All of it is one program for each number of
rows, a power of two, whatever the lengths are. Idle slots fill it up: what a step
writes to them is after their last token, where nothing reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.jit import compile_function
from keras_openllama.generation.kv_cache import init_cache, run_layers
from keras_openllama.layers.cached_attention import (
    CACHE_BLOCK,
    MASKED_SCORE,
    attend_used,
    update_cache,
)
from keras_openllama.utils.types import Tensor

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

# Heuristic, see `token_loop.prefill_chunks`.
CHUNKS = (32, 128, 256)


class XlaSlotDecoder:
    """See `SlotDecoder`.

    Args:
        model: `OpenLlamaCausalLM`, not distributed.
        num_slots: number of sequences.
        context: most tokens of a sequence.
    """

    chunks = CHUNKS

    def __init__(self, model: CausalLM, num_slots: int, context: int) -> None:
        self.model = model
        self.num_slots, self.context = num_slots, context
        # The last chunk of a prompt may extend beyond its end.
        needed = context + CHUNKS[-1]
        self._columns = -(-needed // CACHE_BLOCK) * CACHE_BLOCK
        self._run_step = compile_function(self._step, model, donate=("caches",))
        self._run_prefill = compile_function(self._prefill, model, donate=("cache",))
        self._run_read = compile_function(_read, model, static=("columns",))
        self._run_write = compile_function(_write, model, donate=("cache",))
        self.reset()

    def reset(self) -> None:
        """See `SlotDecoder.reset`."""
        self.lengths = [0] * self.num_slots
        self._final_lengths = [1] * self.num_slots
        self._caches = [None] * self.num_slots

    def open(self, slot: int, final_length: int) -> None:
        """See `SlotDecoder.open`."""
        self.lengths[slot] = 0
        self._final_lengths[slot] = final_length

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> None:
        """See `SlotDecoder.prefill`."""
        size = min(chunk for chunk in self.chunks if chunk >= len(tokens))
        padded = np.zeros((1, size), "int32")
        padded[0, : len(tokens)] = tokens
        self._caches[slot] = self._run_prefill(
            cache=self._take(slot),
            tokens=padded,
            start=np.int32(start),
            final_lengths=np.array([self._final_lengths[slot]], "int32"),
        )
        self.lengths[slot] = start + len(tokens)

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """See `SlotDecoder.step`."""
        rows = self._rows(slots)
        padded = np.zeros(len(rows), "int32")
        padded[: len(tokens)] = tokens
        logits, caches = self._run_step(
            caches=tuple(self._take(slot) for slot in rows),
            tokens=padded,
            positions=np.array([self.lengths[slot] for slot in rows], "int32"),
            final_lengths=np.array([self._final_lengths[s] for s in rows], "int32"),
        )
        for slot, cache in zip(rows, caches, strict=True):
            self._caches[slot] = cache
        for slot in slots:
            self.lengths[slot] += 1
        return np.array(as_numpy(logits)[: len(slots)])

    def read_prefix(self, slot: int, length: int) -> Any:
        """See `SlotDecoder.read_prefix`."""
        columns = -(-length // CACHE_BLOCK) * CACHE_BLOCK
        return self._run_read(cache=self._caches[slot], columns=columns)

    def write_prefix(self, slot: int, prefix: Any, length: int) -> None:
        """See `SlotDecoder.write_prefix`."""
        self._caches[slot] = self._run_write(cache=self._take(slot), prefix=prefix)
        self.lengths[slot] = length

    def _rows(self, slots):
        """The slots of a program: those of a step, and idle ones up to a power of 2."""
        number = min(self.num_slots, 1 << (len(slots) - 1).bit_length())
        idle = sorted(set(range(self.num_slots)) - set(slots), key=self._idle_cost)
        return [*slots, *idle[: number - len(slots)]]

    def _idle_cost(self, slot):
        return self._caches[slot] is None, self.lengths[slot]

    def _take(self, slot):
        """Returns the cache of a slot to donate it to a program."""
        cache, self._caches[slot] = self._caches[slot], None
        return (
            init_cache(self.model.backbone, 1, self._columns)
            if cache is None
            else cache
        )

    def _prefill(self, cache, tokens, start, final_lengths):
        columns = start + ops.arange(tokens.shape[1], dtype="int32")
        keys = ops.arange(self._columns, dtype="int32")
        bias = ops.where(keys[None] <= columns[:, None], 0.0, MASKED_SCORE)[None]
        bias = ops.tile(bias, (self.model.backbone.num_key_value_heads, 1, 1))
        _, cache = run_layers(
            *(self.model.backbone, tokens, columns[None], final_lengths),
            *(bias, cache, start),
        )
        return cache

    def _step(self, caches, tokens, positions, final_lengths):
        backbone = self.model.backbone
        cos, sin = backbone.rotary_embedding(positions[:, None], final_lengths)
        x = ops.cast(backbone.token_embedding(tokens[:, None]), backbone.compute_dtype)
        updated = []
        for layer, pairs in zip(
            backbone.transformer_layers, zip(*caches, strict=True), strict=True
        ):
            attention = layer.self_attention
            heads = attention.project_heads(layer.self_attention_norm(x), cos, sin)
            context, pairs = _attend_rows(heads, pairs, positions)
            x = x + attention.project_output(context)
            x = x + layer.feedforward(layer.feedforward_norm(x))
            updated.append(pairs)
        logits = self.model.lm_head(backbone.final_norm(x))[:, 0]
        return ops.cast(logits, "float32"), tuple(zip(*updated, strict=True))


def _attend_rows(
    heads: tuple[Tensor, Tensor, Tensor],
    pairs: Sequence[tuple[Tensor, Tensor]],
    positions: Tensor,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Writes keys and values, and attends, row by row.

    Args:
        heads: queries, keys and values, `(rows, heads, 1, head_dim)`.
        pairs: keys and values in the cache of each row.
        positions: int `(rows,)`.

    Returns:
        The context `(rows, num_query_heads, 1, head_dim)`, and the updated caches.
    """
    contexts, updated = [], []
    for row, pair in enumerate(pairs):
        query, *key_value = (x[row : row + 1] for x in heads)
        position = positions[row]
        pair = tuple(
            update_cache(cache, update[0], position)
            for cache, update in zip(pair, key_value, strict=True)
        )
        contexts.append(attend_used(query, *pair, position + 1))
        updated.append(pair)
    return ops.concatenate(contexts, axis=0), updated


def _read(cache, columns):
    return tuple(tuple(x[:, :columns] for x in pair) for pair in cache)


def _write(cache, prefix):
    start = np.int32(0) if keras.config.backend() == "jax" else 0
    return tuple(
        tuple(update_cache(*arrays, start) for arrays in zip(*pairs, strict=True))
        for pairs in zip(cache, prefix, strict=True)
    )
