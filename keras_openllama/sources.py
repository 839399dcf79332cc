"""The three kinds of things that a model is loaded from, behind one interface.

Each has `backbone`, `tokenizer`, `preprocessor` and `task`, which `presets` calls.
"""

import contextlib

import keras

from keras_openllama.convert import transformers
from keras_openllama.convert.building import without_weights

_CONFIG = "config.json"
_TOKENIZER = "tokenizer.model"


def open_source(repository):
    """Finds out in which format a directory or repository is.

    Args:
        repository: `hub.Directory` or `hub.HubRepository`.

    Returns:
        A `Transformers` or a `KerasHub` source.

    Raises:
        OSError: if there is no `config.json`.
        ValueError: if it is of neither format.
    """
    path = repository.file(_CONFIG)
    config = transformers.read_config(path)
    if "registered_name" in config:
        return KerasHub(repository)
    if "model_type" in config:
        return Transformers(repository, config, path)
    raise ValueError(
        f"{path} is neither KerasHub's, which has a 'registered_name', nor that of "
        f"transformers, which has a 'model_type'. It has: {', '.join(config)}."
    )


class _Streamed:
    """A source in the format of transformers: built empty, filled from the files."""

    _tied = False

    def backbone(self, cls, load_weights, dtype, overrides):
        arguments = self._all_arguments(overrides, dtype)
        return self._load(lambda: cls(**arguments), load_weights)

    def tokenizer(self, cls, kwargs):
        return cls(str(self._tokenizer_file()), **kwargs)

    def preprocessor(self, cls, kwargs):
        kwargs.setdefault("sequence_length", self._arguments()["max_sequence_length"])
        return cls(self.tokenizer(cls.tokenizer_cls, {}), **kwargs)

    def task(self, cls, load_weights, dtype, preprocessor, overrides, kwargs):
        arguments = self._all_arguments(overrides, dtype)
        if isinstance(preprocessor, str) and preprocessor == "auto":
            # First, since it fails soonest.
            preprocessor = self.preprocessor(
                cls.preprocessor_cls,
                {"sequence_length": arguments["max_sequence_length"]},
            )
            _check_vocabulary(preprocessor.tokenizer, arguments["vocabulary_size"])

        # An optimizer's variables have values from the start, so cannot be made inside
        # `without_weights`.
        compile_it = kwargs.pop("compile", True)

        def build():
            backbone = cls.backbone_cls(**arguments)
            return cls(backbone, preprocessor, compile=False, **kwargs)

        task = self._load(build, load_weights)
        if compile_it:
            task.compile()
        return task

    def _all_arguments(self, overrides, dtype):
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        if policy.quantization_mode is not None:
            raise ValueError(
                "`dtype` takes a floating-point dtype or policy here; to quantise, "
                "load the model and call its method `quantize` afterwards. Received: "
                f"dtype={policy.name!r}"
            )
        return {**self._arguments(), **overrides, "dtype": policy}

    def _load(self, build, load_weights):
        if not load_weights:
            return build()
        with transformers.Weights(self._repository()) as weights:
            with without_weights() as variables:
                model = build()
            weights.fill(model, variables, self._tied)
        return model

    def _tokenizer_file(self):
        try:
            return self._repository().file(_TOKENIZER)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} To load the model without a tokenizer, pass "
                "preprocessor=None."
            ) from error


class Transformers(_Streamed):
    """A directory or repository in the format of transformers.

    Args:
        repository: `hub.Directory` or `hub.HubRepository`.
        config: dict, its `config.json`.
        path: path of it.
    """

    def __init__(self, repository, config, path):
        self._opened = repository
        self._config = config
        self._path = path
        self._tied = bool(config.get("tie_word_embeddings"))

    def _repository(self):
        return self._opened

    def _arguments(self):
        return transformers.backbone_arguments(self._config, self._path)


class Registered(_Streamed):
    """A preset of the registry, which knows its architecture without any file.

    Args:
        preset: `presets.Preset`.
        open_repository: function without arguments that opens its repository.
    """

    def __init__(self, preset, open_repository):
        self._preset = preset
        self._open = open_repository
        self._opened = None

    def tokenizer(self, cls, kwargs):
        tokenizer = super().tokenizer(cls, kwargs)
        expected = self._preset.tokenizer["keeps_spaces"]
        if tokenizer.keeps_spaces != expected:
            does = {True: "keeps runs of spaces", False: "merges runs of spaces"}
            raise ValueError(
                f"{self._tokenizer_file()} {does[not expected]}, and the tokenizer "
                f"{self._preset.tokenizer_version} of {self._preset.name} "
                f"{does[expected]}: it is another model's tokenizer. Delete the file "
                "and get it again."
            )
        return tokenizer

    def _repository(self):
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _arguments(self):
        return dict(self._preset.config)


class KerasHub:
    """A directory or repository that `save_to_preset` wrote; KerasHub loads it.

    Args:
        repository: `hub.Directory` or `hub.HubRepository`.
    """

    def __init__(self, repository):
        self._repository = repository

    def backbone(self, cls, load_weights, dtype, overrides):
        with self._loader(load_weights, overrides) as loader:
            own = loader.check_backbone_class()
            if not issubclass(own, cls):
                raise ValueError(f"it holds a {own.__name__}, not a {cls.__name__}")
            dtype = loader._resolve_dtype(loader.config, {"dtype": dtype})
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
        with self._loader(load_weights, overrides) as loader:
            own = loader.check_backbone_class()
            if not issubclass(own, cls.backbone_cls):
                raise ValueError(f"it holds a {own.__name__}, not a {cls.__name__}")
            return loader.load_task(
                cls, load_weights, load_task_weights=load_weights, dtype=dtype, **kwargs
            )

    @contextlib.contextmanager
    def _loader(self, load_weights=False, overrides=()):
        """Fetches the files, and yields KerasHub's loader for their directory."""
        from keras_openllama._keras_hub import KerasPresetLoader

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
            yield Loader(str(config.parent), transformers.read_config(config))
        except (OSError, KeyError, TypeError, ValueError) as error:
            # What KerasHub and h5py raise seldom says which file it is about.
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(
                f"{config.parent}, in KerasHub's format, cannot be loaded: {error}"
            ) from error


def _check_vocabulary(tokenizer, size):
    if tokenizer.vocabulary_size() > size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocabulary_size()} pieces and the model "
            f"{size} embeddings: it is another model's tokenizer."
        )
