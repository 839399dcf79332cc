"""Token ids of documents: SentencePiece's, but each word is encoded only once.

SentencePiece keeps all mergeable pairs of a document in one priority queue, 98 % of the
time of preparing data. But BPE only merges neighbors whose concatenation is a piece. So
nothing is ever merged across a place where no piece has these two characters side by
side, and the parts before and after it have the same ids when they are encoded alone.
`_word_pattern` cuts documents at such places, and `_WordIds` remembers the ids of the
parts. Models without them, or whose encoding is not local, are left to SentencePiece.
"""

import array
import re
from collections.abc import Iterable

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from keras_openllama.checkpoints.tokenizer_json import unsupported_feature
from keras_openllama.data.token_records import token_dtype
from keras_openllama.text.sentencepiece_model import (
    SPACE,
    load_processor,
    processor_with_normalizer,
)

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # Piece types of SentencePiece.
# Heuristics: 35 MB per process for words of 7 letters, 80 MB for 20 characters of three
# bytes each; longer words seldom occur twice.
_MAX_WORDS = 1 << 18
_MAX_WORD_LENGTH = 20


class DocumentEncoder:
    """Encodes documents with a SentencePiece model.

    Args:
        proto: bytes of the SentencePiece model.

    Attributes:
        processor: a SentencePiece processor with the model loaded.
        remembers_words: whether the model is one for which encoding word by word is
            exact. The ids are SentencePiece's in either case.

    Raises:
        ValueError: if `proto` is not a complete SentencePiece model.

    Example:
        >>> import numpy as np
        >>> encoder = DocumentEncoder(lm.preprocessor.tokenizer.proto)
        >>> np.frombuffer(encoder.encode("The sea"), "<u2")
        array([ 357, 1239], dtype=uint16)
    """

    def __init__(self, proto: bytes):
        self.processor = load_processor(proto, "the tokenizer")
        self._typecode = token_dtype(self.processor.vocab_size()).char
        model = ModelProto.FromString(proto)
        pattern = _word_pattern(model)
        self.remembers_words = pattern is not None
        if self.remembers_words:
            self._find_words = re.compile(pattern).finditer
            self._ids = _WordIds(proto, self._typecode)
            spec = model.normalizer_spec
            self._removes_spaces = spec.remove_extra_whitespaces
            self._prefix = " " * spec.add_dummy_prefix

    def encode(self, text: str) -> bytes:
        """Encodes a document.

        Args:
            text: the document.

        Returns:
            Its token ids without start and end, as the bytes of an array with the dtype
            of `token_records.token_dtype`.
        """
        if not self.remembers_words:
            return array.array(self._typecode, self.processor.encode(text)).tobytes()
        words = self._find_words(self._normalize(text))
        return b"".join([self._ids[word[0]] for word in words])

    def _normalize(self, text):
        """Normalizes a text, but with spaces instead of "▁"."""
        if self._removes_spaces or not text:
            return self.processor.normalize(text).replace(SPACE, " ")
        # The same; SentencePiece takes a sixth of the time of `encode` for it.
        return self._prefix + text.replace(SPACE, " ")


class _WordIds(dict):
    """The ids of words of normalized text, encoded when they are first looked up."""

    def __init__(self, proto, typecode):
        super().__init__()
        self._processor = processor_with_normalizer(
            proto, add_dummy_prefix=False, remove_extra_whitespaces=False
        )
        self._typecode = typecode

    def __missing__(self, word):
        ids = array.array(self._typecode, self._processor.encode(word)).tobytes()
        if len(word) <= _MAX_WORD_LENGTH:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _word_pattern(model):
    """Returns a regular expression for words of a model, `None` if it has none.

    Words are matched one after the other in a text with spaces instead of "▁", and
    cover it. A word is a run of spaces with the characters of one class after it.
    """
    # Only normal pieces are merged (`pieces_` in SentencePiece's bpe_model.cc). It
    # treats user-defined and unused pieces in ways of their own.
    kinds = {piece.type for piece in model.pieces}
    if unsupported_feature(model) or kinds - {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}:
        return None
    pieces = {piece.piece for piece in model.pieces if piece.type == _NORMAL}
    words = {piece.lstrip(SPACE) for piece in pieces}
    if any(SPACE in word for word in words):
        return None
    classes = _character_classes(word for word in words if len(word) > 1)
    sets = ["".join(map(re.escape, sorted(chars))) for chars in classes]
    runs = [f"[{chars}]+" for chars in sets]
    # Nothing is merged with a character of no class. Digits and line feeds are words of
    # their own; scripts without pieces, such as Chinese, are faster in long runs.
    runs += [rf"[^\0-\x7f{''.join(sets)}]+", "[^ ]"]
    return f" *(?:{'|'.join(runs)})| +"


def _character_classes(words: Iterable[str]) -> list[set[str]]:
    """Returns the finest partition of characters with each word in one class.

    Models whose pieces do not mix scripts, which is SentencePiece's default, have one
    for letters and one for punctuation, so that "sea," is two words.
    """
    class_of = {}
    for word in words:
        parts = {id(c): c for c in (class_of.setdefault(c, {c}) for c in word)}
        if len(parts) > 1:
            merged = set().union(*parts.values())
            class_of.update(dict.fromkeys(merged, merged))
    classes = {id(chars): chars for chars in class_of.values()}.values()
    return sorted(classes, key=len, reverse=True)
