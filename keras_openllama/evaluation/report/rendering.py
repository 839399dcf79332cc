"""Report files of evaluations."""

import os
from collections.abc import Sequence
from typing import Any

from keras_openllama.evaluation.report import pictures, tables
from keras_openllama.utils import files
from keras_openllama.utils.types import PathLike


def write_report(
    runs: Sequence[dict[str, Any]], directory: PathLike, columns: Sequence[str] = ()
) -> list[str]:
    """Writes `table.md`, and `table.png` and `table.svg` if there is a bar to draw.

    Args:
        runs: results of evaluations, see `measurements.read_results`.
        directory: the output directory. It is created if it does not exist.
        columns: published columns to add, such as `["LLaMA 7B"]`.

    Returns:
        Paths of the files.

    Raises:
        ValueError: if `runs` is empty or a column was not published.
        OSError: if a file cannot be written.
    """
    text = tables.results_table(runs, columns)
    os.makedirs(directory, exist_ok=True)
    paths = [os.path.join(directory, "table.md")]
    files.write_bytes(paths[0], text.encode())
    if pictures.metrics_to_draw(runs):
        for ending in ("png", "svg"):
            paths.append(os.path.join(directory, f"table.{ending}"))
            pictures.draw_chart(runs, paths[-1])
    return paths
