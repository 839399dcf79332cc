"""The preprocessor: text to the arrays that training and generation take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_openllama.backend.arrays import is_graph_tensor, loaded_tensorflow, to_numpy
from keras_openllama.backend.keras_hub import CausalLMPreprocessor
from keras_openllama.checkpoints.atomic_saving import AtomicPreset
from keras_openllama.loading.load import find_source
from keras_openllama.models.backbone import OpenLlamaBackbone
from keras_openllama.models.tokenizer import OpenLlamaTokenizer
from keras_openllama.text.chat_rendering import (
    ChatTemplate,
    RenderedExample,
    chat_exchanges,
    render_examples,
    render_prompt,
)
from keras_openllama.text.chat_template import check_template
from keras_openllama.text.examples import (
    BatchWarnings,
    TrainingExamples,
    chat_prompt_ids,
    parse_text,
    tokenize_examples,
)
from keras_openllama.text.input_kinds import Examples, GraphTexts, Texts
from keras_openllama.text.inputs import (
    check_graph_texts,
    normalize_examples,
    normalize_texts,
)
from keras_openllama.text.jinja_template import JinjaTemplate
from keras_openllama.text.messages import escape_strings, normalize_messages
from keras_openllama.text.token_arrays import pad_sequences
from keras_openllama.utils.types import PathLike, Tensor
from keras_openllama.utils.validation import check_integer


@keras.saving.register_keras_serializable(package="keras_openllama")
class OpenLlamaCausalLMPreprocessor(AtomicPreset, CausalLMPreprocessor):
    r"""Converts text to `(x, y, sample_weight)` for `fit`, and prompts to token ids.

    A text becomes `<s> text </s>`, truncated or padded to `sequence_length + 1` tokens:
    inputs, and targets shifted by one. Padding has zero weight. A text that is
    too long is truncated at its end: it loses `</s>`, but never `<s>`. A warning
    reports how many examples were truncated or are empty; for the batches of a
    `tf.data.Dataset` it does so when their number reaches 1, 10, 100 and so on.

    This class alone inserts `<s>` and `</s>`: the tokenizer's `add_bos` and `add_eos`
    have no effect here, so no token is inserted twice.

    Call arguments:

    - `x`: a text or a batch of texts (strings, UTF-8 bytes, a list or array of them,
      or a TensorFlow string tensor, also inside `tf.data.Dataset.map`). Or pairs: a
      dict of `"prompt"` and `"response"`, each of them a text or a batch of texts, or a
      list of such dicts. Only the responses contribute to the loss. Or chats: a list
      of `{"messages": [{"role": …, "content": …}, …]}`. Each reply of the role
      `"assistant"` contributes to the loss, with the token that ends it, unless it
      has `"weight": 0`. Other forms are converted to these, see `text.records`.
    - `y`: `None`, or the responses to the prompts in `x`.
    - `sample_weight`: `None`, or weights that are multiplied by those of the tokens:
      one per example, `(batch,)`, or one per target, `(batch, sequence_length)`.
    - `sequence_length`: overrides the constructor's.

    The result is `(x, y, sample_weight)`: a dict of `"token_ids"` (int32) and
    `"padding_mask"` (bool); int32 targets; float32 weights. All are NumPy arrays of
    shape `(batch, sequence_length)`, or `(sequence_length,)` for a single text. Inside
    a TensorFlow graph they are tensors of these shapes.

    Args:
        tokenizer: an `OpenLlamaTokenizer`.
        sequence_length: length of the sequences, in tokens. Can be set later.
        add_start_token: whether texts and prompts begin with `<s>`.
        add_end_token: whether texts (but not prompts) end with `</s>`.
        chat_template: dict from role to a string that contains `{content}` once, such
            as `{"user": "USER: {content}\n", "assistant": "ASSISTANT: {content}"}`;
            or the source of a template in Jinja, as `tokenizer.chat_template` of
            transformers; `None` if there are no chats. Can be set later.
        **kwargs: further arguments of `keras_hub.models.CausalLMPreprocessor`, such as
            `name`.

    Raises:
        ValueError: for an invalid `sequence_length` or `chat_template`; in a call, for
            inputs of another form, or an empty prompt or response.

    Example:
        >>> tokenizer = OpenLlamaTokenizer.from_preset("open_llama_nano")
        >>> preprocessor = OpenLlamaCausalLMPreprocessor(tokenizer, sequence_length=5)
        >>> x, y, sample_weight = preprocessor(["The sea"])
        >>> x["token_ids"]
        array([[   1,  357, 1239,    2,    0]], dtype=int32)
        >>> y
        array([[ 357, 1239,    2,    0,    0]], dtype=int32)
        >>> sample_weight
        array([[1., 1., 1., 0., 0.]], dtype=float32)
        >>> _, _, sample_weight = preprocessor({"prompt": "The", "response": " sea"})
        >>> sample_weight
        array([0., 1., 1., 0., 0.], dtype=float32)
    """

    backbone_cls = OpenLlamaBackbone
    tokenizer_cls = OpenLlamaTokenizer

    def __init__(
        self,
        tokenizer: OpenLlamaTokenizer,
        sequence_length: int = 2048,
        add_start_token: bool = True,
        add_end_token: bool = True,
        chat_template: dict[str, str] | str | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            tokenizer=tokenizer,
            sequence_length=check_integer("sequence_length", sequence_length),
            add_start_token=add_start_token,
            add_end_token=add_end_token,
            **kwargs,
        )
        self.chat_template = chat_template

    @property
    def chat_template(self) -> dict[str, str] | str | None:
        """Dict from role to the text of a message, or Jinja; see the constructor."""
        return self._chat_template

    @chat_template.setter
    def chat_template(self, value: dict[str, str] | str | None) -> None:
        check_template(value)
        self._chat_template = value

    @classmethod
    def from_preset(
        cls, preset: PathLike, revision: str | None = None, **kwargs: Any
    ) -> OpenLlamaCausalLMPreprocessor:
        """Loads the preprocessor of a preset, including its tokenizer.

        Args:
            preset: a name in `OpenLlamaCausalLM.presets`; a directory in KerasHub or
                transformers format or of a training run; a GGUF file;
                `"hf://user/repo"`, or `"hf://user/repo/file.gguf"`.
            revision: branch, tag or commit of a repository on the Hugging Face Hub.
            **kwargs: arguments of the constructor, such as `sequence_length`.

        Returns:
            An `OpenLlamaCausalLMPreprocessor`.

        Raises:
            ValueError: for an unknown preset, or files of another model.
            OSError: if a file is unavailable or cannot be read.

        Example:
            >>> preprocessor = OpenLlamaCausalLMPreprocessor.from_preset(
            ...     "open_llama_nano", sequence_length=128
            ... )
            >>> preprocessor.sequence_length
            128
        """
        return find_source(preset, revision).preprocessor(cls, kwargs)

    @property
    def sequence_length(self) -> int:
        """Length of the sequences, in tokens."""
        return self._sequence_length

    @sequence_length.setter
    def sequence_length(self, value: int) -> None:
        self._sequence_length = check_integer("sequence_length", value)

    def build(self, input_shape: Any) -> None:
        """Does nothing: KerasHub would create its packer here, which is not used."""
        self.built = True

    def call(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        sequence_length: int | None = None,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Converts texts, pairs or chats to training arrays; see the class."""
        length = self._length_or_default(sequence_length)
        data = normalize_examples(x, y)
        if isinstance(data, GraphTexts):
            return self._training_tensors(data.tensors, sample_weight, length)
        examples = self.tokenize_examples(data, length)
        examples.warn()
        return self.pad_examples(examples, sample_weight, data.batched)

    def tokenize_examples(
        self, data: Texts | Examples, sequence_length: int | None = None
    ) -> TrainingExamples:
        """Tokenizes texts, pairs or chats, before they are padded or packed.

        Args:
            data: result of `text.inputs.normalize_examples`.
            sequence_length: overrides the constructor's.

        Returns:
            Token ids and loss masks.

        Raises:
            ValueError: for a prompt without a response, or a malformed chat.

        Example:
            >>> texts = Texts(["The sea"], batched=True)
            >>> examples = lm.preprocessor.tokenize_examples(texts)
            >>> examples.token_ids
            [[1, 357, 1239, 2]]
        """
        rendered = render_examples(data, self.compiled_chat_template())
        return self.tokenize_rendered(rendered, sequence_length)

    def tokenize_rendered(
        self, examples: Sequence[RenderedExample], sequence_length: int | None = None
    ) -> TrainingExamples:
        """Tokenizes examples that have been rendered as text.

        Args:
            examples: result of `text.chat_rendering.render_examples`.
            sequence_length: overrides the constructor's.

        Returns:
            Token ids and loss masks.

        Raises:
            ValueError: for a response that has no tokens.
        """
        length = self._length_or_default(sequence_length)
        options = length, self.add_start_token, self.add_end_token
        return tokenize_examples(examples, self.tokenizer, *options)

    def compiled_chat_template(self) -> ChatTemplate | None:
        """Returns the chat template; one in Jinja with the special tokens."""
        if not isinstance(self.chat_template, str):
            return self.chat_template
        tokens = {
            "bos_token": self.tokenizer.start_token_id,
            "eos_token": self.tokenizer.end_token_id,
            "unk_token": self.tokenizer.unk_token_id,
            "pad_token": self.tokenizer.pad_token_id,
        }
        variables = {n: self.tokenizer.id_to_token(i) for n, i in tokens.items()}
        return JinjaTemplate(self.chat_template, variables)

    def pad_examples(
        self,
        examples: TrainingExamples,
        sample_weight: Any = None,
        batched: bool = True,
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Pads tokenized examples to `(x, y, sample_weight)`.

        Args:
            examples: result of `tokenize_examples`.
            sample_weight: `None`, or weights as in a call.
            batched: false to return the arrays of a single example, without the batch
                axis.

        Returns:
            NumPy arrays as those of a call.

        Raises:
            ValueError: for weights of the wrong shape.

        Example:
            >>> texts = Texts(["The sea"], True)
            >>> examples = lm.preprocessor.tokenize_examples(texts, sequence_length=5)
            >>> _, y, _ = lm.preprocessor.pad_examples(examples)
            >>> y
            array([[ 357, 1239,    2,    0,    0]], dtype=int32)
        """
        x, y, weights = examples.padded()
        if sample_weight is not None:
            sample_weight = to_numpy(sample_weight)
            if not batched:
                sample_weight = sample_weight[None]
            weights *= _as_token_weights(sample_weight, weights.shape)
        if batched:
            return x, y, weights
        return {name: array[0] for name, array in x.items()}, y[0], weights[0]

    def _training_tensors(self, x, sample_weight, length):
        """Does what `call` does in a TensorFlow graph."""
        parts = dict(x) if isinstance(x, dict) else {"": x}
        if sample_weight is not None:
            parts["weight"] = sample_weight
        batch_warnings = BatchWarnings()

        def arrays(*values):
            given = dict(zip(parts, values, strict=True))
            weight = given.pop("weight", None)
            data = normalize_examples(given.get("", given))
            examples = self.tokenize_examples(data, length)
            batch_warnings.add(examples)
            x, targets, weights = self.pad_examples(examples, weight, data.batched)
            return *x.values(), targets, weights

        token_ids, padding_mask, y, weights = _in_graph(
            arrays, list(parts.values()), ["int32", "bool", "int32", "float32"], length
        )
        return {"token_ids": token_ids, "padding_mask": padding_mask}, y, weights

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "chat_template": self.chat_template}

    # --- Generation ---

    def prompt_ids(
        self, texts: list[str], parse_special: bool = False, name: str = "texts"
    ) -> list[list[int]]:
        """Tokenizes prompts for generation.

        Args:
            texts: the prompts.
            parse_special: whether to encode control strings in the prompts as tokens;
                see `OpenLlamaTokenizer.tokenize`.
            name: name of the argument in error messages.

        Returns:
            Token ids of each prompt. They begin with `<s>`, unless `add_start_token` is
            false, and have no `</s>` at the end.

        Raises:
            ValueError: if a prompt is empty, or has only spaces that the tokenizer
                drops.

        Example:
            >>> lm.preprocessor.prompt_ids(["The sea"])
            [[1, 357, 1239]]
        """
        sequences = self.tokenizer.tokenize_texts(
            texts, parse_special=parse_special, add_bos=False, add_eos=False
        )
        start = self.tokenizer.start_token_id
        for i, (text, sequence) in enumerate(zip(texts, sequences, strict=True)):
            if not sequence:
                raise ValueError(
                    f"`{name}[{i}]` is an empty prompt: {text!r}. A prompt must have "
                    + ("text." if not text else "characters other than spaces.")
                )
            if self.add_start_token and sequence[0] != start:
                sequence.insert(0, start)
        return sequences

    def chat_ids(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Any] | None = None,
        parse_special: bool = True,
    ) -> list[int]:
        """Tokenizes a chat up to the reply that is to be generated.

        Args:
            messages: list of `{"role": …, "content": …}`, the last of which is not the
                assistant's. As in training, `</s>` follows each earlier reply; a
                template in Jinja writes all special tokens itself, `<s>` included.
            tools: descriptions of the tools that the chat may use, for templates in
                Jinja.
            parse_special: with a template in Jinja, whether control strings in messages
                are encoded as tokens, as transformers does. False for messages of
                people who must not begin or end messages of other roles. With a
                template by role, they are always text.

        Returns:
            A list of token ids.

        Raises:
            ValueError: for malformed messages, or if there is no `chat_template`.

        Example:
            >>> preprocessor = OpenLlamaCausalLMPreprocessor.from_preset(
            ...     "open_llama_nano"
            ... )
            >>> preprocessor.chat_template = {
            ...     "user": "Q: {content}", "assistant": " A: {content}"
            ... }
            >>> ids = preprocessor.chat_ids([{"role": "user", "content": "Hi"}])
            >>> preprocessor.tokenizer.detokenize(ids)
            'Q: Hi A: '
        """
        messages = normalize_messages(messages, "messages")
        template = self.compiled_chat_template()
        if isinstance(template, JinjaTemplate):
            if not parse_special:
                escape = self.tokenizer.vocabulary.escape_control_strings
                messages = [escape_strings(message, escape) for message in messages]
            text = render_prompt(messages, template, tools)
            return parse_text(self.tokenizer, text)
        exchanges = chat_exchanges(messages, template)
        options = self.add_start_token, self.add_end_token
        return chat_prompt_ids(exchanges, self.tokenizer, *options)

    def generate_preprocess(
        self, x: Any, sequence_length: int | None = None
    ) -> dict[str, Tensor]:
        """Converts prompts to padded arrays, as KerasHub's `generate` takes them.

        Args:
            x: a prompt or a batch of prompts, of the types that a call takes.
            sequence_length: overrides the constructor's.

        Returns:
            A dict of `"token_ids"` (int32) and `"padding_mask"` (bool), NumPy arrays
            `(batch, sequence_length)`, or `(sequence_length,)` for one prompt.

        Raises:
            ValueError: if a prompt is empty, or longer than `sequence_length`.

        Example:
            >>> lm.preprocessor.generate_preprocess("The sea", 5)["token_ids"]
            array([   1,  357, 1239,    0,    0], dtype=int32)
        """
        length = self._length_or_default(sequence_length)
        if is_graph_tensor(x):
            check_graph_texts(x, "x")
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
        prompts = normalize_texts(x, name="x")
        sequences = self.prompt_ids(prompts.texts, name="x")
        for i, sequence in enumerate(sequences):
            if len(sequence) > length:
                raise ValueError(
                    f"`x[{i}]` is a prompt of {len(sequence)} tokens, longer than "
                    f"`sequence_length`, {length}. Shorten it, or raise "
                    "`sequence_length`."
                )
        arrays = tuple(pad_sequences(sequences, length).values())
        return arrays if prompts.batched else tuple(array[0] for array in arrays)

    def generate_postprocess(self, x: dict[str, Tensor]) -> str | list[str]:
        """Converts generated arrays to text.

        Args:
            x: dict of `"token_ids"`, int `(batch, length)` or `(length,)`, and
                `"padding_mask"` of the same shape, nonzero on the tokens to decode.

        Returns:
            A list of strings, or a string. Control tokens have no text.

        Raises:
            ValueError: for arrays of different shapes.

        Example:
            >>> lm.preprocessor.generate_postprocess(
            ...     lm.preprocessor.generate_preprocess("The sea")
            ... )
            'The sea'
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
            self.tokenizer.detokenize(sequence[mask])
            for sequence, mask in zip(token_ids, padding_mask, strict=True)
        ]

    def _length_or_default(self, sequence_length):
        if sequence_length is None:
            return self.sequence_length
        return check_integer("sequence_length", sequence_length)


def _as_token_weights(weights, shape):
    """Returns weights per text or per target in a shape that broadcasts to `shape`."""
    if weights.shape == shape[:1]:
        return weights[:, None]
    if weights.shape == shape:
        return weights
    raise ValueError(
        "`sample_weight` must hold one weight per text or one per target: shape "
        f"{shape[:1]} or {shape}. Received an array of shape {weights.shape}."
    )


def _in_graph(function, inputs, dtypes, length):
    """Runs a function of NumPy arrays in a TensorFlow graph.

    Its outputs have the static shape of `inputs[0]` and a last dimension of `length`.
    """
    outputs = loaded_tensorflow().numpy_function(function, inputs, dtypes)
    for output in outputs:
        output.set_shape([*inputs[0].shape, length])
    return outputs
