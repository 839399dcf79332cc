"""Hides optional packages from Keras, to shorten the start of a command.

Keras and KerasHub import these packages if they are installed, for wrappers, plots and
metrics that no command uses. With all extras, that is more than half of the import
time.
"""

from __future__ import annotations

import importlib.abc
import sys

_IMPORTERS = ("keras", "keras_hub")
_UNUSED = frozenset(
    (
        *("IPython", "PIL", "cv2", "grain", "kagglehub", "matplotlib", "pandas"),
        *("requests", "rouge_score", "sklearn"),
    )
)


class _Hide(importlib.abc.MetaPathFinder):
    """Raises `ImportError` if Keras or KerasHub imports one of `_UNUSED`."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname in _UNUSED and _importing_package() in _IMPORTERS:
            raise ModuleNotFoundError(
                f"No module named {fullname!r}: hidden from Keras", name=fullname
            )


def _importing_package():
    """The package of the code that runs the current `import`."""
    frame = sys._getframe(2)
    while frame and frame.f_globals.get("__name__", "").startswith(
        ("importlib", "_frozen_importlib")
    ):
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").partition(".")[0] if frame else ""


def hide_from_keras() -> None:
    """Hides these packages from Keras and KerasHub, not from other importers.

    For processes that only run a command: `keras.wrappers` and `keras.visualization`
    stop working.
    """
    if not any(isinstance(finder, _Hide) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hide())
