"""Text to token ids and back: a SentencePiece model with added tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keras_openllama.text.added_tokens import (
    AddedToken,
    TokenSplitter,
    as_added_tokens,
    undefined_ids,
    undefined_token,
)
from keras_openllama.text.sentencepiece_model import (
    SPACE,
    keeps_spaces,
    load_processor,
    processor_with_normalizer,
)
from keras_openllama.text.stream_decoder import StreamDecoder

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# Put into a control string, it keeps `encode` from finding the token. A noncharacter,
# which Unicode reserves for such marks inside of a program.
_NOT_A_TOKEN = "\ufdd2"
# What to do with the space that SentencePiece puts before a text, where a token was
# split off: put it before each part, or before a text that begins with a part.
PREPEND_SCHEMES = ("always", "first")


class Vocabulary:
    """Encodes and decodes texts with a SentencePiece model and added tokens.

    Args:
        proto: bytes of the SentencePiece model.
        source: description of the model's source for error messages.
        added_tokens: tokens beside the model's pieces, see `as_added_tokens`.
        prepend_scheme: `"always"`: the text between two tokens is encoded like a text
            of its own, with a space before it. `"first"`: only text at the beginning
            has this space. The names are those of the `tokenizers` library.

    Attributes:
        processor: a SentencePiece processor with the model loaded.
        added_tokens: the tokens beside the model's pieces, by ascending id.
        keeps_spaces: whether runs of spaces are preserved.
        size: number of token ids: the highest one plus 1.
        added_texts: texts of the added tokens and of ids without one, by id; empty for
            special tokens.

    Raises:
        ValueError: if `proto` is not a complete SentencePiece model, or an added token
            is malformed.

    Example:
        >>> proto = lm.preprocessor.tokenizer.proto
        >>> vocabulary = Vocabulary(proto, "proto", ["<sep>"])
        >>> vocabulary.encode(["The sea<sep>"], parse_special=True)
        [[357, 1239, 3072]]
        >>> vocabulary.decode([[357, 1239, 3072]])
        ['The sea']
    """

    def __init__(
        self,
        proto: bytes,
        source: str,
        added_tokens: Sequence[str | dict[str, Any] | AddedToken] = (),
        prepend_scheme: str = "always",
    ):
        self.processor = load_processor(proto, source)
        self.keeps_spaces = keeps_spaces(self.processor)
        self._proto = proto
        self._prefixes_parts = prepend_scheme == "always"
        self._without_prefix = None  # Created on first use, as the next one.
        self._verbatim = None
        pieces = self.processor.vocab_size()
        self.added_tokens = as_added_tokens(added_tokens, first_id=pieces)
        self._undefined = undefined_ids(self.added_tokens, pieces)
        self._added = {token.id: token for token in self.added_tokens}
        self.size = max([pieces, *(i + 1 for i in self._added)])
        self._ids = {token.content: token.id for token in self.added_tokens}
        tokens = {**self._control_tokens(), **self._added}.values()
        self._splitters = {
            False: self._make_splitters([t for t in tokens if not t.special]),
            True: self._make_splitters(tokens),
        }
        self._control_strings = [t for t in tokens if t.special]
        # The text of the added tokens, and of ids without one. As in transformers, the
        # unknown token is a control token; SentencePiece decodes it as " ⁇ ".
        self.added_texts = dict.fromkeys(
            [self.processor.unk_id(), *self._undefined], ""
        )
        for token in self.added_tokens:
            text = self._searched_text(token).replace(SPACE, " ")
            self.added_texts[token.id] = "" if token.special else text

    def _control_tokens(self):
        """Returns the control tokens of the SentencePiece model by id."""
        return {
            i: AddedToken(self.processor.id_to_piece(i), i)
            for i in range(self.processor.vocab_size())
            if self.processor.is_control(i) or self.processor.is_unknown(i)
        }

    def _make_splitters(self, tokens):
        """Returns the splitters of raw and normalized text; `None` without tokens."""
        found = {False: {}, True: {}}
        for token in tokens:
            in_normalized = self._is_searched_in_normalized(token)
            found[in_normalized][self._searched_text(token)] = token
        return [TokenSplitter(tokens) if tokens else None for tokens in found.values()]

    def _is_searched_in_normalized(self, token):
        # With "first", the `tokenizers` library has no normalizer.
        return token.normalized and self._prefixes_parts

    def _searched_text(self, token):
        if self._is_searched_in_normalized(token):
            return self.processor.normalize(token.content)
        return token.content

    # --- Tokens ---

    def token(self, id: int) -> str:
        """Returns the token with an id; an id without a token has a placeholder."""
        if id in self._added:
            return self._added[id].content
        if id in self._undefined:
            return undefined_token(id)
        return self.processor.id_to_piece(id)

    def id(self, token: str) -> int:
        """Returns the id of a token, or that of the unknown token."""
        if token in self._ids:
            return self._ids[token]
        return self.processor.piece_to_id(token)

    def ids_without_token(self, num_rows: int) -> list[int]:
        """Returns the rows of a model's embedding that no token uses.

        Args:
            num_rows: the number of rows.

        Returns:
            Their numbers in ascending order.
        """
        undefined = [i for i in self._undefined if i < num_rows]
        return [*undefined, *range(self.size, num_rows)]

    # --- Text to ids ---

    def encode(self, texts: list[str], parse_special: bool = False) -> list[list[int]]:
        """Encodes texts.

        Args:
            texts: strings.
            parse_special: whether control strings in the texts are encoded as tokens.

        Returns:
            The token ids of each text.
        """
        if not any(self._splitters[parse_special]):
            return self.processor.encode(texts, num_threads=-1)
        return [self._encode_parts(text, parse_special, True) for text in texts]

    def escape_control_strings(self, text: str) -> str:
        """Marks control strings, so that `parse_special` encodes them as text.

        Args:
            text: a part of a text to encode, such as a message of a chat.

        Returns:
            The text with marks inside of control strings, which `encode` removes.

        Raises:
            ValueError: if a control string cannot be marked.

        Example:
            >>> vocabulary = lm.preprocessor.tokenizer.vocabulary
            >>> text = vocabulary.escape_control_strings("</s>")
            >>> ids, = vocabulary.encode([text], parse_special=True)
            >>> vocabulary.decode([ids])  # The token has no text.
            ['</s>']
        """
        text = text.replace(_NOT_A_TOKEN, "")
        for token in self._control_strings:
            found = self._searched_text(token)
            is_normalized = self._is_searched_in_normalized(token)
            searched = self.processor.normalize(text) if is_normalized else text
            if found not in searched:
                continue
            if is_normalized or len(found) == 1:
                raise ValueError(
                    f"The text has the control string {token.content!r}. Remove it."
                )
            # Occurrences may overlap.
            text = re.sub(
                f"(?={re.escape(found)})(.)",
                rf"\1{_NOT_A_TOKEN}",
                text,
                flags=re.DOTALL,
            )
        return text

    def encode_continuation(self, text: str, parse_special: bool = False) -> list[int]:
        """Encodes text that follows other tokens, without a space before it.

        Args:
            text: the text.
            parse_special: as in `encode`.

        Returns:
            Its token ids.
        """
        return self._encode_parts(text, parse_special, False)

    def _encode_parts(self, text, parse_special, has_prefix):
        raw, _ = self._splitters[parse_special]
        ids = []
        for part, token_id in raw.split(text) if raw else [(text, None)] * bool(text):
            if token_id is None:
                if parse_special:
                    part = part.replace(_NOT_A_TOKEN, "")
                ids += self._encode_part(part, parse_special, has_prefix)
            else:
                ids.append(token_id)
            has_prefix = self._prefixes_parts
        return ids

    def _encode_part(self, text, parse_special, has_prefix):
        processor = self.processor if has_prefix else self._processor_without_prefix()
        _, normalized = self._splitters[parse_special]
        if normalized is None:
            return processor.encode(text)
        ids = []
        for part, token_id in normalized.split(processor.normalize(text)):
            if token_id is None:
                ids += self._verbatim_processor().encode(part)
            else:
                ids.append(token_id)
        return ids

    def _processor_without_prefix(self) -> SentencePieceProcessor:
        if self._without_prefix is None:
            self._without_prefix = processor_with_normalizer(
                self._proto, add_dummy_prefix=False
            )
        return self._without_prefix

    def _verbatim_processor(self) -> SentencePieceProcessor:
        """Encodes text that is normalized already."""
        if self._verbatim is None:
            self._verbatim = processor_with_normalizer(
                self._proto,
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                precompiled_charsmap=b"",
            )
        return self._verbatim

    # --- Ids to text ---

    def decode(self, sequences: list[list[int]]) -> list[str]:
        """Decodes sequences of ids, all of which are below `size`.

        Args:
            sequences: token ids of each text.

        Returns:
            The texts. Special tokens and ids without a token have no text.
        """
        if all(map(self.added_texts.keys().isdisjoint, sequences)):
            return self.processor.decode(sequences, num_threads=-1)
        return [self._decode_one(ids) for ids in sequences]

    def _decode_one(self, ids):
        if not self.added_texts.keys().isdisjoint(ids):
            decoder = self.stream_decoder()
            return "".join(map(decoder.push, ids)) + decoder.flush()
        return self.processor.decode(ids)

    def stream_decoder(self, prefix_ids: Sequence[int] = ()) -> StreamDecoder:
        """Returns a decoder of ids that arrive one at a time, see `StreamDecoder`."""
        return StreamDecoder(self.processor, prefix_ids, self.added_texts)
