"""The source for directories in KerasHub's format, see `sources`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import keras

from keras_openllama.backend.keras_hub import (
    PresetLoader,
    resolve_dtype,
    without_tensorflow,
)
from keras_openllama.checkpoints import keras_hub
from keras_openllama.checkpoints.contents import (
    PREPROCESSOR_SETTINGS,
    TOKENIZER_SETTINGS,
)
from keras_openllama.loading.model_directory import CONFIG, TOKENIZER_CONFIG
from keras_openllama.loading.sources import SourceDefaults, StreamedSource
from keras_openllama.loading.uninitialized import without_weights
from keras_openllama.quantization.policies import matrix_format, with_source
from keras_openllama.text.sentencepiece_model import read_model
from keras_openllama.utils.files import read_json_object
from keras_openllama.utils.text_files import check_not_lfs_pointer

if TYPE_CHECKING:
    from keras_openllama.checkpoints.repository import Repository
    from keras_openllama.checkpoints.tensors import StoredTensor
    from keras_openllama.loading.weight_types import WeightTypes
    from keras_openllama.quantization.policies import MatrixFormat


class KerasHubSource(SourceDefaults):
    """A directory or repository that `save_to_preset` wrote. KerasHub loads it.

    Args:
        repository: The directory or repository.
        build_empty_task: Function that builds a task without weights, see
            `keras_hub.read_tensors`. Only `read_tensors` requires it.
    """

    def __init__(
        self,
        repository: Repository,
        build_empty_task: Callable[..., keras.Model] | None = None,
    ):
        self._repository = repository
        self._build_empty_task = build_empty_task

    def set_builder(self, build_empty_task: Callable[..., keras.Model]) -> None:
        """Sets the function of the constructor's argument."""
        self._build_empty_task = build_empty_task

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `OpenLlamaBackbone`, before validation."""
        path = self._repository.file(CONFIG)
        return keras_hub.backbone_arguments(read_json_object(path), path)

    def tokenizer_proto(self) -> bytes:
        """Returns the SentencePiece model."""
        return read_model(self._repository.file(keras_hub.TOKENIZER))

    def preprocessing(self) -> dict[str, Any]:
        """Returns the settings of the saved preprocessor."""
        return self._saved_settings("preprocessor.json", PREPROCESSOR_SETTINGS)

    def tokenizer_settings(self) -> dict[str, Any]:
        """Returns the settings of the saved tokenizer."""
        return self._saved_settings("tokenizer.json", TOKENIZER_SETTINGS)

    def _saved_settings(self, file, names):
        path = self._repository.optional(file)
        settings = read_json_object(path).get("config", {}) if path else {}
        return {name: settings[name] for name in names if name in settings}

    def end_token_ids(self) -> list[int]:
        """Returns the end tokens of the saved task; empty for older versions."""
        path = self._repository.optional("task.json")
        settings = read_json_object(path).get("config", {}) if path else {}
        return settings.get("end_token_ids") or []

    def read_tensors(
        self, arguments: dict[str, Any], head: bool = True
    ) -> dict[str, StoredTensor]:
        """Lists the weights by variable path, without reading their values."""
        policy = self._saved_policy() or "float32"
        return keras_hub.read_tensors(
            self._repository, arguments, self._build_empty_task, head, policy
        )

    def formats(self, arguments: dict[str, Any]) -> dict[str, MatrixFormat]:
        """Returns how layers are quantized in the files, by path."""
        saved = self._saved_policy() or {}
        found = {path: matrix_format(saved[path]) for path in saved}
        return {path: chosen for path, chosen in found.items() if chosen is not None}

    def backbone(
        self,
        cls: type,
        load_weights: bool,
        types: WeightTypes,
        overrides: Mapping[str, Any],
    ) -> Any:
        """Loads a backbone, see `ModelSource`."""
        if self._is_streamed(types):
            streamed = _StreamedKerasHubSource(self)
            return streamed.backbone(cls, load_weights, types, overrides)
        with self._loader(load_weights, overrides) as loader:
            saved = loader.check_backbone_class()
            if not issubclass(saved, cls):
                raise ValueError(
                    f"it contains a {saved.__name__}, not a {cls.__name__}"
                )
            dtype = resolve_dtype(loader, self._dtype(types))
            return loader.load_backbone(saved, load_weights, dtype=dtype)

    def tokenizer(self, cls: type, kwargs: dict[str, Any]) -> Any:
        """Loads a tokenizer, see `ModelSource`."""
        with self._loader(of_model=False) as loader:
            return loader.load_tokenizer(cls, **kwargs)

    def preprocessor(self, cls: type, kwargs: dict[str, Any]) -> Any:
        """Loads a preprocessor, see `ModelSource`."""
        with self._loader(of_model=False) as loader:
            return loader.load_preprocessor(cls, **kwargs)

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
        if self._is_streamed(types):
            streamed = _StreamedKerasHubSource(self)
            return streamed.task(
                cls, load_weights, types, preprocessor, overrides, kwargs
            )
        replaces = not isinstance(preprocessor, str)
        if replaces:  # KerasHub would load the saved tokenizer into a preprocessor.
            kwargs["preprocessor"] = None
        # Not compiled by KerasHub: it would warn about the saved state of an optimizer,
        # which is not loaded.
        compile_task = kwargs.pop("compile", True)
        with self._loader(load_weights, overrides) as loader:
            saved = loader.check_backbone_class()
            if not issubclass(saved, cls.backbone_cls):
                raise ValueError(
                    f"it contains a {saved.__name__}, not a {cls.__name__}"
                )
            if load_weights:  # Without them, KerasHub would initialize the head.
                keras_hub.task_file(self._repository)
            task = loader.load_task(
                cls,
                load_weights,
                load_task_weights=load_weights,
                dtype=self._dtype(types),
                compile=False,
                **kwargs,
            )
        if replaces:
            task.preprocessor = preprocessor
        if compile_task:
            task.compile()
        return task

    def _saved_policy(self):
        """Returns the saved policies by layer if any is quantized, else `None`."""
        saved = read_json_object(self._repository.file(CONFIG)).get("config", {})
        if "quantiz" not in json.dumps(saved.get("dtype")).lower():
            return None
        return keras.dtype_policies.deserialize(saved["dtype"])

    def _is_streamed(self, types):
        """Whether floating-point weights are to be quantized when they are read.

        Raises:
            ValueError: If the saved weights have another quantization.
        """
        if types.quantization == "auto":
            return False
        if self._saved_policy() is not None:
            raise ValueError(
                f"{self._repository} has quantized weights, which are loaded as they "
                "are. Pass quantization='auto', or load the original model. "
                f"Received: quantization={types.quantization!r}"
            )
        return types.config is not None

    def _dtype(self, types):
        """Returns the user's dtype; in a map of quantized layers if these are saved."""
        saved = None if types.dtype is None else self._saved_policy()
        if saved is None:
            return types.dtype
        policy = types.float_policy()
        return keras.dtype_policies.DTypePolicyMap(
            policy, {path: with_source(saved[path], policy.name) for path in saved}
        )

    @contextlib.contextmanager
    def _loader(self, load_weights=False, overrides=(), of_model=True):
        """Downloads the files, and yields KerasHub's loader of their directory."""

        # Defined here because it imports KerasHub, which takes seconds and which a
        # conversion does not need.
        class Loader(PresetLoader):
            def get_backbone_kwargs(self, **kwargs):
                arguments, kwargs = super().get_backbone_kwargs(**kwargs)
                return {**arguments, **dict(overrides)}, kwargs

        # A tokenizer or preprocessor may have been saved alone.
        config = self._repository.optional(CONFIG)
        if config is None and of_model:
            raise FileNotFoundError(
                f"{CONFIG} is missing from {self._repository}, which contains only a "
                "tokenizer or preprocessor. Load it with `from_preset` of its class."
            )
        patterns = ["*.json", "assets/**/*", *(["*.weights.h5"] * load_weights)]
        for pattern in patterns:
            for name in self._repository.glob(pattern):
                path = self._repository.file(name)
                with open(path, "rb") as file:
                    check_not_lfs_pointer(file.read(64), path)
        directory = (config or self._repository.file(TOKENIZER_CONFIG)).parent
        try:
            with without_tensorflow():
                yield Loader(str(directory), read_json_object(config) if config else {})
        except (OSError, KeyError, TypeError, ValueError) as error:
            # The errors of KerasHub and h5py seldom name the file.
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(
                f"{directory}, in KerasHub's format, cannot be loaded: {error}"
            ) from error


class _StreamedKerasHubSource(StreamedSource):
    """A directory in KerasHub's format whose tensors are read one by one.

    Args:
        saved: The source of the directory.
    """

    def __init__(self, saved: KerasHubSource):
        self._saved = saved

    def arguments(self) -> dict[str, Any]:
        return self._saved.arguments()

    def tokenizer_proto(self) -> bytes:
        return self._saved.tokenizer_proto()

    def end_token_ids(self) -> list[int]:
        return self._saved.end_token_ids()

    def preprocessor(self, cls: type, kwargs: dict[str, Any]) -> Any:
        return self._saved.preprocessor(cls, {})

    def _load(self, build, types, load_weights, arguments, head):
        def build_empty_task(arguments, dtype):
            with without_weights():
                model = build(dtype)
            return model if head else _Task(model)

        self._saved.set_builder(build_empty_task)
        return super()._load(build, types, load_weights, arguments, head)

    def read_tensors(
        self, arguments: dict[str, Any], head: bool = True
    ) -> dict[str, StoredTensor]:
        return self._saved.read_tensors(arguments, head)


@dataclasses.dataclass
class _Task:
    """Has the attribute that the names of a backbone's weights are taken from."""

    backbone: keras.Model
