"""Signals stop a run; too many consecutive skipped steps end it."""

import os
import signal

import pytest

from keras_openllama.runs import interruption
from keras_openllama.runs.interruption import DivergedError, SkippedSteps, StopRequest

pytestmark = pytest.mark.backend_free

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def send(number):
    """Sends a signal to this process; Python runs the handler before it continues."""
    os.kill(os.getpid(), number)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture(autouse=True)
def own_handlers():
    """Installs handlers that collect signals, so that none ends the test run."""
    before = handlers()
    caught = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: caught.append(number))
    yield caught
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


# --- StopRequest ---


def test_stop_request_is_false_without_a_signal():
    with StopRequest() as stop:
        assert [stop.requested(step) for step in (1, 2, 3)] == [False] * 3
        assert stop.signal is None


@pytest.mark.parametrize("number", SIGNALS)
def test_stop_request_is_true_after_a_signal(number, own_handlers):
    with StopRequest() as stop:
        assert not stop.requested(1)
        send(number)
        assert stop.requested(2) and stop.requested(3)
    assert stop.signal == number.name
    assert own_handlers == []


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_stop_request_raises_on_a_second_signal(first, second):
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        send(first)
        assert stop.requested(1)
        send(second)
        raise AssertionError("The second signal did not raise.")
    assert stop.signal == first.name


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_stop_request_restores_previous_handlers(error, own_handlers):
    before = handlers()
    try:
        with StopRequest() as stop:
            assert before[0] not in handlers() and before[1] not in handlers()
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert handlers() == before
    for number in SIGNALS:
        send(number)
    assert own_handlers == [*SIGNALS]
    assert stop.signal is None


def test_stop_request_tolerates_a_handler_not_set_by_python(monkeypatch):
    original = signal.signal

    def foreign(number, handler):
        if handler is None:
            raise TypeError("signal handler must be signal.SIG_IGN, …")
        original(number, handler)

    monkeypatch.setattr(interruption.signal, "signal", foreign)  # Returns None.
    with StopRequest() as stop:
        send(signal.SIGTERM)
    assert stop.signal == "SIGTERM"


# --- SkippedSteps ---


def record(skipped, pattern):
    """Records a step per letter, from step 1: `a` is applied, `-` skipped."""
    for step, letter in enumerate(pattern, 1):
        skipped.record(step, letter == "a", 12.5, float("inf"))


@pytest.mark.parametrize("pattern", ["", "a", "--", "--a--a--", "a--a-"])
def test_skipped_steps_counts_a_few_consecutive_steps(pattern):
    skipped = SkippedSteps(3)
    record(skipped, pattern)
    assert skipped.total == pattern.count("-")


@pytest.mark.parametrize("pattern", ["---", "a---", "--a---"])
def test_skipped_steps_raises_after_too_many_consecutive_steps(pattern):
    skipped = SkippedSteps(3)
    with pytest.raises(
        DivergedError, match=r"last 3 steps .*loss 12\.5.*norm inf"
    ) as error:
        record(skipped, pattern)
    assert f"up to step {len(pattern)} " in str(error.value)
    assert "skipped.jsonl" in str(error.value)
    assert skipped.total == pattern.count("-")


def test_skipped_steps_raises_at_once_if_the_limit_is_one():
    with pytest.raises(DivergedError):
        record(SkippedSteps(1), "aaa-")


def test_exit_codes_are_distinct_and_follow_sysexits():
    codes = {interruption.STOPPED, interruption.DIVERGED, interruption.WRITE_FAILED}
    assert len(codes) == 3
    # sysexits.h: temporary failure, internal software error, input/output error.
    assert codes == {os.EX_TEMPFAIL, os.EX_SOFTWARE, os.EX_IOERR}
    assert interruption.STOPPED == os.EX_TEMPFAIL
