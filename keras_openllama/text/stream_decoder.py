"""Text from token ids that arrive one at a time."""

import codecs

_ONE_MARK_PER_BYTE = "keras_openllama.one_mark_per_byte"
_REPLACEMENT = "\ufffd"


# Python replaces a run of bad bytes by one mark, SentencePiece each byte by its own.
codecs.register_error(_ONE_MARK_PER_BYTE, lambda error: (_REPLACEMENT, error.start + 1))


class StreamDecoder:
    """Turns token ids into text as they come, never emitting half a character.

    The pieces that `push` and `flush` return, joined, are exactly what `detokenize`
    makes of all ids at once. A call looks at one id and at most three bytes that may
    still grow into a character, so its cost does not depend on the text before it.

    Get one from `OpenLlamaTokenizer.stream_decoder`, one for each sequence.

    Args:
        processor: `sentencepiece.SentencePieceProcessor` with a model loaded.
        prefix_ids: list of int, ids that the stream continues. Their text is not
            emitted, but the first id after them is read as their continuation, so it
            keeps its leading space. Where the prefix ends inside a character, and ids
            of the stream complete it, the character is emitted.

    Example:
        decoder = tokenizer.stream_decoder(prefix_ids=prompt_ids)
        for token_id in generated_ids:
            print(decoder.push(token_id), end="", flush=True)
        print(decoder.flush())
    """

    def __init__(self, processor, prefix_ids=()):
        self._processor = processor
        self._bytes = codecs.getincrementaldecoder("utf-8")(_ONE_MARK_PER_BYTE)
        # Whether SentencePiece would still drop the space that it put before the text.
        self._at_start = True
        self._space_id = processor.piece_to_id("▁")
        # Something with a text of its own, to decode a piece after it.
        self._anchor_id = next(
            i
            for i in range(processor.vocab_size())
            if not processor.is_byte(i) and processor.decode([i])
        )
        self._anchor_text = processor.decode([self._anchor_id])
        # What the bytes that wait at the end of the prefix look like in its own text.
        self._already_shown = ""
        for token_id in prefix_ids:
            self.push(token_id)
        waiting, _ = self._bytes.getstate()
        self._already_shown = _REPLACEMENT * len(waiting)

    def push(self, token_id):
        """Takes the next id and returns the text that is final with it.

        Args:
            token_id: int, or anything that `int` takes.

        Returns:
            str; empty for control tokens, and while a character is incomplete.

        Raises:
            ValueError: if the id is not in the vocabulary.
        """
        token_id = int(token_id)
        if not 0 <= token_id < self._processor.vocab_size():
            size = self._processor.vocab_size()
            raise ValueError(
                f"`token_id` is {token_id}, which is not in the vocabulary: its size "
                f"is {size}, so ids are 0 to {size - 1}."
            )
        if self._processor.is_byte(token_id):
            byte = int(self._processor.id_to_piece(token_id)[1:-1], base=16)
            text = self._bytes.decode(bytes([byte]))
            self._at_start = self._at_start and not text
            return self._unseen(text)
        return self.flush() + self._piece_text(token_id)

    def flush(self):
        """Ends the text: bytes that wait for the rest of a character become marks.

        Returns:
            str, one U+FFFD for each such byte; empty if there is none.
        """
        text = self._bytes.decode(b"", final=True)
        self._at_start = self._at_start and not text
        return self._unseen(text)

    def _piece_text(self, token_id):
        decode = self._processor.decode
        if not self._at_start:
            return decode([self._anchor_id, token_id])[len(self._anchor_text) :]
        text = decode([token_id])
        # Control tokens leave the start where it is, as does a lone space where the
        # model drops all leading spaces: a space after them would be dropped too.
        self._at_start = not text and decode([token_id, self._space_id]) == decode(
            [self._space_id]
        )
        return text

    def _unseen(self, text):
        """Returns `text` without what the prefix's own text has shown of it."""
        if text and self._already_shown:
            shown, self._already_shown = self._already_shown, ""
            while not text.startswith(shown):
                shown = shown[:-1]
            return text[len(shown) :]
        return text
