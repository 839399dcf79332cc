"""Text to token ids and back, by SentencePiece itself."""

import base64
import hashlib
import re
import warnings
from pathlib import Path

import keras
import numpy as np

from keras_openllama.backend.arrays import is_graph_tensor, loaded_tensorflow
from keras_openllama.backend.keras_hub import Tokenizer
from keras_openllama.loading.load import load_tokenizer
from keras_openllama.models.backbone import OpenLlamaBackbone
from keras_openllama.text.inputs import normalize_texts
from keras_openllama.text.sentencepiece_model import (
    from_base64,
    keeps_spaces,
    load_processor,
    read_proto,
    without_first_space,
)
from keras_openllama.text.stream_decoder import StreamDecoder
from keras_openllama.text.token_arrays import as_id_rows

VOCABULARY_FILE = "vocabulary.spm"  # KerasHub's name for it in its directories.


@keras.saving.register_keras_serializable(package="keras_openllama")
class OpenLlamaTokenizer(Tokenizer):
    """The tokenizer of OpenLLaMA: SentencePiece on the original `tokenizer.model`.

    v1 models merge runs of spaces into one and drop leading and trailing ones; v2
    models keep them. Which of the two holds is read from the model file: see
    `keeps_spaces`. A tokenizer that merges spaces warns once when a text would lose
    some. In any text, the character U+2581 (▁) comes back as a space, since
    SentencePiece writes spaces so.

    Control strings such as `"</s>"` in a text are ordinary characters, unless
    `tokenize` is asked to parse them: text from elsewhere cannot end a sequence.

    Args:
        proto: the SentencePiece model: path of the file, its bytes, or base64 of them
            as in a saved configuration.
        add_bos: bool, put `<s>` before each text. The preprocessor of the model does
            so on its own account.
        add_eos: bool, put `</s>` after each text.

    Call arguments:
        inputs: a string, or a batch of them; see `tokenize`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds no complete SentencePiece model.

    Example:
        tokenizer = OpenLlamaTokenizer("tokenizer.model")
        ids = tokenizer("The quick brown fox")
        tokenizer.detokenize(ids)  # "The quick brown fox"

    Source: Kudo and Richardson, SentencePiece (arXiv:1808.06226).
    """

    backbone_cls = OpenLlamaBackbone

    def __init__(self, proto=None, add_bos=False, add_eos=False, **kwargs):
        super().__init__(_allow_python_workflow=True, **kwargs)
        self.add_bos = add_bos
        self.add_eos = add_eos
        self.file_assets = [VOCABULARY_FILE]
        self.set_proto(proto)
        self.built = True  # It has no weights; Keras quantizes built layers only.

    @classmethod
    def from_preset(cls, preset, revision=None, **kwargs):
        """Loads the tokenizer of a preset.

        Args:
            preset: str, a name of `OpenLlamaCausalLM.presets`, a directory in KerasHub
                or transformers format or of a training run, or `"hf://user/repo"`.
            revision: str, branch, tag or commit on the Hugging Face Hub.
            **kwargs: arguments of the constructor, such as `add_bos`.

        Returns:
            An `OpenLlamaTokenizer`.

        Example:
            OpenLlamaTokenizer.from_preset("open_llama_nano")
        """
        return load_tokenizer(cls, preset, revision=revision, **kwargs)

    def set_proto(self, proto):
        """Replaces the SentencePiece model.

        Args:
            proto: path, bytes or base64, as in the constructor; `None` for a tokenizer
                whose model comes later.

        Raises:
            OSError, ValueError: as the constructor.
        """
        if proto is None:
            self.proto = None
            self._processor = None
            return
        data, source = read_proto(proto)
        self._processor = load_processor(data, source)
        self.proto = data
        self._keeps_spaces = keeps_spaces(self._processor)
        self._warned_of_lost_spaces = False
        self._rest_processor = None  # Made when it is needed.
        self._controls = {
            self._processor.id_to_piece(i): i
            for i in range(self._processor.vocab_size())
            if self._processor.is_control(i)
        }

    # --- The vocabulary ---

    @property
    def processor(self):
        """The `sentencepiece.SentencePieceProcessor` behind it all."""
        self._require_proto()
        return self._processor

    def _require_proto(self):
        if self.proto is None:
            raise ValueError(
                "This tokenizer has no vocabulary yet: `proto` is None. Pass the "
                "tokenizer.model of an OpenLLaMA model as `proto`, or use "
                "`OpenLlamaTokenizer.from_preset`."
            )

    @property
    def keeps_spaces(self):
        """Whether runs of spaces survive: true for v2 models, false for v1."""
        self._require_proto()
        return self._keeps_spaces

    @property
    def fingerprint(self):
        """SHA-256 of the model file, in hexadecimal."""
        self._require_proto()
        return hashlib.sha256(self.proto).hexdigest()

    @property
    def start_token_id(self):
        """Id of `<s>`."""
        return self.processor.bos_id()

    @property
    def end_token_id(self):
        """Id of `</s>`."""
        return self.processor.eos_id()

    @property
    def unk_token_id(self):
        """Id of `<unk>`."""
        return self.processor.unk_id()

    @property
    def pad_token_id(self):
        """0, which fills rows up behind a mask: OpenLLaMA has no padding token."""
        return 0

    @property
    def special_tokens(self):
        """`["<s>", "</s>"]`, in the model's own spelling."""
        return [self.id_to_token(i) for i in self.special_token_ids]

    @property
    def special_token_ids(self):
        """Ids of the tokens that mark start and end."""
        return [self.start_token_id, self.end_token_id]

    def vocabulary_size(self):
        """Returns the number of tokens."""
        return self.processor.vocab_size()

    def get_vocabulary(self):
        """Returns the list of tokens, in the order of their ids."""
        return self.processor.id_to_piece(list(range(self.vocabulary_size())))

    def id_to_token(self, id):
        """Returns the token (str) with an id; `ValueError` if there is none."""
        [[id]], _ = as_id_rows([id], self.vocabulary_size())
        return self.processor.id_to_piece(id)

    def token_to_id(self, token):
        """Returns the id of a token (str), that of `<unk>` if there is none."""
        [token] = normalize_texts(token, name="token").texts
        return self.processor.piece_to_id(token)

    # --- Text to ids ---

    def tokenize(self, inputs, parse_special=False, add_bos=None, add_eos=None):
        """Turns text into token ids. The texts of a batch are shared out to threads.

        Args:
            inputs: str or UTF-8 bytes, or a list or array of them. TensorFlow string
                tensors do as well, also inside `tf.data.Dataset.map`.
            parse_special: bool, read control strings such as `"</s>"` as the tokens
                that they name. What stands between two of them is a text of its own,
                as if it were tokenized alone. Never set it for text that you do not
                trust.
            add_bos: bool, put `<s>` before each text that does not begin with it.
                Defaults to the constructor's.
            add_eos: bool, put `</s>` after each text that does not end with it.
                Defaults to the constructor's.

        Returns:
            A list of int; for a batch, a list of such lists. Inside a TensorFlow graph
            an int32 tensor or a ragged one.

        Raises:
            ValueError: if something is not text, or not valid UTF-8.
        """
        if is_graph_tensor(inputs):
            return self._tokenize_in_graph(inputs, parse_special, add_bos, add_eos)
        inputs = normalize_texts(inputs)
        rows = self.encode(inputs.texts, parse_special, add_bos, add_eos)
        return rows if inputs.batched else rows[0]

    def encode(self, texts, parse_special=False, add_bos=None, add_eos=None):
        """Turns texts into token ids, without a check of what they are.

        Args:
            texts: list of strings, such as `text.inputs.normalize_texts` returns.
            parse_special, add_bos, add_eos: see `tokenize`.

        Returns:
            A list of lists of int.
        """
        self._warn_of_lost_spaces(texts)
        if parse_special:
            rows = [self._parse_special(text) for text in texts]
        else:
            rows = self.processor.encode(texts, num_threads=-1)
        if self.add_bos if add_bos is None else add_bos:
            start = [self.start_token_id]
            rows = [row if row[:1] == start else start + row for row in rows]
        if self.add_eos if add_eos is None else add_eos:
            end = [self.end_token_id]
            rows = [row if row[-1:] == end else row + end for row in rows]
        return rows

    def tokenize_continuation(self, text):
        """Turns the rest of a text into ids: without the space that begins a text.

        Args:
            text: str, what follows tokens that are there already.

        Returns:
            A list of int.

        Example:
            tokenizer.tokenize("un") + tokenizer.tokenize_continuation("happy")
        """
        self._require_proto()
        if self._rest_processor is None:
            self._rest_processor = without_first_space(self.proto)
        return self._rest_processor.encode(text)

    def call(self, inputs, *args, training=None, **kwargs):
        return self.tokenize(inputs, *args, **kwargs)

    def _parse_special(self, text):
        longest_first = sorted(self._controls, key=len, reverse=True)
        pattern = "|".join(re.escape(control) for control in longest_first)
        ids = []
        for part in re.split(f"({pattern})", text):
            if part in self._controls:
                ids.append(self._controls[part])
            elif part:
                ids += self.processor.encode(part)
        return ids

    def _tokenize_in_graph(self, inputs, *options):
        """Tokenizes a string tensor that gets its value later, outside the graph."""
        tensorflow = loaded_tensorflow()
        if inputs.shape.rank not in (0, 1):
            raise ValueError(
                "`inputs` must be a string tensor with no dimension or one. "
                f"Received: {inputs}."
            )

        batched = inputs.shape.rank == 1

        def flat_ids_and_lengths(texts):
            rows = self.tokenize(texts if batched else [texts], *options)
            flat = [token_id for row in rows for token_id in row]
            lengths = [len(row) for row in rows]
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
                    "and trailing ones, as its model file demands (all v1 OpenLLaMA "
                    f"models do), so this text loses spaces: {text[:60]!r}. For code "
                    "and other text whose spaces matter take a v2 preset, such as "
                    '"open_llama_3b_v2" or "open_llama_7b_v2". This is said once.',
                    stacklevel=4,
                )
                return

    # --- Ids to text ---

    def detokenize(self, inputs):
        """Turns token ids into text. Control tokens such as `</s>` have no text.

        Args:
            inputs: an int, a list of ints, or an integer array or tensor of one
                dimension; for a batch a list of lists or two dimensions.

        Returns:
            str; for a batch a list of str. Bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: if an id is not in the vocabulary, or not an integer.
        """
        rows, batched = as_id_rows(inputs, self.vocabulary_size())
        texts = self.processor.decode(rows, num_threads=-1)
        return texts if batched else texts[0]

    def stream_decoder(self, prefix_ids=()):
        """Returns a `StreamDecoder` of `keras_openllama.text.stream_decoder`.

        Args:
            prefix_ids: list of int, ids that the stream continues, such as a prompt's.
        """
        return StreamDecoder(self.processor, prefix_ids)

    # --- Saving ---

    def save_assets(self, dir_path):
        self._require_proto()
        Path(dir_path, VOCABULARY_FILE).write_bytes(self.proto)

    def load_assets(self, dir_path):
        path = Path(dir_path, VOCABULARY_FILE)
        # The configuration mostly holds the same model already.
        if self.proto is None or path.read_bytes() != self.proto:
            self.set_proto(path)

    def get_config(self):
        proto = self.proto
        if proto is not None:  # JSON has no bytes.
            proto = base64.b64encode(proto).decode("ascii")
        return {
            **super().get_config(),
            "proto": proto,
            "add_bos": self.add_bos,
            "add_eos": self.add_eos,
        }

    @classmethod
    def from_config(cls, config):
        # A configuration holds the model itself and never a path, so that one from
        # elsewhere cannot have a file of this machine read.
        if config.get("proto") is not None:
            config = {**config, "proto": from_base64(config["proto"])}
        return cls(**config)
