"""An evaluation as files to look at."""

import os

from keras_openllama.evaluation.report import pictures, tables
from keras_openllama.utils import files


def write(runs, directory, columns=()):
    """Writes `table.md`, and `table.png` and `table.svg` if there is a bar to draw.

    Args:
        runs, columns: see `tables.table`.
        directory: path; made if it is not there.

    Returns:
        List of the paths written.

    Raises:
        ValueError, OSError: as `tables.table` and `pictures.draw`.
    """
    text = tables.table(runs, columns)
    os.makedirs(directory, exist_ok=True)
    paths = [os.path.join(directory, "table.md")]
    files.write_bytes(paths[0], text.encode())
    if pictures.drawn_metrics(runs):
        for ending in ("png", "svg"):
            paths.append(os.path.join(directory, f"table.{ending}"))
            pictures.draw(runs, paths[-1])
    return paths
