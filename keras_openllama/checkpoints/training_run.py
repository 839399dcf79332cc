"""Reads the checkpoints of a training run, tensor by tensor, on any backend.

    runs/nano/run.json                          configuration and architecture
    runs/nano/tokenizer.model
    runs/nano/checkpoints/300/arrays/           written by Orbax, read by TensorStore
    runs/nano/checkpoints/300/checkpoint.json   written last: SHA-256 of each file

`runs.checkpoint_manager` and `runs.run_directory` write these files. They import the
file names from this module.

Source: https://orbax.readthedocs.io/en/latest/guides/checkpoint/checkpoint_format.html
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from keras_openllama.checkpoints import weight_names
from keras_openllama.checkpoints.matching import FLOATS, match_tensors
from keras_openllama.checkpoints.seal import MARKER, check_file, parse_marker
from keras_openllama.checkpoints.tensors import dense_bytes
from keras_openllama.utils.files import read_json_object, sha256
from keras_openllama.utils.progress import progress_bar
from keras_openllama.utils.types import PathLike

if TYPE_CHECKING:
    import numpy as np

_Result = TypeVar("_Result")

RUN, RUN_FORMAT = "run.json", 1
TOKENIZER = "tokenizer.model"
TOKENIZER_SETTINGS = "tokenizer"  # A key of `run.json`.
DIRECTORY = "checkpoints"
ARRAYS = "arrays"
# Orbax joins the keys of the tree ("model" and the variable path) by a dot.
_MODEL = "model."
_ARRAY_METADATA = "/.zarray"  # There is one for each array.


# ----- Runs


def is_run(path: PathLike) -> bool:
    """Returns whether a path is the directory of a run or of one of its checkpoints."""
    path = Path(path).resolve()
    if (path / RUN).is_file() or (path / MARKER).is_file():
        return True
    # An incomplete checkpoint has no marker.
    return path.parent.name == DIRECTORY and (path.parents[1] / RUN).is_file()


class TrainingRun:
    """A training run on disk, which may be in progress. Create it with `open`.

    Args:
        path: Path of its directory.
        chosen: Path of the checkpoint to load. `None` is the newest one.

    Example:
        run = TrainingRun.open("runs/nano")
        checkpoint = run.checkpoint()
        tensors = checkpoint.read_tensors(validate_architecture(run.architecture()))
    """

    def __init__(self, path: Path, chosen: Path | None = None):
        self.path = path
        self._chosen = chosen

    @classmethod
    def open(cls, path: PathLike) -> TrainingRun:
        """Opens a run, or one of its checkpoints.

        Args:
            path: Path of the directory of the run, or of one of its checkpoints.

        Returns:
            The run.

        Raises:
            FileNotFoundError: If there is no `run.json`.
        """
        path = Path(path).resolve()
        if (path / RUN).is_file():
            return cls(path)
        run = path.parent.parent
        if not (run / RUN).is_file():
            raise FileNotFoundError(
                f"{RUN}, which describes the model, is missing from {run}. "
                f"The checkpoint {path} must be inside the directory of its run, at "
                f"RUN/{DIRECTORY}/{path.name}."
            )
        return cls(run, chosen=path)

    def architecture(self) -> dict[str, Any]:
        """Returns the arguments of `OpenLlamaBackbone`.

        Raises:
            OSError: If `run.json` cannot be read.
            ValueError: If it is damaged, has another format version, or belongs to a
                run whose checkpoints contain only adapters.
        """
        path = self.path / RUN
        run = read_json_object(path)
        if run.get("weights") == "adapters" or "lora_rank" in run:
            raise ValueError(
                f"{self.path} is a fine-tuning run whose checkpoints do not contain a "
                f"complete model. Load its export instead: {self.path}/model, or "
                f"{self.path}/adapters with `lm.load_adapters`."
            )
        if run.get("format") != RUN_FORMAT:
            raise ValueError(
                f"{path} has format {run.get('format')!r}, and this version reads "
                f"{RUN_FORMAT}."
            )
        if not isinstance(run.get("architecture"), dict):
            raise ValueError(f"{path} has no 'architecture'.")
        return run["architecture"]

    def end_token_ids(self) -> list[int]:
        """Returns the end tokens that `run.json` declares; possibly none.

        Raises:
            OSError: If `run.json` cannot be read.
            ValueError: If it is damaged.
        """
        return read_json_object(self.path / RUN).get("end_token_ids", [])

    def tokenizer_file(self) -> Path:
        """Returns the path of the SentencePiece model.

        Raises:
            FileNotFoundError: If there is none.
        """
        path = self.path / TOKENIZER
        if not path.is_file():
            raise FileNotFoundError(f"{TOKENIZER} is missing from the run {self.path}.")
        return path

    def chat_template(self) -> dict[str, str] | str | None:
        """Returns the chat template of a fine-tuning run, or `None`.

        Raises:
            OSError: If `run.json` cannot be read.
            ValueError: If it is damaged.
        """
        recipe = read_json_object(self.path / RUN).get("recipe", {})
        return recipe.get("chat_template", {}).get("value")

    def tokenizer_settings(self) -> dict[str, Any]:
        """Returns arguments of the tokenizer, see `OpenLlamaTokenizer.settings`.

        Raises:
            OSError: If `run.json` cannot be read.
            ValueError: If it is damaged.
        """
        return read_json_object(self.path / RUN).get(TOKENIZER_SETTINGS, {})

    def checkpoint(self) -> Checkpoint:
        """Verifies and returns the chosen checkpoint, or else the newest intact one.

        It warns about each newer checkpoint that is damaged.

        Returns:
            The checkpoint.

        Raises:
            OSError: If there is no checkpoint, or the chosen one is incomplete.
            ValueError: If the chosen checkpoint is damaged, or all of them are.
        """
        return self._newest() if self._chosen is None else self._verify(self._chosen)

    def _verify(self, path):
        remedy = f"Pass the run, {self.path}, to load its newest intact checkpoint."
        if not (path / MARKER).is_file():
            raise FileNotFoundError(
                f"{path} has no {MARKER}: it is incomplete, and may still be being "
                f"written. {remedy}"
            )
        try:
            return _verified_checkpoint(path)
        except (OSError, ValueError) as error:
            if not (path / MARKER).is_file():
                raise FileNotFoundError(
                    f"The checkpoint {path} was removed while it was read. {remedy}"
                ) from error
            raise ValueError(
                f"The checkpoint {path} is damaged: {_sentence(error)} {remedy}"
            ) from error

    def _newest(self):
        damaged = {}
        # Listed each time: a run in progress writes new ones and removes old ones.
        while paths := [p for p in self._checkpoints() if p not in damaged]:
            try:
                checkpoint = _verified_checkpoint(paths[-1])
            except (OSError, ValueError) as error:
                if (paths[-1] / MARKER).is_file():
                    damaged[paths[-1]] = _sentence(error)
                continue
            for path, problem in damaged.items():
                warnings.warn(
                    f"The checkpoint of step {path.name} in {self.path} is damaged; "
                    f"loading step {checkpoint.step} instead. {problem}",
                    stacklevel=2,
                )
            return checkpoint
        if damaged:
            raise ValueError(
                f"All checkpoints in {self.path} are damaged. "
                + " ".join(f"Step {p.name}: {why}" for p, why in damaged.items())
            )
        raise FileNotFoundError(
            f"The run {self.path} has no checkpoint yet. To build its model with "
            "random weights, pass load_weights=False."
        )

    def _checkpoints(self):
        """Returns the paths of complete checkpoints by step; some may be damaged."""
        paths = (self.path / DIRECTORY).glob("*")
        steps = [path for path in paths if path.name.isdecimal()]
        # A checkpoint without a marker is incomplete.
        complete = [path for path in steps if (path / MARKER).is_file()]
        return sorted(complete, key=lambda path: int(path.name))


def _sentence(error):
    return f"{str(error).removesuffix('.')}."


def _verified_checkpoint(path):
    """Returns a checkpoint after it verified the checksums of its files.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If a file is damaged.
    """
    marker = parse_marker((path / MARKER).read_bytes(), path / MARKER)

    def check(name):
        file, expected = path / name, marker["files"][name]
        check_file(file, expected, file.stat().st_size, lambda: sha256(file))
        return expected["bytes"]

    total = sum(expected["bytes"] for expected in marker["files"].values())
    with (
        progress_bar(f"Checking step {marker['step']}", total) as bar,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        for size in pool.map(check, sorted(marker["files"])):
            bar.update(size)
    return Checkpoint(path, marker["step"])


# ----- Arrays


class Checkpoint:
    """A checkpoint of a training run whose checksums were verified.

    Args:
        path: Path of its directory.
        step: Number of training steps that were completed.
    """

    def __init__(self, path: PathLike, step: int):
        self.path = str(path)
        self.step = step

    def read_tensors(
        self, arguments: dict[str, Any], head: bool = True
    ) -> dict[str, ArrayTensor]:
        """Opens the checkpoint and lists its weights, without reading their values.

        Args:
            arguments: Arguments of `OpenLlamaBackbone`.
            head: Whether to include the language-model head.

        Returns:
            The weights by variable path.

        Raises:
            ImportError: If TensorStore is not installed.
            OSError: If the checkpoint cannot be read, or has been removed.
            ValueError: If its weights do not match the arguments.
        """
        sizes = weight_names.axis_sizes(arguments)
        expected = {
            row.path: (row.path, row.shape(sizes))
            for row in weight_names.weight_specs(arguments["num_layers"], head)
        }
        stores = self._open()
        if not head:
            stores.pop(weight_names.HEAD.path, None)
        tensors = {
            name: ArrayTensor(name, store.dtype.name, store.shape, i, self, store)
            for i, (name, store) in enumerate(stores.items())
            # Excludes states of random number generators.
            if name in expected or store.dtype.name in FLOATS
        }
        return match_tensors(tensors, expected, self.path)

    def _open(self):
        """Returns the TensorStore of each of the model's arrays by name."""
        ts = _tensorstore()
        context = ts.Context()
        base = {"driver": "file", "path": f"{self.path}/{ARRAYS}/"}

        def store(name):
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{_MODEL}{name}/"}
            # By default missing chunks are read as zeros.
            spec = {"driver": "zarr", "fill_missing_data_reads": False}
            return ts.open({**spec, "kvstore": kvstore}, context=context, read=True)

        def open_all():
            kvstore = {"driver": "ocdbt", "base": base}
            files = ts.KvStore.open(kvstore, context=context).result()
            first, last = _MODEL, _MODEL[:-1] + chr(ord(_MODEL[-1]) + 1)
            keys = files.list(ts.KvStore.KeyRange(first, last)).result()
            names = [
                key.decode().removeprefix(_MODEL).removesuffix(_ARRAY_METADATA)
                for key in sorted(keys)
                if key.endswith(_ARRAY_METADATA.encode())
            ]
            opening = {name: store(name) for name in names}
            return {name: future.result() for name, future in opening.items()}

        return self.call_reader(open_all)

    def call_reader(self, function: Callable[[], _Result]) -> _Result:
        """Calls a function that reads the checkpoint, and translates its errors.

        Args:
            function: Function without arguments.

        Returns:
            Its result.

        Raises:
            OSError: If TensorStore fails, or the checkpoint has been removed.
        """
        try:
            result = function()
        except (ValueError, NotImplementedError) as error:  # Raised by TensorStore.
            self._check_exists(error)
            raise OSError(
                f"The checkpoint {self.path} cannot be read: {error}"
            ) from error
        # The marker is removed before the arrays: if it exists, they are complete.
        self._check_exists()
        return result

    def _check_exists(self, error=None):
        if not Path(self.path, MARKER).is_file():
            raise FileNotFoundError(
                f"The checkpoint {self.path} was removed while it was read. A training "
                "run removes its old checkpoints: load the run again to get the newest."
            ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayTensor:
    """One array of a checkpoint, as a `tensors.StoredTensor`.

    Attributes:
        name: The variable path.
        dtype: Name of its dtype.
        shape: Its shape.
        offset: Its index among the arrays of the checkpoint.
        file: The checkpoint that holds it.
        store: `tensorstore.TensorStore` that reads it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    file: Checkpoint
    store: Any

    @property
    def nbytes(self) -> int:
        """Number of bytes that are read for it."""
        return dense_bytes(self.shape, self.dtype)

    def array(self) -> np.ndarray:
        """Reads the tensor, joined from the shards of all devices.

        Returns:
            The array.

        Raises:
            OSError: If it cannot be read, or the checkpoint has been removed.
        """
        return self.file.call_reader(lambda: self.store.read(order="C").result())

    def prefetch(self) -> None:
        """Does nothing: several tensors would be in memory at the same time."""

    def release(self) -> None:
        """Does nothing: only the caller of `array` holds a reference to the data."""


def _tensorstore():
    try:
        import tensorstore
    except ImportError as error:
        raise ImportError(
            "TensorStore is required to read the checkpoints of a training run. "
            "Install the extra 'train': pip install 'keras-openllama[train]'."
        ) from error
    return tensorstore
