"""Where `from_preset` of each class leads: names, directories, the Hub, runs."""

import functools
import inspect
import warnings
from pathlib import Path

from keras_openllama import presets
from keras_openllama.checkpoints.training_run import TrainingRun, is_run
from keras_openllama.loading import hub, sources
from keras_openllama.loading.keras_hub_source import KerasHubSource
from keras_openllama.utils.files import read_json_object

_CONFIG = "config.json"


def load_backbone(
    cls, preset, *, load_weights=True, dtype=None, revision=None, **kwargs
):
    """`from_preset` of the backbone.

    Args:
        cls: the class to make.
        preset: string, a name of the registry, a directory in KerasHub's or
            transformers' format, that of a training run or of one of its checkpoints,
            or `"hf://user/repo"`.
        load_weights: bool, whether to load the weights, rather than initialise them.
        dtype: dtype or dtype policy; `None` is Keras's global policy.
        revision: string, branch, tag or commit of a repository on the Hub.
        **kwargs: arguments of the backbone, in place of the preset's.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError: for an unknown preset or argument, or files that are not this model.
        OSError: if a file cannot be had or read.
    """
    _check_names(cls, kwargs, arguments_of(cls))
    return find_source(preset, revision).backbone(cls, load_weights, dtype, kwargs)


def load_tokenizer(cls, preset, *, revision=None, **kwargs):
    """`from_preset` of the tokenizer; `**kwargs` are its arguments.

    Arguments, returns and errors as `load_backbone`.
    """
    return find_source(preset, revision).tokenizer(cls, kwargs)


def load_preprocessor(cls, preset, *, revision=None, **kwargs):
    """`from_preset` of the preprocessor; `**kwargs` are its arguments.

    `sequence_length` is the model's context unless given. Arguments, returns and errors
    as `load_backbone`.
    """
    return find_source(preset, revision).preprocessor(cls, kwargs)


def load_task(cls, preset, *, revision=None, **options):
    """`from_preset` of the task.

    Args:
        **options: see `load_task_from`.

    Further arguments, returns and errors as `load_backbone`.
    """
    source = find_source(preset, revision)
    return load_task_from(cls, source, origin(preset, revision), **options)


def load_task_from(
    cls, source, origin, *, load_weights=True, dtype=None, preprocessor="auto", **kwargs
):
    """Loads a task from a source.

    Args:
        cls: the class to make.
        source: `sources.ModelSource`.
        origin: string, what to call the weights by, see `origin`.
        load_weights, dtype: see `load_backbone`.
        preprocessor: `"auto"` loads it, with the model's context as its
            `sequence_length`; `None` looks for no tokenizer; or a preprocessor.
        **kwargs: arguments of the backbone, in place of the preset's, and of `cls`.

    Returns and errors as `load_backbone`.
    """
    if isinstance(preprocessor, str) and preprocessor != "auto":
        raise ValueError(
            "`preprocessor` takes 'auto', None, or a preprocessor. Received: "
            f"preprocessor={preprocessor!r}"
        )
    of_backbone = arguments_of(cls.backbone_cls)
    _check_names(cls, kwargs, {*of_backbone, *arguments_of(cls), *_OF_TASK})
    overrides = {n: kwargs.pop(n) for n in list(kwargs) if n in of_backbone}
    task = source.task(cls, load_weights, dtype, preprocessor, overrides, kwargs)
    if load_weights:
        task.loaded_from = source.origin or origin
    return task


_OF_TASK = ("compile", "name", "trainable")  # What Keras's own classes take.


def arguments_of(cls):
    """Names of the arguments of a class's constructor."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.kind in kinds]


def _check_names(cls, kwargs, known):
    unknown = [name for name in kwargs if name not in known]
    if unknown:
        raise ValueError(
            f"`{cls.__name__}.from_preset` has no argument "
            f"{', '.join(map(repr, unknown))}. Beside its own it takes those of the "
            f"backbone: {', '.join(sorted(known))}."
        )


def origin(source, revision=None, is_file=False):
    """What to call weights by what they were loaded from: no path of this machine.

    Args:
        source: what `from_preset` takes, or the path of a file.
        revision: what `from_preset` takes.
        is_file: bool, whether `source` is the path of a file.

    Returns:
        String: the name of a preset, if the weights are what it publishes and nothing
        else; or `"hf://user/repo"`, or a phrase such as `"the directory out"`.
    """
    name = str(source)
    if is_file:
        return f"the file {Path(name).name}"
    # open_llama_3b_v3 has the weights of open_llama_3b_v2, which comes first.
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


def find_source(preset, revision=None, build_task=None):
    """What a preset's name stands for.

    Args:
        preset, revision: see `load_backbone`.
        build_task: see `keras_hub_source.KerasHubSource`; only conversions need it.

    Returns:
        `sources.ModelSource`.

    Raises:
        ValueError: for an unknown preset.
        OSError: if it is a directory or repository without `config.json`, or a
            checkpoint of a training run without the run.
    """
    if not isinstance(preset, (str, Path)):
        raise ValueError(
            "`preset` takes a name, a path, or 'hf://user/repo'. Received: "
            f"preset={preset!r}"
        )
    name = str(preset)
    known = presets.find(name)
    handle = known.weights["transformers"] if known else name
    on_hub = handle.startswith(hub.HUB_PREFIX)
    if revision is not None and not on_hub:
        raise ValueError(
            "`revision` is for repositories on the Hugging Face Hub, and "
            f"preset={name!r} is none. Received: revision={revision!r}"
        )
    if known:
        _warn_once(known.name)
        path = handle if on_hub else presets.folder() / handle
        return sources.RegistrySource(known, hub.open_repository(path, revision))
    if not on_hub and not Path(name).is_dir():
        raise presets.unknown_preset_error(name)
    repository = hub.open_repository(name, revision)
    if not on_hub and repository.optional(_CONFIG) is None and is_run(name):
        return sources.TrainingRunSource(TrainingRun.open(name))
    return _source_of(repository, build_task)


def _source_of(repository, build_task):
    """The source for the format that a directory or repository is in."""
    path = repository.file(_CONFIG)
    config = read_json_object(path)
    if "registered_name" in config:
        return KerasHubSource(repository, build_task)
    if "model_type" in config:
        return sources.TransformersSource(repository, config, path)
    raise ValueError(
        f"{path} is neither KerasHub's, which has a 'registered_name', nor that of "
        f"transformers, which has a 'model_type'. It has: {', '.join(config)}."
    )


@functools.cache
def _warn_once(name):
    if presets.registry()[name].notice:
        warnings.warn(presets.registry()[name].notice, stacklevel=5)
