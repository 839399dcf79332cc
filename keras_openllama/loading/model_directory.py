"""Tells what a directory or repository holds, by its files and without Keras."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from keras_openllama.checkpoints.matching import format_names
from keras_openllama.checkpoints.repository import LocalRepository
from keras_openllama.checkpoints.training_run import TrainingRun, is_run
from keras_openllama.loading.hub import HUB_PREFIX, open_repository
from keras_openllama.utils.file_types import GGUF_MAGIC, GGUF_SUFFIX
from keras_openllama.utils.files import read_json_object
from keras_openllama.utils.types import PathLike

if TYPE_CHECKING:
    from keras_openllama.checkpoints.repository import Repository

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer.json"
ADAPTER_CONFIG = "adapter_config.json"

# A model in KerasHub's or transformers' format, a tokenizer or preprocessor that
# `save_to_preset` wrote, or a training run.
ModelFormat: TypeAlias = Literal["keras_hub", "transformers", "tokenizer", "run"]


def format_of(repository: Repository) -> ModelFormat:
    """Returns what a directory or repository holds.

    Args:
        repository: The directory or repository.

    Raises:
        FileNotFoundError: If it holds none of them.
        ValueError: If its `config.json` is not that of a model.

    Example:
        >>> lm.preprocessor.tokenizer.save_to_preset("my_tokenizer")
        >>> format_of(LocalRepository("my_tokenizer"))
        'tokenizer'
    """
    path = repository.optional(CONFIG)
    if path is None:
        return _format_without_config(repository)
    config = read_json_object(path)
    if "registered_name" in config:
        return "keras_hub"
    if "model_type" in config:
        return "transformers"
    raise ValueError(
        f"{path} is neither in KerasHub's format, which has a 'registered_name', nor "
        "in that of transformers, which has a 'model_type'. It has: "
        f"{', '.join(config) or 'nothing'}."
    )


def check_model(
    path: PathLike, revision: str | None = None, tokenizer: bool = False
) -> None:
    """Checks that a local directory or GGUF file may be a model, by its first bytes.

    Args:
        path: Path of the directory or file.
        revision: `revision` of `from_preset`, which does not apply to it.
        tokenizer: Whether only its tokenizer is needed.

    Raises:
        OSError: If it is no model.
        ValueError: If its `config.json` is not that of a model, a run has only
            adapters, or there is a revision.

    Example:
        >>> lm.save_to_preset("my_model")
        >>> check_model("my_model")
    """
    repository = open_repository(path, revision)
    if Path(path).is_dir():
        found = format_of(repository)
        if found == "tokenizer" and not tokenizer:
            raise FileNotFoundError(f"{repository} has a tokenizer and no model.")
        if found == "run" and not tokenizer:
            TrainingRun.open(path).architecture()
        return
    with open(path, "rb") as file:
        start = file.read(len(GGUF_MAGIC))
    if start != GGUF_MAGIC:
        raise ValueError(
            f"{path} is not a GGUF file: it must begin with {GGUF_MAGIC}. Received: "
            f"{start}. If it is truncated or damaged, download it again."
        )


def check_adapters(path: PathLike) -> None:
    """Checks that a local directory holds LoRA adapters.

    Args:
        path: Path of the directory.

    Raises:
        OSError: If it does not.
        ValueError: If their configuration is not valid JSON.

    Example:
        >>> check_adapters(".")
        Traceback (most recent call last):
        ...
        FileNotFoundError: adapter_config.json is missing from the directory ..
    """
    read_json_object(LocalRepository(path).file(ADAPTER_CONFIG))


def _format_without_config(repository):
    path = repository.optional(TOKENIZER_CONFIG)
    if path is not None and "registered_name" in read_json_object(path):
        return "tokenizer"
    if isinstance(repository, LocalRepository) and is_run(repository.path):
        return "run"
    files = [file for file in repository.glob("*") if file.endswith(GGUF_SUFFIX)]
    if files:
        is_local = isinstance(repository, LocalRepository)
        parent = repository.path if is_local else f"{HUB_PREFIX}{repository.name}"
        raise FileNotFoundError(
            f"{CONFIG} is missing from {repository}, which has GGUF files: "
            f"{format_names(files)}. Name one of them, such as "
            f"'{parent}/{files[0]}'."
        )
    if repository.optional(ADAPTER_CONFIG):
        raise FileNotFoundError(
            f"{repository} has LoRA adapters and no model: load their base model, "
            "and then the adapters with `lm.load_adapters`."
        )
    raise FileNotFoundError(
        f"{CONFIG} is missing from {repository}, so it is neither a model in "
        "KerasHub's or transformers' format nor a training run."
    )
