"""Models from one format into another, tensor by tensor."""

import dataclasses
import itertools
import re
import shutil
from pathlib import Path

from keras_openllama.convert import easylm, keras_files, to_transformers
from keras_openllama.convert.contents import of_source
from keras_openllama.convert.formats import DTYPES, FORMATS, MAX_SHARD_SIZE
from keras_openllama.convert.progress import progress
from keras_openllama.convert.staging import check_target, staged
from keras_openllama.convert.stored import ReadAhead

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def convert(source, target, to, *, preset=None, revision=None, **options):
    """Converts a model; no more than one tensor at a time is in memory.

    Args:
        source: what `OpenLlamaCausalLM.from_preset` takes, or the path of a file of
            EasyLM.
        target: path of the directory to write; for EasyLM, of the file.
        to: `"transformers"`, `"easylm"` or `"keras"`.
        preset: for a file of EasyLM, the model whose weights they are: a name, a
            directory or `"hf://user/repo"`, for architecture and tokenizer.
        revision: branch, tag or commit of a repository on the Hub.
        **options: see `write`.

    Returns:
        List of `outputs.Output`, the files that were written.

    Raises:
        ValueError: for an unknown preset, format, dtype or size; if files are damaged
            or not this model's; if a value is beyond float16's range.
        OSError: if a file cannot be had, read or written, or the target exists.

    Example:

    ```python
    convert("open_llama_3b_v2", "3b_v2.msgpack", to="easylm", dtype="bfloat16")
    convert("3b_v2.msgpack", "3b_v2_hf", to="transformers", preset="3b_v2")
    ```
    """
    from keras_openllama import presets

    easylm_file = Path(source) if Path(source).is_file() else None
    if easylm_file is None and preset is not None:
        raise ValueError(
            "`preset` tells the architecture of a file of EasyLM, and "
            f"source={str(source)!r} is no file. Received: preset={preset!r}"
        )
    if easylm_file is not None and preset is None:
        raise ValueError(
            f"{source} is a file, as EasyLM writes it, which says neither how many "
            "heads its model has nor which tokenizer: name the model with `preset` "
            "(--preset), such as open_llama_3b_v2 or a directory with a config.json."
        )
    contents = of_source(
        presets.find_source(preset if easylm_file else source, revision, easylm_file),
        presets.origin(source),
        tokenizer=options.get("tokenizer", True) and to != "easylm",
    )
    return write(contents, target, to, **options)


def write(
    contents,
    target,
    to,
    *,
    dtype=None,
    max_shard_size=MAX_SHARD_SIZE,
    content="params",
    tokenizer=True,
    force=False,
    dry_run=False,
):
    """Writes a model in a format. The target takes its place when it is whole.

    Args:
        contents: `contents.Contents`.
        target: path of the directory to write; for EasyLM, of the file.
        to: one of `FORMATS`.
        dtype: one of `DTYPES`; `None` is that of the tensors.
        max_shard_size: for transformers, bytes of one file of weights at most: int, or
            a string such as `"5GB"`.
        content: for EasyLM, one of `formats.EASYLM_CONTENTS`.
        tokenizer: bool, whether to write the tokenizer, where the format has one.
        force: bool, whether to replace what is there.
        dry_run: bool, whether to only tell what would be written.

    Returns:
        List of `outputs.Output`.

    Raises:
        ValueError: for an unknown format, dtype, size or content; if a value is beyond
            float16's range; if the tokenizer cannot be expressed.
        OSError: if the target exists or cannot be written.
    """
    if to not in FORMATS:
        raise ValueError(f"`to` is one of {', '.join(FORMATS)}. Received: to={to!r}")
    dtype = contents.dtype() if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(
            f"`dtype` is one of {', '.join(DTYPES)}. Received: dtype={dtype!r}"
        )
    target = Path(target)
    single_file = to == "easylm"
    _check_source_stays(contents.files, target)
    check_target(target, single_file, force)
    if not tokenizer:
        contents = dataclasses.replace(contents, tokenizer=None)
    if to == "transformers":
        plan = to_transformers.plan(contents, dtype, as_bytes(max_shard_size))
    elif to == "easylm":
        plan = easylm.plan(contents, dtype, content)
    else:
        plan = keras_files.plan(contents, dtype)
    if not dry_run:
        _write(plan, contents, target, single_file, force)
    return plan


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


def _check_source_stays(files, target):
    """Refuses a target that holds the files that are read."""
    target = target.resolve()
    for file in files:
        file = Path(file).resolve()
        if target == file or target in file.parents:
            raise FileExistsError(
                f"{target} holds the source, {file}, which would be lost. Choose "
                "another target."
            )


def _write(plan, contents, target, single_file, force):
    order = [contents.tensors[path] for output in plan for path in output.tensors]
    total = sum(output.size for output in plan)
    try:
        with (
            staged(target, single_file, force) as directory,
            ReadAhead(order) as ahead,
            progress(f"Writing {target.name}", sum(t.nbytes for t in order)) as bar,
        ):
            _check_room(directory.parent, total)
            values = _Values(ahead, bar)
            for output in plan:
                _write_file(directory / output.name, output, values)
    except OSError as error:
        if error.errno is None:  # One of ours, which says it all.
            raise
        raise OSError(
            f"{target} cannot be written: {error.strerror}. It needs {total:,} bytes. "
            "Nothing was left there."
        ) from error


def _check_room(directory, total):
    free = shutil.disk_usage(directory).free
    if free < total:
        raise OSError(
            f"There is no room for the target: it needs {total:,} bytes, and the disk "
            f"has {free:,} left."
        )


def _write_file(path, output, values):
    try:
        output.write(path, itertools.islice(values, len(output.tensors)))
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
