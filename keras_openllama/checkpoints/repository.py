"""Where the files of a model are: what every reader of a format is given."""

from pathlib import Path
from typing import Protocol


class Repository(Protocol):
    """The files of a model by name, wherever they are: see `Directory`, `loading.hub`.

    `str(repository)` names it in messages.
    """

    def optional(self, name: str) -> Path | None:
        """Path of a file, or `None` where there is none of this name."""

    def file(self, name: str) -> Path:
        """Path of a file; raises `FileNotFoundError` if there is none of this name."""

    def glob(self, pattern: str) -> list[str]:
        """Names of the files that match a pattern such as `"assets/**/*"`."""


class Directory:
    """The files of a model in a directory.

    Args:
        path: path of the directory.
    """

    def __init__(self, path):
        self.path = Path(path)

    def __str__(self):
        return f"the directory {self.path}"

    def optional(self, name):
        """Path of a file, or `None` where there is none of this name."""
        path = self.path / name
        return path if path.is_file() else None

    def file(self, name):
        """Path of a file.

        Raises:
            FileNotFoundError: if the directory has none of this name.
        """
        path = self.optional(name)
        if path is None:
            raise FileNotFoundError(f"{name} is missing from {self}.")
        return path

    def glob(self, pattern):
        """Names of the files that match a pattern such as `"assets/**/*"`."""
        paths = sorted(self.path.glob(pattern))
        return [str(path.relative_to(self.path)) for path in paths if path.is_file()]
