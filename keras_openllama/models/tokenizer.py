"""The SentencePiece tokenizer: text to token ids and back."""

from __future__ import annotations

import base64
import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_openllama.backend.arrays import is_graph_tensor, loaded_tensorflow
from keras_openllama.backend.keras_hub import Tokenizer
from keras_openllama.checkpoints.atomic_saving import AtomicPreset
from keras_openllama.loading.load import find_source
from keras_openllama.models.backbone import OpenLlamaBackbone
from keras_openllama.text.added_tokens import AddedToken
from keras_openllama.text.inputs import check_graph_texts, normalize_texts
from keras_openllama.text.sentencepiece_model import (
    proto_from_base64,
    read_proto,
)
from keras_openllama.text.token_arrays import PAD_TOKEN_ID, as_id_sequences
from keras_openllama.text.vocabulary import PREPEND_SCHEMES, Vocabulary
from keras_openllama.utils.types import PathLike, Tensor

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

    from keras_openllama.text.stream_decoder import StreamDecoder

VOCABULARY_FILE = "vocabulary.spm"  # The file's name in KerasHub's directories.


@keras.saving.register_keras_serializable(package="keras_openllama")
class OpenLlamaTokenizer(AtomicPreset, Tokenizer):
    """The tokenizer of OpenLLaMA: SentencePiece on the original `tokenizer.model`.

    The models of OpenLLaMA v1 merge runs of spaces into one and drop leading and
    trailing spaces; those of v2 preserve them. The property `keeps_spaces` reads from
    the model file which of the two applies. A tokenizer that merges spaces warns once,
    at the first text that loses some. SentencePiece represents spaces by the character
    U+2581 (▁), so this character is always decoded as a space.

    Control strings such as `"</s>"` in a text are encoded as ordinary characters,
    unless `tokenize` is called with `parse_special=True`. So untrusted text cannot end
    a sequence. (The `tokenizer.json` of an export always encodes them as tokens, as
    transformers does.)

    A checkpoint can have tokens beside the pieces of its SentencePiece model, such as
    `<|im_start|>`. `from_preset` reads them from the files of the checkpoint, and
    exports contain them.

    Calling the tokenizer is the same as calling `tokenize`, which corresponds to
    `encode` of transformers.

    Args:
        proto: the SentencePiece model: path of the file, its bytes, or their base64
            encoding as in a saved configuration.
        add_bos: whether to insert `<s>` before each text. The preprocessor of the model
            inserts it independently of this option.
        add_eos: whether to append `</s>` to each text.
        added_tokens: tokens beside the pieces of the SentencePiece model. Each is a
            string, for a special token with the next id; an
            `keras_openllama.text.added_tokens.AddedToken`; or a dict with its
            attributes. Special tokens are encoded as control strings are. Others are
            encoded wherever they occur. The model needs an embedding for each of them.
        prepend_scheme: whether SentencePiece's space before a text also precedes text
            that follows a control string or an added token: `"always"`, or `"first"`
            for text at the beginning only.
        **kwargs: further arguments of `keras_hub.tokenizers.Tokenizer`, such as `name`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a complete SentencePiece model, or an added token is
            malformed.

    Example:
        >>> tokenizer = OpenLlamaTokenizer.from_preset("open_llama_nano")
        >>> tokenizer(["The sea", "unhappy"])
        [[357, 1239], [518, 269, 441, 3016]]
        >>> tokenizer.detokenize([357, 1239])
        'The sea'
        >>> chat = OpenLlamaTokenizer(tokenizer.proto, added_tokens=["<|im_end|>"])
        >>> chat("The sea<|im_end|>", parse_special=True)
        [357, 1239, 3072]

    Source: Kudo and Richardson, SentencePiece (arXiv:1808.06226).
    """

    backbone_cls = OpenLlamaBackbone

    def __init__(
        self,
        proto: PathLike | bytes | None = None,
        add_bos: bool = False,
        add_eos: bool = False,
        added_tokens: Sequence[str | dict[str, Any] | AddedToken] = (),
        prepend_scheme: str = "always",
        **kwargs: Any,
    ):
        if prepend_scheme not in PREPEND_SCHEMES:
            raise ValueError(
                f"`prepend_scheme` must be one of {PREPEND_SCHEMES}. "
                f"Received: {prepend_scheme!r}"
            )
        super().__init__(_allow_python_workflow=True, **kwargs)
        self.add_bos = add_bos
        self.add_eos = add_eos
        self.prepend_scheme = prepend_scheme
        self._given_tokens = added_tokens
        self.file_assets = [VOCABULARY_FILE]
        self.set_proto(proto)
        self.built = True  # No weights; but Keras only quantizes built layers.

    @classmethod
    def from_preset(
        cls, preset: PathLike, revision: str | None = None, **kwargs: Any
    ) -> OpenLlamaTokenizer:
        """Loads the tokenizer of a preset.

        Args:
            preset: a name in `OpenLlamaCausalLM.presets`; a directory in KerasHub or
                transformers format or of a training run; a GGUF file;
                `"hf://user/repo"`, or `"hf://user/repo/file.gguf"`.
            revision: branch, tag or commit of a repository on the Hugging Face Hub.
            **kwargs: arguments of the constructor, such as `add_bos`.

        Returns:
            An `OpenLlamaTokenizer`.

        Raises:
            ValueError: for an unknown preset, or files of another model.
            OSError: if a file is unavailable or cannot be read.

        Example:
            >>> tokenizer = OpenLlamaTokenizer.from_preset(
            ...     "open_llama_nano", add_bos=True
            ... )
            >>> tokenizer("The sea")
            [1, 357, 1239]
        """
        return find_source(preset, revision).tokenizer(cls, kwargs)

    def set_proto(self, proto: PathLike | bytes | None) -> None:
        """Replaces the SentencePiece model.

        Args:
            proto: path, bytes or base64, as in the constructor; `None` for a tokenizer
                that gets its model later.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is not a complete SentencePiece model.

        Example:
            >>> tokenizer = OpenLlamaTokenizer()
            >>> tokenizer.set_proto(lm.preprocessor.tokenizer.proto)
            >>> tokenizer.vocabulary_size()
            3072
        """
        if proto is None:
            self.proto = self._vocabulary = None
            return
        data, source = read_proto(proto)
        self._vocabulary = Vocabulary(
            data, source, self._given_tokens, self.prepend_scheme
        )
        self.proto = data
        self._warned_of_lost_spaces = False

    # --- The vocabulary ---

    @property
    def processor(self) -> SentencePieceProcessor:
        """The underlying `sentencepiece.SentencePieceProcessor`.

        Example:
            >>> lm.preprocessor.tokenizer.processor.encode("The sea", out_type=str)
            ['▁The', '▁sea']
        """
        return self.vocabulary.processor

    @property
    def vocabulary(self) -> Vocabulary:
        """The SentencePiece model with the added tokens.

        Raises:
            ValueError: if the tokenizer has no SentencePiece model.
        """
        self._require_proto()
        return self._vocabulary

    def _require_proto(self):
        if self.proto is None:
            raise ValueError(
                "The tokenizer has no vocabulary: `proto` is None. Pass the "
                "tokenizer.model of an OpenLLaMA model as `proto`, or use "
                "`OpenLlamaTokenizer.from_preset`."
            )

    @property
    def keeps_spaces(self) -> bool:
        """Whether runs of spaces are preserved: true for v2 models, false for v1.

        Example:
            >>> lm.preprocessor.tokenizer.keeps_spaces
            True
        """
        return self.vocabulary.keeps_spaces

    @property
    def added_tokens(self) -> tuple[AddedToken, ...]:
        """The tokens beside the pieces of the SentencePiece model, by ascending id.

        Example:
            >>> proto = lm.preprocessor.tokenizer.proto
            >>> tokenizer = OpenLlamaTokenizer(proto, added_tokens=["<|im_end|>"])
            >>> tokenizer.added_tokens[0].id
            3072
        """
        return self.vocabulary.added_tokens

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what determines the token ids of plain text, in hexadecimal.

        That is the model file, and those added tokens that are not special.

        Example:
            >>> len(lm.preprocessor.tokenizer.fingerprint)
            64
        """
        added = [t.to_json() for t in self.added_tokens if not t.special]
        added = json.dumps([added, self.prepend_scheme]).encode() if added else b""
        return hashlib.sha256(self.proto + added).hexdigest()

    def settings(self) -> dict[str, Any]:
        """Returns the arguments beside `proto` that change token ids, for JSON.

        Example:
            >>> lm.preprocessor.tokenizer.settings()
            {'add_eos': False, 'added_tokens': [], 'prepend_scheme': 'always'}
        """
        return {
            "add_eos": self.add_eos,
            "added_tokens": [token.to_json() for token in self.added_tokens],
            "prepend_scheme": self.prepend_scheme,
        }

    @property
    def start_token(self) -> str:
        """The start token, spelled as in the model file.

        Example:
            >>> lm.preprocessor.tokenizer.start_token
            '<s>'
        """
        return self.id_to_token(self.start_token_id)

    @property
    def end_token(self) -> str:
        """The end token, spelled as in the model file.

        Example:
            >>> lm.preprocessor.tokenizer.end_token
            '</s>'
        """
        return self.id_to_token(self.end_token_id)

    @property
    def start_token_id(self) -> int:
        """Id of `<s>`, which begins a sequence."""
        return self.processor.bos_id()

    @property
    def end_token_id(self) -> int:
        """Id of `</s>`, which ends a sequence."""
        return self.processor.eos_id()

    @property
    def unk_token_id(self) -> int:
        """Id of `<unk>`, the unknown token."""
        return self.processor.unk_id()

    @property
    def pad_token_id(self) -> int:
        """0, the id of `<unk>`: OpenLLaMA has no padding token. Padding is masked."""
        return PAD_TOKEN_ID

    @property
    def special_tokens(self) -> list[str]:
        """The start and end tokens, spelled as in the model file.

        Example:
            >>> lm.preprocessor.tokenizer.special_tokens
            ['<s>', '</s>']
        """
        return [self.id_to_token(i) for i in self.special_token_ids]

    @property
    def special_token_ids(self) -> list[int]:
        """Ids of the start and end tokens.

        Example:
            >>> lm.preprocessor.tokenizer.special_token_ids
            [1, 2]
        """
        return [self.start_token_id, self.end_token_id]

    def vocabulary_size(self) -> int:
        """Returns the number of tokens.

        Example:
            >>> lm.preprocessor.tokenizer.vocabulary_size()
            3072
        """
        return self.vocabulary.size

    def get_vocabulary(self) -> list[str]:
        """Returns the tokens in the order of their ids.

        Example:
            >>> lm.preprocessor.tokenizer.get_vocabulary()[:4]
            ['<unk>', '<s>', '</s>', '<0x00>']
        """
        return [self.vocabulary.token(i) for i in range(self.vocabulary_size())]

    def id_to_token(self, id: int) -> str:
        """Returns the token with an id.

        Args:
            id: a token id.

        Returns:
            The token; a leading space is spelled "▁" (U+2581).

        Raises:
            ValueError: if the id is not in the vocabulary.

        Example:
            >>> lm.preprocessor.tokenizer.id_to_token(1239)
            '▁sea'
        """
        [[id]], _ = as_id_sequences([id], self.vocabulary_size())
        return self.vocabulary.token(id)

    def token_to_id(self, token: str) -> int:
        """Returns the id of a token.

        Args:
            token: a token; a leading space is spelled "▁" (U+2581).

        Returns:
            Its id, or the id of `<unk>` if the token is not in the vocabulary.

        Example:
            >>> lm.preprocessor.tokenizer.token_to_id("▁sea")
            1239
        """
        [token] = normalize_texts(token, name="token").texts
        return self.vocabulary.id(token)

    # --- Text to ids ---

    def tokenize(
        self,
        inputs: str | bytes | Sequence[str | bytes] | Tensor,
        parse_special: bool = False,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
    ) -> list[int] | list[list[int]] | Tensor:
        """Converts text to token ids. A batch of texts is processed by all CPU cores.

        Args:
            inputs: a string or UTF-8 bytes; a list or array of them; or a TensorFlow
                string tensor, also inside `tf.data.Dataset.map`.
            parse_special: whether to encode control strings such as `"</s>"` as the
                tokens that they name. The text between two of them is tokenized on its
                own. Never set it for untrusted text.
            add_bos: whether to insert `<s>` before each text that does not begin with
                it. Defaults to the constructor's.
            add_eos: whether to append `</s>` to each text that does not end with it.
                Defaults to the constructor's.

        Returns:
            A list of token ids; for a batch, a list of such lists. Inside a TensorFlow
            graph, an int32 tensor or ragged tensor.

        Raises:
            ValueError: if an input is not text, or not valid UTF-8.

        Example:
            >>> tokenizer = OpenLlamaTokenizer.from_preset("open_llama_nano")
            >>> tokenizer.tokenize("The sea")
            [357, 1239]
            >>> tokenizer.tokenize(["<s>The sea</s>"], parse_special=True)
            [[1, 357, 1239, 2]]
        """
        if is_graph_tensor(inputs):
            return self._tokenize_in_graph(inputs, parse_special, add_bos, add_eos)
        inputs = normalize_texts(inputs)
        options = parse_special, add_bos, add_eos
        sequences = self.tokenize_texts(inputs.texts, *options)
        return sequences if inputs.batched else sequences[0]

    def tokenize_texts(
        self,
        texts: list[str],
        parse_special: bool = False,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
    ) -> list[list[int]]:
        """Converts a list of strings to token ids; `tokenize` takes other inputs, too.

        Args:
            texts: strings. Their types are not checked.
            parse_special: see `tokenize`.
            add_bos: see `tokenize`.
            add_eos: see `tokenize`.

        Returns:
            A list of token ids for each string.

        Example:
            >>> lm.preprocessor.tokenizer.tokenize_texts(["The sea"], add_eos=True)
            [[357, 1239, 2]]
        """
        self._warn_of_lost_spaces(texts)
        sequences = self.vocabulary.encode(texts, parse_special)
        if self.add_bos if add_bos is None else add_bos:
            start = [self.start_token_id]
            sequences = [ids if ids[:1] == start else start + ids for ids in sequences]
        if self.add_eos if add_eos is None else add_eos:
            end = [self.end_token_id]
            sequences = [ids if ids[-1:] == end else ids + end for ids in sequences]
        return sequences

    def tokenize_continuation(
        self, text: str, parse_special: bool = False
    ) -> list[int]:
        """Converts text that follows other tokens to ids.

        `tokenize` treats every text as the beginning of one, and encodes a space before
        it. This method does not.

        Args:
            text: text after existing tokens.
            parse_special: see `tokenize`.

        Returns:
            A list of token ids.

        Example:
            >>> tokenizer = OpenLlamaTokenizer.from_preset("open_llama_nano")
            >>> ids = tokenizer.tokenize("un")
            >>> tokenizer.detokenize(ids + tokenizer.tokenize_continuation("happy"))
            'unhappy'
        """
        return self.vocabulary.encode_continuation(text, parse_special)

    def call(
        self, inputs: Any, *args: Any, training: bool | None = None, **kwargs: Any
    ) -> Any:
        """See `tokenize`."""
        return self.tokenize(inputs, *args, **kwargs)

    def _tokenize_in_graph(self, inputs, *options):
        """Tokenizes a symbolic string tensor by a Python function in the graph."""
        tensorflow = loaded_tensorflow()
        check_graph_texts(inputs, "inputs")
        batched = inputs.shape.rank == 1

        def flat_ids_and_lengths(texts):
            sequences = self.tokenize(texts if batched else [texts], *options)
            flat = [token_id for sequence in sequences for token_id in sequence]
            lengths = [len(sequence) for sequence in sequences]
            return np.array(flat, "int32"), np.array(lengths, "int64")

        ids, lengths = tensorflow.numpy_function(
            flat_ids_and_lengths, [inputs], [tensorflow.int32, tensorflow.int64]
        )
        ids.set_shape([None])
        lengths.set_shape([None])
        if not batched:
            return ids
        return tensorflow.RaggedTensor.from_row_lengths(ids, lengths)

    def _warn_of_lost_spaces(self, texts):
        if self.keeps_spaces or self._warned_of_lost_spaces:
            return
        for text in texts:
            if text[:1] == " " or text[-1:] == " " or "  " in text:
                self._warned_of_lost_spaces = True
                warnings.warn(
                    "This tokenizer merges runs of spaces into one and drops leading "
                    "and trailing spaces, like all OpenLLaMA v1 models. This text "
                    f"loses spaces: {text[:60]!r}. For code and other text in which "
                    "spaces matter, use a v2 preset, such as "
                    '"open_llama_3b_v2" or "open_llama_7b_v2". Further texts are not '
                    "reported.",
                    stacklevel=4,
                )
                return

    # --- Ids to text ---

    def detokenize(
        self, inputs: int | Sequence[int] | Sequence[Sequence[int]] | Tensor
    ) -> str | list[str]:
        """Converts token ids to text. Special tokens such as `</s>` have no text.

        Args:
            inputs: an int, a list of ints, or an integer array or tensor of one
                dimension; for a batch, a list of lists or two dimensions.

        Returns:
            A string; for a batch, a list of strings. Invalid UTF-8 is replaced by
            U+FFFD.

        Raises:
            ValueError: if an id is not an integer, or not in the vocabulary.

        Example:
            >>> lm.preprocessor.tokenizer.detokenize([1, 357, 1239, 2])
            'The sea'
        """
        sequences, batched = as_id_sequences(inputs, self.vocabulary_size())
        texts = self.vocabulary.decode(sequences)
        return texts if batched else texts[0]

    def stream_decoder(self, prefix_ids: Sequence[int] = ()) -> StreamDecoder:
        """Returns a decoder of a stream of tokens, for text that is shown as it comes.

        Args:
            prefix_ids: ids that the stream continues, such as a prompt's.

        Returns:
            A `keras_openllama.text.stream_decoder.StreamDecoder`.

        Example:
            >>> tokenizer = OpenLlamaTokenizer.from_preset("open_llama_nano")
            >>> decoder = tokenizer.stream_decoder(prefix_ids=tokenizer("The"))
            >>> [decoder.push(token) for token in tokenizer("sea shore")]
            [' sea', ' sh', 'ore']
        """
        return self.vocabulary.stream_decoder(prefix_ids)

    # --- Saving ---

    def save_assets(self, dir_path: PathLike) -> None:
        """Writes the SentencePiece model to a directory; Keras calls it."""
        self._require_proto()
        Path(dir_path, VOCABULARY_FILE).write_bytes(self.proto)

    def load_assets(self, dir_path: PathLike) -> None:
        """Reads the SentencePiece model of a directory; Keras calls it."""
        path = Path(dir_path, VOCABULARY_FILE)
        # The configuration usually contains the same model already.
        if self.proto is None or path.read_bytes() != self.proto:
            self.set_proto(path)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, the model as base64."""
        proto = self.proto
        if proto is not None:  # JSON cannot represent bytes.
            proto = base64.b64encode(proto).decode("ascii")
        tokens = self._given_tokens if proto is None else self.added_tokens
        return {
            **super().get_config(),
            "proto": proto,
            "add_bos": self.add_bos,
            "add_eos": self.add_eos,
            "added_tokens": [
                token.to_json() if isinstance(token, AddedToken) else token
                for token in tokens
            ],
            "prepend_scheme": self.prepend_scheme,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OpenLlamaTokenizer:
        """Creates a tokenizer from the result of `get_config`."""
        # Only base64: with a path, an untrusted configuration could read any file.
        if config.get("proto") is not None:
            config = {**config, "proto": proto_from_base64(config["proto"])}
        return cls(**config)
