"""Supervised fine-tuning examples as token ids: texts, pairs and chats.

Every example becomes a list of exchanges: a prompt, which is masked out of the loss,
and a response. A plain text is a response without a prompt.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from keras_openllama.text.inputs import Examples, Message, Pair, Texts
from keras_openllama.text.token_arrays import pad_sequences
from keras_openllama.utils.bin_packing import best_fit_decreasing

# A prompt and the response to it; either may be empty.
Exchange: TypeAlias = tuple[str, str]
ChatTemplate: TypeAlias = dict[str, str]

_TEMPLATE = '{"user": "USER: {content}\\n", "assistant": "ASSISTANT: {content}"}'


class TextTokenizer(Protocol):
    """The part of `OpenLlamaTokenizer` that is used here."""

    start_token_id: int
    end_token_id: int

    def tokenize(self, inputs: list[str], **options: Any) -> list[list[int]]:
        """Returns the token ids of each text."""

    def tokenize_continuation(self, text: str) -> list[int]:
        """Returns the token ids of a text that continues another one."""

    def detokenize(self, inputs: list[int]) -> str:
        """Returns the text of token ids."""


# ----- Exchanges


def to_exchanges(
    data: Texts | Examples, template: ChatTemplate | None = None
) -> list[list[Exchange]]:
    """Converts texts, pairs or chats to lists of exchanges.

    Args:
        data: the normalized input.
        template: a chat template, see `chat_exchanges`. Needed for chats only.

    Returns:
        One list of `(prompt, response)` per example.

    Raises:
        ValueError: if a chat is malformed, or there is no template for it.

    Example:
        >>> to_exchanges(Texts(["Llamas hum."], batched=True))
        [[('', 'Llamas hum.')]]
    """
    if isinstance(data, Texts):
        return [[("", text)] for text in data.texts]
    return [
        [(example.prompt, example.response)]
        if isinstance(example, Pair)
        else chat_exchanges(example.messages, template, example.name)
        for example in data.examples
    ]


def check_template(template: ChatTemplate | None) -> None:
    """Checks a chat template.

    Args:
        template: see `chat_exchanges`; `None` is valid.

    Raises:
        ValueError: if `template` is not a dict of strings with the role `"assistant"`,
            each with `{content}` exactly once.
    """
    if template is None:
        return
    if not isinstance(template, dict) or "assistant" not in template:
        raise ValueError(
            '`chat_template` must be a dict of strings with the role "assistant", '
            f"such as {_TEMPLATE}. Received: {template!r}"
        )
    for role, text in template.items():
        if not isinstance(text, str) or text.count("{content}") != 1:
            raise ValueError(
                f'`chat_template["{role}"]` must be a string that has {{content}} '
                f"exactly once. Received: {text!r}"
            )


def chat_exchanges(
    messages: Sequence[Message], template: ChatTemplate | None, name: str = "messages"
) -> list[Exchange]:
    r"""Converts a chat to exchanges. The last one may lack a response.

    Args:
        messages: dicts `{"role": …, "content": …}`.
        template: text by role, each with `{content}` exactly once. Text before the
            assistant's content belongs to the prompt, text after it to the response.
        name: name of the argument in error messages.

    Returns:
        List of `(prompt, response)`. A missing response is `""`.

    Raises:
        ValueError: if there is no template, the template does not have a role, or a
            message is malformed.

    Example:
        >>> template = {"user": "Q: {content}\n", "assistant": "A: {content}"}
        >>> chat_exchanges([{"role": "user", "content": "Hi"}], template)
        [('Q: Hi\nA: ', '')]
    """
    if template is None:
        raise ValueError(
            "Chats need a chat template. Set `preprocessor.chat_template`, for "
            f"example to {_TEMPLATE}."
        )
    before, after = template["assistant"].split("{content}")
    exchanges, prompt = [], ""
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(
                f'`{name}[{i}]` must be a dict with the keys "role" and "content". '
                f"Received: {message!r}"
            )
        role, content = message["role"], message["content"]
        if role not in template or not isinstance(content, str) or not content:
            raise ValueError(
                f"`{name}[{i}]` must have a role of {sorted(template)} and non-empty "
                f"content. Received: {message!r}"
            )
        if role == "assistant":
            exchanges.append((prompt + before, content + after))
            prompt = ""
        else:
            prompt += template[role].replace("{content}", content)
    if prompt:
        exchanges.append((prompt + before, ""))
    return exchanges


# ----- Tokens


def tokenize_examples(
    examples: Sequence[Sequence[Exchange]],
    tokenizer: TextTokenizer,
    sequence_length: int,
    add_start_token: bool = True,
    add_end_token: bool = True,
) -> TrainingExamples:
    """Tokenizes examples and masks their prompts out of the loss.

    A prompt is tokenized exactly as in `generate`, and a response as its continuation.
    After the `</s>` of a response, the next prompt is tokenized as a new text.

    Args:
        examples: lists of exchanges, see `to_exchanges`.
        tokenizer: usually an `OpenLlamaTokenizer`.
        sequence_length: predictions per sequence. A sequence has one token more.
        add_start_token: whether to add `<s>` before each example.
        add_end_token: whether to add `</s>` after each response.

    Returns:
        The token ids and loss masks, truncated to `sequence_length + 1` tokens.

    Raises:
        ValueError: if a prompt has no response, or the response has no tokens.

    Example:
        >>> tokenizer = lm.preprocessor.tokenizer
        >>> tokenized = tokenize_examples([[("2 + 2 =", " 4")]], tokenizer, 16)
        >>> tokenizer.detokenize(tokenized.token_ids[0])
        '2 + 2 = 4'
        >>> sum(tokenized.loss_masks[0])  # The response and the end token.
        3
    """
    exchanges = [exchange for example in examples for exchange in example]
    pairs = iter(_pairs_of_ids(exchanges, tokenizer))
    start = [tokenizer.start_token_id] if add_start_token else []
    end = [tokenizer.end_token_id] if add_end_token else []
    tokenized = TrainingExamples([], [], sequence_length)
    for number, example in enumerate(examples):
        ids, loss_mask = list(start), [False] * len(start)
        for prompt, response in example:
            prompt_ids, response_ids = next(pairs)
            if prompt and not response_ids:
                raise ValueError(
                    f"Example {number} has a prompt without a response, or with a "
                    f"response that has no tokens: {prompt[-80:]!r}"
                )
            room = sequence_length + 1 - len(ids) - len(prompt_ids)
            part = response, prompt_ids, response_ids, room
            tokenized.num_bytes += _visible_bytes(*part, tokenizer)
            ids += prompt_ids + response_ids + end
            loss_mask += [False] * len(prompt_ids)
            loss_mask += [bool(response_ids)] * len(response_ids + end)
        tokenized.add(ids, loss_mask)
    return tokenized


def _visible_bytes(response, prompt_ids, response_ids, room, tokenizer):
    """Bytes of a response that remain after truncation to `room` tokens."""
    if len(response_ids) <= room:
        return len(response.encode())
    if room <= 0:
        return 0
    text = tokenizer.detokenize(prompt_ids + response_ids[:room])
    return len(text.encode()) - len(tokenizer.detokenize(prompt_ids).encode())


def chat_prompt_ids(
    exchanges: Sequence[Exchange],
    tokenizer: TextTokenizer,
    add_start_token: bool = True,
    add_end_token: bool = True,
) -> list[int]:
    """Tokenizes a chat that ends with a prompt, for generation.

    Args:
        exchanges: see `chat_exchanges`; the last one has no response.
        tokenizer: usually an `OpenLlamaTokenizer`.
        add_start_token: whether to add `<s>` before the chat.
        add_end_token: whether to add `</s>` after each response.

    Returns:
        Token ids.

    Raises:
        ValueError: if the chat ends with a message of the assistant.
    """
    if not exchanges or exchanges[-1][1]:
        raise ValueError(
            "A chat to continue must not end with a message of the assistant. "
            f"Received: {exchanges!r:.200}"
        )
    ids = [tokenizer.start_token_id] if add_start_token else []
    end = [tokenizer.end_token_id] if add_end_token else []
    for prompt_ids, response_ids in _pairs_of_ids(exchanges, tokenizer):
        ids += prompt_ids + response_ids + (end if response_ids else [])
    return ids


def _pairs_of_ids(exchanges, tokenizer):
    """`(ids of the prompt, ids of the response)` of each exchange."""
    options = dict(add_bos=False, add_eos=False)
    prompts = tokenizer.tokenize([prompt for prompt, _ in exchanges], **options)
    joined = tokenizer.tokenize([p + r for p, r in exchanges], **options)
    pairs = []
    for (_, response), prompt, both in zip(exchanges, prompts, joined, strict=True):
        is_prefix = both[: len(prompt)] == prompt
        # Otherwise one token spans the end of the prompt and the start of the response.
        # `generate` never produces such a token.
        rest = (
            both[len(prompt) :]
            if is_prefix
            else tokenizer.tokenize_continuation(response)
        )
        pairs.append((prompt, rest))
    return pairs


@dataclasses.dataclass
class TrainingExamples:
    """Token ids of examples, and which of them are prediction targets.

    Attributes:
        token_ids: token ids of each example, at most `sequence_length + 1`.
        loss_masks: for each token id, whether it is a prediction target.
        sequence_length: maximum number of predictions per sequence, which is one less
            than its tokens.
        num_bytes: UTF-8 bytes of the target text, without truncated text.
        num_truncated: number of examples that were too long.
        num_without_targets: number of examples without a prediction target: empty
            texts, and those whose prompt fills the sequence.
        longest: tokens of the longest example before truncation.
    """

    token_ids: list[list[int]]
    loss_masks: list[list[bool]]
    sequence_length: int
    num_bytes: int = 0
    num_truncated: int = 0
    num_without_targets: int = 0
    longest: int = 0

    def add(self, token_ids: list[int], loss_mask: list[bool]) -> None:
        """Adds an example, truncated to `sequence_length + 1` tokens."""
        room = self.sequence_length + 1
        self.longest = max(self.longest, len(token_ids))
        self.num_truncated += len(token_ids) > room
        self.num_without_targets += not any(loss_mask[1:room])
        self.token_ids.append(token_ids[:room])
        self.loss_masks.append(loss_mask[:room])

    def padded(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Pads each example to a sequence of its own.

        Returns:
            `(x, y, sample_weight)` as `fit` takes them, all of shape
            `(examples, sequence_length)`: a dict of int32 `"token_ids"` and bool
            `"padding_mask"`, int32 targets, and float32 weights, 1 on targets.
        """
        width = self.sequence_length + 1
        ids, mask = pad_sequences(self.token_ids, width).values()
        weights, _ = pad_sequences(self.loss_masks, width).values()
        x = {"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]}
        return x, ids[:, 1:], weights[:, 1:].astype("float32")

    def packed(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Packs several examples into each sequence.

        Tokens attend to their own example only, and no token predicts the first one of
        the next example.

        Returns:
            As `padded`, with fewer sequences. The `"padding_mask"` is int32 and numbers
            the examples of a sequence from 1; padding is 0.
        """
        sizes = np.array([max(0, len(ids) - 1) for ids in self.token_ids])
        bins = best_fit_decreasing(sizes, self.sequence_length)
        shape = int(bins.max()) + 1, self.sequence_length
        ids, numbers, targets = (np.zeros(shape, "int32") for _ in range(3))
        weights = np.zeros(shape, "float32")
        ends, counts = np.zeros((2, len(ids)), "int64")
        for example, (index, size) in enumerate(zip(bins, sizes, strict=True)):
            here = np.s_[index, ends[index] : ends[index] + size]
            tokens = self.token_ids[example]
            ids[here], targets[here] = tokens[:size], tokens[1:]
            weights[here] = self.loss_masks[example][1:]
            ends[index], counts[index] = ends[index] + size, counts[index] + 1
            numbers[here] = counts[index]
        return {"token_ids": ids, "padding_mask": numbers}, targets, weights

    def warn(self) -> None:
        """Warns about truncated examples and examples without targets, with counts."""
        _warn(self, f"of {len(self.token_ids)} examples")


class BatchWarnings:
    """Warnings about the examples of many batches, as by `TrainingExamples.warn`.

    The counts are those of all batches so far. A warning is issued when a count reaches
    1, 10, 100 and so on: truncation in a late batch is reported, and a long stream has
    few warnings.

    Example:
        >>> import warnings
        >>> batches = BatchWarnings()
        >>> with warnings.catch_warnings(record=True) as reported:
        ...     for text in ["a", "a long text", "another long text"]:
        ...         texts = Texts([text], batched=True)
        ...         batches.add(lm.preprocessor.tokenize_examples(texts, 4))
        >>> print(*[str(warning.message)[:44] for warning in reported])
        1 of the 2 examples so far were truncated to
    """

    def __init__(self) -> None:
        self._total = 0
        self._counts = TrainingExamples([], [], 0)

    def add(self, examples: TrainingExamples) -> None:
        """Adds a batch, and warns if a count has reached a power of ten."""
        counts = self._counts
        before = counts.num_truncated, counts.num_without_targets
        self._total += len(examples.token_ids)
        counts.sequence_length = examples.sequence_length
        counts.num_truncated += examples.num_truncated
        counts.num_without_targets += examples.num_without_targets
        counts.longest = max(counts.longest, examples.longest)
        after = counts.num_truncated, counts.num_without_targets
        if [*map(_num_digits, after)] != [*map(_num_digits, before)]:
            _warn(counts, f"of the {self._total} examples so far")


def _num_digits(count):
    return len(str(count)) if count else 0


def _warn(examples, of_all):
    """Warns about some of the examples, such as `of_all="of 12 examples"`."""
    if examples.num_truncated:
        warnings.warn(
            f"{examples.num_truncated} {of_all} were truncated to "
            f"sequence_length={examples.sequence_length}. The longest has "
            f"{examples.longest} tokens. To use all tokens, set "
            "`preprocessor.sequence_length`.",
            stacklevel=3,
        )
    if examples.num_without_targets:
        warnings.warn(
            f"{examples.num_without_targets} {of_all} have no target tokens: they are "
            "empty, or truncation removed their response.",
            stacklevel=3,
        )
