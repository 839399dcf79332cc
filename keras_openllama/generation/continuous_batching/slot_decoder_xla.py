"""`SlotDecoder` on JAX and TensorFlow.

A step runs a program for each layer, which has the matrix products of all rows, and one
for the attention of each row. So each slot has buffers of its own size, which are
updated in place and double when they are full, and any rows can be in a step. The
programs depend on the number of rows and on the sizes of buffers, both rounded up to
few different values, and are shared by all layers. Starting a program takes time: for
one row, a program has a few layers and their attention.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.layer_programs import layer_programs
from keras_openllama.generation.kv_cache import (
    MAX_VERIFIED,
    MIN_CACHE_LENGTH,
    init_cache,
    padded_cache_length,
)
from keras_openllama.generation.sharding import device_platform
from keras_openllama.layers.cached_attention import (
    CACHE_BLOCK,
    MASKED_SCORE,
    attend_cached,
    update_cache,
)

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

# Heuristic, see `prefill_chunks.prefill_chunks`.
CHUNKS = (32, 64, 128, 256)
# Heuristic: beside steps of 8 rows on two cores, a prompt of 512 tokens takes 1.6 times
# as long as alone in chunks of 64, with half the gaps of 128, and 2.2 times in chunks
# of 32 (`benchmarks/serve.py`). An accelerator takes as long for 64 as for 128.
CHUNK_BESIDE_STEPS = {"cpu": 64}
# Numbers of tokens for which `verify` has programs.
VERIFIED = (4, 8, MAX_VERIFIED)
# Heuristic: rows that a program attends for; to start one takes 0.1 ms.
GROUP = 8
# Heuristic: layers in a program that has one row. More compile for longer.
LAYERS = 4


class XlaSlotDecoder:
    """See `SlotDecoder`.

    Args:
        model: `OpenLlamaCausalLM`, not distributed.
        num_slots: number of sequences.
        context: most tokens of a sequence.
    """

    chunks = CHUNKS
    follows_adapters = True

    def __init__(self, model: CausalLM, num_slots: int, context: int) -> None:
        self.model = model
        self.num_slots, self.context = num_slots, context
        # The last chunk of a prompt may extend beyond its end.
        needed = context + CHUNKS[-1]
        self._most_columns = -(-needed // CACHE_BLOCK) * CACHE_BLOCK
        self.programs = layer_programs(model)
        on_jax = keras.config.backend() == "jax"
        platform = device_platform(model.backbone) if on_jax else "cpu"
        self.chunk_beside_steps = CHUNK_BESIDE_STEPS.get(platform, CHUNKS[-2])
        self.reset()

    def reset(self) -> None:
        """See `SlotDecoder.reset`."""
        self.lengths = [0] * self.num_slots
        self._final_lengths = [1] * self.num_slots
        self._caches = [None] * self.num_slots

    def open(self, slot: int, final_length: int) -> None:
        """See `SlotDecoder.open`."""
        self.programs.refresh()
        self.lengths[slot] = 0
        self._final_lengths[slot] = final_length
        if self._columns(slot) > MIN_CACHE_LENGTH:
            self._caches[slot] = None  # The next sequence may be short.

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> None:
        """See `SlotDecoder.prefill`."""
        self._feed(slot, tokens, start, self.chunks)

    def verify(self, slot: int, tokens: Sequence[int], start: int) -> np.ndarray:
        """See `SlotDecoder.verify`."""
        sizes = VERIFIED if len(tokens) <= MAX_VERIFIED else self.chunks
        x = self._feed(slot, tokens, start, sizes)
        layers = [self.model.backbone.final_norm, self.model.lm_head]
        logits = self._run(_project_logits, layers, x=x)
        return np.array(as_numpy(logits)[: len(tokens)])

    def _feed(self, slot, tokens, start, sizes):
        """Feeds tokens, filled up to one of some numbers, to all layers."""
        size = min(size for size in sizes if size >= len(tokens))
        padded = np.zeros((1, size), "int32")
        padded[0, : len(tokens)] = tokens
        self._reserve(slot, start + size)
        backbone = self.model.backbone
        x, cos, sin = self._run(
            _embed,
            [backbone.token_embedding, backbone.rotary_embedding],
            tokens=padded,
            positions=np.arange(start, start + size, dtype="int32")[None],
            final_lengths=np.array([self._final_lengths[slot]], "int32"),
        )
        cache = self._caches[slot]
        for number, layer in enumerate(backbone.transformer_layers):
            x, cache[number] = self._run(
                *(_prefill_layer, [layer]),
                donate=("x", "cache"),
                x=x,
                cos=cos,
                sin=sin,
                cache=cache[number],
                start=np.int32(start),
            )
        self.lengths[slot] = start + len(tokens)
        return x

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """See `SlotDecoder.step`."""
        for slot in slots:
            self._reserve(slot, self.lengths[slot] + 1)
        if len(slots) == 1:
            return self._step_one(slots[0], tokens[0])
        rows = 1 << (len(slots) - 1).bit_length()
        slots = list(slots)
        # The matrix products of some more rows take no more time than compiling them.
        padded = slots + slots[-1:] * (rows - len(slots))
        tokens = [*tokens, *[0] * (rows - len(tokens))]
        positions = [np.int32(self.lengths[slot]) for slot in padded]
        x, heads, cos, sin = self._begin(tokens, positions, padded)
        layers = self.model.backbone.transformer_layers
        groups = self._groups(slots)
        for number, layer in enumerate(layers):
            contexts = [None] * len(slots)
            for group in groups:
                caches = tuple(self._caches[slots[row]][number] for row in group)
                found, caches = self._run(
                    _attend_rows,
                    donate=("caches",),
                    heads=tuple(heads[row] for row in group),
                    caches=caches,
                    positions=tuple(positions[row] for row in group),
                )
                for row, context, cache in zip(group, found, caches, strict=True):
                    contexts[row] = context
                    self._caches[slots[row]][number] = cache
            contexts = (*contexts, *contexts[-1:] * (rows - len(slots)))
            if number + 1 < len(layers):
                x, heads = self._run(
                    *(_finish_and_begin, [layer, layers[number + 1]]),
                    donate=("x",),
                    x=x,
                    contexts=contexts,
                    cos=cos,
                    sin=sin,
                )
        head = [self.model.backbone.final_norm, self.model.lm_head]
        logits = self._run(_finish, [layer, *head], x=x, contexts=contexts)
        for slot in slots:
            self.lengths[slot] += 1
        return np.array(as_numpy(logits)[: len(slots)])

    def _step_one(self, slot, token):
        """A step of one row: its attention needs no programs of its own."""
        position = np.int32(self.lengths[slot])
        x, (heads,), cos, sin = self._begin([token], [position], [slot])
        layers = self.model.backbone.transformer_layers
        caches = self._caches[slot]
        last = len(layers) - 1
        for start in range(0, last, LAYERS):
            end = min(start + LAYERS, last)
            x, heads, caches[start:end] = self._run(
                *(_advance, layers[start : end + 1]),
                donate=("x", "caches"),
                x=x,
                heads=heads,
                caches=tuple(caches[start:end]),
                position=position,
                cos=cos,
                sin=sin,
            )
        logits, caches[last] = self._run(
            _attend_and_finish,
            [layers[last], self.model.backbone.final_norm, self.model.lm_head],
            donate=("cache",),
            x=x,
            heads=heads,
            cache=caches[last],
            position=position,
        )
        self.lengths[slot] += 1
        return np.array(as_numpy(logits))

    def read_prefix(self, slot: int, length: int) -> Any:
        """See `SlotDecoder.read_prefix`."""
        columns = -(-length // CACHE_BLOCK) * CACHE_BLOCK
        # A program is made for each number of columns, so there are few of them.
        read = _reader(min(columns, self._columns(slot)))
        return [self._run(read, pair=pair) for pair in self._caches[slot]]

    def write_prefix(self, slot: int, prefix: Any, length: int) -> None:
        """See `SlotDecoder.write_prefix`."""
        self._reserve(slot, prefix[0][0].shape[1])
        cache = self._caches[slot]
        for number, pair in enumerate(prefix):
            cache[number] = self._write(cache[number], pair)
        self.lengths[slot] = length

    def _groups(self, slots):
        """Rows whose buffers have the same size, in groups of 1 or `GROUP`."""
        by_columns = collections.defaultdict(list)
        for row, slot in enumerate(slots):
            by_columns[self._columns(slot)].append(row)
        groups = []
        for rows in by_columns.values():
            whole = len(rows) // GROUP * GROUP
            groups += [rows[i : i + GROUP] for i in range(0, whole, GROUP)]
            groups += [[row] for row in rows[whole:]]
        return groups

    def _begin(self, tokens, positions, slots):
        backbone = self.model.backbone
        return self._run(
            _embed_and_begin,
            [
                backbone.token_embedding,
                backbone.rotary_embedding,
                backbone.transformer_layers[0],
            ],
            tokens=np.array(tokens, "int32")[:, None],
            positions=np.array(positions, "int32")[:, None],
            final_lengths=np.array([self._final_lengths[s] for s in slots], "int32"),
        )

    def _run(self, function, layers=(), donate=(), **inputs):
        return self.programs.run(function, layers, donate, **inputs)

    def _write(self, cache, pair):
        return self._run(_write, donate=("cache",), cache=cache, pair=tuple(pair))

    def _columns(self, slot):
        cache = self._caches[slot]
        return 0 if cache is None else cache[0][0].shape[1]

    def _reserve(self, slot, columns):
        """Enlarges the buffers of a slot to a number of columns."""
        if columns <= self._columns(slot):
            return
        columns = min(padded_cache_length(columns), self._most_columns)
        old = self._caches[slot]
        new = list(init_cache(self.model.backbone, 1, columns))
        if old is not None and self.lengths[slot]:
            new = [self._write(*pairs) for pairs in zip(new, old, strict=True)]
        self._caches[slot] = new


# The functions below are programs of `layer_programs`. In all of them, `x` is
# `(rows, length, hidden_dim)`, and the heads of a row are a tuple of its queries, keys
# and values `(1, heads, 1, head_dim)`.


def _embed(embedding, rotary_embedding, tokens, positions, final_lengths):
    cos, sin = rotary_embedding(positions, final_lengths)
    return embedding(tokens), cos, sin


def _embed_and_begin(embedding, rotary, layer, tokens, positions, final_lengths):
    x, cos, sin = _embed(embedding, rotary, tokens, positions, final_lengths)
    x = ops.cast(x, layer.compute_dtype)
    return x, _heads(layer, x, cos, sin), cos, sin


def _heads(layer, x, cos, sin):
    """The heads of each row of a step."""
    normed = layer.self_attention_norm(x)
    heads = layer.self_attention.project_heads(normed, cos, sin)
    rows = range(x.shape[0])
    return tuple(tuple(head[row : row + 1] for head in heads) for row in rows)


def _attend_rows(heads, caches, positions):
    rows = zip(heads, caches, positions, strict=True)
    return tuple(zip(*(_attend(*row) for row in rows), strict=True))


def _attend(heads, cache, position):
    """Writes the keys and values of one row, and attends to all up to them."""
    query, *updates = heads
    cache = tuple(
        update_cache(whole, update[0], position)
        for whole, update in zip(cache, updates, strict=True)
    )
    columns = ops.arange(cache[0].shape[1], dtype="int32")
    bias = ops.where(columns <= position, 0.0, MASKED_SCORE)
    return attend_cached(query, *cache, bias[None, None]), cache


def _finish_layer(layer, x, contexts):
    context = ops.concatenate(contexts, axis=0)
    x = x + layer.self_attention.project_output(context)
    return x + layer.feedforward(layer.feedforward_norm(x))


def _finish_and_begin(layer, next_layer, x, contexts, cos, sin):
    x = _finish_layer(layer, x, contexts)
    return x, _heads(next_layer, x, cos, sin)


def _advance(*layers, x, heads, caches, position, cos, sin):
    """Feeds one row to the layers, but to the last one only up to its heads."""
    written = []
    for layer, next_layer, cache in zip(layers, layers[1:], caches, strict=False):
        context, cache = _attend(heads, cache, position)
        written.append(cache)
        x, (heads,) = _finish_and_begin(layer, next_layer, x, [context], cos, sin)
    return x, heads, written


def _attend_and_finish(layer, norm, head, x, heads, cache, position):
    context, cache = _attend(heads, cache, position)
    return _finish(layer, norm, head, x, [context]), cache


def _finish(layer, norm, head, x, contexts):
    logits = head(norm(_finish_layer(layer, x, contexts)))
    return ops.cast(logits[:, 0], "float32")


def _project_logits(norm, head, x):
    return ops.cast(head(norm(x))[0], "float32")


def _prefill_layer(layer, x, cos, sin, cache, start):
    columns = start + ops.arange(x.shape[1], dtype="int32")
    keys = ops.arange(cache[0].shape[1], dtype="int32")
    bias = ops.where(keys[None] <= columns[:, None], 0.0, MASKED_SCORE)[None]
    bias = ops.tile(bias, (cache[0].shape[0], 1, 1))
    x, cache = layer(x, cos, sin, bias, cache=tuple(cache), column=start)
    return x, tuple(cache)


@functools.cache
def _reader(columns):
    """A program that copies the first columns of keys and values."""

    def read(pair):
        # Without `copy`, JAX returns an array itself if all of it is read.
        return tuple(ops.copy(x[:, :columns]) for x in pair)

    return read


def _write(cache, pair):
    """Writes keys and values to the first columns."""
    start = np.int32(0) if keras.config.backend() == "jax" else 0
    return tuple(
        update_cache(*arrays, start) for arrays in zip(cache, pair, strict=True)
    )
