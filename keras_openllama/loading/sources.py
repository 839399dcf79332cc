"""The kinds of things that a model is loaded from, behind one interface.

Each has `backbone`, `tokenizer`, `preprocessor` and `task`, which `presets` calls; and
`arguments`, `tokenizer_file`, `control_ids` and `read_tensors`, of which a conversion
makes its `Contents`.
"""

import contextlib

import keras

from keras_openllama.checkpoints import easylm, keras_hub, transformers
from keras_openllama.checkpoints.contents import PREPROCESSING, Contents
from keras_openllama.checkpoints.matching import listed
from keras_openllama.config import checked
from keras_openllama.loading.filling import Weights
from keras_openllama.loading.uninitialized import without_weights
from keras_openllama.text.sentencepiece_model import (
    check_vocabulary,
    keeps_spaces,
    load_processor,
)

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


class _Source:
    """What a conversion asks of a source, where there is nothing special to tell."""

    origin = None  # Of the weights, where it knows more than `load.origin`.

    def control_ids(self):
        """Ids of the tokens of start and end, of a model without tokenizer."""
        return 1, 2  # Of all OpenLLaMA models.

    def preprocessing(self):
        """Settings of the preprocessor, see `contents.PREPROCESSING`."""
        return {}

    def added_tokens(self, pieces):
        """Tokens that the model has beyond so many of SentencePiece."""
        return []


class Streamed(_Source):
    """A source that is read tensor by tensor into a model that was built empty."""

    def backbone(self, cls, load_weights, dtype, overrides):
        arguments = self._all_arguments(overrides)
        policy = _policy(dtype)
        return self._load(
            lambda: cls(**arguments, dtype=policy), load_weights, arguments, head=False
        )

    def tokenizer(self, cls, kwargs):
        return cls(str(self._needed_tokenizer_file()), **kwargs)

    def preprocessor(self, cls, kwargs):
        kwargs.setdefault("sequence_length", self.arguments()["max_sequence_length"])
        return cls(self.tokenizer(cls.tokenizer_cls, {}), **kwargs)

    def task(self, cls, load_weights, dtype, preprocessor, overrides, kwargs):
        arguments = self._all_arguments(overrides)
        policy = _policy(dtype)
        if isinstance(preprocessor, str) and preprocessor == "auto":
            # First, since it fails soonest.
            preprocessor = self.preprocessor(
                cls.preprocessor_cls,
                {"sequence_length": arguments["max_sequence_length"]},
            )
            check_vocabulary(
                preprocessor.tokenizer.vocabulary_size(), arguments["vocabulary_size"]
            )

        # An optimizer's variables have values from the start, so cannot be made inside
        # `without_weights`.
        compile_it = kwargs.pop("compile", True)

        def build():
            backbone = cls.backbone_cls(**arguments, dtype=policy)
            return cls(backbone, preprocessor, compile=False, **kwargs)

        task = self._load(build, load_weights, arguments, head=True)
        if compile_it:
            task.compile()
        return task

    def _all_arguments(self, overrides):
        return checked({**self.arguments(), **overrides})

    def _load(self, build, load_weights, arguments, head):
        if not load_weights:
            return build()
        with Weights(self.read_tensors(arguments, head)) as weights:
            with without_weights() as variables:
                model = build()
            weights.fill(model, variables)
        return model

    def _needed_tokenizer_file(self):
        try:
            return self.tokenizer_file()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} To load the model without a tokenizer, pass "
                "preprocessor=None."
            ) from error


def _policy(dtype):
    policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
    if policy.quantization_mode is not None:
        raise ValueError(
            "`dtype` takes a floating-point dtype or policy here; to quantise, "
            "load the model and call its method `quantize` afterwards. Received: "
            f"dtype={policy.name!r}"
        )
    return policy


class Transformers(Streamed):
    """A directory or repository in the format of transformers.

    Args:
        repository: `hub.Directory` or `hub.HubRepository`.
        config: dict, its `config.json`.
        path: path of it.
    """

    def __init__(self, repository, config, path):
        self._repository = repository
        self._config = config
        self._path = path

    def arguments(self):
        return transformers.backbone_arguments(self._config, self._path)

    def tokenizer_file(self):
        return self._repository.file(_TOKENIZER)

    def control_ids(self):
        ids = [self._config.get(name) for name in ("bos_token_id", "eos_token_id")]
        usual = super().control_ids()
        # The end may be a list of several; what writes one takes the first.
        ids = [i[0] if isinstance(i, list) and i else i for i in ids]
        return tuple(u if i is None else i for i, u in zip(ids, usual, strict=True))

    def added_tokens(self, pieces):
        ids = {}
        for name in ("added_tokens.json", "tokenizer_config.json"):
            path = self._repository.optional(name)
            found = transformers.read_config(path) if path else {}
            decoder = found.get("added_tokens_decoder", {})
            ids.update({entry["content"]: int(i) for i, entry in decoder.items()})
            if name == "added_tokens.json":
                ids.update(found)
        return sorted(token for token, i in ids.items() if i >= pieces)

    def read_tensors(self, arguments, head=True):
        tied = bool(self._config.get("tie_word_embeddings"))
        return transformers.read_tensors(self._repository, arguments, head, tied)


class Registered(Streamed):
    """A preset of the registry, which knows its architecture without any file.

    Args:
        preset: `presets.Preset`.
        open_repository: function without arguments that opens its repository.
    """

    def __init__(self, preset, open_repository):
        self._preset = preset
        self._open = open_repository
        self._opened = None

    def arguments(self):
        return dict(self._preset.config)

    def tokenizer_file(self):
        path = self._repository().file(_TOKENIZER)
        found = keeps_spaces(load_processor(path.read_bytes(), str(path)))
        expected = self._preset.tokenizer["keeps_spaces"]
        if found != expected:
            does = {True: "keeps runs of spaces", False: "merges runs of spaces"}
            raise ValueError(
                f"{path} {does[found]}, and the tokenizer "
                f"{self._preset.tokenizer_version} of {self._preset.name} "
                f"{does[expected]}: it is another model's tokenizer. Delete the file "
                "and get it again."
            )
        return path

    def read_tensors(self, arguments, head=True):
        return transformers.read_tensors(self._repository(), arguments, head)

    def _repository(self):
        if self._opened is None:
            self._opened = self._open()
        return self._opened


class EasyLM(Streamed):
    """A file of EasyLM, which holds weights alone.

    Args:
        path: path of the file.
        model: a source of the rest: architecture and tokenizer.
    """

    def __init__(self, path, model):
        self._path = path
        self._model = model

    def arguments(self):
        return self._model.arguments()

    def tokenizer(self, cls, kwargs):
        return self._model.tokenizer(cls, kwargs)

    def tokenizer_file(self):
        return self._model.tokenizer_file()

    def control_ids(self):
        return self._model.control_ids()

    def preprocessing(self):
        return self._model.preprocessing()

    def added_tokens(self, pieces):
        return self._model.added_tokens(pieces)

    def read_tensors(self, arguments, head=True):
        return easylm.read_tensors(self._path, arguments, head)


class KerasHub(_Source):
    """A directory or repository that `save_to_preset` wrote; KerasHub loads it.

    Args:
        repository: `hub.Directory` or `hub.HubRepository`.
    """

    def __init__(self, repository):
        self._repository = repository

    def arguments(self):
        path = self._repository.file(_CONFIG)
        return keras_hub.backbone_arguments(transformers.read_config(path), path)

    def tokenizer_file(self):
        return self._repository.file(keras_hub.TOKENIZER)

    def preprocessing(self):
        path = self._repository.optional("preprocessor.json")
        settings = transformers.read_config(path).get("config", {}) if path else {}
        return {name: settings[name] for name in PREPROCESSING if name in settings}

    def read_tensors(self, arguments, head=True):
        return keras_hub.read_tensors(self._repository, arguments, head)

    def backbone(self, cls, load_weights, dtype, overrides):
        from keras_openllama.backend.keras_hub import resolve_dtype

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
        from keras_openllama.backend.keras_hub import (
            KerasPresetLoader,
            without_tensorflow,
        )

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
                yield Loader(str(config.parent), transformers.read_config(config))
        except (OSError, KeyError, TypeError, ValueError) as error:
            # What KerasHub and h5py raise seldom says which file it is about.
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(
                f"{config.parent}, in KerasHub's format, cannot be loaded: {error}"
            ) from error


def contents_of(source, tokenizer=True, origin=None, paths=()):
    """What the model of a source consists of. No tensor is read yet.

    Args:
        source: one of the classes above.
        tokenizer: bool, whether its tokenizer is wanted.
        origin: string, see `load.origin`.
        paths: list of further paths that are read.

    Returns:
        `Contents`.

    Raises:
        OSError: if a file is missing or cannot be read.
        ValueError: if a file is damaged, or its tensors are not those of the network.
    """
    arguments = checked(source.arguments())
    proto = _proto(source, arguments) if tokenizer else None
    tensors = source.read_tensors(arguments)
    return Contents(
        arguments,
        tensors,
        tokenizer=proto,
        origin=source.origin or origin,
        control_ids=source.control_ids(),
        preprocessing=source.preprocessing(),
        paths=(*paths, *sorted({tensor.file.path for tensor in tensors.values()})),
    )


def _proto(source, arguments):
    try:
        path = source.tokenizer_file()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} To convert the weights alone, leave the tokenizer out "
            "(tokenizer=False, or --no-tokenizer)."
        ) from error
    proto = path.read_bytes()
    pieces = load_processor(proto, str(path)).vocab_size()
    check_vocabulary(pieces, arguments["vocabulary_size"])
    added = source.added_tokens(pieces)
    if added:
        raise ValueError(
            f"Beside {path}, which has {pieces} pieces, the model has tokens that were "
            f"added to it: {listed(added)}. SentencePiece has no place for them. To "
            "convert the weights alone, leave the tokenizer out (tokenizer=False, or "
            "--no-tokenizer)."
        )
    return proto
