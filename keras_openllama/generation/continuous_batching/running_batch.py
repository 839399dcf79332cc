"""The requests in the slots of an `Engine`, which its thread advances."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_openllama.generation.continuous_batching.request import (
    FinishReason,
    RequestHandle,
    TokenEvent,
)
from keras_openllama.generation.continuous_batching.slot_decoder import (
    make_slot_decoder,
)
from keras_openllama.generation.continuous_batching.slot_sampler import (
    ChosenToken,
    SlotSampler,
)
from keras_openllama.generation.prompt_cache import common_length

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM
    from keras_openllama.generation.continuous_batching.named_adapters import (
        NamedAdapters,
    )
    from keras_openllama.generation.continuous_batching.stats import EngineStats
    from keras_openllama.generation.prompt_cache import PromptCache

_LOGGER = logging.getLogger(__name__)
# Heuristic: to copy fewer tokens is not worth it.
LEAST_CACHED_TOKENS = 16
# Heuristic: tokens of a prompt whose logits are in memory at once.
SCORED_CHUNK = 256


class SlotSequence:
    """A request in a slot.

    Args:
        handle: its handle.
        slot: number of the slot.

    Attributes:
        handle: as above.
        slot: as above.
        read: the tokens in the cache.
        unread: the tokens of the prompt that are still to be written to the cache.
        scored: the tokens of the prompt with log-probabilities, if requested.
        next_token: the token that the next step feeds.
        variant: see `CachedPrefix`.
    """

    def __init__(self, handle: RequestHandle, slot: int) -> None:
        self.handle = handle
        self.slot = slot
        self.read: list[int] = []
        self.unread: list[int] = []
        self.scored: list[ChosenToken] = []
        self.variant: Any = None
        self.next_token: Any = handle.request.prompt_ids[-1]


class RunningBatch:
    """A fixed number of slots, each with a request or free.

    An exception of one request ends it, and no other. Not for use by several threads,
    except for `num_free` and `handles`.

    Args:
        model: `OpenLlamaCausalLM`.
        num_slots: most sequences that are decoded at once.
        context: most tokens of a sequence.
        cache: saved beginnings of sequences, or `None`.
        stats: counts what happens.
        adapters: sets of adapters that requests choose from, or `None`.

    Raises:
        ValueError: for a model that `make_slot_decoder` does not support, or
            `adapters` of a model that ONNX Runtime computes.
    """

    def __init__(
        self,
        model: CausalLM,
        num_slots: int,
        context: int,
        cache: PromptCache | None,
        stats: EngineStats,
        adapters: NamedAdapters | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._stats = stats
        self._adapters = adapters
        self._decoder = make_slot_decoder(
            *(model, num_slots, context), named_adapters=adapters is not None
        )
        if adapters is not None and not self._decoder.follows_adapters:
            raise ValueError(
                "A quantized model runs with ONNX Runtime on a CPU, which compiles the "
                "adapters into its graph, so that requests cannot choose them by name. "
                "Load the model without quantization, or call `load_adapters` to use "
                f"one set for all requests. Received: adapters={adapters.names}"
            )
        self._sampler = SlotSampler(model, num_slots)
        self._slots: list[SlotSequence | None] = [None] * num_slots

    @property
    def num_free(self) -> int:
        """Number of free slots."""
        return self._slots.count(None)

    @property
    def handles(self) -> list[RequestHandle]:
        """The handles of the requests in the slots."""
        return [sequence.handle for sequence in self._sequences()]

    def place(self, handle: RequestHandle) -> SlotSequence:
        """Gives a free slot to a request, which `open` then begins.

        Args:
            handle: the handle of a request, whose adapters are those of the others.
        """
        slot = self._slots.index(None)
        self._slots[slot] = sequence = SlotSequence(handle, slot)
        self._count()
        return sequence

    def open(self, sequence: SlotSequence) -> None:
        """Begins a request: copies what is saved of its prompt.

        Args:
            sequence: a result of `place`.
        """
        with self._failure_ends(sequence):
            request = sequence.handle.request
            if self._adapters is not None:
                self._adapters.use(request.adapter)
            self._sampler.open(
                sequence.slot,
                request.sampling,
                request.prompt_ids,
                request.stop_token_ids,
                request.max_new_tokens,
                request.sample,
            )
            final_length = len(request.prompt_ids) + request.max_new_tokens
            self._decoder.open(sequence.slot, final_length)
            sequence.variant = self._rope_length(final_length), request.adapter
            if request.prompt_logprobs is not None:
                sequence.unread = list(request.prompt_ids[:-1])
            elif request.max_new_tokens:
                sequence.unread = list(request.prompt_ids[:-1])
                self._reuse_prefix(sequence)
            self._stats.prompt_tokens += len(request.prompt_ids)
            if not sequence.unread:
                self._end_prompt(sequence)

    def advance(self) -> None:
        """Computes at most one chunk of a prompt, and one step of the others."""
        sequences = self._sequences()
        prefilling = [sequence for sequence in sequences if sequence.unread]
        decoding = [sequence for sequence in sequences if not sequence.unread]
        if prefilling:
            oldest = min(prefilling, key=lambda sequence: sequence.handle.id)
            decoder = self._decoder
            size = decoder.chunk_beside_steps if decoding else decoder.chunks[-1]
            self._prefill(oldest, size)
        if decoding:
            self._decode(decoding)

    def end_cancelled(self) -> None:
        """Ends the requests that were cancelled."""
        for sequence in self._sequences():
            if sequence.handle.is_cancelled:
                with self._failure_ends(sequence):
                    self._save_prefix(sequence)
                    self._end(sequence, "cancelled")

    def fail(self, error: Exception) -> None:
        """Ends all requests after an exception."""
        for sequence in self._sequences():
            self._end(sequence, "error", error)

    def finish(
        self,
        handle: RequestHandle,
        reason: FinishReason,
        error: Exception | None = None,
    ) -> None:
        """Passes the end of a request without a further token to its `on_event`.

        Args:
            handle: the handle of a request, in a slot or not.
            reason: why it ends.
            error: see `TokenEvent`.
        """
        self._send_last(handle, TokenEvent(None, finish_reason=reason, error=error))

    def _sequences(self):
        return [sequence for sequence in self._slots if sequence]

    def _count(self):
        self._stats.active = len(self._slots) - self.num_free

    # ----- Prompts

    def _rope_length(self, final_length):
        """What the rotary angles of a sequence depend on."""
        rotary = self._model.backbone.rotary_embedding
        return max(final_length, rotary.max_sequence_length) * rotary.is_dynamic

    def _reuse_prefix(self, sequence):
        """Copies the beginning of a prompt from the cache, or from another slot."""
        tokens = sequence.unread
        if self._cache is not None and len(tokens) >= LEAST_CACHED_TOKENS:
            prefix, length = self._cache.find(tokens, sequence.variant)
            self._write_prefix(sequence, prefix, length)
        self._copy_from_slots(sequence)

    def _copy_from_slots(self, sequence):
        """Copies what another slot has of a prompt, such as an equal prompt's."""
        tokens = np.array(sequence.read + sequence.unread, "int32")
        best, length = None, len(sequence.read) + LEAST_CACHED_TOKENS - 1
        for other in self._sequences():
            if other is not sequence and other.variant == sequence.variant:
                found = common_length(np.array(other.read, "int32"), tokens)
                if found > length:
                    best, length = other.slot, found
        if best is not None:
            prefix = self._decoder.read_prefix(best, length)
            self._write_prefix(sequence, prefix, length)

    def _write_prefix(self, sequence, prefix, length):
        if length < LEAST_CACHED_TOKENS:
            return
        self._decoder.write_prefix(sequence.slot, prefix, length)
        tokens = sequence.read + sequence.unread
        sequence.read, sequence.unread = tokens[:length], tokens[length:]
        self._stats.cached_tokens += length - sequence.handle.cached_tokens
        sequence.handle.cached_tokens = length

    def _save_prefix(self, sequence):
        tokens = sequence.read
        if self._cache is None or len(tokens) < LEAST_CACHED_TOKENS:
            return
        if not self._cache.contains(tokens, sequence.variant):
            prefix = self._decoder.read_prefix(sequence.slot, len(tokens))
            self._cache.add(tokens, prefix, sequence.variant)

    def _prefill(self, sequence, size):
        with self._failure_ends(sequence):
            if sequence.handle.request.prompt_logprobs is None:
                self._copy_from_slots(sequence)
            if sequence.unread:
                self._read_chunk(sequence, size)
            if not sequence.unread:
                self._end_prompt(sequence)

    def _read_chunk(self, sequence, size):
        request, start = sequence.handle.request, len(sequence.read)
        if request.prompt_logprobs is None:
            chunk = sequence.unread[:size]
            self._decoder.prefill(sequence.slot, chunk, start)
        else:
            chunk = sequence.unread[: min(size, SCORED_CHUNK)]
            logits = self._decoder.verify(sequence.slot, chunk, start)
            following = request.prompt_ids[start + 1 : start + 1 + len(chunk)]
            sequence.scored += self._sampler.score(
                logits, following, request.prompt_logprobs
            )
        sequence.read += chunk
        sequence.unread = sequence.unread[len(chunk) :]

    def _end_prompt(self, sequence):
        """Passes the scores of a prompt, which has been read, to its request."""
        handle = sequence.handle
        if handle.request.prompt_logprobs is not None:
            handle.on_event(TokenEvent(None, prompt=tuple(sequence.scored)))
        if handle.request.max_new_tokens == 0:
            self._save_prefix(sequence)
            self._end(sequence, "length")

    # ----- Decoding

    def _decode(self, decoding):
        allowed = self._allowed(decoding)
        decoding = [s for s in decoding if s.slot in allowed]
        if not decoding:
            return
        slots = [sequence.slot for sequence in decoding]
        try:
            logits = self._decoder.step(slots, [s.next_token for s in decoding])
            chosen = self._sampler.choose(
                logits,
                slots,
                [s.handle.request.top_logprobs for s in decoding],
                [allowed[slot] for slot in slots],
            )
        except Exception as error:
            _LOGGER.exception("A decoding step failed")
            # A failed program may have destroyed any of the caches.
            self.fail(error)
            self._decoder.reset()
            return
        self._stats.steps += 1
        for sequence, token in zip(decoding, chosen, strict=True):
            with self._failure_ends(sequence):
                self._emit(sequence, token)

    def _allowed(self, decoding):
        """Which tokens the constraints allow, by slot; without those that fail."""
        masks = {}
        for sequence in decoding:
            constraint = sequence.handle.request.constraint
            with self._failure_ends(sequence):
                mask = None
                if constraint is not None:
                    mask = np.asarray(constraint.allowed(), "bool")
                    self._check_mask(mask)
                masks[sequence.slot] = mask
        return masks

    def _check_mask(self, mask):
        size = self._model.backbone.vocabulary_size
        if mask.shape != (size,) or not mask.any():
            raise ValueError(
                f"`constraint.allowed` must return an array of shape ({size},) that "
                f"allows some token. Received: shape {mask.shape}, {mask.sum()} allowed"
            )

    def _emit(self, sequence, chosen):
        """Passes a token to a request, and ends the request if it is the last one."""
        handle, request = sequence.handle, sequence.handle.request
        token_id = chosen.token_id
        sequence.read.append(sequence.next_token)
        sequence.next_token = token_id
        if handle.first_token is None:
            handle.first_token = time.monotonic()
            self._stats.add_first_token(handle.first_token - handle.submitted)
        handle.new_tokens.append(token_id)
        self._stats.generated_tokens += 1
        reason = None
        if token_id in request.stop_token_ids:
            reason = "stop"
        elif len(handle.new_tokens) == request.max_new_tokens:
            reason = "length"
        if request.constraint is not None and reason != "stop":
            request.constraint.accept(token_id)
        event = TokenEvent(*chosen, finish_reason=reason)
        if reason is None:
            handle.on_event(event)
        else:
            self._save_prefix(sequence)
            self._free(sequence)
            self._send_last(handle, event)

    # ----- Ends

    @contextlib.contextmanager
    def _failure_ends(self, sequence: SlotSequence) -> Iterator[None]:
        """An exception in the block ends this request, and no other."""
        try:
            yield
        except Exception as error:
            _LOGGER.warning("Request %d failed: %r", sequence.handle.id, error)
            self._end(sequence, "error", error)

    def _end(self, sequence, reason, error=None):
        self._free(sequence)
        self.finish(sequence.handle, reason, error)

    def _free(self, sequence):
        if self._slots[sequence.slot] is sequence:
            self._slots[sequence.slot] = None
            self._count()

    def _send_last(self, handle, event):
        if handle.finished.is_set():
            return
        self._stats.finished[event.finish_reason] += 1
        try:
            handle.on_event(event)
        except Exception:
            _LOGGER.exception("`on_event` of request %d failed", handle.id)
        handle.finished.set()
