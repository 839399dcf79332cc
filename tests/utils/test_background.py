"""A function in the background gives its result or its error, and keeps nobody up."""

import subprocess
import sys
import threading

import pytest

from keras_openllama.utils.background import run_in_background

pytestmark = pytest.mark.backend_free


def test_the_result_comes_when_the_function_is_done():
    go = threading.Event()
    future = run_in_background(lambda *numbers: go.wait() and sum(numbers), 1, 2, 3)
    assert not future.done()
    go.set()
    assert future.result(timeout=10) == 6


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit("mine")])
def test_an_error_is_raised_where_the_result_is_asked_for(error):
    def fails():
        raise error

    with pytest.raises(type(error), match="mine"):
        run_in_background(fails).result(timeout=10)


def test_a_function_that_hangs_does_not_keep_the_process_alive():
    script = (
        "import threading\n"
        "from keras_openllama.utils.background import run_in_background\n"
        "run_in_background(threading.Event().wait)\n"
        "print('the end')"
    )
    asked = [sys.executable, "-c", script]
    assert subprocess.check_output(asked, text=True, timeout=60) == "the end\n"
