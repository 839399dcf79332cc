"""What `from_preset` of the public classes does: finds a source, loads from it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from keras_openllama import presets
from keras_openllama.checkpoints.training_run import TrainingRun
from keras_openllama.loading import hub, sources
from keras_openllama.loading.keras_hub_source import KerasHubSource
from keras_openllama.loading.model_directory import CONFIG, format_of
from keras_openllama.loading.weight_types import WeightTypes
from keras_openllama.utils.file_types import GGUF_SUFFIX, is_gguf_file
from keras_openllama.utils.files import read_json_object

if TYPE_CHECKING:
    import keras

    from keras_openllama.utils.types import PathLike

_Loaded = TypeVar("_Loaded")


def load_backbone(
    cls: type[_Loaded],
    source: sources.ModelSource,
    *,
    load_weights: bool = True,
    dtype: str | keras.DTypePolicy | None = None,
    quantization: Any = "auto",
    **kwargs: Any,
) -> _Loaded:
    """Loads a backbone from a source.

    Args:
        cls: The class of the backbone.
        source: The source, see `find_source`.
        load_weights: Whether to load the weights. Otherwise they are initialized at
            random.
        dtype: Dtype or dtype policy. `None` is Keras's global policy.
        quantization: `"int8"`, `"int4"` or a `keras.quantizers.QuantizationConfig`;
            `None` for floating-point weights; `"auto"` for weights as in the files.
        **kwargs: Arguments of the backbone, which override those of the source.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError: If an argument is unknown, or the files do not belong to this model.
        OSError: If a file is unavailable or cannot be read.
    """
    _check_names(cls, kwargs, arguments_of(cls))
    types = WeightTypes(dtype, quantization)
    return source.backbone(cls, load_weights, types, kwargs)


def load_task(
    cls: type[_Loaded],
    source: sources.ModelSource,
    origin: str,
    *,
    load_weights: bool = True,
    dtype: str | keras.DTypePolicy | None = None,
    preprocessor: Any = "auto",
    quantization: Any = "auto",
    **kwargs: Any,
) -> _Loaded:
    """Loads a task from a source.

    Args:
        cls: The class of the task.
        source: The source.
        origin: Description of the weights, as `describe_origin` returns it.
        load_weights: As for `load_backbone`.
        dtype: As for `load_backbone`.
        preprocessor: A preprocessor. `"auto"` loads it from the source, with the
            context length of the model as its `sequence_length`. `None` loads no
            tokenizer.
        quantization: As for `load_backbone`.
        **kwargs: Arguments of the task, and arguments of the backbone that override
            those of the source.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError: As for `load_backbone`.
        OSError: As for `load_backbone`.
    """
    if isinstance(preprocessor, str) and preprocessor != "auto":
        raise ValueError(
            "`preprocessor` must be 'auto', None, or a preprocessor. Received: "
            f"preprocessor={preprocessor!r}"
        )
    of_backbone = arguments_of(cls.backbone_cls)
    _check_names(cls, kwargs, {*of_backbone, *arguments_of(cls), *_KERAS_ARGUMENTS})
    overrides = {n: kwargs.pop(n) for n in list(kwargs) if n in of_backbone}
    types = WeightTypes(dtype, quantization)
    task = source.task(cls, load_weights, types, preprocessor, overrides, kwargs)
    if load_weights:
        task.loaded_from = source.origin or origin
    return task


_KERAS_ARGUMENTS = ("compile", "name", "trainable")  # Of the task's base classes.


def arguments_of(cls: type) -> list[str]:
    """Returns the names of the arguments of a class's constructor.

    Example:
        >>> arguments_of(hub.HubRepository)
        ['handle', 'revision']
    """
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.kind in kinds]


def _check_names(cls, kwargs, known):
    unknown = [name for name in kwargs if name not in known]
    if unknown:
        raise ValueError(
            f"`{cls.__name__}.from_preset` has no argument "
            f"{', '.join(map(repr, unknown))}. In addition to its own arguments it "
            f"takes those of the backbone: {', '.join(sorted(known))}."
        )


def describe_origin(
    source: PathLike, revision: str | None = None, is_file: bool = False
) -> str:
    """Describes the origin of weights, without a path of this machine.

    Args:
        source: The preset that was passed to `from_preset`, or the path of a file.
        revision: The revision that was passed to `from_preset`.
        is_file: Whether `source` is the path of a file.

    Returns:
        The name of a preset if the weights are those that it publishes. Otherwise
        `"hf://user/repo"`, or a description such as `"the directory out"`.

    Example:
        >>> describe_origin("3b_v2"), describe_origin("/home/me/out")
        ('open_llama_3b_v2', 'the directory out')
    """
    name = str(source)
    if is_file or (not presets.find(name) and is_gguf_file(name)):
        return f"the file {Path(name).name}"
    # open_llama_3b_v3 has the weights of open_llama_3b_v2, which is listed first.
    by_handle = [
        p for p in presets.registry().values() if p.handles["transformers"] == name
    ]
    known = presets.find(name) or (by_handle or [None])[0]
    if known and revision is None:
        return known.name
    if known or name.startswith("hf://"):
        handle = known.handles["transformers"] if known else name
        return f"{handle} at {revision}" if revision else handle
    return f"the directory {Path(name).resolve().name}"


def find_source(
    preset: PathLike,
    revision: str | None = None,
    build_empty_task: Callable[..., keras.Model] | None = None,
    argument: str = "preset",
) -> sources.ModelSource:
    """Finds the source that a preset refers to.

    Args:
        preset: Name of a preset; path of a directory in KerasHub's or transformers'
            format, of a training run or of one of its checkpoints; path of a GGUF file;
            `"hf://user/repo"`, or `"hf://user/repo/file.gguf"`.
        revision: Branch, tag or commit of a repository on the Hub.
        build_empty_task: As for `keras_hub_source.KerasHubSource`. Only conversions
            require it.
        argument: Name of the caller's argument, for error messages.

    Returns:
        The source. Its weights are not opened yet.

    Raises:
        ValueError: If the preset is unknown.
        OSError: If it is a directory or repository without `config.json`, or a
            checkpoint outside the directory of its training run.

    Example:
        >>> find_source("open_llama_nano").arguments()["num_layers"]
        4
    """
    if not isinstance(preset, (str, Path)):
        raise ValueError(
            f"`{argument}` must be a name, a path, or 'hf://user/repo'. Received: "
            f"{argument}={preset!r}"
        )
    name = str(preset)
    known = presets.find(name)
    handle = known.weights["transformers"] if known else name
    on_hub = handle.startswith(hub.HUB_PREFIX)
    if not known and (found := _find_gguf(name, revision)):
        return found
    if known:
        _warn_once(known.name)
        path = handle if on_hub else presets.folder() / handle
        return sources.RegistrySource(known, hub.open_repository(path, revision))
    if not on_hub and not (name and Path(name).is_dir()):
        raise presets.unknown_preset_error(name, argument)
    repository = hub.open_repository(name, revision)
    return _source_of(repository, format_of(repository), build_empty_task)


def _find_gguf(name, revision):
    """Returns the source of a GGUF file, local or on the Hub, or `None`."""
    repository, file = hub.split_file_handle(name)
    if repository is None:
        if not is_gguf_file(name):
            if name.endswith(GGUF_SUFFIX) and not Path(name).is_dir():
                raise FileNotFoundError(f"There is no GGUF file {name}.")
            return None
        repository, file = Path(name).parent, Path(name).name
    from keras_openllama.loading.gguf_source import GgufSource

    return GgufSource(hub.open_repository(repository, revision), file)


def _source_of(repository, model_format, build_empty_task):
    if model_format == "run":
        return sources.TrainingRunSource(TrainingRun.open(repository.path))
    if model_format == "transformers":
        path = repository.file(CONFIG)
        return sources.TransformersSource(repository, read_json_object(path), path)
    return KerasHubSource(repository, build_empty_task)


@functools.cache
def _warn_once(name):
    if presets.registry()[name].notice:
        warnings.warn(presets.registry()[name].notice, stacklevel=4)
