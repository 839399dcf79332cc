"""Continuous batching: requests join and leave between the steps of one batch.

One thread runs the model. Between two decoding steps it gives free slots to waiting
requests, and computes one chunk of a prompt that is new: a small one while others
decode, so that they do not stall.

The tokens of a prompt except the last are written to the cache first. The last one is
fed by a decoding step, as each new token is.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_openllama.generation.continuous_batching.request import (
    EngineRequest,
    EngineStoppedError,
    QueueFullError,
    RequestHandle,
    TokenConstraint,
    TokenEvent,
)
from keras_openllama.generation.continuous_batching.slot_decoder import (
    make_slot_decoder,
)
from keras_openllama.generation.continuous_batching.slot_sampler import SlotSampler
from keras_openllama.generation.continuous_batching.stats import EngineStats
from keras_openllama.generation.prompt_cache import PromptCache, common_length
from keras_openllama.utils.validation import check_integer

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

__all__ = [
    "Engine",
    "EngineRequest",
    "EngineStats",
    "EngineStoppedError",
    "QueueFullError",
    "RequestHandle",
    "TokenConstraint",
    "TokenEvent",
]

_LOGGER = logging.getLogger(__name__)
# Heuristic: to copy fewer tokens is not worth it.
LEAST_CACHED_TOKENS = 16


class Engine:
    """Generates tokens for many requests at once.

    What a request gets does not depend on the other requests, up to rounding.

    Args:
        model: `OpenLlamaCausalLM`. Its weights must not change while the engine runs.
        num_slots: most sequences that are decoded at once. Each has a KV cache of
            `context` tokens, which is allocated when it is first used.
        context: most tokens of a sequence, prompt and new ones; `None` for the context
            of the model.
        max_queue: most requests that wait for a slot.
        prompt_cache_bytes: most bytes of keys and values of ended requests that are
            saved for prompts that begin alike; 0 saves none. Or a `PromptCache`.

    Attributes:
        stats: an `EngineStats`.
        context: most tokens of a sequence.
        error: the exception after which the engine could not go on; `None` before.

    Raises:
        ValueError: for numbers out of range, or a model on several devices.

    Example:
        >>> from keras_openllama import SamplingConfig
        >>> greedy = SamplingConfig(temperature=0)
        >>> with Engine(lm, num_slots=2, context=64) as engine:
        ...     request = EngineRequest([1, 357, 1239], 3, greedy)  # "The sea"
        ...     ids = [event.token_id for event in engine.stream(request)]
        >>> lm.preprocessor.tokenizer.detokenize(ids)
        'shines,'
    """

    def __init__(
        self,
        model: CausalLM,
        num_slots: int = 16,
        context: int | None = None,
        max_queue: int = 64,
        prompt_cache_bytes: int | PromptCache = 2 << 30,
    ) -> None:
        num_slots = check_integer("num_slots", num_slots)
        longest = model.backbone.context_length
        context = check_integer("context", context or longest, most=longest)
        self._max_queue = check_integer("max_queue", max_queue, least=0)
        self.context = context
        self.stats = EngineStats()
        self.error: Exception | None = None
        self._model = model
        cache = prompt_cache_bytes
        if not isinstance(cache, PromptCache):
            check_integer("prompt_cache_bytes", cache, least=0)
            cache = PromptCache(cache) if cache else None
        self._cache = cache
        if cache is not None:
            cache.use_with(model)
        self._decoder = make_slot_decoder(model, num_slots, context)
        self._sampler = SlotSampler(model, num_slots)
        self._slots: list[_Sequence | None] = [None] * num_slots
        self._queue: collections.deque[RequestHandle] = collections.deque()
        self._numbers = itertools.count()
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    # ----- From any thread

    def start(self) -> None:
        """Starts the thread that runs the model.

        Raises:
            EngineStoppedError: if the engine was shut down.
        """
        with self._condition:
            self._check_open()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="keras_openllama.engine", daemon=True
                )
                self._thread.start()

    def submit(
        self, request: EngineRequest, on_event: Callable[[TokenEvent], None]
    ) -> RequestHandle:
        """Adds a request to the queue.

        Args:
            request: the request.
            on_event: called with each new token, from the thread of the engine: it
                must return at once. If it raises an exception, the request ends.

        Returns:
            A handle, with which the request can be cancelled.

        Raises:
            ValueError: for a malformed request; a `ContextLengthError` if it has more
                tokens than the context.
            QueueFullError: if `max_queue` requests wait already.
            EngineStoppedError: after `shutdown`, or an error.
        """
        request = request.validated(self._model, self.context)
        handle = RequestHandle(next(self._numbers), request, on_event, self._wake)
        with self._condition:
            self._check_open()
            # A free slot takes the next request before anything else happens.
            free = self._slots.count(None)
            if len(self._queue) >= self._max_queue + free:
                self.stats.rejected += 1
                raise QueueFullError(
                    f"{len(self._queue)} requests wait already, the most that are "
                    f"accepted. Try again later. Received: max_queue={self._max_queue}"
                )
            self.stats.submitted += 1
            self._queue.append(handle)
            self.stats.queued = len(self._queue)
            self._condition.notify_all()
        return handle

    def stream(self, request: EngineRequest) -> Iterator[TokenEvent]:
        """Submits a request and yields its events; blocks until each of them.

        Closing the iterator cancels the request.

        Args:
            request: the request.

        Returns:
            An iterator, which ends after the event with a `finish_reason`.

        Raises:
            ValueError: as `submit`, as are the next two; already at the call.
            QueueFullError: see there.
            EngineStoppedError: see there.
            Exception: that of the event, if the request ended with an error.
        """
        self.start()
        events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        handle = self.submit(request, events.put)

        def iterate():
            try:
                while True:
                    event = events.get()
                    if event.error is not None:
                        raise event.error
                    yield event
                    if event.finish_reason is not None:
                        return
            finally:
                handle.cancel()

        return iterate()

    def shutdown(self, drain: bool = True, timeout: float | None = None) -> None:
        """Ends the thread; afterwards no request is accepted.

        Args:
            drain: whether to complete the requests, running and waiting, first.
            timeout: seconds after which those that still run are cancelled; `None` for
                no limit.
        """
        with self._condition:
            self._is_closed = True
            if not drain:
                self._cancel_all()
            self._condition.notify_all()
            thread = self._thread
        if thread is None:
            self._run()  # Ends the requests that wait.
            return
        if thread is threading.current_thread():
            return
        thread.join(timeout)
        if thread.is_alive():
            with self._condition:
                self._cancel_all()
            thread.join()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown(drain=exception[0] is None)

    def _check_open(self):
        if self.error is not None:
            raise EngineStoppedError(
                f"The engine stopped after an error: {self.error!r}. Make a new one."
            ) from self.error
        if self._is_closed:
            raise EngineStoppedError("The engine was shut down. Make a new one.")

    def _wake(self):
        with self._condition:
            self._condition.notify_all()

    def _cancel_all(self):
        for handle in (*self._queue, *(s.handle for s in self._slots if s)):
            handle.is_cancelled = True
        self._condition.notify_all()

    # ----- From the thread of the engine

    def _run(self):
        try:
            while self._wait_for_work():
                self._advance()
        except Exception as error:
            _LOGGER.exception("The engine cannot go on")
            with self._condition:
                self.error = error
                handles = [*self._queue, *(s.handle for s in self._slots if s)]
                self._queue.clear()
                self._slots[:] = [None] * len(self._slots)
            for handle in handles:
                self._finish(handle, "error", error)

    def _wait_for_work(self):
        """Returns False when the engine is shut down and nothing is left to do."""
        with self._condition:
            while not self._queue and not any(self._slots):
                if self._is_closed:
                    return False
                self._condition.wait()
            return True

    def _advance(self):
        """Admits requests, computes at most one chunk of a prompt, and one step."""
        self._end_cancelled()
        self._admit()
        prefilling = [s for s in self._slots if s and s.unread]
        decoding = [s for s in self._slots if s and not s.unread]
        if prefilling:
            oldest = min(prefilling, key=lambda sequence: sequence.handle.id)
            chunks = self._decoder.chunks
            is_alone = not decoding
            self._prefill(oldest, chunks[-1] if is_alone else chunks[-2])
        if decoding:
            self._decode(decoding)

    def _end_cancelled(self):
        with self._condition:
            waiting = [handle for handle in self._queue if handle.is_cancelled]
            for handle in waiting:
                self._queue.remove(handle)
            self.stats.queued = len(self._queue)
        for handle in waiting:
            self._finish(handle, "cancelled")
        for sequence in list(self._slots):
            if sequence and sequence.handle.is_cancelled:
                with self._failure_ends(sequence):
                    self._save_prefix(sequence)
                    self._end(sequence, "cancelled")

    def _admit(self):
        """Gives free slots to the requests that wait, in their order."""
        while True:
            with self._condition:
                if not self._queue or None not in self._slots:
                    break
                handle = self._queue.popleft()
                slot = self._slots.index(None)
                sequence = _Sequence(handle, slot)
                self._slots[slot] = sequence
                self._count_slots()
            with self._failure_ends(sequence):
                self._open(sequence)

    def _count_slots(self):
        self.stats.queued = len(self._queue)
        self.stats.active = len(self._slots) - self._slots.count(None)

    def _open(self, sequence):
        request = sequence.handle.request
        if request.max_new_tokens == 0:
            self._end(sequence, "length")
            return
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
        sequence.rope_length = self._rope_length(final_length)
        sequence.unread = list(request.prompt_ids[:-1])
        self._reuse_prefix(sequence)
        self.stats.prompt_tokens += len(request.prompt_ids)
        self.stats.cached_tokens += sequence.handle.cached_tokens

    def _rope_length(self, final_length):
        """What the rotary angles of a sequence depend on."""
        rotary = self._model.backbone.rotary_embedding
        return max(final_length, rotary.max_sequence_length) * rotary.is_dynamic

    def _reuse_prefix(self, sequence):
        """Copies the beginning of a prompt from the cache, or from another slot."""
        tokens = np.array(sequence.unread, "int32")
        if self._cache is None or len(tokens) < LEAST_CACHED_TOKENS:
            return
        prefix, length = self._cache.find(tokens, sequence.rope_length)
        for other in self._slots:
            if other and other.rope_length == sequence.rope_length:
                found = common_length(np.array(other.read, "int32"), tokens)
                if found > length:
                    length = found
                    prefix = self._decoder.read_prefix(other.slot, length)
        if length >= LEAST_CACHED_TOKENS:
            self._decoder.write_prefix(sequence.slot, prefix, length)
            sequence.read = sequence.unread[:length]
            sequence.unread = sequence.unread[length:]
            sequence.handle.cached_tokens = length

    def _save_prefix(self, sequence):
        tokens = sequence.read
        if self._cache is None or len(tokens) < LEAST_CACHED_TOKENS:
            return
        if not self._cache.contains(tokens, sequence.rope_length):
            prefix = self._decoder.read_prefix(sequence.slot, len(tokens))
            self._cache.add(tokens, prefix, sequence.rope_length)

    def _prefill(self, sequence, size):
        with self._failure_ends(sequence):
            chunk, rest = sequence.unread[:size], sequence.unread[size:]
            start = len(sequence.read)
            self._decoder.prefill(sequence.slot, chunk, start)
            sequence.read += chunk
            sequence.unread = rest

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
            for sequence in [s for s in self._slots if s]:
                self._end(sequence, "error", error)
            self._decoder.reset()
            return
        self.stats.steps += 1
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
            self.stats.add_first_token(handle.first_token - handle.submitted)
        handle.new_tokens.append(token_id)
        self.stats.generated_tokens += 1
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

    @contextlib.contextmanager
    def _failure_ends(self, sequence):
        """An exception in the block ends this request, and no other."""
        try:
            yield
        except Exception as error:
            _LOGGER.warning("Request %d failed: %r", sequence.handle.id, error)
            self._end(sequence, "error", error)

    def _end(self, sequence, reason, error=None):
        self._free(sequence)
        self._finish(sequence.handle, reason, error)

    def _free(self, sequence):
        with self._condition:
            if self._slots[sequence.slot] is sequence:
                self._slots[sequence.slot] = None
                self._count_slots()

    def _finish(self, handle, reason, error=None):
        self._send_last(handle, TokenEvent(None, finish_reason=reason, error=error))

    def _send_last(self, handle, event):
        if handle.finished.is_set():
            return
        self.stats.finished[event.finish_reason] += 1
        try:
            handle.on_event(event)
        except Exception:
            _LOGGER.exception("`on_event` of request %d failed", handle.id)
        handle.finished.set()


class _Sequence:
    """A request in a slot.

    Attributes:
        handle: its handle.
        slot: number of the slot.
        read: the tokens in the cache.
        unread: the tokens of the prompt that are still to be written to the cache.
        next_token: the token that the next step feeds.
        rope_length: see `CachedPrefix`.
    """

    def __init__(self, handle: RequestHandle, slot: int) -> None:
        self.handle = handle
        self.slot = slot
        self.read: list[int] = []
        self.unread: list[int] = []
        self.rope_length = 0
        self.next_token: Any = handle.request.prompt_ids[-1]
