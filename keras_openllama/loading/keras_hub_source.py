"""Directories in KerasHub's format as a source of models, see `sources`."""

import contextlib

from keras_openllama.backend.keras_hub import (
    KerasPresetLoader,
    resolve_dtype,
    without_tensorflow,
)
from keras_openllama.checkpoints import keras_hub
from keras_openllama.checkpoints.contents import PREPROCESSING
from keras_openllama.loading.sources import SourceDefaults
from keras_openllama.utils.files import read_json_object

_CONFIG = "config.json"


class KerasHubSource(SourceDefaults):
    """A directory or repository that `save_to_preset` wrote; KerasHub loads it.

    Args:
        repository: `repository.Repository`.
        build_task: function that makes an empty task, see `keras_hub.read_tensors`;
            `None` where no tensors are read one by one.
    """

    def __init__(self, repository, build_task=None):
        self._repository = repository
        self._build_task = build_task

    def arguments(self):
        path = self._repository.file(_CONFIG)
        return keras_hub.backbone_arguments(read_json_object(path), path)

    def tokenizer_file(self):
        return self._repository.file(keras_hub.TOKENIZER)

    def preprocessing(self):
        path = self._repository.optional("preprocessor.json")
        settings = read_json_object(path).get("config", {}) if path else {}
        return {name: settings[name] for name in PREPROCESSING if name in settings}

    def read_tensors(self, arguments, head=True):
        return keras_hub.read_tensors(
            self._repository, arguments, self._build_task, head
        )

    def backbone(self, cls, load_weights, dtype, overrides):
        with self._loader(load_weights, overrides) as loader:
            own = loader.check_backbone_class()
            if not issubclass(own, cls):
                raise ValueError(f"it holds a {own.__name__}, not a {cls.__name__}")
            dtype = resolve_dtype(loader, dtype)
            return loader.load_backbone(own, load_weights, dtype=dtype)

    def tokenizer(self, cls, kwargs):
        with self._loader() as loader:
            return loader.load_tokenizer(cls, **kwargs)

    def preprocessor(self, cls, kwargs):
        with self._loader() as loader:
            return loader.load_preprocessor(cls, **kwargs)

    def task(self, cls, load_weights, dtype, preprocessor, overrides, kwargs):
        if preprocessor is None or not isinstance(preprocessor, str):
            kwargs["preprocessor"] = preprocessor
        # The state of an optimizer that a new one has no use for would be warned of.
        compile_it = kwargs.pop("compile", True)
        with self._loader(load_weights, overrides) as loader:
            own = loader.check_backbone_class()
            if not issubclass(own, cls.backbone_cls):
                raise ValueError(f"it holds a {own.__name__}, not a {cls.__name__}")
            task = loader.load_task(
                cls,
                load_weights,
                load_task_weights=load_weights,
                dtype=dtype,
                compile=False,
                **kwargs,
            )
        if compile_it:
            task.compile()
        return task

    @contextlib.contextmanager
    def _loader(self, load_weights=False, overrides=()):
        """Fetches the files, and yields KerasHub's loader for their directory."""

        # Here, since it takes seconds: a conversion does without.
        class Loader(KerasPresetLoader):
            def get_backbone_kwargs(self, **kwargs):
                arguments, kwargs = super().get_backbone_kwargs(**kwargs)
                return {**arguments, **dict(overrides)}, kwargs

        patterns = ["*.json", "assets/**/*", *(["*.weights.h5"] * load_weights)]
        for pattern in patterns:
            for name in self._repository.glob(pattern):
                self._repository.file(name)
        config = self._repository.file(_CONFIG)
        try:
            with without_tensorflow():
                yield Loader(str(config.parent), read_json_object(config))
        except (OSError, KeyError, TypeError, ValueError) as error:
            # What KerasHub and h5py raise seldom says which file it is about.
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(
                f"{config.parent}, in KerasHub's format, cannot be loaded: {error}"
            ) from error
