"""The style of the plots, and writing them to files. Needs matplotlib."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from keras_openllama.utils import files
from keras_openllama.utils.types import PathLike

STYLE = Path(__file__).with_name("plots.mplstyle")
GRAY = "#6b7280"  # For notes, and for legend entries that stand for several colors.
FORMATS = (".png", ".svg")


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Applies the style of this package, whatever the user's settings are.

    Figures must be made inside the block. matplotlib's settings are restored after it.

    Example:
    >>> with style():
    ...     axes = Figure(figsize=(8, 4)).subplots()
    >>> axes.spines["top"].get_visible()
    False
    """
    with matplotlib.rc_context(fname=str(STYLE)):
        yield


def add_note(axes: Axes, text: str) -> None:
    """Writes a small gray note above the right end of the axes."""
    axes.set_title(text, loc="right", fontsize=9, fontweight="normal", color=GRAY)


def check_format(path: PathLike) -> str:
    """Returns the extension of the path of a plot, such as `".png"`.

    Raises:
        ValueError: if no plot is written in this format.
    """
    extension = os.path.splitext(path)[1].lower()
    if extension not in FORMATS:
        raise ValueError(
            f"`path` must end in {' or '.join(FORMATS)}. Received: path={str(path)!r}"
        )
    return extension


def save(figure: Figure, path: PathLike) -> None:
    """Writes a figure to a PNG or SVG file, which appears when it is complete.

    Args:
        figure: what to write.
        path: file, local or remote. Its extension is the format.

    Raises:
        ValueError: if the extension is neither `.png` nor `.svg`.
        OSError: if the file cannot be written.
    """
    extension = check_format(path)
    # A date would make two files of one figure differ.
    metadata = {"Date": None} if extension == ".svg" else None
    with style(), files.atomic_write(path) as unfinished:
        figure.savefig(unfinished, format=extension[1:], metadata=metadata)
