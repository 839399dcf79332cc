"""The bytes that each token stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keras_openllama.text.sentencepiece_model import SPACE

if TYPE_CHECKING:
    from keras_openllama.text.vocabulary import Vocabulary


def token_bytes(vocabulary: Vocabulary) -> list[bytes]:
    r"""Returns the bytes of each token, as in the middle of a text.

    Args:
        vocabulary: The vocabulary.

    Returns:
        Bytes by token id. Control tokens and ids without a token have none.

    Example:
        >>> table = token_bytes(lm.preprocessor.tokenizer.vocabulary)
        >>> table[2], table[13], table[1239]
        (b'', b'\n', b' sea')
    """
    processor = vocabulary.processor
    texts = vocabulary.added_texts

    def of_id(token_id):
        if token_id in texts:
            return texts[token_id].encode()
        if processor.is_control(token_id):
            return b""
        piece = processor.id_to_piece(token_id)
        if processor.is_byte(token_id):
            return bytes([int(piece[1:-1], base=16)])
        return piece.replace(SPACE, " ").encode()

    return [of_id(token_id) for token_id in range(vocabulary.size)]
