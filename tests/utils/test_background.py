"""Functions in the background: result, error, and the end of the process."""

import subprocess
import sys
import threading

import pytest

from keras_openllama.utils.background import run_in_background

pytestmark = pytest.mark.backend_free


def test_run_in_background_returns_the_result():
    go = threading.Event()
    future = run_in_background(lambda *numbers: go.wait() and sum(numbers), 1, 2, 3)
    assert not future.done()
    go.set()
    assert future.result(timeout=10) == 6


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit("mine")])
def test_run_in_background_raises_errors_in_result(error):
    def fails():
        raise error

    with pytest.raises(type(error), match="mine"):
        run_in_background(fails).result(timeout=10)


def test_run_in_background_does_not_keep_the_process_alive():
    script = (
        "import threading\n"
        "from keras_openllama.utils.background import run_in_background\n"
        "run_in_background(threading.Event().wait)\n"
        "print('the end')"
    )
    command = [sys.executable, "-c", script]
    assert subprocess.check_output(command, text=True, timeout=60) == "the end\n"
