"""Supervised fine-tuning examples as token ids, with a mask of what is learned."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from keras_openllama.text.chat_rendering import (
    Exchange,
    RenderedChat,
    RenderedExample,
    not_a_prompt_error,
)
from keras_openllama.text.token_arrays import pad_sequences
from keras_openllama.utils.bin_packing import best_fit_decreasing


class TextTokenizer(Protocol):
    """The part of `OpenLlamaTokenizer` that is used here."""

    start_token_id: int
    end_token_id: int

    def tokenize(self, inputs: list[str], **options: Any) -> list[list[int]]:
        """Returns the token ids of each text."""

    def tokenize_continuation(
        self, text: str, parse_special: bool = False
    ) -> list[int]:
        """Returns the token ids of a text that continues another one."""

    def detokenize(self, inputs: list[int]) -> str:
        """Returns the text of token ids."""


def tokenize_examples(
    examples: Sequence[RenderedExample],
    tokenizer: TextTokenizer,
    sequence_length: int,
    add_start_token: bool = True,
    add_end_token: bool = True,
) -> TrainingExamples:
    """Tokenizes examples and masks their prompts out of the loss.

    A prompt is tokenized exactly as in `generate`, and a response as its continuation.
    After the `</s>` of a response, the next prompt is tokenized as a new text.

    Args:
        examples: see `chat_rendering.render_examples`.
        tokenizer: usually an `OpenLlamaTokenizer`.
        sequence_length: predictions per sequence. A sequence has one token more.
        add_start_token: whether to add `<s>` before each example. To a chat that was
            rendered by a template in Jinja nothing is added.
        add_end_token: whether to add `</s>` after each response.

    Returns:
        The token ids and loss masks, truncated to `sequence_length + 1` tokens.

    Raises:
        ValueError: if a prompt has no response, or the response has no tokens.

    Example:
        >>> tokenizer = lm.preprocessor.tokenizer
        >>> exchange = Exchange("2 + 2 =", " 4")
        >>> tokenized = tokenize_examples([[exchange]], tokenizer, 16)
        >>> tokenizer.detokenize(tokenized.token_ids[0])
        '2 + 2 = 4'
        >>> sum(tokenized.loss_masks[0])  # The response and the end token.
        3
    """
    exchanges = [
        exchange
        for example in examples
        if not isinstance(example, RenderedChat)
        for exchange in example
    ]
    pairs = iter(_pairs_of_ids(exchanges, tokenizer))
    start = [tokenizer.start_token_id] if add_start_token else []
    end = [tokenizer.end_token_id] if add_end_token else []
    tokenized = TrainingExamples([], [], sequence_length)
    for number, example in enumerate(examples):
        if isinstance(example, RenderedChat):
            ids, loss_mask, num_bytes = _tokenize_chat(
                example, tokenizer, sequence_length + 1
            )
            tokenized.num_bytes += num_bytes
            tokenized.add(ids, loss_mask)
            continue
        ids, loss_mask = list(start), [False] * len(start)
        for prompt, response, is_learned in example:
            prompt_ids, response_ids = next(pairs)
            if prompt and response and not response_ids:
                raise ValueError(
                    f"Example {number} has a response that has no tokens: {response!r}"
                )
            is_target = is_learned and bool(response_ids)
            if is_target:
                room = sequence_length + 1 - len(ids) - len(prompt_ids)
                part = response, prompt_ids, response_ids, room
                tokenized.num_bytes += _visible_bytes(*part, tokenizer)
            ids += prompt_ids + response_ids + end
            loss_mask += [False] * len(prompt_ids)
            loss_mask += [is_target] * len(response_ids + end)
        tokenized.add(ids, loss_mask)
    return tokenized


def _tokenize_chat(chat, tokenizer, room):
    """Token ids of a rendered chat, their loss mask, and bytes of its targets.

    The ids are those of `apply_chat_template` of transformers, unless a token would
    span the start or the end of a reply: `generate` never produces such a token.
    """
    ends = sorted({0, *(end for span in chat.replies for end in span), len(chat.text)})
    ids = parse_text(tokenizer, chat.text)
    counts = [len(prefix) for prefix in _prefixes(chat.text, ends, ids, tokenizer)]
    if len(counts) < len(ends):
        parts = [chat.text[a:b] for a, b in itertools.pairwise(ends)]
        pieces = [parse_text(tokenizer, parts[0])] + [
            tokenizer.tokenize_continuation(part, parse_special=True)
            for part in parts[1:]
        ]
        ids = [token_id for piece in pieces for token_id in piece]
        counts = [0, *itertools.accumulate(map(len, pieces))]
    position = dict(zip(ends, counts, strict=True))
    loss_mask, num_bytes = [False] * len(ids), 0
    for start, end in chat.replies:
        first, last = position[start], position[end]
        loss_mask[first:last] = [True] * (last - first)
        if first < room:
            text = tokenizer.detokenize(ids[: min(last, room)])
            before = tokenizer.detokenize(ids[:first])
            num_bytes += len(text.encode()) - len(before.encode())
    return ids, loss_mask, num_bytes


def _prefixes(text, ends, ids, tokenizer):
    """Yields the ids of the text up to each end, while the whole text's begin alike."""
    for end in ends:
        prefix = parse_text(tokenizer, text[:end])
        if ids[: len(prefix)] != prefix:
            return
        yield prefix


def parse_text(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Tokenizes a rendered chat, in which special tokens are written out.

    Args:
        tokenizer: usually an `OpenLlamaTokenizer`.
        text: the text.

    Returns:
        Token ids.
    """
    options = dict(parse_special=True, add_bos=False, add_eos=False)
    [ids] = tokenizer.tokenize([text], **options)
    return ids


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
        exchanges: see `chat_rendering.chat_exchanges`; the last one has no response.
        tokenizer: usually an `OpenLlamaTokenizer`.
        add_start_token: whether to add `<s>` before the chat.
        add_end_token: whether to add `</s>` after each response.

    Returns:
        Token ids.

    Raises:
        ValueError: if the chat ends with a message of the assistant.
    """
    if not exchanges or exchanges[-1].response:
        raise not_a_prompt_error(exchanges)
    ids = [tokenizer.start_token_id] if add_start_token else []
    end = [tokenizer.end_token_id] if add_end_token else []
    for prompt_ids, response_ids in _pairs_of_ids(exchanges, tokenizer):
        ids += prompt_ids + response_ids + (end if response_ids else [])
    return ids


def _pairs_of_ids(exchanges, tokenizer):
    """`(ids of the prompt, ids of the response)` of each exchange."""
    options = dict(add_bos=False, add_eos=False)
    prompts = tokenizer.tokenize([prompt for prompt, *_ in exchanges], **options)
    joined = tokenizer.tokenize([p + r for p, r, _ in exchanges], **options)
    pairs = []
    for (_, response, _), prompt, both in zip(exchanges, prompts, joined, strict=True):
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
        >>> from keras_openllama.text.input_kinds import Texts
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
