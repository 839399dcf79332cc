"""The requests that wait for a slot of an `Engine`."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keras_openllama.generation.continuous_batching.request import RequestHandle


class RequestQueue:
    """Requests in the order of their submission, in turns of their adapters.

    A model has one set of adapters at a time, so only requests of the same set run
    together. When no request runs, a turn of a set begins: that of the request that has
    waited longest. All requests of this set that wait then get slots in this turn. A
    later one does so only if none of another set waits before it, so that each turn
    ends.

    Example:
        >>> from types import SimpleNamespace as Handle
        >>> queue = RequestQueue()
        >>> for number, name in enumerate([None, "polite", None]):
        ...     request = Handle(adapter=name)
        ...     queue.add(Handle(id=number, request=request, is_cancelled=False))
        >>> queue.take(is_idle=True).id, queue.take(is_idle=False).id
        (0, 2)
        >>> queue.take(is_idle=False)
        >>> queue.take(is_idle=True).id
        1
    """

    def __init__(self) -> None:
        self._handles: collections.deque[RequestHandle] = collections.deque()
        self._adapter: str | None = None
        # The last request that waited when the turn began.
        self._last_of_turn = -1

    def __len__(self) -> int:
        """Number of requests that wait."""
        return len(self._handles)

    def __iter__(self) -> Iterator[RequestHandle]:
        """Iterates over the requests."""
        return iter(self._handles)

    def add(self, handle: RequestHandle) -> None:
        """Adds a request at the end.

        Args:
            handle: its handle, with a larger id than those before.
        """
        self._handles.append(handle)

    def take(self, is_idle: bool) -> RequestHandle | None:
        """Removes and returns the request that gets the next free slot.

        Args:
            is_idle: whether no request runs.

        Returns:
            Its handle; `None` if none can run beside those that do.
        """
        if is_idle and self._handles:
            self._adapter = self._handles[0].request.adapter
            self._last_of_turn = self._handles[-1].id
        others_wait = False
        for handle in self._handles:
            if handle.request.adapter != self._adapter:
                others_wait = True
            elif not others_wait or handle.id <= self._last_of_turn:
                self._handles.remove(handle)
                return handle
        return None

    def remove_cancelled(self) -> list[RequestHandle]:
        """Removes and returns the requests that were cancelled."""
        cancelled = [handle for handle in self._handles if handle.is_cancelled]
        for handle in cancelled:
            self._handles.remove(handle)
        return cancelled

    def clear(self) -> list[RequestHandle]:
        """Removes and returns all requests."""
        handles = list(self._handles)
        self._handles.clear()
        return handles
