"""Reading SentencePiece model files, and saying what is wrong with them."""

import base64
import binascii
import os
from pathlib import Path

import sentencepiece

# A longer string is no path but the base64 that `get_config` writes.
_LONGEST_PATH = 2048
# Parts of SentencePiece's ModelProto that no whole file lacks; they stand behind the
# vocabulary, in this order.
_TRAINER_SPEC, _NORMALIZER_SPEC = 2, 3


def read_proto(proto):
    """Returns the bytes of a model, and what to call their source in errors.

    Args:
        proto: path of the file, its bytes, or base64 of them.

    Raises:
        OSError: if there is no such file, or it is a directory.
        ValueError: if `proto` is something else.
    """
    if isinstance(proto, bytes):
        return proto, f"`proto` ({len(proto)} bytes)"
    if isinstance(proto, str) and len(proto) > _LONGEST_PATH:
        return from_base64(proto), f"`proto` (base64, {len(proto)} characters)"
    if not isinstance(proto, (str, os.PathLike)):
        raise ValueError(
            "`proto` must be the path of a SentencePiece file or its bytes. "
            f"Received: {proto!r} of type {type(proto).__name__}."
        )
    path = Path(proto)
    if path.is_dir():
        raise IsADirectoryError(
            f"`proto` is a directory: {str(path)!r}. Pass the tokenizer.model inside "
            "it, or load the directory with `OpenLlamaTokenizer.from_preset`."
        )
    if not path.exists():
        raise FileNotFoundError(
            f"`proto` names a file that does not exist: {str(path)!r}. Pass the "
            "tokenizer.model that came with the model, or use "
            '`OpenLlamaTokenizer.from_preset("open_llama_nano")`.'
        )
    return path.read_bytes(), repr(str(path))


def load_processor(data, source):
    """Loads a SentencePiece model that has what a LLaMA tokenizer needs.

    Args:
        data: bytes of the model file.
        source: str, what to call it in errors.

    Returns:
        A `sentencepiece.SentencePieceProcessor`.

    Raises:
        ValueError: if the data are no complete SentencePiece model, or one without
            tokens for start and end.
    """
    complaint = _complaint_about(data)
    processor = sentencepiece.SentencePieceProcessor()
    if complaint is None:
        try:
            processor.LoadFromSerializedProto(data)
        except RuntimeError as error:
            complaint = f"SentencePiece refuses it ({str(error).strip()})"
        else:
            if processor.bos_id() < 0 or processor.eos_id() < 0:
                complaint = "it has no <s> or no </s>, so it is not a LLaMA tokenizer"
    if complaint is not None:
        raise ValueError(
            f"{source} cannot be used as tokenizer: {complaint}. Pass the "
            "SentencePiece file tokenizer.model that came with the model; if this is "
            "it, fetch it again."
        )
    return processor


def keeps_spaces(processor):
    """Whether runs of spaces stay; v1 models merge them into one."""
    # SentencePiece writes a space as ▁ once it has normalised a text.
    return "▁▁" in processor.normalize("a  b")


def without_first_space(data):
    """A processor that puts no space before a text, as for the rest of one.

    Args:
        data: bytes of a SentencePiece model.

    Returns:
        `sentencepiece.SentencePieceProcessor`.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    model.normalizer_spec.add_dummy_prefix = False
    return load_processor(model.SerializeToString(), "the model")


def check_vocabulary(pieces, embeddings):
    """Raises a `ValueError` if a tokenizer has more pieces than a model embeddings."""
    if pieces > embeddings:
        raise ValueError(
            f"The tokenizer has {pieces} pieces and the model {embeddings} embeddings: "
            "it is another model's tokenizer."
        )


def from_base64(text):
    """Returns the model (bytes) that a saved configuration holds as base64 (str)."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(
            "`proto` in the tokenizer's configuration must be base64 of a "
            f"SentencePiece model. Received: {str(text)[:60]!r}."
        ) from error


def _complaint_about(data):
    """Says what is wrong with a model file; `None` if it is whole and of its kind.

    SentencePiece itself takes a file that was cut between two of its parts for a whole
    one, and merges spaces, say, where the part that keeps them is gone. So the file's
    structure is looked at first.
    """
    if not data:
        return "it is empty"
    try:
        fields = _field_numbers(data)
    except IndexError:
        if data.startswith(b"version https://git-lfs"):
            return "it is a Git LFS pointer (`git lfs pull` gets the file itself)"
        if data.lstrip().startswith(b"{"):
            return "it is JSON (a tokenizer.json?), not SentencePiece"
        return f"its {len(data)} bytes are cut off or are no SentencePiece model"
    if not {_TRAINER_SPEC, _NORMALIZER_SPEC} <= fields:
        return f"its {len(data)} bytes lack parts of a SentencePiece model"
    return None


def _field_numbers(data):
    """Returns the numbers of the fields of a serialised protocol buffer.

    Raises `IndexError` where the data end inside a field or are something else. Only
    fields with a length are expected: a SentencePiece model has no others.
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
            raise IndexError(f"not a whole field before byte {position}")
        numbers.add(tag // 8)
    return numbers
