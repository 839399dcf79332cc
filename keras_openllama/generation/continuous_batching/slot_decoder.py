"""KV caches of several sequences that begin and end independently.

The batch of a `TokenLoop` begins and ends as a whole. A `SlotDecoder` has a fixed
number of slots, each with the cache of one sequence from its first column on, and its
own length. A step computes any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import keras
import numpy as np

from keras_openllama.generation.onnx_runtime.token_loop import uses_onnx_runtime
from keras_openllama.generation.sharding import state_shardings

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM


class SlotDecoder(Protocol):
    """The KV caches of a fixed number of sequences, and the network that fills them.

    Not for use by several threads at once.

    Attributes:
        num_slots: number of sequences.
        context: most tokens of a sequence.
        lengths: number of tokens in the cache of each slot.
        chunks: numbers of tokens that `prefill` computes at once, ascending.
        chunk_beside_steps: number of tokens that `prefill` best computes at once while
            other sequences wait for their next tokens.
        follows_adapters: whether `open` adopts a change of the model's adapters.
    """

    num_slots: int
    context: int
    lengths: list[int]
    chunks: tuple[int, ...]
    chunk_beside_steps: int
    follows_adapters: bool

    def open(self, slot: int, final_length: int) -> None:
        """Begins a sequence.

        Args:
            slot: number of the slot.
            final_length: length of the sequence after generation, on which dynamic RoPE
                scaling depends.
        """

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> None:
        """Writes a part of a prompt to the cache of a slot.

        Args:
            slot: number of the slot.
            tokens: token ids, at least one and at most `chunks[-1]`.
            start: position of the first of them; later ones are forgotten.
        """

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Feeds one token to each of some sequences.

        Args:
            slots: numbers of different slots.
            tokens: a token id for each.

        Returns:
            float32 `(len(slots), vocabulary_size)`, the logits of the next tokens. The
            array may be modified, and is valid until the next step.
        """

    def verify(self, slot: int, tokens: Sequence[int], start: int) -> np.ndarray:
        """Feeds several tokens to one sequence, and returns the logits after each.

        Args:
            slot: number of the slot.
            tokens: token ids, at least one and at most `chunks[-1]`. Programs for up
                to `kv_cache.MAX_VERIFIED` are fast.
            start: position of the first of them; later ones are forgotten.

        Returns:
            float32 `(len(tokens), vocabulary_size)`, as that of `step`. Afterwards the
            length of the slot is `start + len(tokens)`.
        """

    def read_prefix(self, slot: int, length: int) -> Any:
        """Copies the keys and values of the first tokens of a slot.

        Args:
            slot: number of the slot.
            length: number of tokens, at most `lengths[slot]`.

        Returns:
            For each layer a pair of arrays in the memory of the backend; they may have
            more tokens than `length`.
        """

    def write_prefix(self, slot: int, prefix: Any, length: int) -> None:
        """Writes keys and values to the first columns of a slot.

        Args:
            slot: number of the slot.
            prefix: a result of `read_prefix`.
            length: how many of its tokens to use; the length of the slot afterwards.
        """

    def reset(self) -> None:
        """Releases all caches, after an error in a step."""


def make_slot_decoder(
    model: CausalLM, num_slots: int, context: int, named_adapters: bool = False
) -> SlotDecoder:
    """Creates the decoder for a model.

    Args:
        model: `OpenLlamaCausalLM`.
        num_slots: number of sequences.
        context: most tokens of a sequence.
        named_adapters: whether requests choose adapters by name.

    Returns:
        A decoder on ONNX Runtime for models for which `uses_onnx_runtime` holds,
        otherwise on the backend of Keras.

    Raises:
        ValueError: if the model is sharded over a mesh, or has a KV cache of 8 bits.

    Example:
        >>> decoder = make_slot_decoder(lm, num_slots=2, context=64)
        >>> decoder.open(0, final_length=8)
        >>> decoder.prefill(0, [1, 357], start=0)  # "The"
        >>> logits = decoder.step([0], [1239])  # " sea"
        >>> lm.preprocessor.tokenizer.id_to_token(int(logits[0].argmax()))
        '▁sh'
    """
    if model.kv_cache_dtype is not None:
        raise ValueError(
            "Continuous batching needs a KV cache that is not of 8 bits. "
            "Compile the model without `kv_cache_dtype`, or call `generate`. Received: "
            f"a model with kv_cache_dtype={model.kv_cache_dtype!r}"
        )
    if uses_onnx_runtime(model, named_adapters):
        from keras_openllama.generation.onnx_runtime.slot_decoder import OnnxSlotDecoder

        return OnnxSlotDecoder(model, num_slots, context)
    if keras.config.backend() == "torch":
        from keras_openllama.generation.pytorch.slot_decoder import TorchSlotDecoder

        return TorchSlotDecoder(model, num_slots, context)
    if state_shardings(model.backbone)[0] is not None:
        raise ValueError(
            "Continuous batching does not support models that are sharded over a mesh. "
            "Load the model without a distribution, or call `generate` with batches."
        )
    from keras_openllama.generation.continuous_batching.slot_decoder_xla import (
        XlaSlotDecoder,
    )

    return XlaSlotDecoder(model, num_slots, context)
