"""The texts of one HTTP request: submitted to the engine, and their pieces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from keras_openllama.generation.continuous_batching.engine import (
    EngineRequest,
    EngineStoppedError,
    QueueFullError,
)
from keras_openllama.serving.choices import ChoiceDecoder, Piece
from keras_openllama.serving.errors import ApiError, from_value_error

if TYPE_CHECKING:
    from keras_openllama.generation.continuous_batching.engine import Engine
    from keras_openllama.serving.metrics import ServerMetrics

RETRY_AFTER = "1"  # Seconds.


class RequestGeneration:
    """Texts that the engine generates together, for one HTTP request.

    Args:
        engine: The engine.
        requests: One request for each text.
        decoders: One decoder for each text.
        metrics: Where tokens and times are counted.

    Raises:
        ApiError: If the queue of the engine is full, with status 429.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[EngineRequest],
        decoders: Sequence[ChoiceDecoder],
        metrics: ServerMetrics,
    ) -> None:
        self._events = asyncio.Queue()
        self._decoders = decoders
        self._metrics = metrics
        self._start = time.monotonic()
        self._handles = []
        self._last_token_times: dict[int, float] = {}
        loop = asyncio.get_running_loop()

        def listener(index):
            # The engine calls it from a thread of its own.
            def on_event(event):
                item = index, event
                loop.call_soon_threadsafe(self._events.put_nowait, item)

            return on_event

        try:
            for index, request in enumerate(requests):
                self._handles.append(engine.submit(request, listener(index)))
        except QueueFullError as error:
            self.cancel()
            raise ApiError(
                "The server is busy: its queue is full. Try again later.",
                status=429,
                code="queue_full",
                headers={"Retry-After": RETRY_AFTER},
            ) from error
        except EngineStoppedError as error:
            self.cancel()
            raise _stopped() from error
        except ValueError as error:
            self.cancel()
            raise from_value_error(error) from error

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yields the index of a text and its next piece, until all are complete.

        Raises:
            ApiError: If the engine fails, or is stopped.
        """
        while not all(decoder.finished for decoder in self._decoders):
            index, event = await self._events.get()
            if event.token_id is not None:
                self._measure_token(index)
            piece = self._decoders[index].push(event)
            if piece is None:
                continue
            if piece.finish_reason in ("error", "cancelled"):
                self.cancel()
                raise _failure(event)
            if piece.finish_reason and not event.finish_reason:
                self._handles[index].cancel()  # A stop string was found.
            yield index, piece

    def _measure_token(self, index):
        now = time.monotonic()
        before = self._last_token_times.get(index)
        if before is None:
            self._metrics.time_to_first_token.observe(now - self._start)
        else:
            self._metrics.time_between_tokens.observe(now - before)
        self._last_token_times[index] = now
        self._metrics.generated_tokens.add(1)

    def cancel(self) -> None:
        """Frees the slots of the texts that are not complete. May be called again."""
        for handle, decoder in zip(self._handles, self._decoders, strict=False):
            if not decoder.finished:
                handle.cancel()

    def usage(self, num_choices: int) -> dict[str, object]:
        """Returns the numbers of tokens, as in OpenAI's responses.

        Args:
            num_choices: Number of texts for each prompt, which counts once.
        """
        prompts = self._handles[::num_choices]
        prompt_tokens = sum(handle.prompt_tokens for handle in prompts)
        new_tokens = sum(decoder.num_tokens for decoder in self._decoders)
        cached = sum(handle.cached_tokens or 0 for handle in prompts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _failure(event):
    if event.finish_reason == "cancelled":
        return _stopped()
    if isinstance(event.error, ApiError):  # A constraint that cannot be met.
        return event.error
    return ApiError(
        "The text could not be generated; the log of the server says why.",
        status=500,
        code="generation_error",
    )


def _stopped():
    return ApiError("The server is shutting down.", status=503, code="shutdown")
