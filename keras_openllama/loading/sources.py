"""The sources that models are loaded from, with one interface.

The source for KerasHub's format is in `keras_hub_source`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from keras_openllama.checkpoints import easylm, transformers
from keras_openllama.checkpoints.chat_template import read_chat_template
from keras_openllama.checkpoints.end_tokens import read_end_token_ids
from keras_openllama.checkpoints.tokenizer_settings import TokenizerFiles
from keras_openllama.config import (
    END_TOKEN_ID,
    START_TOKEN_ID,
    context_length,
    validate_architecture,
)
from keras_openllama.loading.filling import CheckpointWeights
from keras_openllama.loading.uninitialized import without_weights
from keras_openllama.loading.weight_types import stored_formats
from keras_openllama.text.sentencepiece_model import (
    check_vocabulary,
    keeps_spaces,
    load_processor,
    read_model,
)

if TYPE_CHECKING:
    from keras_openllama.checkpoints.repository import Repository
    from keras_openllama.checkpoints.tensors import StoredTensor
    from keras_openllama.checkpoints.training_run import TrainingRun
    from keras_openllama.loading.weight_types import WeightTypes
    from keras_openllama.presets import Preset
    from keras_openllama.quantization.policies import MatrixFormat
    from keras_openllama.utils.types import PathLike

_TOKENIZER = "tokenizer.model"


class ModelSource(Protocol):
    """The files of one model, from which it is loaded or converted.

    `from_preset` calls `backbone`, `tokenizer`, `preprocessor` and `task`. A conversion
    calls the other methods. Each method raises `OSError` if a file is missing or cannot
    be read, and `ValueError` if a file is damaged or belongs to another model.

    Attributes:
        origin: Description of the weights, if the source provides a more precise one
            than `load.describe_origin`; otherwise `None`.
    """

    origin: str | None

    def backbone(
        self,
        cls: type,
        load_weights: bool,
        types: WeightTypes,
        overrides: Mapping[str, Any],
    ) -> Any:
        """Loads a backbone of class `cls`; `overrides` are arguments of the class."""

    def tokenizer(self, cls: type, kwargs: dict[str, Any]) -> Any:
        """Loads a tokenizer of class `cls`; `kwargs` are arguments of the class."""

    def preprocessor(self, cls: type, kwargs: dict[str, Any]) -> Any:
        """Loads a preprocessor of class `cls`; `kwargs` are arguments of the class."""

    def task(
        self,
        cls: type,
        load_weights: bool,
        types: WeightTypes,
        preprocessor: Any,
        overrides: Mapping[str, Any],
        kwargs: dict[str, Any],
    ) -> Any:
        """Loads a task; `overrides` are arguments of its backbone, `kwargs` its own."""

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `OpenLlamaBackbone`, before validation."""

    def tokenizer_proto(self) -> bytes:
        """Returns the SentencePiece model."""

    def start_token_id(self) -> int:
        """Returns the id of the start token of a model without tokenizer."""

    def end_token_ids(self) -> list[int]:
        """Returns the declared end tokens; empty if the tokenizer's applies."""

    def preprocessing(self) -> dict[str, Any]:
        """Returns settings of the preprocessor, see `PREPROCESSOR_SETTINGS`."""

    def tokenizer_settings(self) -> dict[str, Any]:
        """Returns arguments of the tokenizer, see `OpenLlamaTokenizer.settings`."""

    def read_tensors(
        self, arguments: dict[str, Any], head: bool = True
    ) -> dict[str, StoredTensor]:
        """Lists the weights by variable path, without reading their values."""

    def formats(self, arguments: dict[str, Any]) -> dict[str, MatrixFormat]:
        """Returns how layers are quantized in the files, by path."""


class SourceDefaults:
    """Defaults of the methods that a conversion calls; see `ModelSource`."""

    origin = None

    def start_token_id(self) -> int:
        """Returns the id of the start token of all OpenLLaMA models."""
        return START_TOKEN_ID

    def end_token_ids(self) -> list[int]:
        """Returns no end tokens: that of the tokenizer applies."""
        return []

    def preprocessing(self) -> dict[str, Any]:
        """Returns no settings of the preprocessor."""
        return {}

    def tokenizer_settings(self) -> dict[str, Any]:
        """Returns no settings of the tokenizer."""
        return {}

    def formats(self, arguments: dict[str, Any]) -> dict[str, MatrixFormat]:
        """Returns no formats: only some files have quantized weights."""
        return {}


class StreamedSource(SourceDefaults):
    """A source whose tensors are read one by one into a model without weights."""

    def backbone(
        self,
        cls: type,
        load_weights: bool,
        types: WeightTypes,
        overrides: Mapping[str, Any],
    ) -> Any:
        """Loads a backbone, see `ModelSource`."""
        arguments = self._all_arguments(overrides)
        types.float_policy()  # Raises an error before files are read.
        return self._load(
            lambda policy: cls(**arguments, dtype=policy),
            *(types, load_weights, arguments),
            head=False,
        )

    def tokenizer(self, cls: type, kwargs: dict[str, Any]) -> Any:
        """Loads a tokenizer, see `ModelSource`."""
        proto = self._required_tokenizer_proto()
        return cls(proto, **{**self.tokenizer_settings(), **kwargs})

    def preprocessor(self, cls: type, kwargs: dict[str, Any]) -> Any:
        """Loads a preprocessor, see `ModelSource`."""
        kwargs = {**self.preprocessing(), **kwargs}
        kwargs.setdefault("sequence_length", context_length(self._all_arguments({})))
        return cls(self.tokenizer(cls.tokenizer_cls, {}), **kwargs)

    def task(
        self,
        cls: type,
        load_weights: bool,
        types: WeightTypes,
        preprocessor: Any,
        overrides: Mapping[str, Any],
        kwargs: dict[str, Any],
    ) -> Any:
        """Loads a task, see `ModelSource`."""
        arguments = self._all_arguments(overrides)
        types.float_policy()
        if isinstance(preprocessor, str) and preprocessor == "auto":
            # Loaded first, so that an error is raised before weights are read.
            preprocessor = self.preprocessor(
                cls.preprocessor_cls,
                {"sequence_length": context_length(arguments)},
            )
            check_vocabulary(
                preprocessor.tokenizer.vocabulary_size(), arguments["vocabulary_size"]
            )

        # The variables of an optimizer are created with values, which is not possible
        # inside `without_weights`.
        compile_task = kwargs.pop("compile", True)
        kwargs.setdefault("end_token_ids", self._end_token_ids(preprocessor))

        def build(policy):
            backbone = cls.backbone_cls(**arguments, dtype=policy)
            return cls(backbone, preprocessor, compile=False, **kwargs)

        task = self._load(build, types, load_weights, arguments, head=True)
        if compile_task:
            task.compile()
        return task

    def _end_token_ids(self, preprocessor):
        """Returns the end tokens of a task; `None` for that of its tokenizer."""
        if preprocessor is None:
            return self.end_token_ids() or [END_TOKEN_ID]
        return self.end_token_ids() or None

    def _all_arguments(self, overrides):
        return validate_architecture({**self.arguments(), **overrides})

    def _load(self, build, types, load_weights, arguments, head):
        if not load_weights:
            return build(types.policy(arguments))
        tensors = self.read_tensors(arguments, head)
        formats = stored_formats(tensors)
        is_float = not types.formats(arguments, formats)
        dtype = types.float_policy().variable_dtype if is_float else None
        with CheckpointWeights(tensors, dtype) as weights:
            with without_weights() as variables:
                model = build(types.policy(arguments, formats))
            weights.assign_to(model, variables)
        return model

    def _required_tokenizer_proto(self):
        try:
            return self.tokenizer_proto()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} To load the model without a tokenizer, pass "
                "preprocessor=None."
            ) from error


class TransformersSource(StreamedSource):
    """A directory or repository in the format of transformers.

    Args:
        repository: The directory or repository.
        config: Contents of its `config.json`.
        path: Path of its `config.json`.
    """

    def __init__(self, repository: Repository, config: dict[str, Any], path: Path):
        self._repository = repository
        self._tokenizer_files = TokenizerFiles(repository)
        self._config = config
        self._path = path

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `OpenLlamaBackbone`, before validation."""
        return transformers.backbone_arguments(self._config, self._path)

    def tokenizer_proto(self) -> bytes:
        """Returns the SentencePiece model."""
        return self._tokenizer_files.proto()

    def start_token_id(self) -> int:
        """Returns the id of the start token in `config.json`."""
        declared = self._config.get("bos_token_id")
        return super().start_token_id() if declared is None else declared

    def end_token_ids(self) -> list[int]:
        """Returns the ids that the files declare: of the tokenizer, and of the model.

        The tokenizer's counts only if its files name another one than the SentencePiece
        model does. Its own does not end a text unless the model declares it, as in
        transformers.
        """
        ids = read_end_token_ids(self._repository, self._config, self._path)
        renamed = self._tokenizer_files.renamed_end_token()
        return ids if renamed is None else [renamed, *(i for i in ids if i != renamed)]

    def preprocessor(self, cls: type, kwargs: dict[str, Any]) -> Any:
        """Loads a preprocessor, see `ModelSource`."""
        preprocessor = super().preprocessor(cls, kwargs)
        if preprocessor.add_start_token:
            self._check_start_token(preprocessor.tokenizer)
        return preprocessor

    def _check_start_token(self, tokenizer):
        used = tokenizer.start_token_id
        of_tokenizer = self._tokenizer_files.start_token()
        if self.start_token_id() != used:
            declared = f"{self._path} sets bos_token_id={self.start_token_id()}"
        elif of_tokenizer not in (None, used):
            token = tokenizer.id_to_token(of_tokenizer)
            declared = f"The tokenizer's files set bos_token={token!r} ({of_tokenizer})"
        else:
            return
        warnings.warn(
            f"{declared}, but texts begin with the start token of the tokenizer, "
            f"{tokenizer.id_to_token(used)!r} ({used}). If the model was trained "
            "without it, set `lm.preprocessor.add_start_token = False`, and write "
            "another start token into the texts. If the file's eos_token_id is wrong "
            "as well, set `lm.end_token_ids`.",
            stacklevel=2,
        )

    def tokenizer_settings(self) -> dict[str, Any]:
        """Returns the added tokens and settings in the files of the tokenizer."""
        return self._tokenizer_files.settings(self._config["vocab_size"])

    def preprocessing(self) -> dict[str, Any]:
        """Returns the chat template, and whether a text begins with the start token."""
        template = read_chat_template(self._repository)
        settings = {} if template is None else {"chat_template": template}
        if not self._tokenizer_files.adds_start_token():
            settings["add_start_token"] = False
        return settings

    def read_tensors(
        self, arguments: dict[str, Any], head: bool = True
    ) -> dict[str, StoredTensor]:
        """Lists the weights by variable path, without reading their values."""
        tied = bool(self._config.get("tie_word_embeddings"))
        return transformers.read_tensors(self._repository, arguments, head, tied)


class RegistrySource(StreamedSource):
    """A preset of the registry, which contains the architecture.

    Args:
        preset: The preset.
        repository: The repository that holds its tokenizer and weights.
    """

    def __init__(self, preset: Preset, repository: Repository):
        self._preset = preset
        self._repository = repository

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `OpenLlamaBackbone`, before validation."""
        return dict(self._preset.config)

    def tokenizer_proto(self) -> bytes:
        """Returns the SentencePiece model, after checking its version."""
        path = self._repository.file(_TOKENIZER)
        proto = path.read_bytes()
        found = keeps_spaces(load_processor(proto, str(path)))
        expected = self._preset.tokenizer["keeps_spaces"]
        if found != expected:
            does = {True: "preserves runs of spaces", False: "merges runs of spaces"}
            raise ValueError(
                f"{path} {does[found]}, but the tokenizer "
                f"{self._preset.tokenizer_version} of {self._preset.name} "
                f"{does[expected]}: it is another model's tokenizer. Delete the file "
                "and download it again."
            )
        return proto

    def read_tensors(
        self, arguments: dict[str, Any], head: bool = True
    ) -> dict[str, StoredTensor]:
        """Lists the weights by variable path, without reading their values."""
        return transformers.read_tensors(self._repository, arguments, head)


class EasyLMSource(StreamedSource):
    """A file of EasyLM, which contains only weights.

    Args:
        path: Path of the file.
        model: Source of the architecture and the tokenizer.
    """

    def __init__(self, path: PathLike, model: ModelSource):
        self._path = path
        self._model = model

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `OpenLlamaBackbone`, before validation."""
        return self._model.arguments()

    def tokenizer(self, cls: type, kwargs: dict[str, Any]) -> Any:
        """Loads the tokenizer of the other source."""
        return self._model.tokenizer(cls, kwargs)

    def tokenizer_proto(self) -> bytes:
        """Returns the SentencePiece model of the other source."""
        return self._model.tokenizer_proto()

    def start_token_id(self) -> int:
        """Returns the id of the start token of the other source."""
        return self._model.start_token_id()

    def end_token_ids(self) -> list[int]:
        """Returns the declared end tokens of the other source."""
        return self._model.end_token_ids()

    def preprocessing(self) -> dict[str, Any]:
        """Returns the settings of the preprocessor of the other source."""
        return self._model.preprocessing()

    def tokenizer_settings(self) -> dict[str, Any]:
        """Returns the settings of the tokenizer of the other source."""
        return self._model.tokenizer_settings()

    def read_tensors(
        self, arguments: dict[str, Any], head: bool = True
    ) -> dict[str, StoredTensor]:
        """Lists the weights by variable path, without reading their values."""
        return easylm.read_tensors(self._path, arguments, head)


class TrainingRunSource(StreamedSource):
    """A training run that trains all weights, or one of its checkpoints.

    Args:
        run: The run.
    """

    def __init__(self, run: TrainingRun):
        self._run = run

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `OpenLlamaBackbone`, before validation."""
        return self._run.architecture()

    def tokenizer_proto(self) -> bytes:
        """Returns the SentencePiece model."""
        return read_model(self._run.tokenizer_file())

    def end_token_ids(self) -> list[int]:
        """Returns the end tokens of the model that was fine-tuned, if it had any."""
        return self._run.end_token_ids()

    def preprocessing(self) -> dict[str, Any]:
        """Returns the chat template of the run, if it has one."""
        template = self._run.chat_template()
        return {} if template is None else {"chat_template": template}

    def tokenizer_settings(self) -> dict[str, Any]:
        """Returns the settings of the run's tokenizer."""
        return self._run.tokenizer_settings()

    def read_tensors(
        self, arguments: dict[str, Any], head: bool = True
    ) -> dict[str, StoredTensor]:
        """Verifies the checkpoint and lists its weights by variable path."""
        checkpoint = self._run.checkpoint()
        tensors = checkpoint.read_tensors(arguments, head)
        name = self._run.path.name
        self.origin = f"the training run {name} at step {checkpoint.step}"
        return tensors
