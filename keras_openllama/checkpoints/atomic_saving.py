"""`save_to_preset`, `save_weights` and `save` of Keras, whole or not at all."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from keras_openllama.backend.keras_hub import correct_metadata
from keras_openllama.checkpoints.hdf5_file import closable_hdf5_files
from keras_openllama.checkpoints.tensors import dense_bytes
from keras_openllama.utils import files
from keras_openllama.utils.staging import staged_files
from keras_openllama.utils.types import PathLike

_IS_STAGED = contextvars.ContextVar("is_staged", default=False)


class AtomicPreset:
    """Mixin whose `save_to_preset` leaves the directory as it was if it fails."""

    def save_to_preset(self, preset_dir: PathLike, **options: Any) -> None:
        """Saves to a directory in KerasHub's format, whole or not at all.

        Files of the same names are replaced when all new files are complete.

        Args:
            preset_dir: Path of the directory, which is created if it does not exist.
            **options: See KerasHub, such as `max_shard_size` of models.

        Raises:
            OSError: If a file cannot be written, as on a full disk.

        Example:
            >>> lm.save_to_preset("my_preset")
            >>> "task.weights.h5" in os.listdir("my_preset")
            True
        """
        with _atomic(self, preset_dir) as unfinished:
            super().save_to_preset(str(unfinished), **options)
            correct_metadata(unfinished)
            written = {path.name for path in unfinished.iterdir()}
        if any(name.endswith(".weights.h5") for name in written):
            _remove_earlier_weights(Path(preset_dir), written)


class AtomicWeights:
    """Mixin whose `save_weights` and `save` leave the file as it was if they fail."""

    def save_weights(
        self, filepath: PathLike, overwrite: bool = True, **options: Any
    ) -> None:
        """Saves the weights, whole or not at all; see `keras.Model.save_weights`.

        Args:
            filepath: Path of a file whose name ends in `.weights.h5`.
            overwrite: Whether to replace an existing file without asking.
            **options: See `keras.Model.save_weights`.

        Raises:
            OSError: If the file cannot be written, as on a full disk.

        Example:
            >>> lm.save_weights("nano.weights.h5")
        """
        with _atomic_file(self, filepath, overwrite) as path:
            super().save_weights(path, overwrite, **options)

    def save(
        self, filepath: PathLike, overwrite: bool = True, *args: Any, **options: Any
    ) -> None:
        """Saves the model, whole or not at all; see `keras.Model.save`.

        Args:
            filepath: Path of a file whose name ends in `.keras`.
            overwrite: Whether to replace an existing file without asking.
            *args: See `keras.Model.save`.
            **options: See `keras.Model.save`.

        Raises:
            OSError: If the file cannot be written, as on a full disk.

        Example:
            >>> lm.save("nano.keras")
        """
        with _atomic_file(self, filepath, overwrite) as path:
            super().save(path, overwrite, *args, **options)


@contextlib.contextmanager
def _atomic_file(
    model: keras.Model, filepath: Any, overwrite: bool
) -> Iterator[PathLike]:
    """Yields the path to write to, which has the same name."""
    is_path = isinstance(filepath, (str, os.PathLike))
    if not is_path or files.is_remote(filepath):
        yield filepath
        return
    path = Path(filepath)
    if path.is_dir() or (path.exists() and not overwrite):  # Keras asks the user.
        with closable_hdf5_files():
            yield filepath
        return
    with _atomic(model, path.parent, path) as unfinished:
        yield str(unfinished / path.name)


@contextlib.contextmanager
def _atomic(
    saved: Any, directory: PathLike, target: PathLike | None = None
) -> Iterator[Path]:
    """Yields a directory to write to; within another one, the same directory."""
    if _IS_STAGED.get():  # As the backbone and the tokenizer of a task.
        yield Path(directory)
        return
    with staged_files(directory, target) as unfinished:
        _check_free_space(saved, unfinished)
        token = _IS_STAGED.set(True)
        try:
            with closable_hdf5_files():
                yield unfinished
        finally:
            _IS_STAGED.reset(token)


def _remove_earlier_weights(directory, written):
    """Removes other files of weights: loading would prefer shards to one file."""
    for pattern in ("model*.weights.h5", "model.weights.json"):
        for path in directory.glob(pattern):
            if path.name not in written:
                path.unlink()


def _check_free_space(saved, directory):
    """Raises an `OSError` if the weights do not fit on the disk."""
    if not isinstance(saved, keras.Model):
        return
    size = sum(dense_bytes(v.shape, v.dtype) for v in saved.variables)
    free = shutil.disk_usage(directory).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: the weights need {size:,} bytes, and "
            f"{free:,} bytes are free",
        )
