"""Incremental detokenization: text from token ids that arrive one at a time."""

from __future__ import annotations

import codecs
import types
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, SupportsInt

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_ONE_MARK_PER_BYTE = "keras_openllama.one_mark_per_byte"
_REPLACEMENT = "\ufffd"


# Python replaces a run of invalid bytes by one U+FFFD, SentencePiece each byte.
codecs.register_error(_ONE_MARK_PER_BYTE, lambda error: (_REPLACEMENT, error.start + 1))


class StreamDecoder:
    """Decodes a stream of token ids to text, without emitting incomplete characters.

    The joined outputs of `push` and `flush` equal `detokenize` of all ids. Each call
    processes one id and at most three pending bytes of a character, so its cost does
    not depend on the length of the text.

    Create one for each sequence with `OpenLlamaTokenizer.stream_decoder`.

    Args:
        processor: a SentencePiece processor with a model loaded.
        prefix_ids: token ids that the stream continues, such as a prompt. Their text is
            not emitted. The first id after them is decoded as their continuation, so it
            keeps its leading space. If the prefix ends inside a character that the
            stream completes, that character is emitted.
        added_texts: text of each id that the processor does not have, or decodes
            otherwise; empty for control tokens.

    Example:
        >>> tokenizer = lm.preprocessor.tokenizer
        >>> decoder = tokenizer.stream_decoder(prefix_ids=tokenizer("Once"))
        >>> "".join(decoder.push(token_id) for token_id in tokenizer("upon a time"))
        ' upon a time'
        >>> decoder.flush()
        ''
    """

    def __init__(
        self,
        processor: SentencePieceProcessor,
        prefix_ids: Iterable[int] = (),
        added_texts: Mapping[int, str] = types.MappingProxyType({}),
    ):
        self._processor = processor
        self._added_texts = added_texts
        self._num_ids = max([processor.vocab_size(), *(i + 1 for i in added_texts)])
        self._bytes = codecs.getincrementaldecoder("utf-8")(_ONE_MARK_PER_BYTE)
        # Whether SentencePiece would still remove the space before the text.
        self._at_start = True
        self._space_id = processor.piece_to_id("▁")
        # A piece with visible text, to decode other pieces after it.
        self._anchor_id = next(
            i
            for i in range(processor.vocab_size())
            if not processor.is_byte(i) and processor.decode([i])
        )
        self._anchor_text = processor.decode([self._anchor_id])
        # How `detokenize` shows the pending bytes at the end of the prefix.
        self._already_shown = ""
        for token_id in prefix_ids:
            self.push(token_id)
        pending, _ = self._bytes.getstate()
        self._already_shown = _REPLACEMENT * len(pending)

    def push(self, token_id: SupportsInt) -> str:
        """Adds the next token id and returns the text that it completes.

        Args:
            token_id: an int, or a scalar array or tensor.

        Returns:
            The completed text. Empty for control tokens and for incomplete characters.

        Raises:
            ValueError: if the id is not in the vocabulary.
        """
        token_id = int(token_id)
        if not 0 <= token_id < self._num_ids:
            raise ValueError(
                "`token_id` must be in the vocabulary, from 0 to "
                f"{self._num_ids - 1}. Received: {token_id}"
            )
        if token_id in self._added_texts:
            return self.flush() + self._added_text(token_id)
        if self._processor.is_byte(token_id):
            byte = int(self._processor.id_to_piece(token_id)[1:-1], base=16)
            text = self._bytes.decode(bytes([byte]))
            self._at_start = self._at_start and not text
            return self._unseen(text)
        return self.flush() + self._piece_text(token_id)

    def flush(self) -> str:
        """Ends the text. Pending bytes become replacement characters.

        Returns:
            One U+FFFD for each pending byte; empty if there is none.
        """
        text = self._bytes.decode(b"", final=True)
        self._at_start = self._at_start and not text
        return self._unseen(text)

    def _piece_text(self, token_id):
        decode = self._processor.decode
        if not self._at_start:
            return decode([self._anchor_id, token_id])[len(self._anchor_text) :]
        text = decode([token_id])
        # After a control token the text has still not started. The same holds for a
        # single space if the model removes all leading spaces.
        self._at_start = not text and decode([token_id, self._space_id]) == decode(
            [self._space_id]
        )
        return text

    def _added_text(self, token_id):
        text = self._added_texts[token_id]
        if self._at_start and text.startswith(" "):
            # What SentencePiece removes of the spaces before a text: one, or all.
            removes_all = not self._processor.decode([self._space_id] * 2)
            text = text.lstrip(" ") if removes_all else text[1:]
        self._at_start = self._at_start and not text
        return text

    def _unseen(self, text):
        """Removes from `text` what the text of the prefix already contains."""
        if text and self._already_shown:
            shown, self._already_shown = self._already_shown, ""
            while not text.startswith(shown):
                shown = shown[:-1]
            return text[len(shown) :]
        return text
