"""Continuous batching: requests join and leave between the steps of one batch.

One thread runs the model. Between two decoding steps it gives free slots to waiting
requests, and computes one chunk of a prompt that is new: a small one while others
decode, so that they do not stall.

The tokens of a prompt except the last are written to the cache first. The last one is
fed by a decoding step, as each new token is.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from keras_openllama.generation.continuous_batching.request import (
    EngineRequest,
    EngineStoppedError,
    QueueFullError,
    RequestHandle,
    TokenConstraint,
    TokenEvent,
)
from keras_openllama.generation.continuous_batching.request_queue import RequestQueue
from keras_openllama.generation.continuous_batching.running_batch import RunningBatch
from keras_openllama.generation.continuous_batching.stats import EngineStats
from keras_openllama.generation.prompt_cache import PromptCache
from keras_openllama.utils.validation import check_integer

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM
    from keras_openllama.generation.continuous_batching.named_adapters import (
        NamedAdapters,
    )

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
        adapters: sets of adapters of the model, which requests choose by name. Only
            requests with the same adapters run together; the others wait for their
            turn, see `RequestQueue`.

    Attributes:
        stats: an `EngineStats`.
        context: most tokens of a sequence.
        adapter_names: names that requests choose adapters by.
        error: the exception after which the engine could not go on; `None` before.

    Raises:
        ValueError: for numbers out of range, a model on several devices, or `adapters`
            of another model or of one that ONNX Runtime computes.

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
        adapters: NamedAdapters | None = None,
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
        if adapters is not None and adapters.model is not model:
            raise ValueError(
                "`adapters` must be those of `model`. Make `NamedAdapters(model)`. "
                f"Received: adapters of {adapters.model!r}"
            )
        self._batch = RunningBatch(
            model, num_slots, context, cache, self.stats, adapters
        )
        if cache is not None:
            # Afterwards: ONNX Runtime's first use of a model replaces its weights.
            cache.use_with(model)
        self._adapters = adapters
        self._queue = RequestQueue()
        self._numbers = itertools.count()
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """See the attribute."""
        return self._adapters.names if self._adapters else ()

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
        self._check_adapter(request.adapter)
        with self._condition:
            self._check_open()
            # A free slot takes the next request before anything else happens.
            if len(self._queue) >= self._max_queue + self._batch.num_free:
                self.stats.rejected += 1
                raise QueueFullError(
                    f"{len(self._queue)} requests wait already, the most that are "
                    f"accepted. Try again later. Received: max_queue={self._max_queue}"
                )
            self.stats.submitted += 1
            handle = RequestHandle(next(self._numbers), request, on_event, self._wake)
            self._queue.add(handle)
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

    def _check_adapter(self, name):
        if self._adapters:
            self._adapters.check(name)
        elif name is not None:
            raise ValueError(
                f"`adapter` needs an engine with `adapters`. Received: adapter={name!r}"
            )

    def _wake(self):
        with self._condition:
            self._condition.notify_all()

    def _cancel_all(self):
        for handle in (*self._queue, *self._batch.handles):
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
                waiting = self._queue.clear()
            self._batch.fail(error)
            for handle in waiting:
                self._batch.finish(handle, "error", error)
        finally:
            if self._adapters:
                self._adapters.use(None)

    def _wait_for_work(self):
        """Returns False when the engine is shut down and nothing is left to do."""
        with self._condition:
            while not self._queue and not self._batch.handles:
                if self._is_closed:
                    return False
                self._condition.wait()
            return True

    def _advance(self):
        """Admits requests, computes at most one chunk of a prompt, and one step."""
        self._end_cancelled()
        self._admit()
        self._batch.advance()

    def _end_cancelled(self):
        with self._condition:
            waiting = self._queue.remove_cancelled()
            self.stats.queued = len(self._queue)
        for handle in waiting:
            self._batch.finish(handle, "cancelled")
        self._batch.end_cancelled()

    def _admit(self):
        """Gives free slots to requests that wait."""
        while True:
            with self._condition:
                if not self._batch.num_free:
                    break
                handle = self._queue.take(is_idle=not self._batch.handles)
                if handle is None:
                    break
                sequence = self._batch.place(handle)
                self.stats.queued = len(self._queue)
            self._batch.open(sequence)
