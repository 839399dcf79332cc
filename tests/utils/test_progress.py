"""Work over bytes shows itself to those who watch, if it takes a while."""

import io
import sys

import pytest

from keras_openllama.utils import progress

pytestmark = pytest.mark.backend_free


class Terminal(io.StringIO):
    def __init__(self, watched):
        super().__init__()
        self.isatty = lambda: watched


@pytest.mark.parametrize(
    "watched, seconds, shown", [(True, 0, True), (False, 0, False), (True, 60, False)]
)
def test_a_bar_is_shown(watched, seconds, shown, monkeypatch):
    monkeypatch.setattr(progress, "_DELAY_SECONDS", seconds)
    monkeypatch.setattr(sys, "stderr", Terminal(watched))
    with progress.progress_bar("Writing out", 2000) as bar:
        bar.update(2000)
    assert ("Writing out" in sys.stderr.getvalue()) == shown
    assert ("2.00k/2.00k" in sys.stderr.getvalue()) == shown
