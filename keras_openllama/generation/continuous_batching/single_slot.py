"""Slot decoders with one slot, for sequences that are generated one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from keras_openllama.generation.continuous_batching.slot_decoder import (
    SlotDecoder,
    make_slot_decoder,
)
from keras_openllama.generation.continuous_batching.slot_sampler import SlotSampler
from keras_openllama.generation.kv_cache import padded_cache_length
from keras_openllama.generation.sampling.config import SamplingConfig

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM


@dataclasses.dataclass(frozen=True)
class SequenceOptions:
    """What a draft needs to know of a sequence.

    Attributes:
        prompt_ids: token ids of the prompt.
        limit: most new tokens.
        sampling: how tokens are chosen, with a seed.
        sample: number of the sequence among those of the prompt, from 0.
        stop_token_ids: ids that end the sequence.
    """

    prompt_ids: Sequence[int]
    limit: int
    sampling: SamplingConfig
    sample: int = 0
    stop_token_ids: Sequence[int] = ()

    @property
    def final_length(self) -> int:
        """Most tokens of the sequence."""
        return len(self.prompt_ids) + self.limit


def open_slot(
    model: CausalLM, options: SequenceOptions
) -> tuple[SlotDecoder, SlotSampler]:
    """Returns a decoder and a sampler whose only slot is open for a sequence.

    Args:
        model: `OpenLlamaCausalLM`, compiled.
        options: the sequence.

    Raises:
        ValueError: see `make_slot_decoder`.
    """
    # Rounded up, so that few sizes of buffers are compiled.
    decoder = make_slot_decoder(model, 1, padded_cache_length(options.final_length))
    decoder.open(0, options.final_length)
    sampler = SlotSampler(model, 1)
    sampler.open(
        0,
        options.sampling,
        options.prompt_ids,
        options.stop_token_ids,
        options.limit,
        options.sample,
    )
    return decoder, sampler


def write_prefix(decoder: SlotDecoder, tokens: Sequence[int], start: int) -> None:
    """Writes tokens to the cache of the first slot, in chunks with little padding.

    Args:
        decoder: the decoder.
        tokens: token ids, possibly none.
        start: position of the first of them.
    """
    tokens = list(tokens)
    while tokens:
        fitting = [size for size in decoder.chunks if size <= len(tokens)]
        size = max(fitting, default=len(tokens))
        decoder.prefill(0, tokens[:size], start)
        tokens, start = tokens[size:], start + size
