"""Progress bars that count bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

_DELAY_SECONDS = 1.0  # Heuristic: shorter work shows no bar.


def progress_bar(description: str, total: int) -> tqdm:
    """Returns a progress bar that appears after a second, on a terminal only.

    Args:
        description: The work, such as `"Loading weights"`.
        total: Bytes to process.

    Returns:
        A `tqdm.tqdm`. Call its `update` with the bytes processed since the last call.

    Example:
        >>> with progress_bar("Loading weights", total=2_000_000) as bar:
        ...     _ = bar.update(1_000_000)
    """
    from tqdm import tqdm

    return tqdm(
        desc=description,
        total=total,
        unit="B",
        unit_scale=True,
        delay=_DELAY_SECONDS,
        disable=None,  # tqdm disables the bar if stderr is not a terminal.
    )
