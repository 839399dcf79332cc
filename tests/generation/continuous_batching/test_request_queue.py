"""The order in which waiting requests get slots, by their adapters."""

from types import SimpleNamespace

import pytest

from keras_openllama.generation.continuous_batching.request_queue import RequestQueue

pytestmark = pytest.mark.backend_free


def filled(names, first=0):
    queue = RequestQueue()
    add(queue, names, first)
    return queue


def add(queue, names, first):
    for number, name in enumerate(names, first):
        request = SimpleNamespace(adapter=name)
        queue.add(SimpleNamespace(id=number, request=request, is_cancelled=False))


def taken(queue, is_idle=False):
    """The numbers of the requests that run together, beginning with the next one."""
    numbers = []
    while (handle := queue.take(is_idle and not numbers)) is not None:
        numbers.append(handle.id)
    return numbers


def test_request_queue_takes_requests_of_one_set_of_adapters_in_order():
    queue = filled("aaa")
    assert taken(queue, is_idle=True) == [0, 1, 2]
    assert len(queue) == 0
    assert queue.take(is_idle=True) is None


def test_request_queue_gives_the_next_turn_to_the_request_that_waits_longest():
    queue = filled("abcab")
    turns = [taken(queue, is_idle=True) for _ in range(3)]
    assert turns == [[0, 3], [1, 4], [2]]


def test_request_queue_lets_later_requests_join_while_no_other_set_waits():
    queue = filled("a")
    assert taken(queue, is_idle=True) == [0]
    add(queue, "aab", first=1)
    assert taken(queue) == [1, 2]
    add(queue, "a", first=4)  # After a request of another set.
    assert taken(queue) == []
    assert taken(queue, is_idle=True) == [3]


def test_request_queue_removes_cancelled_requests():
    queue = filled("aba")
    next(iter(queue)).is_cancelled = True
    assert [handle.id for handle in queue.remove_cancelled()] == [0]
    assert taken(queue, is_idle=True) == [1]
    assert [handle.id for handle in queue.clear()] == [2]
