"""Progress bars appear on terminals only, after a delay."""

import io
import sys

import pytest

from keras_openllama.utils import progress

pytestmark = pytest.mark.backend_free


class Terminal(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal


@pytest.mark.parametrize(
    "is_terminal, seconds, shown",
    [(True, 0, True), (False, 0, False), (True, 60, False)],
)
def test_progress_bar_is_shown_on_a_terminal_after_a_delay(
    is_terminal, seconds, shown, monkeypatch
):
    monkeypatch.setattr(progress, "_DELAY_SECONDS", seconds)
    monkeypatch.setattr(sys, "stderr", Terminal(is_terminal))
    with progress.progress_bar("Writing out", 2000) as bar:
        bar.update(2000)
    assert ("Writing out" in sys.stderr.getvalue()) == shown
    assert ("2.00k/2.00k" in sys.stderr.getvalue()) == shown
