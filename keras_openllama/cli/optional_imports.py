"""Spares a command the packages that Keras imports only because they are installed.

Keras and KerasHub import these for wrappers, plots and metrics that no command uses:
more than half of a command's imports where the extras are installed.
"""

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
    """Raises `ImportError` where Keras or KerasHub imports one of `_UNUSED`."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname in _UNUSED and _importing_package() in _IMPORTERS:
            raise ModuleNotFoundError(
                f"No module named {fullname!r}: hidden from Keras", name=fullname
            )


def _importing_package():
    """The package of the code whose `import` is being carried out."""
    frame = sys._getframe(2)
    while frame and frame.f_globals.get("__name__", "").startswith(
        ("importlib", "_frozen_importlib")
    ):
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").partition(".")[0] if frame else ""


def hide_from_keras():
    """Lets Keras and KerasHub, when they are imported, find none of these packages.

    Every other import finds them as ever. For a process that runs a command and nothing
    else: in it, `keras.wrappers` and `keras.visualization` do not work.
    """
    if not any(isinstance(finder, _Hide) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hide())
