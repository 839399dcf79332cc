"""Perplexity and bits per byte of texts, compared with `xz -9e`.

There are two protocols:

- `"strided"`: a document follows `<s>`, and windows of the model's context length
  advance over it by a stride. Each token is scored once. After the first window, each
  token is predicted from at least `context - stride` previous tokens.
- `"llama.cpp"`: what `llama-perplexity` measures. The text is split into disjoint
  chunks, `<s>` replaces the first token of each, and the second half of each is scored.
"""

from __future__ import annotations

import lzma
import math
import numbers
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from keras_openllama.evaluation.perplexity_protocols import (
    PROTOCOLS,
    Document,
    TokenizedDocument,
)
from keras_openllama.evaluation.token_scoring import DEFAULT_BATCH_SIZE, TokenScorer
from keras_openllama.training.step_metrics import perplexity_from_loss
from keras_openllama.utils.validation import check_integer, one_of

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM

TOTAL = "total"  # Name of the row over all sources.
# Heuristic: tokens whose windows are in memory at the same time.
_TOKENS_AT_ONCE = 1 << 18
# Heuristic: xz takes about a second per megabyte.
_XZ_BYTES = 16 << 20


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
            document is a text, or a `TokenizedDocument`: a pair of token ids (without
            `<s>` and `</s>`) and the number of bytes of their text.
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
        ValueError: if an argument is invalid, a source is named `"total"`, has no
            tokens or is too short for `"llama.cpp"`, or a log-probability is not
            finite.

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
    if TOTAL in sources:
        raise ValueError(
            f"`sources` must not have the name {TOTAL!r}, which is the row over all "
            f"sources. Rename it. Received: {', '.join(sources)}"
        )
    one_of(*PROTOCOLS)("protocol", protocol)
    rules = PROTOCOLS[protocol](lm.backbone.context_length, context, stride)
    scorer = TokenScorer(lm, batch_size)
    rows = [
        _measure(scorer, rules, name, _as_documents(name, documents), progress)
        for name, documents in sources.items()
    ]
    return rows if len(rows) == 1 else [*rows, _total(rows)]


def _as_documents(name, documents):
    """A document, or a sequence of documents, as a list of documents."""
    if isinstance(documents, str) or _is_tokenized(documents):
        documents = [documents]
    return [_as_document(name, document) for document in documents]


def _is_tokenized(value):
    """Whether a value is a pair of token ids and a number of bytes."""
    is_pair = isinstance(value, tuple) and len(value) == 2
    return is_pair and isinstance(value[1], numbers.Integral)


def _as_document(name, document):
    if isinstance(document, str):
        return document
    if not _is_tokenized(document):
        raise ValueError(
            f"`sources[{name!r}]` must be a text, a pair of token ids and the number "
            f"of bytes of their text, or a list of these. Received: {document!r:.200}"
        )
    token_ids, num_bytes = list(map(int, document[0])), document[1]
    argument = f"sources[{name!r}]: number of bytes"
    num_bytes = check_integer(argument, num_bytes, 1 if token_ids else 0)
    return TokenizedDocument(token_ids, num_bytes)


def _measure(scorer, protocol, name, documents, progress):
    """The row of a source."""
    tokenizer = scorer.lm.preprocessor.tokenizer
    windows = [
        (ids, window)
        for ids in _tokenize(tokenizer, protocol.documents(name, documents))
        for window in protocol.windows(name, len(ids))
    ]
    if not windows:
        raise ValueError(
            f"The source {name!r} has no tokens. Remove it from `sources`."
        )
    start = time.perf_counter()
    nats = _nats(scorer, windows, tokenizer.start_token_id, protocol, name, progress)
    seconds = time.perf_counter() - start
    total = math.fsum(nats)
    if not math.isfinite(total):
        raise ValueError(
            f"The log-probabilities of the tokens of {name!r} are not finite. Check "
            "the weights, and whether the dtype can represent them. Received: a sum of "
            f"{-total} nats"
        )
    counts = [window.last + 1 - window.first for _, window in windows]
    row = {
        "name": name,
        "documents": len(documents),
        "bytes": sum(map(_document_bytes, documents)),
        "tokens": sum(counts),
        "nats": total,
    }
    row |= _rates(row, seconds, protocol.has_bits_per_byte)
    if protocol.has_bits_per_byte:
        row["xz_bits_per_byte"] = _xz(documents)
    return row | protocol.details(nats, counts)


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
            sequences = [protocol.sequence(*pair, start_token_id) for pair in part]
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


def _tokenize(tokenizer, documents):
    texts = [document for document in documents if isinstance(document, str)]
    if texts:
        texts = iter(tokenizer.tokenize(texts, add_bos=False, add_eos=False))
    return [
        next(texts) if isinstance(document, str) else document.token_ids
        for document in documents
    ]


def _document_bytes(document):
    if isinstance(document, str):
        return len(document.encode())
    return document.num_bytes


def _rates(row, seconds, has_bits_per_byte):
    """Values of a row that follow from its sums and the time that it took."""
    bits = row["nats"] / math.log(2)
    return {
        "perplexity": perplexity_from_loss(row["nats"] / row["tokens"]),
        "bits_per_byte": bits / row["bytes"] if has_bits_per_byte else None,
        "xz_bits_per_byte": None,
        "tokens_per_second": row["tokens"] / seconds,
    }


def _total(rows):
    total = {"name": TOTAL}
    for key in ("documents", "bytes", "tokens", "nats"):
        total[key] = sum(row[key] for row in rows)
    seconds = sum(row["tokens"] / row["tokens_per_second"] for row in rows)
    has_bits_per_byte = all(row["bits_per_byte"] is not None for row in rows)
    return total | _rates(total, seconds, has_bits_per_byte)


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
        >>> bits = {"novel": 1.0, "code": 2.0, "total": 1.1}
        >>> rows = [{"name": name, "bits_per_byte": bits[name]} for name in bits]
        >>> mean_bits_per_byte(rows)
        1.5
    """
    sources = [row for row in rows if row["name"] != TOTAL]
    return sum(row["bits_per_byte"] for row in sources) / len(sources)
