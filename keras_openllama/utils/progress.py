"""Progress bars over bytes, for work that takes a while."""

_SECONDS = 1.0  # Ours: what takes less shows no bar.


def progress(what, total):
    """A bar that shows itself after a second, where somebody watches.

    Args:
        what: string, the work: `"Loading weights"`.
        total: int, the bytes of all of it.

    Returns:
        A `tqdm.tqdm`; call `update` with bytes done.
    """
    from tqdm import tqdm

    return tqdm(
        desc=what,
        total=total,
        unit="B",
        unit_scale=True,
        delay=_SECONDS,
        disable=None,  # Where stderr is no terminal.
    )
