"""Perplexity and bits per byte of texts, compared with `xz -9e`.

There are two protocols:

- `"strided"`: a document follows `<s>`, and windows of the model's context length
  advance over it by a stride. Each token is scored once. After the first window, each
  token is predicted from at least `context - stride` previous tokens.
- `"llama.cpp"`: what `llama-perplexity` measures. The text is split into disjoint
  chunks, `<s>` replaces the first token of each, and the second half of each is scored.
"""

from __future__ import annotations

import itertools
import lzma
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from tqdm import tqdm

from keras_openllama.evaluation.token_scoring import DEFAULT_BATCH_SIZE, TokenScorer
from keras_openllama.training.step_metrics import perplexity_from_loss
from keras_openllama.utils.validation import check_integer

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM

# A text, or its token ids (without `<s>` and `</s>`) and its size in bytes.
Document: TypeAlias = str | tuple[Sequence[int], int]

PROTOCOLS = ("strided", "llama.cpp")
LLAMA_CPP_CONTEXT = 512  # The default of `-c` in llama-perplexity.
# Heuristic: tokens whose windows are in memory at the same time.
_TOKENS_AT_ONCE = 1 << 18
# Heuristic: xz takes about a second per megabyte.
_XZ_BYTES = 16 << 20


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


# --- Measurement ---


def evaluate_perplexity(
    lm: OpenLlamaCausalLM,
    sources: Mapping[str, Document | Sequence[Document]],
    protocol: str = "strided",
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measures how well a model predicts texts.

    Bits per byte are relative to the bytes of the original text, so that models with
    different tokenizers can be compared. Perplexity per token cannot be compared. With
    `"llama.cpp"`, which scores half of the tokens, there are no bits per byte.

    Args:
        lm: a model with a preprocessor.
        sources: by name, a document or a list of documents, see `texts.read_texts`. A
            document is a text, or a pair of token ids and bytes.
        protocol: one of `PROTOCOLS`.
        context: length of a window in tokens. Defaults to the model's context length,
            with `"llama.cpp"` to at most 512.
        stride: tokens by which windows advance, for `"strided"`. Defaults to half of
            `context`.
        batch_size: number of packed sequences of 512 tokens in a batch.
        progress: whether to show a progress bar if stderr is a terminal.

    Returns:
        A row per source and, if there are several, the row `"total"` over all tokens.
        The keys are `name`, `documents`, `bytes`, `tokens` (those scored), `nats`,
        `perplexity`, `bits_per_byte`, `xz_bits_per_byte` (of text up to 16 MiB),
        `tokens_per_second`, and with `"llama.cpp"` `cumulative`, the perplexity after
        each chunk. Values that are not available are `None`.

    Raises:
        ValueError: if an argument is invalid, a source has no tokens or is too short
            for `"llama.cpp"`, or a log-probability is not finite.

    Example:
        >>> [row] = evaluate_perplexity(lm, {"greeting": "Good morning."})
        >>> row["bytes"], 1 < row["bits_per_byte"] < 8
        (13, True)
    """
    if not sources:
        raise ValueError("`sources` must not be empty. Received: {}")
    if lm.preprocessor is None:
        raise ValueError(
            "Perplexity needs a tokenizer: load the model with its preprocessor. "
            "Received: lm.preprocessor=None"
        )
    protocol = _Protocol(lm, protocol, context, stride)
    scorer = TokenScorer(lm, batch_size)
    rows = [
        _row(scorer, protocol, name, documents, progress)
        for name, documents in sources.items()
    ]
    return rows if len(rows) == 1 else [*rows, _total(rows)]


class _Protocol:
    """A protocol with validated arguments, which splits documents into windows."""

    def __init__(self, lm, name, context, stride):
        if name not in PROTOCOLS:
            raise ValueError(
                f"`protocol` must be one of {', '.join(PROTOCOLS)}. Received: "
                f"protocol={name!r}"
            )
        self.chunked = name == "llama.cpp"
        longest = lm.backbone.context_length
        if context is None:
            context = min(LLAMA_CPP_CONTEXT, longest) if self.chunked else longest
        # A chunk of 2 tokens would have no scored tokens.
        least = 3 if self.chunked else 1
        context = check_integer("context", context, least, longest)
        if self.chunked and stride is not None:
            raise ValueError(
                '`stride` requires protocol="strided": the chunks of llama.cpp are '
                f"disjoint. Received: stride={stride!r}"
            )
        if stride is None:
            stride = max(1, context // 2)
        self.context = context
        self.stride = check_integer("stride", stride, most=context)

    def texts(self, name, documents):
        """The documents of a source, checked and adapted to the protocol."""
        if not self.chunked:
            return documents
        if len(documents) != 1 or not isinstance(documents[0], str):
            raise ValueError(
                'protocol="llama.cpp" requires one text per source, and '
                f"{name!r} has {len(documents)} documents. Pass it as a text file, or "
                'use protocol="strided".'
            )
        # llama.cpp does the same when it reads a file.
        return [documents[0].removesuffix("\n")]

    def windows(self, name, count):
        """The windows of a document of `count` tokens."""
        if not self.chunked:
            return strided_windows(count, self.context, self.stride)
        if count + 1 < 2 * self.context:
            raise ValueError(
                f"{name!r} has {count + 1} tokens, and llama.cpp's protocol requires "
                f"{2 * self.context}, two chunks. Use a longer text, a `context` below "
                f'{self.context}, or protocol="strided".'
            )
        return llama_cpp_windows(count, self.context)


def _row(scorer, protocol, name, documents, progress):
    documents = [documents] if isinstance(documents, str) else list(documents)
    tokenizer = scorer.lm.preprocessor.tokenizer
    token_ids = _tokenize(tokenizer, protocol.texts(name, documents))
    windows = [
        (ids, window)
        for ids in token_ids
        for window in protocol.windows(name, len(ids))
    ]
    if not windows:
        raise ValueError(
            f"The source {name!r} has no tokens. Remove it from `sources`."
        )
    start = time.perf_counter()
    nats = _nats(scorer, windows, tokenizer.start_token_id, protocol, name, progress)
    seconds = time.perf_counter() - start
    counts = [window.last + 1 - window.first for _, window in windows]
    row = {
        "name": name,
        "documents": len(documents),
        "bytes": sum(map(_document_bytes, documents)),
        "tokens": sum(counts),
        "nats": math.fsum(nats),
    }
    row |= _rates(row, seconds, None if protocol.chunked else _xz(documents))
    if not math.isfinite(row["nats"]):
        raise ValueError(
            f"The log-probabilities of the tokens of {name!r} are not finite. Check "
            "the weights, and whether the dtype can represent them. Received: a sum of "
            f"{-row['nats']} nats"
        )
    if protocol.chunked:
        row["bits_per_byte"] = None
        row["cumulative"] = _cumulative(nats, counts)
    return row


def _nats(scorer, windows, start_token_id, protocol, name, progress):
    """Negative log-likelihood of the scored tokens of each window, in nats."""
    nats = [0.0] * len(windows)
    done = 0
    total = sum(window.last + 1 - window.first for _, window in windows)
    at_once = max(1, _TOKENS_AT_ONCE // protocol.context)
    with tqdm(
        desc=name, total=total, unit=" tokens", disable=None if progress else True
    ) as bar:
        for begin in range(0, len(windows), at_once):
            part = windows[begin : begin + at_once]
            sequences = [_sequence(*pair, start_token_id, protocol) for pair in part]
            score_from = [window.first - window.start for _, window in part]
            for batch in scorer.make_batches(sequences):
                for i, (log_probs, _) in scorer.score_batch(
                    batch, sequences, score_from
                ).items():
                    nats[begin + i] = -float(log_probs.sum(dtype="float64"))
                    done += len(log_probs)
                bar.set_postfix_str(
                    f"perplexity {perplexity_from_loss(sum(nats) / done):.4f}", False
                )
                bar.update(done - bar.n)
    return nats


def _sequence(ids, window, start_token_id, protocol):
    if window.start == 0:
        return [start_token_id, *ids[: window.last]]
    tokens = ids[window.start - 1 : window.last]
    return [start_token_id, *tokens[1:]] if protocol.chunked else tokens


def _tokenize(tokenizer, documents):
    texts = [document for document in documents if isinstance(document, str)]
    if texts:
        texts = iter(tokenizer.tokenize(texts, add_bos=False, add_eos=False))
    return [
        next(texts) if isinstance(document, str) else list(map(int, document[0]))
        for document in documents
    ]


def _document_bytes(document):
    return len(document.encode()) if isinstance(document, str) else document[1]


def _rates(row, seconds, xz=None):
    return {
        "perplexity": perplexity_from_loss(row["nats"] / row["tokens"]),
        "bits_per_byte": row["nats"] / math.log(2) / row["bytes"],
        "xz_bits_per_byte": xz,
        "tokens_per_second": row["tokens"] / seconds,
    }


def _total(rows):
    total = {"name": "total"}
    for key in ("documents", "bytes", "tokens", "nats"):
        total[key] = sum(row[key] for row in rows)
    total |= _rates(total, sum(r["tokens"] / r["tokens_per_second"] for r in rows))
    if any(row["bits_per_byte"] is None for row in rows):
        total["bits_per_byte"] = None
    return total


def _cumulative(nats, counts):
    """Perplexity of all windows up to and including each."""
    totals = zip(itertools.accumulate(nats), itertools.accumulate(counts), strict=True)
    return [perplexity_from_loss(total / count) for total, count in totals]


def _xz(documents):
    if not all(isinstance(document, str) for document in documents):
        return None
    data = "\n".join(documents).encode()
    return xz_bits_per_byte(data) if 0 < len(data) <= _XZ_BYTES else None


def xz_bits_per_byte(data: bytes) -> float:
    """Compresses data with `xz -9e`; returns its size in bits per byte.

    Example:
        >>> xz_bits_per_byte(b"a" * 1000) < 1
        True
    """
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) * 8 / len(data)


# --- Table ---


def perplexity_table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the rows of `evaluate_perplexity` as a table.

    Args:
        rows: see `evaluate_perplexity`.

    Returns:
        A line per row. For several sources the last line has the mean of their bits per
        byte, in which all sources have the same weight.

    Example:
        >>> rows = evaluate_perplexity(lm, {"greeting": "Good morning."})
        >>> perplexity_table(rows).split()[:4]
        ['source', 'bytes', 'tokens', 'perplexity']
    """
    heads = ("source", "bytes", "tokens", "perplexity", "bits/byte", "xz -9e", "tok/s")
    lines = [heads, *map(_cells, rows)]
    if len(rows) > 1 and rows[-1]["bits_per_byte"] is not None:
        mean = mean_bits_per_byte(rows)
        lines.append(("mean", "", "", "", f"{mean:.3f}", "", ""))
    width = max(len(line[0]) for line in lines)
    return "\n".join(
        f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells)
        for name, *cells in lines
    )


def _cells(row):
    return (
        row["name"],
        str(row["bytes"]),
        str(row["tokens"]),
        f"{row['perplexity']:.4f}",
        _format_number(row["bits_per_byte"]),
        _format_number(row["xz_bits_per_byte"]),
        f"{row['tokens_per_second']:.0f}",
    )


def _format_number(value):
    return "–" if value is None else f"{value:.3f}"


def mean_bits_per_byte(rows: Sequence[dict[str, Any]]) -> float:
    """Returns the unweighted mean of bits per byte over sources.

    Args:
        rows: see `evaluate_perplexity`. The row `"total"` is ignored.

    Returns:
        The mean.

    Example:
        >>> rows = [{"bits_per_byte": bits} for bits in (1.0, 2.0, 1.1)]
        >>> mean_bits_per_byte(rows)
        1.5
    """
    sources = rows if len(rows) == 1 else rows[:-1]
    return sum(row["bits_per_byte"] for row in sources) / len(sources)
