"""The interface through which the readers of every format open a model's files."""

from pathlib import Path
from typing import Protocol

from keras_openllama.utils.types import PathLike


class Repository(Protocol):
    """The files of a model, by name.

    `LocalRepository` and `loading.hub.HubRepository` implement it. `str(repository)`
    names the repository in messages.
    """

    def optional(self, name: str) -> Path | None:
        """Returns the path of a file, or `None` if there is no such file."""

    def file(self, name: str) -> Path:
        """Returns the path of a file; raises `FileNotFoundError` if there is none."""

    def glob(self, pattern: str) -> list[str]:
        """Returns the names of files that match a pattern such as `"assets/**/*"`."""


class LocalRepository:
    """The files of a model in a local directory.

    Args:
        path: Path of the directory.

    Example:
        >>> _ = Path("config.json").write_text("{}")
        >>> repository = LocalRepository(".")
        >>> repository.file("config.json").read_text()
        '{}'
        >>> repository.optional("tokenizer.model") is None
        True
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)

    def __str__(self):
        return f"the directory {self.path}"

    def optional(self, name: str) -> Path | None:
        """Returns the path of a file, or `None` if there is no such file."""
        path = self.path / name
        return path if path.is_file() else None

    def file(self, name: str) -> Path:
        """Returns the path of a file.

        Args:
            name: Path of the file, relative to the directory.

        Returns:
            Path of the existing file.

        Raises:
            FileNotFoundError: If the directory has no such file.
        """
        path = self.optional(name)
        if path is None:
            if not self.path.is_dir():
                problem = "is a file" if self.path.exists() else "does not exist"
                raise FileNotFoundError(
                    f"{self.path} {problem}, and must be a directory with {name}."
                )
            raise FileNotFoundError(f"{name} is missing from {self}.")
        return path

    def glob(self, pattern: str) -> list[str]:
        """Returns the names of files that match a pattern such as `"assets/**/*"`."""
        paths = sorted(self.path.glob(pattern))
        return [str(path.relative_to(self.path)) for path in paths if path.is_file()]
