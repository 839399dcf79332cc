"""The tokenizer of a GGUF file: reads it from the metadata, and writes it there.

The metadata list the text, score and type of each token: the pieces of the
SentencePiece model, then the added tokens, then placeholders for rows of the embedding
without a token. Types have the numbers of SentencePiece's pieces.

Source: `convert_hf_to_gguf.py` and `src/llama-vocab.cpp` of
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import functools
import json
import warnings
from typing import TYPE_CHECKING, Any

from keras_openllama.checkpoints.chat_template import exported_template, usable_template
from keras_openllama.checkpoints.tokenizer_json import unsupported_feature
from keras_openllama.config import START_TOKEN_ID
from keras_openllama.text.added_tokens import AddedToken
from keras_openllama.text.sentencepiece_model import SPACE

if TYPE_CHECKING:
    import gguf

    from keras_openllama.checkpoints.contents import ModelContents
    from keras_openllama.checkpoints.files.gguf_file import GgufFile

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0  # As llama.cpp's converter writes them.
_BPE = 2  # SentencePiece's enum value of the model type.
_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
# Settings that GGUF cannot express, in JSON. Only this package reads them.
_OWN_SETTINGS = "keras_openllama.tokenizer"
# Keys of the tokens that end a text: the end of a text, of a turn, of a message.
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


# ----- Reading


class GgufTokenizer:
    """The tokenizer in the metadata of a GGUF file.

    Args:
        file: The file.

    Example:
        >>> from keras_openllama.checkpoints.files.gguf_file import read_gguf
        >>> lm.export_to_gguf("nano.gguf")
        >>> tokenizer = GgufTokenizer(read_gguf("nano.gguf"))
        >>> tokenizer.start_token_id(), tokenizer.end_token_ids()
        (1, [])
    """

    def __init__(self, file: GgufFile):
        self._file = file

    def proto(self) -> bytes:
        """Returns the SentencePiece model, without the added tokens.

        Raises:
            FileNotFoundError: If the file has no tokenizer.
            ValueError: If the tokenizer is not a SentencePiece model of LLaMA, or its
                metadata are damaged.
        """
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto()
        for token, score, kind in self._pieces:
            piece = model.pieces.add(piece=token, score=score)
            if kind != _NORMAL:  # The default, which SentencePiece does not store.
                piece.type = kind
        trainer = model.trainer_spec
        trainer.model_type = _BPE
        trainer.vocab_size = len(self._pieces)
        trainer.byte_fallback = any(kind == _BYTE for *_, kind in self._pieces)
        trainer.pad_id = -1
        for name, token_id in self._control_ids.items():
            setattr(trainer, f"{name}_id", token_id)
            setattr(trainer, f"{name}_piece", self._pieces[token_id][0])
        normalizer = model.normalizer_spec
        normalizer.name = "identity"
        normalizer.add_dummy_prefix = self._flag("add_space_prefix", True)
        normalizer.remove_extra_whitespaces = self._flag(
            "remove_extra_whitespaces", False
        )
        return model.SerializeToString()

    def settings(self) -> dict[str, Any]:
        """Returns arguments of `OpenLlamaTokenizer`, in JSON."""
        own = self._file.metadata.get(_OWN_SETTINGS)
        if own is not None:
            return self._own_settings(own)
        tokens = self._tokens
        added = [
            AddedToken(token, i, special=kind == _CONTROL)
            for i, (token, _, kind) in enumerate(tokens)
            if i >= len(self._pieces) and kind != _UNUSED
        ]
        return {
            "added_tokens": [token.to_json() for token in added],
            # llama.cpp adds a space after each special token.
            "prepend_scheme": "always",
            "add_eos": self._flag("add_eos_token", False),
        }

    def _own_settings(self, text):
        try:
            settings = json.loads(text)
            if not isinstance(settings, dict):
                raise ValueError("it is not an object")
        except (TypeError, ValueError) as error:
            raise self._error(
                f"sets {_OWN_SETTINGS} to invalid JSON: {error}"
            ) from None
        return settings

    def adds_start_token(self) -> bool:
        """Returns whether a text begins with the start token."""
        return self._flag("add_bos_token", True)

    def start_token_id(self) -> int:
        """Returns the id of the start token."""
        return self._id("bos_token_id", START_TOKEN_ID)

    def end_token_ids(self) -> list[int]:
        """Returns the ids that end a text; none if only that of the tokenizer does."""
        ids = [self._id(key, None) for key in _END_KEYS]
        ids = list(dict.fromkeys(i for i in ids if i is not None))
        if self.has_tokens() and ids == [self._control_ids["eos"]]:
            return []
        return ids

    def chat_template(self) -> str | None:
        """Returns the chat template in Jinja, if there is one."""
        template = self._file.metadata.get(_TEMPLATE)
        if template is not None and not isinstance(template, str):
            raise self._error(f"sets {_TEMPLATE}={template!r:.80}, which is no text")
        names = {}
        if self.has_tokens():
            for name in ("bos_token", "eos_token"):
                token_id = self._id(f"{name}_id", None)
                if token_id is not None and token_id < len(self._tokens):
                    names[name] = self._tokens[token_id][0]
        return usable_template(template, names, self._file.path)

    def has_tokens(self) -> bool:
        """Returns whether the file has the tokenizer of LLaMA."""
        return self._value("model") == "llama"

    # ----- Tokens

    @functools.cached_property
    def _tokens(self):
        """Text, score and type of each token, as the file lists them."""
        model = self._value("model")
        if model in (None, "no_vocab", "none"):
            raise FileNotFoundError(f"{self._file.path} contains no tokenizer.")
        if model != "llama":
            raise self._error(
                f"has a tokenizer of the kind {model!r}. Only SentencePiece models "
                "('llama') are supported. Load the model with preprocessor=None"
            )
        tokens = self._list("tokens", str)
        scores = self._list("scores", (int, float), [0.0] * len(tokens))
        kinds = self._list("token_type", int, [_NORMAL] * len(tokens))
        if not tokens or not len(tokens) == len(scores) == len(kinds):
            raise self._error(
                f"has {len(tokens)} tokens, {len(scores)} scores and {len(kinds)} "
                "types, which must be as many of each"
            )
        wrong = sorted(set(kinds) - set(range(_NORMAL, _BYTE + 1)))
        if wrong:
            raise self._error(f"has tokens of the unknown types {wrong}")
        return list(zip(tokens, scores, kinds, strict=True))

    @functools.cached_property
    def _pieces(self):
        """Text, score and type of each piece of the SentencePiece model."""
        tokens = list(self._tokens)
        while tokens and tokens[-1][2] in (_CONTROL, _USER_DEFINED, _UNUSED):
            tokens.pop()
        if not tokens:
            raise self._error("has no token of the type NORMAL")
        for name, token_id in self._ids_of_controls(tokens).items():
            # Converters mark the unknown token as a control token, too.
            kind = _UNKNOWN if name == "unk" else _CONTROL
            tokens[token_id] = (tokens[token_id][0], 0.0, kind)
        return [
            (token.replace(" ", SPACE) if kind == _USER_DEFINED else token, score, kind)
            for token, score, kind in tokens
        ]

    @property
    def _control_ids(self):
        return self._ids_of_controls(self._pieces)

    def _ids_of_controls(self, tokens):
        """Returns the ids of the unknown, start and end token of SentencePiece."""
        ids = {token: i for i, (token, *_) in enumerate(tokens)}
        result = {}
        for name, key, usual in (
            ("unk", "unknown_token_id", "<unk>"),
            ("bos", "bos_token_id", "<s>"),
            ("eos", "eos_token_id", "</s>"),
        ):
            # Fine-tuned models often declare an added token, and not that of the
            # SentencePiece model, which comes first for this reason.
            token_id = ids.get(usual, self._id(key, None))
            if token_id is None or token_id >= len(tokens):
                raise self._error(f"names no {usual} among its tokens")
            result[name] = token_id
        return result

    # ----- Metadata

    def _value(self, key, default=None):
        return self._file.metadata.get(_PREFIX + key, default)

    def _flag(self, key, default):
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._error(f"sets {_PREFIX}{key}={value!r}, which must be a boolean")
        return value

    def _id(self, key, default):
        value = self._value(key, default)
        if value is not None and (type(value) is not int or value < 0):
            raise self._error(f"sets {_PREFIX}{key}={value!r}, which must be an id")
        return value

    def _list(self, key, kinds, default=None):
        value = self._value(key, default)
        if not isinstance(value, list) or not all(isinstance(v, kinds) for v in value):
            raise self._error(f"has no valid list {_PREFIX}{key}")
        return value

    def _error(self, problem):
        return ValueError(f"{self._file.path} {problem}.")


# ----- Writing


def add_tokenizer(writer: gguf.GGUFWriter, contents: ModelContents) -> None:
    """Adds the tokenizer of a model to the metadata of a GGUF file.

    Args:
        writer: The writer of the file.
        contents: The model.

    Raises:
        ValueError: If llama.cpp cannot apply the tokenizer.
    """
    _add_end_tokens(writer, contents.end_token_ids)
    if contents.tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_bos_token_id(contents.start_token_id)
        return
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(contents.tokenizer)
    _check_supported(model)
    settings = contents.tokenizer_settings
    added = [AddedToken.from_json(t) for t in settings.get("added_tokens", ())]
    tokens = _token_list(model, added, contents.arguments["vocabulary_size"])
    names, scores, kinds = map(list, zip(*tokens, strict=True))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    ids = {piece.piece: i for i, piece in reversed(list(enumerate(model.pieces)))}
    writer.add_bos_token_id(ids[model.trainer_spec.bos_piece])
    unknown = ids[model.trainer_spec.unk_piece]
    writer.add_unk_token_id(unknown)
    writer.add_pad_token_id(unknown)  # Has no token of its own, see `transformers`.
    preprocessing = contents.preprocessing
    writer.add_add_bos_token(preprocessing.get("add_start_token", True))
    writer.add_add_eos_token(settings.get("add_eos", False))
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(model.normalizer_spec.remove_extra_whitespaces)
    template = exported_template(preprocessing)
    if template is not None:
        writer.add_chat_template(template)
    _add_own_settings(writer, settings, added, len(model.pieces))


def _add_end_tokens(writer, ids):
    if len(ids) > len(_END_KEYS):
        warnings.warn(
            f"GGUF has room for {len(_END_KEYS)} tokens that end a text, and the model "
            f"has {len(ids)}: {', '.join(map(str, ids[len(_END_KEYS) :]))} will not.",
            stacklevel=2,
        )
    for key, token_id in zip(_END_KEYS, ids, strict=False):
        writer.add_uint32(_PREFIX + key, token_id)


def _check_supported(model):
    reason = unsupported_feature(model)
    if reason:
        raise ValueError(
            f"llama.cpp cannot apply this SentencePiece model: {reason}. Export the "
            "model without a tokenizer (tokenizer=False, or --no-tokenizer)."
        )
    if model.normalizer_spec.remove_extra_whitespaces:
        warnings.warn(
            "This tokenizer merges runs of spaces, and llama.cpp does not: merge them "
            "before you pass a text to llama.cpp.",
            stacklevel=2,
        )


def _token_list(model, added, num_rows):
    """Returns text, score and type for each row of the embedding."""
    tokens = [(f"[PAD{i}]", _UNUSED_SCORE, _UNUSED) for i in range(num_rows)]
    for i, piece in enumerate(model.pieces):
        name = piece.piece
        if piece.type == _USER_DEFINED:  # Searched in the text before it is normalized.
            name = name.replace(SPACE, " ")
        tokens[i] = (name, piece.score, piece.type)
    for token in added:
        kind = _CONTROL if token.special else _USER_DEFINED
        tokens[token.id] = (token.content, _ADDED_SCORE, kind)
    return tokens


def _add_own_settings(writer, settings, added, pieces):
    """Adds the settings that a reader would not derive from the list of tokens."""
    expressible = settings.get("prepend_scheme", "always") == "always" and all(
        token.id >= pieces
        and token == AddedToken(token.content, token.id, token.special)
        for token in added
    )
    if not expressible:
        writer.add_string(_OWN_SETTINGS, json.dumps(settings, ensure_ascii=False))
