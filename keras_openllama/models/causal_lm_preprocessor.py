"""Text to the arrays that the model is trained on and generates from."""

import keras
import numpy as np

from keras_openllama.backend.arrays import is_graph_tensor, loaded_tensorflow, to_numpy
from keras_openllama.backend.keras_hub import CausalLMPreprocessor
from keras_openllama.loading.load import load_preprocessor
from keras_openllama.models.backbone import OpenLlamaBackbone
from keras_openllama.models.tokenizer import OpenLlamaTokenizer
from keras_openllama.text.examples import (
    chat_exchanges,
    chat_prompt_ids,
    check_template,
    exchanges_of,
    tokenize,
)
from keras_openllama.text.inputs import (
    GraphTexts,
    normalize_examples,
    normalize_texts,
)
from keras_openllama.text.token_arrays import as_arrays


@keras.saving.register_keras_serializable(package="keras_openllama")
class OpenLlamaCausalLMPreprocessor(CausalLMPreprocessor):
    """Turns strings into `(x, y, sample_weight)` for `fit`, and prompts into ids.

    A text becomes `<s> text </s>`, cut or filled up to `sequence_length`; targets are
    the same tokens, one step ahead, and filling weighs nothing. A text that is too
    long loses its end, `</s>` with it, and never its `<s>`. It is this class that
    decides about `<s>` and `</s>`: the tokenizer's `add_bos` and `add_eos` do not
    count here, so nothing is ever doubled.

    Args:
        tokenizer: an `OpenLlamaTokenizer`.
        sequence_length: int, length of the rows, in tokens. Can be set later.
        add_start_token: bool, begin texts and prompts with `<s>`.
        add_end_token: bool, end texts (never prompts) with `</s>`.

        chat_template: dict of strings by role, each with `{content}` once, such as
            `{"user": "USER: {content}\\n", "assistant": "ASSISTANT: {content}"}`;
            `None` where there are no chats. Can be set later.

    Call arguments:
        x: one text or a batch of them: str, UTF-8 bytes, a list or array of them, or a
            TensorFlow string tensor, also inside `tf.data.Dataset.map`. Or pairs: a
            dict of `"prompt"` and `"response"`, each as above, or a list of such dicts
            of strings: only responses are learned. Or chats: a list of `{"messages":
            [{"role": …, "content": …}, …]}`, of which each reply of the role
            `"assistant"` is learned, with `</s>` behind it.
        y: `None`, or responses to the prompts in `x`.
        sample_weight: `None`, or weights that multiply those of the tokens: one per
            text, `(batch,)`, or one per target, `(batch, sequence_length)`.
        sequence_length: int, in place of the constructor's.

    Returns:
        `(x, y, sample_weight)`: a dict of `"token_ids"` (int32) and `"padding_mask"`
        (bool); int32 targets; float32 weights. All are NumPy arrays of shape
        `(batch, sequence_length)`, or `(sequence_length,)` for one text; inside a
        TensorFlow graph they are tensors with these shapes.

    Raises:
        ValueError: if an argument is not of this form, or a prompt or response empty.

    What was cut, and texts that are empty, are warned of, with their number.

    Example:
        preprocessor = OpenLlamaCausalLMPreprocessor(tokenizer, sequence_length=128)
        x, y, sample_weight = preprocessor(["One text.", "Another."])
        x, y, sample_weight = preprocessor({"prompt": "2 + 2 =", "response": " 4"})
    """

    backbone_cls = OpenLlamaBackbone
    tokenizer_cls = OpenLlamaTokenizer

    def __init__(
        self,
        tokenizer,
        sequence_length=2048,
        add_start_token=True,
        add_end_token=True,
        chat_template=None,
        **kwargs,
    ):
        super().__init__(
            tokenizer=tokenizer,
            sequence_length=_checked_length(sequence_length),
            add_start_token=add_start_token,
            add_end_token=add_end_token,
            **kwargs,
        )
        self.chat_template = chat_template

    @property
    def chat_template(self):
        """How the messages of a chat become text; see the constructor."""
        return self._chat_template

    @chat_template.setter
    def chat_template(self, value):
        check_template(value)
        self._chat_template = value

    @classmethod
    def from_preset(cls, preset, revision=None, **kwargs):
        """Loads the preprocessor of a preset, its tokenizer included.

        Args:
            preset: str, a name of `OpenLlamaCausalLM.presets`, a directory in KerasHub
                or transformers format or of a training run, or `"hf://user/repo"`.
            revision: str, branch, tag or commit on the Hugging Face Hub.
            **kwargs: arguments of the constructor, such as `sequence_length`.

        Returns:
            An `OpenLlamaCausalLMPreprocessor`.

        Example:
            OpenLlamaCausalLMPreprocessor.from_preset(
                "open_llama_nano", sequence_length=256
            )
        """
        return load_preprocessor(cls, preset, revision=revision, **kwargs)

    @property
    def sequence_length(self):
        """Length of the rows, in tokens."""
        return self._sequence_length

    @sequence_length.setter
    def sequence_length(self, value):
        self._sequence_length = _checked_length(value)

    def build(self, input_shape):
        self.built = True  # KerasHub would make its packer here; rows are made below.

    def call(self, x, y=None, sample_weight=None, sequence_length=None):
        length = self._length_or_default(sequence_length)
        data = normalize_examples(x, y)
        if isinstance(data, GraphTexts):
            return self._training_tensors(data.tensors, sample_weight, length)
        rows = self.tokenize_examples(data, length)
        rows.warn()
        return self.pad_examples(rows, sample_weight, data.batched)

    def tokenize_examples(self, data, sequence_length=None):
        """Tokens of texts, pairs or chats, before they are filled up or packed.

        Args:
            data: `inputs.Texts` or `inputs.Examples`.
            sequence_length: as for a call.

        Returns:
            `examples.TrainingExamples`.
        """
        length = self._length_or_default(sequence_length)
        examples = exchanges_of(data, self.chat_template)
        options = length, self.add_start_token, self.add_end_token
        return tokenize(examples, self.tokenizer, *options)

    def pad_examples(self, rows, sample_weight=None, batched=True):
        """Rows filled up to `(x, y, sample_weight)`.

        Args:
            rows: `examples.TrainingExamples`.
            sample_weight: as for a call.
            batched: bool, false for the arrays of one row.
        """
        x, y, weights = rows.filled()
        if sample_weight is not None:
            sample_weight = to_numpy(sample_weight)
            if not batched:
                sample_weight = sample_weight[None]
            weights *= _as_token_weights(sample_weight, weights.shape)
        if batched:
            return x, y, weights
        return {name: array[0] for name, array in x.items()}, y[0], weights[0]

    def _training_tensors(self, x, sample_weight, length):
        """The same as a step of a TensorFlow graph; warns of its first batch only."""
        parts = dict(x) if isinstance(x, dict) else {"": x}
        if sample_weight is not None:
            parts["weight"] = sample_weight
        told = []

        def arrays(*values):
            given = dict(zip(parts, values, strict=True))
            weight = given.pop("weight", None)
            data = normalize_examples(given.get("", given))
            rows = self.tokenize_examples(data, length)
            if not told:
                told.append(rows.warn())
            x, targets, weights = self.pad_examples(rows, weight, data.batched)
            return *x.values(), targets, weights

        token_ids, padding_mask, y, weights = _in_graph(
            arrays, list(parts.values()), ["int32", "bool", "int32", "float32"], length
        )
        return {"token_ids": token_ids, "padding_mask": padding_mask}, y, weights

    def get_config(self):
        return {**super().get_config(), "chat_template": self.chat_template}

    # --- Generation ---

    def prompt_ids(self, texts, parse_special=False):
        """Turns prompts into the ids that the model continues.

        Args:
            texts: list of strings.
            parse_special: bool, read control strings in the prompts as tokens; see
                `OpenLlamaTokenizer.tokenize`.

        Returns:
            A list of lists of int: `<s>` first, unless `add_start_token` is false, and
            no `</s>` last.

        Raises:
            ValueError: if a prompt is empty, or holds nothing but spaces that the
                tokenizer drops.
        """
        rows = self.tokenizer.encode(
            texts, parse_special=parse_special, add_bos=False, add_eos=False
        )
        start = self.tokenizer.start_token_id
        for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
            if not row:
                raise ValueError(
                    f"`inputs[{i}]` is an empty prompt: {text!r}. Pass at least one "
                    "character to continue"
                    + ("." if not text else ", other than spaces.")
                )
            if self.add_start_token and row[0] != start:
                row.insert(0, start)
        return rows

    def chat_ids(self, messages):
        """Turns a chat that waits for a reply into the ids that the model continues.

        Args:
            messages: list of `{"role": …, "content": …}`, the last of them not the
                assistant's. Replies have `</s>` behind them, as in training.

        Returns:
            A list of int.

        Raises:
            ValueError: for malformed messages, or if there is no `chat_template`.
        """
        exchanges = chat_exchanges(messages, self.chat_template)
        options = self.add_start_token, self.add_end_token
        return chat_prompt_ids(exchanges, self.tokenizer, *options)

    def generate_preprocess(self, x, sequence_length=None):
        """Turns prompts into filled-up rows, as KerasHub's `generate` takes them.

        Args:
            x: one prompt or a batch of them, as for a call.
            sequence_length: int, in place of the constructor's.

        Returns:
            A dict of `"token_ids"` (int32) and `"padding_mask"` (bool), NumPy arrays
            `(batch, sequence_length)`, or `(sequence_length,)` for one prompt.

        Raises:
            ValueError: if a prompt is empty, or longer than `sequence_length`.
        """
        length = self._length_or_default(sequence_length)
        if is_graph_tensor(x):
            token_ids, padding_mask = _in_graph(
                lambda texts: self._prompt_arrays(texts, length),
                [x],
                ["int32", "bool"],
                length,
            )
        else:
            token_ids, padding_mask = self._prompt_arrays(x, length)
        return {"token_ids": token_ids, "padding_mask": padding_mask}

    def _prompt_arrays(self, x, length):
        prompts = normalize_texts(x)
        rows = self.prompt_ids(prompts.texts)
        for i, row in enumerate(rows):
            if len(row) > length:
                raise ValueError(
                    f"`inputs[{i}]` is a prompt of {len(row)} tokens, longer than "
                    f"`sequence_length`, {length}. Shorten it, or raise "
                    "`sequence_length`."
                )
        arrays = tuple(as_arrays(rows, length).values())
        return arrays if prompts.batched else tuple(array[0] for array in arrays)

    def generate_postprocess(self, x):
        """Turns generated rows back into text.

        Args:
            x: dict of `"token_ids"`, int `(batch, length)` or `(length,)`, and
                `"padding_mask"` of the same shape, true on the tokens to read.

        Returns:
            A list of str, or one str. Control tokens have no text.
        """
        token_ids = to_numpy(x["token_ids"])
        padding_mask = to_numpy(x["padding_mask"]).astype("bool")
        if token_ids.shape != padding_mask.shape or token_ids.ndim not in (1, 2):
            raise ValueError(
                '`x["token_ids"]` and `x["padding_mask"]` must have the same shape, '
                f"(batch, length) or (length,). Received: {token_ids.shape} and "
                f"{padding_mask.shape}."
            )
        if token_ids.ndim == 1:
            return self.tokenizer.detokenize(token_ids[padding_mask])
        return [
            self.tokenizer.detokenize(row[mask])
            for row, mask in zip(token_ids, padding_mask, strict=True)
        ]

    def _length_or_default(self, sequence_length):
        if sequence_length is None:
            return self.sequence_length
        return _checked_length(sequence_length)


def _checked_length(sequence_length):
    if (
        not isinstance(sequence_length, (int, np.integer))
        or isinstance(sequence_length, bool)
        or sequence_length < 1
    ):
        raise ValueError(
            "`sequence_length` must be a whole number of tokens, at least 1. "
            f"Received: {sequence_length!r}."
        )
    return int(sequence_length)


def _as_token_weights(weights, shape):
    """Returns weights per text or per target in a shape that multiplies `shape`."""
    if weights.shape == shape[:1]:
        return weights[:, None]
    if weights.shape == shape:
        return weights
    raise ValueError(
        "`sample_weight` must hold one weight per text or one per target: shape "
        f"{shape[:1]} or {shape}. Received an array of shape {weights.shape}."
    )


def _in_graph(function, inputs, dtypes, length):
    """Runs a function on NumPy arrays as a step of a TensorFlow graph.

    Its outputs have the shape of `inputs[0]`, known as far as it is known when the
    graph is made, and a last dimension of `length`.
    """
    if inputs[0].shape.rank not in (0, 1):
        raise ValueError(
            "`x` must be a string tensor with no dimension or one. "
            f"Received: {inputs[0]}."
        )
    outputs = loaded_tensorflow().numpy_function(function, inputs, dtypes)
    for output in outputs:
        output.set_shape([*inputs[0].shape, length])
    return outputs
