"""Protocols of perplexity: how documents are split into windows that are scored."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from keras_openllama.training.step_metrics import perplexity_from_loss
from keras_openllama.utils.validation import check_integer

LLAMA_CPP_CONTEXT = 512  # The default of `-c` in llama-perplexity.


class TokenizedDocument(NamedTuple):
    """A document whose text is tokenized already.

    Attributes:
        token_ids: token ids without `<s>` and `</s>`.
        num_bytes: size of the text in bytes.
    """

    token_ids: Sequence[int]
    num_bytes: int


Document: TypeAlias = str | TokenizedDocument | tuple[Sequence[int], int]


class Window(NamedTuple):
    """A window of a document, by positions. The position of `<s>` is 0.

    Attributes:
        start: position of the first token that the model reads.
        first: position of the first token that is scored.
        last: position of the last token that is scored.
    """

    start: int
    first: int
    last: int


def strided_windows(count: int, context: int, stride: int) -> list[Window]:
    """Splits a document into the windows of the protocol `"strided"`.

    Args:
        count: number of tokens, at positions 1 to `count`.
        context: length of a window in tokens.
        stride: number of tokens by which windows advance.

    Returns:
        The windows.

    Example:
        >>> strided_windows(10, context=4, stride=2)[1]
        Window(start=2, first=5, last=6)
    """
    windows, last = [], 0
    while last < count:
        first = last + 1
        last = min(count, last + (stride if windows else context))
        windows.append(Window(max(0, last - context), first, last))
    return windows


def llama_cpp_windows(count: int, context: int) -> list[Window]:
    """Splits a document into the chunks of the protocol `"llama.cpp"`.

    Source: https://github.com/ggml-org/llama.cpp, `perplexity` in
    tools/perplexity/perplexity.cpp.

    Args:
        count: number of tokens, at positions 1 to `count`.
        context: length of a chunk in tokens.

    Returns:
        The chunks. `<s>` replaces the token at the `start` of each.

    Example:
        >>> llama_cpp_windows(22, context=8)
        [Window(start=0, first=5, last=7), Window(start=8, first=13, last=15)]
    """
    starts = range(0, (count + 1) // context * context, context)
    return [Window(s, s + context // 2 + 1, s + context - 1) for s in starts]


class StridedProtocol:
    """Overlapping windows, which score each token once.

    Args:
        context_length: context length of the model, in tokens.
        context: length of a window in tokens. Defaults to `context_length`.
        stride: tokens by which windows advance. Defaults to half of `context`.

    Raises:
        ValueError: if `context` or `stride` is out of range.

    Example:
        >>> protocol = StridedProtocol(2048, context=512)
        >>> protocol.stride
        256
    """

    has_bits_per_byte = True

    def __init__(
        self,
        context_length: int,
        context: int | None = None,
        stride: int | None = None,
    ):
        context = context_length if context is None else context
        self.context = check_integer("context", context, most=context_length)
        stride = max(1, self.context // 2) if stride is None else stride
        self.stride = check_integer("stride", stride, most=self.context)

    def documents(self, name: str, documents: list[Document]) -> list[Document]:
        """Returns the documents of the source `name`, as the protocol reads them."""
        return documents

    def windows(self, name: str, count: int) -> list[Window]:
        """Returns the windows of a document of `count` tokens."""
        return strided_windows(count, self.context, self.stride)

    def sequence(
        self, token_ids: list[int], window: Window, start_token_id: int
    ) -> list[int]:
        """Returns the token ids that the model reads in a window."""
        if window.start == 0:
            return [start_token_id, *token_ids[: window.last]]
        return token_ids[window.start - 1 : window.last]

    def details(self, nats: list[float], counts: list[int]) -> dict[str, Any]:
        """Returns further values of a row, given nats and scored tokens per window."""
        return {}


class LlamaCppProtocol:
    """Disjoint chunks, of which the second half is scored, as by `llama-perplexity`.

    It scores half of the tokens, whose bytes are unknown: there are no bits per byte.

    Args:
        context_length: context length of the model, in tokens.
        context: length of a chunk in tokens. Defaults to 512, or `context_length` if
            that is smaller.
        stride: must be `None`, since chunks are disjoint.

    Raises:
        ValueError: if `context` is out of range, or `stride` is given.

    Example:
        >>> LlamaCppProtocol(2048).context
        512
    """

    has_bits_per_byte = False

    def __init__(
        self,
        context_length: int,
        context: int | None = None,
        stride: int | None = None,
    ):
        if context is None:
            context = min(LLAMA_CPP_CONTEXT, context_length)
        # A chunk of 2 tokens would have no scored tokens.
        self.context = check_integer("context", context, 3, context_length)
        if stride is not None:
            raise ValueError(
                '`stride` requires protocol="strided": the chunks of llama.cpp are '
                f"disjoint. Received: stride={stride!r}"
            )

    def documents(self, name: str, documents: list[Document]) -> list[Document]:
        """Returns the text of the source `name`, without a newline at its end.

        Raises:
            ValueError: if the source is not one text.
        """
        if len(documents) == 1 and isinstance(documents[0], str):
            # llama.cpp does the same when it reads a file.
            return [documents[0].removesuffix("\n")]
        found = f"{len(documents)} documents"
        if len(documents) == 1:
            found = "1 document of token ids"
        raise ValueError(
            f'protocol="llama.cpp" requires one text per source; {name!r} has {found}. '
            'Pass it as a text file, or use protocol="strided".'
        )

    def windows(self, name: str, count: int) -> list[Window]:
        """Returns the chunks of a text of `count` tokens.

        Raises:
            ValueError: if there are less than two chunks.
        """
        if count + 1 < 2 * self.context:
            raise ValueError(
                f"{name!r} has {count + 1} tokens, and llama.cpp's protocol requires "
                f"{2 * self.context}, two chunks. Use a longer text, a `context` below "
                f'{self.context}, or protocol="strided".'
            )
        return llama_cpp_windows(count, self.context)

    def sequence(
        self, token_ids: list[int], window: Window, start_token_id: int
    ) -> list[int]:
        """Returns the token ids that the model reads in a chunk."""
        return [start_token_id, *token_ids[window.start : window.last]]

    def details(self, nats: list[float], counts: list[int]) -> dict[str, Any]:
        """Returns `cumulative`: the perplexity of all chunks up to each of them."""
        totals = zip(
            itertools.accumulate(nats), itertools.accumulate(counts), strict=True
        )
        return {"cumulative": [perplexity_from_loss(n / count) for n, count in totals]}


PROTOCOLS = {"strided": StridedProtocol, "llama.cpp": LlamaCppProtocol}
