"""The kinds of things that a model is loaded from, behind one interface.

That of KerasHub's format is in `keras_hub_source`.
"""

from pathlib import Path
from typing import Protocol

import keras

from keras_openllama.checkpoints import easylm, transformers
from keras_openllama.config import validate_architecture
from keras_openllama.loading.filling import Weights
from keras_openllama.loading.uninitialized import without_weights
from keras_openllama.text.sentencepiece_model import (
    check_vocabulary,
    keeps_spaces,
    load_processor,
)
from keras_openllama.utils.files import read_json_object

_TOKENIZER = "tokenizer.model"


class ModelSource(Protocol):
    """What `from_preset` and conversions load models from.

    `from_preset` calls `backbone`, `tokenizer`, `preprocessor` and `task`; a conversion
    calls the others. Each raises `OSError` if a file is missing or cannot be read, and
    `ValueError` if one is damaged or not this model's.

    Attributes:
        origin: string, what the weights are called where the source knows more than
            `load.origin`, or `None`.
    """

    origin: str | None

    def backbone(self, cls, load_weights: bool, dtype, overrides: dict):
        """Loads a backbone of class `cls`; `overrides` are arguments of it."""

    def tokenizer(self, cls, kwargs: dict):
        """Loads a tokenizer of class `cls`; `kwargs` are arguments of it."""

    def preprocessor(self, cls, kwargs: dict):
        """Loads a preprocessor of class `cls`; `kwargs` are arguments of it."""

    def task(
        self, cls, load_weights: bool, dtype, preprocessor, overrides: dict, kwargs
    ):
        """Loads a task; `overrides` are arguments of its backbone, `kwargs` its own."""

    def arguments(self) -> dict:
        """Arguments of `OpenLlamaBackbone`, before `config.validate_architecture`."""

    def tokenizer_file(self) -> Path:
        """Path of the SentencePiece model."""

    def control_ids(self) -> tuple:
        """Ids of the tokens of start and end, of a model without tokenizer."""

    def preprocessing(self) -> dict:
        """Settings of the preprocessor, see `contents.PREPROCESSING`."""

    def added_tokens(self, pieces: int) -> list:
        """Tokens that the model has beyond the `pieces` of SentencePiece."""

    def read_tensors(self, arguments: dict, head: bool = True) -> dict:
        """Describes the weights: dict of `tensors.StoredTensor`s by variable path."""


class SourceDefaults:
    """What most sources answer to a conversion; see `ModelSource`."""

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


class StreamedSource(SourceDefaults):
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
        return validate_architecture({**self.arguments(), **overrides})

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


class TransformersSource(StreamedSource):
    """A directory or repository in the format of transformers.

    Args:
        repository: `repository.Repository`.
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
            found = read_json_object(path) if path else {}
            decoder = found.get("added_tokens_decoder", {})
            ids.update({entry["content"]: int(i) for i, entry in decoder.items()})
            if name == "added_tokens.json":
                ids.update(found)
        return sorted(token for token, i in ids.items() if i >= pieces)

    def read_tensors(self, arguments, head=True):
        tied = bool(self._config.get("tie_word_embeddings"))
        return transformers.read_tensors(self._repository, arguments, head, tied)


class RegistrySource(StreamedSource):
    """A preset of the registry, which knows its architecture without any file.

    Args:
        preset: `presets.Preset`.
        repository: `repository.Repository` with its files.
    """

    def __init__(self, preset, repository):
        self._preset = preset
        self._repository = repository

    def arguments(self):
        return dict(self._preset.config)

    def tokenizer_file(self):
        path = self._repository.file(_TOKENIZER)
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
        return transformers.read_tensors(self._repository, arguments, head)


class EasyLMSource(StreamedSource):
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


class TrainingRunSource(StreamedSource):
    """A pretraining run, or one of its checkpoints.

    Args:
        run: `training_run.TrainingRun`.
    """

    def __init__(self, run):
        self._run = run

    def arguments(self):
        return self._run.architecture()

    def tokenizer_file(self):
        return self._run.tokenizer_file()

    def read_tensors(self, arguments, head=True):
        checkpoint = self._run.checkpoint()
        tensors = checkpoint.read_tensors(arguments, head)
        name = self._run.path.name
        self.origin = f"the training run {name} at step {checkpoint.step}"
        return tensors
