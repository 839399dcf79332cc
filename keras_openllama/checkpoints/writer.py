"""Writes a model in a format, tensor by tensor: whole, or not at all."""

import contextlib
import dataclasses
import errno
import itertools
import re
import shutil
from pathlib import Path

from keras_openllama.checkpoints import easylm, keras_hub, transformers
from keras_openllama.checkpoints.formats import (
    DTYPES,
    EASYLM_CONTENTS,
    FORMATS,
    MAX_SHARD_SIZE,
)
from keras_openllama.checkpoints.model_files import foreign_content
from keras_openllama.checkpoints.tensors import ReadAhead
from keras_openllama.utils.background_writer import open_in_background
from keras_openllama.utils.progress import progress_bar
from keras_openllama.utils.staging import check_target, staged

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_TOO_LARGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class WriteRequest:
    """What is to be written, and where.

    Values are checked when it is made, the target by `check_target`.

    Attributes:
        target: path of the directory to write; for EasyLM, of the file.
        to: one of `formats.FORMATS`.
        dtype: one of `formats.DTYPES`; `None` is that of the model's tensors.
        max_shard_size: for transformers, bytes that one file of weights holds at most:
            int, or a string such as `"5GB"`; `None` is 5 GB.
        content: for EasyLM, one of `formats.EASYLM_CONTENTS`; `None` is `"params"`.
        tokenizer: bool, whether to write the tokenizer, where the format has one.
        force: bool, whether to replace what is there.

    Raises:
        ValueError: for an unknown format, dtype, size or content, or an option that
            the format has no use for.
    """

    target: Path
    to: str
    dtype: str | None = None
    max_shard_size: str | int | None = None
    content: str | None = None
    tokenizer: bool = True
    force: bool = False

    def __post_init__(self):
        for name, value, known in (
            ("to", self.to, FORMATS),
            ("dtype", self.dtype, (*DTYPES, None)),
            ("content", self.content, (*EASYLM_CONTENTS, None)),
        ):
            if value not in known:
                names = ", ".join(k for k in known if k)
                raise ValueError(
                    f"`{name}` is one of {names}. Received: {name}={value!r}"
                )
        for name, value, to in (
            ("max_shard_size", self.max_shard_size, "transformers"),
            ("content", self.content, "easylm"),
        ):
            if value is not None and self.to != to:
                raise ValueError(
                    f"`{name}` means something to {to} only. Received: "
                    f"{name}={value!r}, to={self.to!r}"
                )
        _ = self.max_shard_bytes  # Raises for what is no size.
        object.__setattr__(self, "target", Path(self.target))

    def check_target(self):
        """Raises an `OSError` if the target exists, or is no place to write to."""
        check_target(self.target, self.single_file, self.force, foreign_content)

    @property
    def single_file(self):
        return self.to == "easylm"

    @property
    def max_shard_bytes(self):
        size = self.max_shard_size
        return as_bytes(MAX_SHARD_SIZE if size is None else size)


def write_model(contents, request, dry_run=False, build_task=None):
    """Writes a model. The target takes its place when it is whole.

    Args:
        contents: `contents.Contents`.
        request: `WriteRequest`.
        dry_run: bool, whether to only tell what would be written.
        build_task: function that Keras's format needs, see `keras_hub.plan`.

    Returns:
        List of `outputs.Output`.

    Raises:
        ValueError: if a value is beyond the range of the dtype, if tensors are of
            several dtypes and none is asked for, or if the tokenizer cannot be
            expressed.
        OSError: if the target exists, holds the source, or cannot be written.
    """
    request.check_target()
    _check_source_stays(contents.paths, request.target)
    plan = _plan(contents, request, build_task)
    if not dry_run:
        _write(plan, contents, request)
    return plan


def _plan(contents, request, build_task):
    dtype = request.dtype or contents.dtype()
    if dtype not in DTYPES:
        raise ValueError(
            f"The tensors are {dtype}, which is not written: choose `dtype` among "
            f"{', '.join(DTYPES)}."
        )
    if not request.tokenizer:
        contents = dataclasses.replace(contents, tokenizer=None)
    if request.to == "transformers":
        return transformers.plan(contents, dtype, request.max_shard_bytes)
    if request.to == "easylm":
        return easylm.plan(contents, dtype, request.content or "params")
    return keras_hub.plan(contents, dtype, build_task)


def as_bytes(size):
    """Bytes that a size stands for: an int, or a string such as `"5GB"` or `"500MB"`.

    Raises:
        ValueError: if it is something else, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", str(size).strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if unit is None or float(match[1]) * unit < 1:
        raise ValueError(
            "`max_shard_size` is a number of bytes, or one with a unit such as '5GB' "
            f"or '500MB'. Received: max_shard_size={size!r}"
        )
    return int(float(match[1]) * unit)


def _check_source_stays(paths, target):
    """Refuses a target in whose place something stands that is read."""
    targets = {target.absolute(), target.resolve()}
    for path in map(Path, paths):
        for read in {path.absolute(), path.resolve()}:
            within = target.exists() and any(read in t.parents for t in targets)
            if within or targets & {read, *read.parents}:
                raise FileExistsError(
                    f"{target} holds the source, {path}, or is a part of it, which "
                    "would be lost. Choose another target."
                )


def _write(plan, contents, request):
    order = [contents.tensors[path] for output in plan for path in output.tensors]
    total = sum(output.size for output in plan)
    work = f"Writing {request.target.name}"
    with (
        _said_plainly(request.target, total),
        staged(
            request.target, request.single_file, request.force, foreign_content
        ) as path,
        ReadAhead(order) as ahead,
        progress_bar(work, sum(tensor.nbytes for tensor in order)) as bar,
    ):
        _check_room(path.parent, total)
        values = _Values(ahead, bar)
        for output in plan:
            _write_file(path / output.name, output, values)


@contextlib.contextmanager
def _said_plainly(target, total):
    """Errors of the system tell of the target, not of files beside it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # One of ours, which says it all.
            raise
        needs = f" It needs {total:,} bytes." if error.errno in _TOO_LARGE else ""
        raise OSError(
            f"{target} cannot be written: {error.strerror}.{needs} It is as it was "
            "before."
        ) from error


def _check_room(directory, total):
    free = shutil.disk_usage(directory).free
    if free < total:
        raise OSError(
            f"There is no room for the target: it needs {total:,} bytes, and the disk "
            f"has {free:,} left."
        )


def _write_file(path, output, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_in_background(path) as file:
            output.write(file, itertools.islice(values, len(output.tensors)))
    except ValueError as error:
        if values.current is None:
            raise
        raise ValueError(f"{values.current}: {error}.") from error
    values.finish()


class _Values:
    """Hands out the tensors' values one by one, and knows which one is in use."""

    def __init__(self, tensors, bar):
        self._tensors = iter(tensors)
        self._bar = bar
        self._last = None

    @property
    def current(self):
        """Name of the tensor in use, or `None`."""
        return self._last and self._last.name

    def __iter__(self):
        return self

    def __next__(self):
        self.finish()
        self._last = next(self._tensors)
        return self._last.array()

    def finish(self):
        """Lets go of the tensor in use."""
        if self._last is not None:
            self._last.drop()
            self._bar.update(self._last.nbytes)
            self._last = None
