"""Converts a source of models to `ModelContents`, the input of every export."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from keras_openllama.checkpoints.contents import ModelContents
from keras_openllama.config import END_TOKEN_ID, validate_architecture
from keras_openllama.text.sentencepiece_model import check_vocabulary, load_processor

if TYPE_CHECKING:
    from keras_openllama.loading.sources import ModelSource
    from keras_openllama.utils.types import PathLike


def contents_of_source(
    source: ModelSource,
    tokenizer: bool = True,
    origin: str | None = None,
    paths: Iterable[PathLike] = (),
) -> ModelContents:
    """Returns the contents of the model of a source, without reading its tensors.

    Args:
        source: The source.
        tokenizer: Whether to include the tokenizer.
        origin: Description of the weights, as `load.describe_origin` returns it.
        paths: Paths that are read, in addition to the files of the tensors.

    Returns:
        The contents.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If a file is damaged, or does not match the model.

    Example:
        >>> from keras_openllama.loading.load import find_source
        >>> contents_of_source(find_source("open_llama_nano")).parameters
        4524288
    """
    arguments = validate_architecture(source.arguments())
    proto, settings = _tokenizer(source, arguments) if tokenizer else (None, {})
    tensors = source.read_tensors(arguments)
    return ModelContents(
        arguments,
        tensors,
        tokenizer=proto,
        tokenizer_settings=settings,
        origin=source.origin or origin,
        start_token_id=source.start_token_id(),
        end_token_ids=_end_token_ids(source, proto),
        preprocessing=source.preprocessing(),
        paths=(*paths, *sorted({tensor.file.path for tensor in tensors.values()})),
    )


def _end_token_ids(source, proto):
    declared = source.end_token_ids()
    if declared or proto is None:
        return tuple(declared) or (END_TOKEN_ID,)
    return (load_processor(proto, "The tokenizer").eos_id(),)


def _tokenizer(source, arguments):
    """Returns the SentencePiece model and the settings of the tokenizer."""
    try:
        proto = source.tokenizer_proto()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} To convert only the weights, skip the tokenizer "
            "(tokenizer=False, or --no-tokenizer)."
        ) from error
    pieces = load_processor(proto, "The tokenizer").vocab_size()
    check_vocabulary(pieces, arguments["vocabulary_size"])
    return proto, source.tokenizer_settings()
