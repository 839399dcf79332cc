"""Rejects names that no task of lm-evaluation-harness can have, without the harness.

The harness parses its 14,000 YAML files to list its tasks, which takes seconds. A name
that is in none of their texts is found in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from keras_openllama.utils.types import PathLike

# Larger files describe no task.
_LARGEST = 1 << 20


def check_task_names(
    names: Collection[str], include_path: PathLike | None = None
) -> None:
    """Checks that tasks, groups or tags may exist. Does nothing without the harness.

    A name that passes may still be unknown: see `tasks.task_names`.

    Args:
        names: Names of tasks, groups or tags of the harness.
        include_path: Directory with further tasks, in the harness's YAML format.

    Raises:
        ValueError: If a name is in no file of a task.

    Example:
        >>> check_task_names(["hellaswag"])
    """
    if not names:
        return
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return
    # Whole words: in a file, names are values of keys or items of lists.
    missing = {
        name: re.compile(rb"(?<![\w-])" + re.escape(name.encode()) + rb"(?![\w-])")
        for name in names
    }
    folders = [Path(folder, "tasks") for folder in spec.submodule_search_locations]
    for text in _yaml_files(folders + ([Path(include_path)] if include_path else [])):
        found = [name for name, pattern in missing.items() if pattern.search(text)]
        for name in found:
            del missing[name]
        if not missing:
            return
    for name in missing:
        raise unknown_task_error(name)


def unknown_task_error(name: str) -> ValueError:
    """Returns the error for a name that is not in the harness."""
    return ValueError(
        f"The harness has no task {name!r}. List its tasks with "
        "`keras-openllama lm-eval ls tasks`."
    )


def _yaml_files(folders: Iterable[Path]) -> Iterator[bytes]:
    """Yields the texts of YAML files. Those that others include may have any suffix."""
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                with contextlib.suppress(OSError):  # Such as a link to nothing.
                    is_small = path.is_file() and path.stat().st_size <= _LARGEST
                    if is_small and path.suffix not in (".py", ".pyc", ".md"):
                        yield path.read_bytes()
