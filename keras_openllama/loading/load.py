"""Where `from_preset` of each class leads: names, directories, the Hub, runs."""

import functools
import inspect
import warnings
from pathlib import Path

from keras_openllama import presets
from keras_openllama.checkpoints.training_run import is_run
from keras_openllama.loading import hub, sources, training_run_source


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
        ValueError: for an unknown preset, or files that are not this model.
        OSError: if a file cannot be had or read.
    """
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


def load_task(
    cls,
    preset,
    *,
    load_weights=True,
    dtype=None,
    revision=None,
    preprocessor="auto",
    easylm=None,
    **kwargs,
):
    """`from_preset` of the task.

    Args:
        easylm: path of a file of EasyLM that has the weights, in place of the preset's.
        preprocessor: `"auto"` loads it, with the model's context as its
            `sequence_length`; `None` looks for no tokenizer; or a preprocessor.
        **kwargs: arguments of the backbone, in place of the preset's, and of `cls`.

    Further arguments, returns and errors as `load_backbone`.
    """
    if isinstance(preprocessor, str) and preprocessor != "auto":
        raise ValueError(
            "`preprocessor` takes 'auto', None, or a preprocessor. Received: "
            f"preprocessor={preprocessor!r}"
        )
    own = inspect.signature(cls.backbone_cls).parameters
    overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
    source = find_source(preset, revision, easylm)
    task = source.task(cls, load_weights, dtype, preprocessor, overrides, kwargs)
    if load_weights:
        name = origin(easylm or preset, revision, easylm is not None)
        task.loaded_from = source.origin or name
    return task


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


def find_source(preset, revision=None, easylm=None):
    """What a preset's name stands for, one of `sources` or `run_source`.

    Args:
        preset, revision: see `load_backbone`.
        easylm: path of a file of EasyLM that has the weights, in place of the preset's.

    Raises:
        ValueError: for an unknown preset.
        OSError: if it is a directory or repository without `config.json`, or a
            checkpoint of a training run without the run.
    """
    source = _find_source(preset, revision)
    return source if easylm is None else sources.EasyLM(easylm, source)


def _find_source(preset, revision):

    if not isinstance(preset, (str, Path)):
        raise ValueError(
            "`preset` takes a name, a path, or 'hf://user/repo'. Received: "
            f"preset={preset!r}"
        )
    name = str(preset)
    known = presets.find(name)
    handle = known.weights["transformers"] if known else name
    if handle.startswith(hub.HUB_PREFIX):
        repository = functools.partial(hub.HubRepository, handle, revision)
    elif revision is not None:
        raise ValueError(
            "`revision` is for repositories on the Hugging Face Hub, and "
            f"preset={name!r} is none. Received: revision={revision!r}"
        )
    elif known:
        repository = functools.partial(hub.Directory, presets.folder() / handle)
    elif Path(name).is_dir():
        repository = functools.partial(hub.Directory, name)
        if repository().optional("config.json") is None and is_run(name):
            return training_run_source.TrainingRun(name)
    else:
        raise presets.unknown(name)
    if known:
        _tell_once(known.name)
        return sources.Registered(known, repository)
    return sources.open_source(repository())


@functools.cache
def _tell_once(name):
    if presets.registry()[name].notice:
        warnings.warn(presets.registry()[name].notice, stacklevel=6)
