"""`SlotDecoder` on PyTorch: plain functions of `network`, run eagerly."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.generation.kv_cache import init_cache
from keras_openllama.generation.pytorch.network import (
    TorchNetwork,
    finish_layer,
    project,
    project_heads,
    rms_norm,
    weights_key,
)
from keras_openllama.generation.pytorch.onednn_weights import without_onednn

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

# Heuristic, see `prefill_chunks.prefill_chunks`.
CHUNKS = {"cpu": (128, 256)}
ACCELERATOR_CHUNKS = (512, 2048)


class TorchSlotDecoder:
    """See `SlotDecoder`.

    Args:
        model: `OpenLlamaCausalLM`.
        num_slots: number of sequences.
        context: most tokens of a sequence.
    """

    follows_adapters = True

    def __init__(self, model: CausalLM, num_slots: int, context: int) -> None:
        self.model = model
        self.num_slots, self.context = num_slots, context
        self.device = model.weights[0].value.device
        self.chunks = CHUNKS.get(self.device.type, ACCELERATOR_CHUNKS)
        self.chunk_beside_steps = self.chunks[0]
        self._weights = None
        self.reset()

    def reset(self) -> None:
        """See `SlotDecoder.reset`."""
        self.lengths = [0] * self.num_slots
        self._final_lengths = [1] * self.num_slots
        self._caches = [None] * self.num_slots

    def open(self, slot: int, final_length: int) -> None:
        """See `SlotDecoder.open`."""
        weights = weights_key(self.model)
        if weights != self._weights:
            self._weights, self._network = weights, TorchNetwork(self.model)
        self.lengths[slot] = 0
        self._final_lengths[slot] = final_length
        if self._caches[slot] is None:
            # Without inference mode, whose tensors could not be modified outside.
            with torch.inference_mode(False):
                backbone = self.model.backbone
                self._caches[slot] = init_cache(backbone, 1, self.context)

    @torch.no_grad()
    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> None:
        """See `SlotDecoder.prefill`."""
        self._feed(slot, tokens, start)

    @torch.no_grad()
    def verify(self, slot: int, tokens: Sequence[int], start: int) -> np.ndarray:
        """See `SlotDecoder.verify`."""
        return as_numpy(self._logits(self._feed(slot, tokens, start))[0])

    def _logits(self, x):
        x = rms_norm(x, self._network.final_norm, self._network.epsilon)
        return project(x, self._network.lm_head).float()

    def _feed(self, slot, tokens, start):
        """Feeds tokens to one slot and returns the output of the last layer."""
        end = start + len(tokens)
        positions = torch.arange(start, end, device=self.device)
        # Causal: a token sees the columns up to its own.
        columns = torch.arange(end, device=self.device)
        mask = columns[None] <= positions[:, None]

        def attend(heads, pairs):
            query, key, value = heads
            for whole, update in zip(pairs[0], (key, value), strict=True):
                whole[:, start:end] = update[0].transpose(0, 1)
            keys, values = (whole[None, :, :end] for whole in pairs[0])
            context = functional.scaled_dot_product_attention(
                *(query.transpose(1, 2), keys, values),
                attn_mask=mask if start else None,
                is_causal=not start,
                enable_gqa=query.shape[2] != keys.shape[1],
            )
            return context.transpose(1, 2)

        self.lengths[slot] = end
        return self._run([slot], [tokens], positions[None], attend)

    @torch.no_grad()
    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """See `SlotDecoder.step`."""
        lengths = [self.lengths[slot] for slot in slots]

        def attend(heads, pairs):
            queries, keys, values = heads
            contexts = []
            for row, ((key, value), length) in enumerate(
                zip(pairs, lengths, strict=True)
            ):
                key[:, length] = keys[row, 0]
                value[:, length] = values[row, 0]
                query = queries[row : row + 1].transpose(1, 2)
                context = functional.scaled_dot_product_attention(
                    *(query, key[None, :, : length + 1], value[None, :, : length + 1]),
                    enable_gqa=query.shape[1] != key.shape[0],
                )
                contexts.append(context.transpose(1, 2))
            return torch.cat(contexts)

        positions = torch.tensor(lengths, device=self.device)[:, None]
        is_single = len(slots) == 1 and self.device.type == "cpu"
        with without_onednn() if is_single else contextlib.nullcontext():
            x = self._run(slots, [[token] for token in tokens], positions, attend)
            logits = self._logits(x)[:, 0]
        for slot in slots:
            self.lengths[slot] += 1
        return as_numpy(logits)

    @torch.no_grad()
    def read_prefix(self, slot: int, length: int) -> Any:
        """See `SlotDecoder.read_prefix`."""
        return tuple(
            tuple(x[:, :length].clone() for x in pair) for pair in self._caches[slot]
        )

    @torch.no_grad()
    def write_prefix(self, slot: int, prefix: Any, length: int) -> None:
        """See `SlotDecoder.write_prefix`."""
        for pair, values in zip(self._caches[slot], prefix, strict=True):
            for whole, value in zip(pair, values, strict=True):
                whole[:, :length] = value[:, :length]
        self.lengths[slot] = length

    def _run(self, slots, tokens, positions, attend):
        """Runs the layers; `attend` writes the cache of the slots and reads it."""
        network = self._network
        final_lengths = torch.tensor(
            [self._final_lengths[slot] for slot in slots], device=self.device
        )
        cos, sin = (
            table.transpose(1, 2)
            for table in self.model.backbone.rotary_embedding(positions, final_lengths)
        )
        x = network.embed(torch.tensor(tokens, device=self.device))
        for number, layer in enumerate(network.layers):
            heads = project_heads(x, layer, cos, sin, network.head_dim, network.epsilon)
            context = attend(heads, [self._caches[slot][number] for slot in slots])
            x = finish_layer(x, context, layer, network.epsilon)
        return x
