"""Reads a tokenizer's settings from the files of a checkpoint of transformers.

`tokenizer.model` contains the pieces. Other tokens and settings are spread over
`tokenizer_config.json`, `tokenizer.json`, `added_tokens.json` and
`special_tokens_map.json`, each of which may be absent.

Source: `PreTrainedTokenizerBase.from_pretrained` of transformers 5.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import TYPE_CHECKING, Any

from keras_openllama.checkpoints.matching import format_names
from keras_openllama.checkpoints.tokenizer_json import (
    build_sentencepiece_model,
    prepend_scheme_of,
    template_of,
)
from keras_openllama.text.added_tokens import (
    AddedToken,
    as_added_tokens,
    undefined_token,
)
from keras_openllama.text.sentencepiece_model import load_processor
from keras_openllama.utils.files import read_json_object
from keras_openllama.utils.text_files import decode_text

if TYPE_CHECKING:
    from keras_openllama.checkpoints.repository import Repository

MODEL = "tokenizer.model"
CONFIG = "tokenizer_config.json"
FAST = "tokenizer.json"
ADDED = "added_tokens.json"
SPECIAL = "special_tokens_map.json"

_SPECIAL_NAMES = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token"),
    *("cls_token", "mask_token", "additional_special_tokens", "extra_special_tokens"),
)
# General classes of transformers, which do what the files say.
_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend", "AutoTokenizer")
# Settings of which `OpenLlamaTokenizer` implements only these values.
_SUPPORTED_VALUES = {
    "add_prefix_space": (True, None),
    "do_lower_case": (False, None),
    "sp_model_kwargs": ({}, None),
}
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
# Texts on which tokenizer.json and tokenizer.model are compared. They do not begin with
# a space, which some pre-tokenizers of the `tokenizers` library cannot keep.
_SAMPLE = "The sea was calm, and 3 gulls flew.\nдом 日本 🙂"
_SPACES = "def f(x):\n    return  x"


class TokenizerFiles:
    """The files that describe the tokenizer of a checkpoint, beside its pieces.

    Args:
        repository: The checkpoint.

    Example:
        >>> from keras_openllama.checkpoints.repository import LocalRepository
        >>> lm.export_to_transformers("exported")
        >>> files = TokenizerFiles(LocalRepository("exported"))
        >>> files.settings(num_rows=3072)["added_tokens"]
        []
    """

    def __init__(self, repository: Repository):
        self._repository = repository

    def settings(self, num_rows: int) -> dict[str, Any]:
        """Returns arguments of `OpenLlamaTokenizer`, in JSON.

        Args:
            num_rows: Rows of the model's embedding. Tokens without a row are ignored,
                with a warning.

        Returns:
            `added_tokens`, `prepend_scheme` and `add_eos`.

        Raises:
            OSError: If a file cannot be read.
            ValueError: If a file is malformed, files contradict each other, or a
                setting is not supported.
        """
        self._check_supported()
        self.proto()  # Raises if there is none.
        self._compare_with_fast()
        tokens = self._with_rows(self._tokens, num_rows)
        return {
            "added_tokens": [token.to_json() for token in tokens],
            "prepend_scheme": self._prepend_scheme(bool(tokens)),
            "add_eos": self._adds("add_eos_token", last=True) or False,
        }

    def adds_start_token(self) -> bool:
        """Returns whether a text begins with `<s>`; it does unless a file says no."""
        return self._adds("add_bos_token", last=False) is not False

    def _adds(self, name, last):
        """Returns a setting, which transformers 5 writes into `tokenizer.json` only."""
        value = self._boolean(name)
        template = template_of(self._fast)
        if value is not None or template is None:
            return value
        return "SpecialToken" in template[-1 if last else 0]

    def start_token(self) -> int | None:
        """Returns the id of the start token that the files name, if any."""
        first = (template_of(self._fast) or [{}])[0]
        in_template = first.get("SpecialToken", {}).get("id")
        return self._id_of([*self._names_of("bos_token"), in_template])

    def renamed_end_token(self) -> int | None:
        """Returns the id of the end token that the files name.

        `None` if they name none, or that of the SentencePiece model.
        """
        token_id = self._id_of(self._names_of("eos_token"))
        if token_id is None or token_id == self._processor.eos_id():
            return None
        return token_id

    def _names_of(self, key):
        files = {CONFIG: self.config, SPECIAL: self._object(SPECIAL)}
        return [
            token.content
            for file, data in files.items()
            for token in self._named_tokens(file, key, data.get(key))
        ]

    def _id_of(self, names):
        """Returns the id of the first name, if there is one, and it has an id."""
        name = next(filter(None, names), None)
        if name is None or not any(map(self._repository.optional, (MODEL, FAST))):
            return None
        added = {token.content: token.id for token in self._tokens}
        token_id = added.get(name, self._processor.piece_to_id(name))
        return None if token_id == self._processor.unk_id() else token_id

    # ----- The files

    def proto(self) -> bytes:
        """Returns the SentencePiece model, made from `tokenizer.json` if need be.

        Raises:
            FileNotFoundError: If there is neither file.
            ValueError: If a file is damaged, or SentencePiece cannot reproduce
                `tokenizer.json`.
        """
        return self._proto_and_processor[0]

    @property
    def _processor(self):
        return self._proto_and_processor[1]

    @functools.cached_property
    def _proto_and_processor(self):
        path = self._repository.optional(MODEL)
        if path is not None:
            proto = path.read_bytes()
            return proto, load_processor(proto, str(path))
        path = self._repository.optional(FAST)
        if path is None:
            raise FileNotFoundError(
                f"{MODEL} is missing from {self._repository}, and there is no {FAST} "
                "to make it from."
            )
        try:
            text = decode_text(path.read_bytes(), path)
            proto = build_sentencepiece_model(text)
        except ValueError as error:
            raise ValueError(
                f"{MODEL} is missing from {self._repository}, and cannot be made from "
                f"{FAST}: {error}. Copy {MODEL} of the model that this one was trained "
                "from into the directory, or load it with preprocessor=None."
            ) from error
        return proto, load_processor(proto, str(path))

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The contents of `tokenizer_config.json`."""
        return self._object(CONFIG)

    @functools.cached_property
    def _fast(self):
        return self._object(FAST)

    def _object(self, name):
        path = self._repository.optional(name)
        return read_json_object(path) if path else {}

    def _boolean(self, name):
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._error(CONFIG, f"sets {name}={value!r}, which must be a boolean")
        return value

    def _error(self, name, problem):
        return ValueError(f"{name} of {self._repository} {problem}.")

    def _check_supported(self):
        tokenizer_class = self.config.get("tokenizer_class")
        if (
            tokenizer_class not in _CLASSES
            and "llama" not in f"{tokenizer_class}".lower()
        ):
            raise self._error(
                CONFIG,
                f"sets tokenizer_class={tokenizer_class!r}, which may encode texts "
                f"otherwise than {MODEL}. Write 'LlamaTokenizer' there if it does not, "
                "or load the model with preprocessor=None",
            )
        for name, allowed in _SUPPORTED_VALUES.items():
            value = self.config.get(name)
            if value not in allowed:
                raise self._error(
                    CONFIG,
                    f"sets {name}={value!r}, which OpenLlamaTokenizer does not "
                    "support. Load the model with preprocessor=None, or with a "
                    "preprocessor that has another tokenizer",
                )

    # ----- Tokens

    @functools.cached_property
    def _tokens(self):
        """The tokens that the SentencePiece model lacks or treats otherwise."""
        processor = self._processor
        found = {}  # By id: the token, and the name of its file.
        for name, tokens in self._listed_tokens():
            for token in tokens:
                known, where = found.setdefault(token.id, (token, name))
                if known.content != token.content:
                    raise self._error(
                        name,
                        f"gives the id {token.id} to {token.content!r}, but {where} "
                        f"gives it to {known.content!r}. Correct one of them",
                    )
        tokens = [
            token
            for token, _ in found.values()
            if token.content != undefined_token(token.id)
            and not _is_known(token, processor)
        ]
        for token in tokens:
            piece = processor.piece_to_id(token.content)
            if piece not in (token.id, processor.unk_id()):
                raise self._error(
                    found[token.id][1],
                    f"gives the id {token.id} to {token.content!r}, which {MODEL} "
                    f"has as {piece}. Correct one of them",
                )
        contents = {token.content for token in tokens}
        names = [
            name
            for name in self._special_tokens
            if name not in contents
            and processor.piece_to_id(name) == processor.unk_id()
            and name != processor.id_to_piece(processor.unk_id())
        ]
        try:
            tokens = as_added_tokens([*tokens, *names], processor.vocab_size())
        except ValueError as error:
            raise self._error("The tokenizer", f"has wrong tokens: {error}") from error
        return [
            dataclasses.replace(self._special_tokens[token.content], id=token.id)
            if token.content in names
            else token
            for token in tokens
        ]

    def _listed_tokens(self):
        """Yields the tokens of each file that gives ids, the most precise first."""
        yield CONFIG, self._decoder_tokens(CONFIG, self.config)
        entries = self._fast.get("added_tokens") or []
        if not isinstance(entries, list):
            raise self._error(
                FAST, f"has added_tokens that are no list: {entries!r:.80}"
            )
        yield FAST, [_token(entry, None, FAST) for entry in entries]
        added = self._object(ADDED)
        if "added_tokens_decoder" in added:  # As in tokenizer_config.json.
            yield ADDED, self._decoder_tokens(ADDED, added)
            return
        for content, token_id in added.items():
            if type(token_id) is not int or token_id < 0:
                raise self._error(
                    ADDED,
                    "must map each token to its integer id, such as "
                    f'{{"<|im_end|>": 32000}}. Received: {content!r}: {token_id!r}',
                )
        special = self._special_tokens
        yield (
            ADDED,
            [
                AddedToken(content, i, content in special, content not in special)
                for content, i in added.items()
            ],
        )

    def _decoder_tokens(self, name, data):
        decoder = data.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict) or not all(
            str(i).isdecimal() for i in decoder
        ):
            raise self._error(
                name,
                "must have an added_tokens_decoder with token ids as keys, such as "
                f'{{"32000": {{"content": "<|im_end|>"}}}}. Received: {decoder!r:.80}',
            )
        return [_token(entry, int(i), name) for i, entry in decoder.items()]

    @functools.cached_property
    def _special_tokens(self):
        """The special tokens that files name without their ids (here 0), by text."""
        return {
            token.content: token
            for file, data in ((CONFIG, self.config), (SPECIAL, self._object(SPECIAL)))
            for key in _SPECIAL_NAMES
            for token in self._named_tokens(file, key, data.get(key))
        }

    def _named_tokens(self, file, key, value):
        """Returns the tokens that a setting names, with the id 0."""
        if not value:
            return []
        if isinstance(value, str):
            return [AddedToken(value, 0)]
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            # As in transformers, these are not found in the normalized text.
            value = {**value, "special": True, "normalized": False}
            return [_token(value, 0, file)]
        if isinstance(value, (list, dict)) and not key.endswith("_token"):
            items = value.values() if isinstance(value, dict) else value
            return [t for item in items for t in self._named_tokens(file, key, item)]
        raise self._error(
            file, f"sets {key}={value!r:.80}, which must be the text of a token"
        )

    def _with_rows(self, tokens, num_rows):
        without = [token.content for token in tokens if token.id >= num_rows]
        if without:
            warnings.warn(
                f"{self._repository} names tokens for which the model has no weights: "
                f"{format_names(without)}. Its embedding has {num_rows} rows, so these "
                "tokens are ignored.",
                stacklevel=2,
            )
        return [token for token in tokens if token.id < num_rows]

    # ----- Spaces

    def _prepend_scheme(self, has_tokens):
        """Returns where the space before a text is added, see `OpenLlamaTokenizer`."""
        tokenizer_class = self.config.get("tokenizer_class")
        legacy = self._boolean("legacy")
        if legacy is not None and tokenizer_class != "PreTrainedTokenizerFast":
            return "always" if legacy else "first"
        if scheme := prepend_scheme_of(self._fast):
            return scheme
        # What LlamaTokenizer of transformers 5 does. Without added tokens, the scheme
        # has an effect on text after control strings only.
        return "first" if has_tokens else "always"

    def _compare_with_fast(self):
        """Warns if `tokenizer.json` disagrees with `tokenizer.model`."""
        if not self._fast or not self._repository.optional(MODEL):
            return
        from tokenizers import Tokenizer

        path = self._repository.file(FAST)
        try:
            fast = Tokenizer.from_str(decode_text(path.read_bytes(), path))
        except Exception as error:  # The library raises no narrower class.
            raise ValueError(f"{path} is not a valid tokenizer: {error}.") from error
        fast.encode_special_tokens = True
        for text, consequence in (
            (_SAMPLE, "It belongs to another tokenizer, or was converted wrongly"),
            (_SPACES, "They treat spaces differently, so code has other token ids"),
        ):
            found = fast.encode(text, add_special_tokens=False).ids
            expected = self._processor.encode(text)
            if found != expected:
                warnings.warn(
                    f"In {self._repository}, {FAST} and {MODEL} encode {text!r} "
                    f"differently. {consequence}. {MODEL} is used, with which "
                    "OpenLLaMA was trained; transformers uses the other. If the model "
                    f"was fine-tuned with {FAST}, quality may suffer.",
                    stacklevel=2,
                )
                return


def _token(entry, token_id, name):
    """Converts an entry of a file to a token; other keys of the entry are ignored."""
    if isinstance(entry, str):
        entry = {"content": entry}
    if isinstance(entry, dict):
        entry = {k: entry[k] for k in ("content", "id", *_FLAGS) if k in entry}
        # The defaults of `tokenizers.AddedToken`.
        entry = {"special": False, **entry}
        entry = {"normalized": not entry["special"], **entry}
        if token_id is not None:
            entry["id"] = token_id
    return AddedToken.from_json(entry, name)


def _is_known(token, processor):
    """Whether the SentencePiece model has a token as a control token of its own."""
    if token.id >= processor.vocab_size():
        return False
    is_control = processor.is_control(token.id) or processor.is_unknown(token.id)
    strips = token.lstrip or token.rstrip or token.single_word
    return (
        is_control and processor.id_to_piece(token.id) == token.content and not strips
    )
