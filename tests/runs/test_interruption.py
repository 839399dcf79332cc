"""A signal asks a run to end; many steps left out in a row end it."""

import os
import signal

import pytest

from keras_openllama.runs import interruption
from keras_openllama.runs.interruption import Diverged, Skipped, StopRequest

pytestmark = pytest.mark.backend_free

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def send(number):
    """To this process; Python runs the handler before it goes on."""
    os.kill(os.getpid(), number)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture(autouse=True)
def own_handlers():
    """Handlers of the tests, so that a signal that nobody catches ends nothing else."""
    before = handlers()
    caught = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: caught.append(number))
    yield caught
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


# --- Signals ---


def test_without_a_signal_a_run_goes_on():
    with StopRequest() as stop:
        assert [stop.at(step) for step in (1, 2, 3)] == [False] * 3
        assert stop.signal is None


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_the_step(number, own_handlers):
    with StopRequest() as stop:
        assert not stop.at(1)
        send(number)
        assert stop.at(2) and stop.at(3)
    assert stop.signal == number.name
    assert own_handlers == []


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_it_at_once(first, second):
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        send(first)
        assert stop.at(1)
        send(second)
        raise AssertionError("It went on.")
    assert stop.signal == first.name


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_afterwards_signals_do_what_they_did_before(error, own_handlers):
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


def test_a_handler_that_python_did_not_set_is_no_error(monkeypatch):
    original = signal.signal

    def foreign(number, handler):
        if handler is None:
            raise TypeError("signal handler must be signal.SIG_IGN, …")
        original(number, handler)

    monkeypatch.setattr(interruption.signal, "signal", foreign)  # It returns None.
    with StopRequest() as stop:
        send(signal.SIGTERM)
    assert stop.signal == "SIGTERM"


# --- Steps that were left out ---


def note(skipped, pattern):
    """One step a letter, from step 1 on: `k`ept, or left out."""
    for step, letter in enumerate(pattern, 1):
        skipped.note(step, letter == "k", 12.5, float("inf"))


@pytest.mark.parametrize("pattern", ["", "k", "--", "--k--k--", "k--k-"])
def test_few_in_a_row_are_counted_and_no_more(pattern):
    skipped = Skipped(3)
    note(skipped, pattern)
    assert skipped.total == pattern.count("-")


@pytest.mark.parametrize("pattern", ["---", "k---", "--k---"])
def test_too_many_in_a_row_end_the_run(pattern):
    skipped = Skipped(3)
    with pytest.raises(Diverged, match=r"last 3 steps .*loss 12\.5.*norm inf") as error:
        note(skipped, pattern)
    assert f"up to step {len(pattern)} " in str(error.value)
    assert "skipped.jsonl" in str(error.value)
    assert skipped.total == pattern.count("-")


def test_one_is_too_many_where_none_is_allowed():
    with pytest.raises(Diverged):
        note(Skipped(1), "kkk-")


def test_the_exit_codes_tell_the_endings_apart():
    codes = {interruption.STOPPED, interruption.DIVERGED, interruption.NOT_WRITTEN}
    assert len(codes) == 3
    # sysexits.h: what may be tried again, an error of the software, one of the disk.
    assert codes == {os.EX_TEMPFAIL, os.EX_SOFTWARE, os.EX_IOERR}
    assert interruption.STOPPED == os.EX_TEMPFAIL
