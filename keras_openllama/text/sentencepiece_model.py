"""Loading and validation of SentencePiece model files."""

import base64
import binascii
import functools
import os
from pathlib import Path
from typing import Any

import sentencepiece

from keras_openllama.utils.text_files import is_lfs_pointer
from keras_openllama.utils.types import PathLike

# A longer string is not a path but the base64 that `get_config` writes.
_MAX_PATH_LENGTH = 2048
SPACE = "▁"  # How SentencePiece writes a space in normalized text and in pieces.
# Field numbers of SentencePiece's ModelProto. Every complete file has both fields, in
# this order, after the vocabulary.
_TRAINER_SPEC, _NORMALIZER_SPEC = 2, 3


def read_proto(proto: PathLike | bytes) -> tuple[bytes, str]:
    """Reads a SentencePiece model.

    Args:
        proto: path of the file, its bytes, or base64 of its bytes.

    Returns:
        The bytes of the model, and a description of their source for error messages.

    Raises:
        OSError: if there is no such file, or it is a directory.
        ValueError: if `proto` has another type.
    """
    if isinstance(proto, bytes):
        return proto, f"`proto` ({len(proto)} bytes)"
    if isinstance(proto, str) and len(proto) > _MAX_PATH_LENGTH:
        return proto_from_base64(proto), f"`proto` (base64, {len(proto)} characters)"
    if not isinstance(proto, (str, os.PathLike)):
        raise ValueError(
            "`proto` must be the path of a SentencePiece file or its bytes. "
            f"Received: {proto!r} of type {type(proto).__name__}."
        )
    path = Path(proto)
    if path.is_dir():
        raise IsADirectoryError(
            f"`proto` is a directory: {str(path)!r}. Pass the tokenizer.model in "
            "it, or load the directory with `OpenLlamaTokenizer.from_preset`."
        )
    if not path.exists():
        raise FileNotFoundError(
            f"`proto` names a file that does not exist: {str(path)!r}. Pass the "
            "tokenizer.model that came with the model, or use "
            '`OpenLlamaTokenizer.from_preset("open_llama_nano")`.'
        )
    return path.read_bytes(), repr(str(path))


def read_model(path: Path) -> bytes:
    """Reads the file of a SentencePiece model.

    Args:
        path: path of the file.

    Returns:
        The bytes of the model.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a complete SentencePiece model, see `load_processor`.
    """
    data = path.read_bytes()
    load_processor(data, str(path))
    return data


def load_processor(data: bytes, source: str) -> sentencepiece.SentencePieceProcessor:
    """Loads a SentencePiece model that can serve as a LLaMA tokenizer.

    Args:
        data: bytes of the model file.
        source: description of the model's source for error messages.

    Returns:
        A processor with the model loaded, which must not be changed: the same for the
        same data, since a conversion needs it several times.

    Raises:
        ValueError: if `data` is not a complete SentencePiece model, or has no start or
            end token.
    """
    try:
        return _load_processor(data)
    except ValueError as error:
        raise ValueError(
            f"{source} cannot be used as a tokenizer: {error}. Pass the "
            "SentencePiece file tokenizer.model that came with the model. If this is "
            "that file, download it again."
        ) from error


@functools.lru_cache(maxsize=1)
def _load_processor(data):
    if defect := _find_defect(data):
        raise ValueError(defect)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
    except RuntimeError as error:
        reason = str(error).strip()
        raise ValueError(f"SentencePiece cannot load it ({reason})") from error
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise ValueError("it has no <s> or no </s>, so it is not a LLaMA tokenizer")
    return processor


def keeps_spaces(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Returns whether a model preserves runs of spaces. v1 models merge them."""
    return SPACE * 2 in processor.normalize("a  b")


def processor_with_normalizer(
    data: bytes, **settings: Any
) -> sentencepiece.SentencePieceProcessor:
    """Loads a model with other settings of its normalizer.

    Args:
        data: bytes of a SentencePiece model.
        **settings: fields of SentencePiece's `NormalizerSpec`. Without
            `add_dummy_prefix`, no space is put before a text, as a text that continues
            another one requires.

    Returns:
        A processor with the changed model loaded.

    Example:
        >>> proto = lm.preprocessor.tokenizer.proto
        >>> processor = processor_with_normalizer(proto, add_dummy_prefix=False)
        >>> processor.encode("sea", out_type=str)
        ['se', 'a']
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    for name, value in settings.items():
        setattr(model.normalizer_spec, name, value)
    return load_processor(model.SerializeToString(), "the model")


def check_vocabulary(pieces: int, embeddings: int) -> None:
    """Checks that a model has an embedding for every piece of a tokenizer.

    Args:
        pieces: vocabulary size of the tokenizer.
        embeddings: vocabulary size of the model.

    Raises:
        ValueError: if there are more pieces than embeddings.

    Example:
        >>> check_vocabulary(pieces=32_000, embeddings=32_000)
    """
    if pieces > embeddings:
        raise ValueError(
            f"The tokenizer has {pieces} pieces but the model has {embeddings} "
            "embeddings. Use the tokenizer of this model."
        )


def proto_from_base64(text: str) -> bytes:
    """Decodes the model in a saved configuration.

    Args:
        text: base64 of a SentencePiece model.

    Returns:
        The bytes of the model.

    Raises:
        ValueError: if `text` is not valid base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(
            "`proto` in the tokenizer's configuration must be the base64 of a "
            f"SentencePiece model. Received: {str(text)[:60]!r}."
        ) from error


def _find_defect(data):
    """Returns what is wrong with a model file, or `None` if it is complete.

    SentencePiece accepts a file that was truncated between two fields. Such a model
    behaves differently: without the normalizer spec, for example, it merges spaces. So
    this checks the structure of the file first.
    """
    if not data:
        return "it is empty"
    try:
        fields = _field_numbers(data)
    except IndexError:
        if is_lfs_pointer(data):
            return "it is a Git LFS pointer (`git lfs pull` gets the file itself)"
        if data.lstrip().startswith(b"{"):
            return "it is JSON (a tokenizer.json?), not SentencePiece"
        return f"its {len(data)} bytes are truncated or not a SentencePiece model"
    if not {_TRAINER_SPEC, _NORMALIZER_SPEC} <= fields:
        return f"its {len(data)} bytes lack parts of a SentencePiece model"
    return None


def _field_numbers(data):
    """Returns the field numbers of a serialized protocol buffer.

    Raises `IndexError` where the data end inside a field or are not a protocol buffer.
    Expects length-delimited fields only: a SentencePiece model has no others.
    """

    def varint(position):
        value = shift = 0
        while True:
            byte = data[position]
            value |= (byte & 0x7F) << shift
            position, shift = position + 1, shift + 7
            if byte < 0x80:
                return value, position

    numbers = set()
    position = 0
    while position < len(data):
        tag, position = varint(position)
        size, position = varint(position)
        position += size
        if tag % 8 != 2 or position > len(data):
            raise IndexError(f"incomplete field before byte {position}")
        numbers.add(tag // 8)
    return numbers
