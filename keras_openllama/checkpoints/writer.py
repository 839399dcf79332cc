"""Exports a model to any format, tensor by tensor and atomically."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_openllama.checkpoints import easylm, keras_hub, transformers
from keras_openllama.checkpoints.export_config import ExportConfig
from keras_openllama.checkpoints.formats import DTYPES
from keras_openllama.checkpoints.model_files import foreign_content
from keras_openllama.checkpoints.tensors import ReadableTensor, ReadAhead
from keras_openllama.utils.background_writer import open_in_background
from keras_openllama.utils.progress import progress_bar
from keras_openllama.utils.staging import staged

if TYPE_CHECKING:
    from keras_openllama.checkpoints.contents import ModelContents
    from keras_openllama.checkpoints.outputs import OutputFile

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_model(
    contents: ModelContents,
    config: ExportConfig,
    dry_run: bool = False,
    build_empty_task: Callable | None = None,
) -> list[OutputFile]:
    """Exports a model. The target appears atomically, when it is complete.

    Args:
        contents: The model.
        config: The options of the export.
        dry_run: Whether to only return the list of files, and write nothing.
        build_empty_task: Function that builds a task without weights. The Keras format
            requires it: see `keras_hub.output_files`.

    Returns:
        The files that were (or would be) written.

    Raises:
        ValueError: If a value exceeds the range of the dtype, if the tensors have
            several dtypes and the configuration has none, or if the format cannot
            represent the tokenizer.
        OSError: If the target exists, contains the source, or cannot be written.
    """
    config.check_target()
    _check_source_is_not_replaced(contents.paths, config.target)
    plan = _plan(contents, config, build_empty_task)
    if not dry_run:
        _write(plan, contents, config)
    return plan


def _plan(contents, config, build_empty_task):
    if not config.tokenizer:
        contents = dataclasses.replace(contents, tokenizer=None)
    if config.to == "gguf":
        from keras_openllama.checkpoints import gguf_model  # It takes half a second.

        return gguf_model.output_files(
            contents, config.quantization or "f16", config.target.stem
        )
    dtype = config.dtype or contents.dtype()
    if dtype not in DTYPES:
        raise ValueError(
            f"The tensors have the dtype {dtype}, which cannot be exported: set "
            f"`dtype` to one of {', '.join(DTYPES)}."
        )
    if config.to == "transformers":
        return transformers.output_files(contents, dtype, config.max_shard_bytes)
    if config.to == "easylm":
        return easylm.output_files(contents, dtype, config.content or "params")
    return keras_hub.output_files(contents, dtype, build_empty_task)


def _check_source_is_not_replaced(paths, target):
    """Raises an error if writing the target would delete a file that is read."""
    targets = {target.absolute(), target.resolve()}
    for path in map(Path, paths):
        for source in {path.absolute(), path.resolve()}:
            within = target.exists() and any(source in t.parents for t in targets)
            if within or targets & {source, *source.parents}:
                raise FileExistsError(
                    f"{target} contains the source {path} or is a part of it, and "
                    "replacing it would delete the source. Choose another target."
                )


def _write(plan, contents, config):
    order = [contents.tensors[path] for output in plan for path in output.tensors]
    total = sum(output.size for output in plan)
    description = f"Writing {config.target.name}"
    with (
        _errors_about_target(config.target, total),
        staged(
            config.target, config.single_file, config.force, foreign_content
        ) as path,
        ReadAhead(order) as ahead,
        progress_bar(description, sum(tensor.nbytes for tensor in order)) as bar,
    ):
        _check_free_space(path.parent, total)
        values = _TensorValues(ahead, bar)
        for output in plan:
            _write_file(path / output.name, output, values)


@contextlib.contextmanager
def _errors_about_target(target, total):
    """Makes system errors name the target instead of the staging directory."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # Raised by this package, with a complete message.
            raise
        needs = f" It needs {total:,} bytes." if error.errno in _OUT_OF_SPACE else ""
        raise OSError(
            f"{target} cannot be written: {error.strerror}.{needs} The target was not "
            "changed."
        ) from error


def _check_free_space(directory, total):
    free = shutil.disk_usage(directory).free
    if free < total:
        raise OSError(
            f"Not enough disk space for the target: it needs {total:,} bytes, and "
            f"{free:,} bytes are free."
        )


def _write_file(path, output, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_in_background(path) as file:
            count = len(output.tensors)
            output.write(file, itertools.islice(values.read_by(output.read), count))
    except ValueError as error:
        if values.current is None:
            raise
        raise ValueError(f"{values.current}: {error}.") from error
    values.release_current()


class _TensorValues:
    """Reads the values of tensors, and keeps track of the current tensor."""

    def __init__(self, tensors, bar):
        self._tensors = iter(tensors)
        self._bar = bar
        self._current = None

    @property
    def current(self) -> str | None:
        """Name of the current tensor, if any."""
        return self._current and self._current.name

    def read_by(self, read: Callable[[ReadableTensor], Any]) -> Iterator[Any]:
        """Yields the values of the next tensors, read by a function."""
        while True:
            self.release_current()
            self._current = next(self._tensors)
            yield read(self._current)

    def release_current(self) -> None:
        """Releases the memory of the current tensor."""
        if self._current is not None:
            self._current.release()
            self._bar.update(self._current.nbytes)
            self._current = None
