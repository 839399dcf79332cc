"""Pretraining runs, whose checkpoints are read tensor by tensor on any backend.

    runs/nano/run.json                          what the run is, architecture included
    runs/nano/tokenizer.model
    runs/nano/checkpoints/300/arrays/           what Orbax wrote, read by TensorStore
    runs/nano/checkpoints/300/checkpoint.json   written last: SHA-256 of each file

`runs.checkpoint_manager` and `runs.run_directory` write them, and take the names from
here.

Source: https://orbax.readthedocs.io/en/latest/guides/checkpoint/checkpoint_format.html
"""

import concurrent.futures
import dataclasses
import warnings
from pathlib import Path

from keras_openllama.checkpoints import weight_names
from keras_openllama.checkpoints.matching import FLOATS, match
from keras_openllama.checkpoints.seal import MARKER, check_file, parse_marker
from keras_openllama.checkpoints.tensors import dense_bytes
from keras_openllama.utils.files import read_json_object, sha256
from keras_openllama.utils.progress import progress_bar

RUN, RUN_FORMAT = "run.json", 1
TOKENIZER = "tokenizer.model"
DIRECTORY = "checkpoints"
ARRAYS = "arrays"
# Orbax joins the keys of the tree, the part and the variable's path, by a dot.
_MODEL = "model."
_ARRAY_METADATA = "/.zarray"  # Of each array there is one.


# ----- Runs


def is_run(path):
    """Whether a path is the directory of a run, or of a checkpoint in one."""
    path = Path(path).resolve()
    if (path / RUN).is_file() or (path / MARKER).is_file():
        return True
    # A checkpoint whose writing was cut short has no marker.
    return path.parent.name == DIRECTORY and (path.parents[1] / RUN).is_file()


class TrainingRun:
    """A run on the disk, which may be going on; see `open`.

    Args:
        path: `pathlib.Path` of its directory.
        chosen: `pathlib.Path` of the checkpoint that is wanted; `None` is the newest.

    Example:

    ```python
    run = TrainingRun.open("runs/nano")
    checkpoint = run.checkpoint()
    tensors = checkpoint.read_tensors(validate_architecture(run.architecture()))
    ```
    """

    def __init__(self, path, chosen=None):
        self.path = path
        self._chosen = chosen

    @classmethod
    def open(cls, path):
        """Opens a run, or one of its checkpoints.

        Args:
            path: path of the run's directory, or of the checkpoint that is wanted.

        Raises:
            FileNotFoundError: if there is no `run.json`.
        """
        path = Path(path).resolve()
        if (path / RUN).is_file():
            return cls(path)
        run = path.parent.parent
        if not (run / RUN).is_file():
            raise FileNotFoundError(
                f"{RUN}, which says what the model is, is missing from {run}. "
                f"The checkpoint {path} belongs into its run, as "
                f"RUN/{DIRECTORY}/{path.name}."
            )
        return cls(run, chosen=path)

    def architecture(self):
        """Arguments of `OpenLlamaBackbone`.

        Raises:
            OSError: if `run.json` cannot be read.
            ValueError: if it is damaged, of another format, or no run's.
        """
        path = self.path / RUN
        run = read_json_object(path)
        if run.get("weights") == "adapters" or "lora_rank" in run:
            raise ValueError(
                f"{self.path} is a fine-tuning run whose checkpoints do not hold a "
                f"whole model. Load what it exported: {self.path}/model, or "
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

    def tokenizer_file(self):
        """Path of the SentencePiece model.

        Raises:
            FileNotFoundError: if there is none.
        """
        path = self.path / TOKENIZER
        if not path.is_file():
            raise FileNotFoundError(f"{TOKENIZER} is missing from the run {self.path}.")
        return path

    def checkpoint(self):
        """The checkpoint that was chosen, or else the newest one that is whole.

        Where a newer one is damaged, a warning names what is wrong with it.

        Returns:
            `Checkpoint`.

        Raises:
            OSError: if there is none, or the chosen one is unfinished.
            ValueError: if the chosen one, or every one, is damaged.
        """
        return self._newest() if self._chosen is None else self._only(self._chosen)

    def _only(self, path):
        remedy = f"Name the run, {self.path}, for its newest whole checkpoint."
        if not (path / MARKER).is_file():
            raise FileNotFoundError(
                f"{path} has no {MARKER}: its writing has not ended, or was cut short. "
                f"{remedy}"
            )
        try:
            return _whole(path)
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
        # Listed anew each time: a run that goes on writes new ones, and removes old.
        while paths := [p for p in self._checkpoints() if p not in damaged]:
            try:
                checkpoint = _whole(paths[-1])
            except (OSError, ValueError) as error:
                if (paths[-1] / MARKER).is_file():
                    damaged[paths[-1]] = _sentence(error)
                continue
            for path, problem in damaged.items():
                warnings.warn(
                    f"The checkpoint of step {path.name} in {self.path} is damaged, "
                    f"and that of step {checkpoint.step} is taken: {problem}",
                    stacklevel=2,
                )
            return checkpoint
        if damaged:
            raise ValueError(
                f"None of the checkpoints in {self.path} is whole: "
                + " ".join(f"Step {p.name}: {why}" for p, why in damaged.items())
            )
        raise FileNotFoundError(
            f"The run {self.path} has no checkpoint yet. For its model with random "
            "weights, pass load_weights=False."
        )

    def _checkpoints(self):
        """Paths of the checkpoints, damaged ones included, by step."""
        paths = (self.path / DIRECTORY).glob("*")
        steps = [path for path in paths if path.name.isdecimal()]
        # Without a marker it is being written, or its writing was cut short.
        whole = [path for path in steps if (path / MARKER).is_file()]
        return sorted(whole, key=lambda path: int(path.name))


def _sentence(error):
    return f"{str(error).removesuffix('.')}."


def _whole(path):
    """A checkpoint, once its files are found to be what was written.

    Raises:
        OSError: if a file is missing or cannot be read.
        ValueError: if a file is damaged.
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
    """A checkpoint on the disk, found to be whole.

    Attributes:
        path: string, its directory.
        step: int, steps done.
    """

    def __init__(self, path, step):
        self.path = str(path)
        self.step = step

    def read_tensors(self, arguments, head=True):
        """Describes the weights; none is read yet.

        Args:
            arguments: dict, arguments of `OpenLlamaBackbone`.
            head: bool, whether the language-model head is wanted.

        Returns:
            Dict of `ArrayTensor`s by variable path.

        Raises:
            ImportError: if TensorStore is not installed.
            OSError: if the checkpoint cannot be read, or was removed meanwhile.
            ValueError: if its weights are not those of the network that the arguments
                describe.
        """
        sizes = weight_names.sizes(arguments)
        expected = {
            row.path: (row.path, row.shape(sizes))
            for row in weight_names.weights(arguments["num_layers"], head)
        }
        stores = self._open()
        if not head:
            stores.pop(weight_names.HEAD.path, None)
        tensors = {
            name: ArrayTensor(name, store.dtype.name, store.shape, i, self, store)
            for i, (name, store) in enumerate(stores.items())
            # States of random generators are no weights.
            if name in expected or store.dtype.name in FLOATS
        }
        return match(tensors, expected, self.path)

    def _open(self):
        """The model's arrays by name, as TensorStore opens them."""
        ts = _tensorstore()
        context = ts.Context()
        base = {"driver": "file", "path": f"{self.path}/{ARRAYS}/"}

        def store(name):
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{_MODEL}{name}/"}
            # What is missing would be read as zeros.
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

        return self.read(open_all)

    def read(self, function):
        """What a function returns that reads the checkpoint.

        Raises:
            OSError: if TensorStore cannot read, or the checkpoint is there no more.
        """
        try:
            result = function()
        except (ValueError, NotImplementedError) as error:  # Of TensorStore.
            self._check_there(error)
            raise OSError(
                f"The checkpoint {self.path} cannot be read: {error}"
            ) from error
        # The marker goes before the arrays do: while it is there, they are whole.
        self._check_there()
        return result

    def _check_there(self, error=None):
        if not Path(self.path, MARKER).is_file():
            raise FileNotFoundError(
                f"The checkpoint {self.path} was removed while it was read. A run that "
                "goes on removes its old checkpoints: load it again, for its newest."
            ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayTensor:
    """One array of a checkpoint, in place of a `tensors.StoredTensor`.

    Attributes:
        name: the variable's path.
        dtype: name of its dtype.
        shape: tuple of ints.
        offset: int, its place among the others.
        file: the `Checkpoint` that holds it.
        store: `tensorstore.TensorStore`.
    """

    name: str
    dtype: str
    shape: tuple
    offset: int
    file: Checkpoint
    store: object

    @property
    def nbytes(self):
        return dense_bytes(self.shape, self.dtype)

    def array(self):
        """The tensor as a NumPy array, put together from the parts of all devices.

        Raises:
            OSError: if it cannot be read, or the checkpoint was removed meanwhile.
        """
        return self.file.read(lambda: self.store.read(order="C").result())

    def touch(self):
        """It is read by `array`: several read ahead would be in memory at once."""

    def drop(self):
        """Nobody but the reader keeps it."""


def _tensorstore():
    try:
        import tensorstore
    except ImportError as error:
        raise ImportError(
            "The checkpoints of a training run are read by TensorStore, which the "
            "extra 'train' brings: pip install 'keras-openllama[train]'."
        ) from error
    return tensorstore
