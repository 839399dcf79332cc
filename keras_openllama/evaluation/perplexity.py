"""Perplexity and bits per byte of any text under a model, next to `xz -9e`.

Two protocols say what each token is predicted from:

- `"strided"`: `<s>` stands before a document, and windows of the model's context
  advance over it by a stride. Each token counts once, and behind the first window at
  least `context - stride` tokens come before it.
- `"llama.cpp"`: what `llama-perplexity` measures. A text is cut into chunks that share
  nothing, `<s>` takes the place of the first token of each, and the second half of each
  counts.
"""

import lzma
import math
import time
from typing import NamedTuple

from tqdm import tqdm

from keras_openllama.evaluation.token_scoring import DEFAULT_BATCH_SIZE, TokenScorer
from keras_openllama.training.step_metrics import perplexity_from_loss

PROTOCOLS = ("strided", "llama.cpp")
LLAMA_CPP_CONTEXT = 512  # Of llama-perplexity, where no -c is given.
# Ours: tokens whose windows are planned at once, so that a corpus of any size fits.
_PLANNED = 1 << 18
# Ours: xz takes about a second for a megabyte.
_XZ_BYTES = 16 << 20


class Window(NamedTuple):
    """A part of a document behind its `<s>`.

    Attributes:
        start: int, position of the first token that is read; that of `<s>` is 0.
        first, last: ints, the positions whose predictions count, both included.
    """

    start: int
    first: int
    last: int


def strided_windows(count, context, stride):
    """How the protocol `"strided"` cuts a document.

    Args:
        count: int, its tokens, at positions 1 to `count`.
        context: int, tokens that a window reads.
        stride: int, tokens by which windows advance.

    Returns:
        List of `Window`.

    Example:
        strided_windows(10, context=4, stride=2)[1]  # Window(start=2, first=5, last=6)
    """
    windows, last = [], 0
    while last < count:
        first = last + 1
        last = min(count, last + (stride if windows else context))
        windows.append(Window(max(0, last - context), first, last))
    return windows


def llama_cpp_windows(count, context):
    """How the protocol `"llama.cpp"` cuts a document.

    Args:
        count: int, its tokens, at positions 1 to `count`.
        context: int, tokens of a chunk.

    Returns:
        List of `Window`; `<s>` takes the place of the token at each `start`.

    Source: https://github.com/ggml-org/llama.cpp, `perplexity` in
        tools/perplexity/perplexity.cpp.
    """
    starts = range(0, (count + 1) // context * context, context)
    return [Window(s, s + context // 2 + 1, s + context - 1) for s in starts]


# --- Measuring ---


def evaluate(
    lm,
    sources,
    protocol="strided",
    context=None,
    stride=None,
    batch_size=DEFAULT_BATCH_SIZE,
    progress=True,
):
    """Measures how well a model predicts texts.

    Bits per byte are over the bytes of the texts as they are, whatever the tokenizer
    makes of them, so that models with different tokenizers can be compared; perplexity
    by token cannot. With `"llama.cpp"`, where half of the tokens count, there are none.

    Args:
        lm: `OpenLlamaCausalLM` with a preprocessor.
        sources: dict by name of texts, or of lists of documents, each a text or a pair
            `(token ids, bytes)`; see `texts.read`.
        protocol: one of `PROTOCOLS`.
        context: int, tokens that are read at once. Defaults to the model's context,
            with `"llama.cpp"` to no more than 512.
        stride: int, for `"strided"`; half of `context` unless given.
        batch_size: int, rows of 512 tokens that are computed at once.
        progress: bool, show a bar where stderr is a terminal.

    Returns:
        List of dicts, a row per source, and behind several the row `"total"` of all
        their tokens: `name`, `documents`, `bytes`, `tokens` (those that count), `nats`,
        `perplexity`, `bits_per_byte`, `xz_bits_per_byte` (of text up to 16 MiB) and
        `tokens_per_second`. With `"llama.cpp"` also `cumulative`, the perplexity after
        each chunk. What there is none of is `None`.

    Raises:
        ValueError: for arguments that make no sense, a source without tokens, or one
            too short for `"llama.cpp"`.

    Example:
        perplexity.evaluate(lm, {"greeting": "Good morning."})[0]["bits_per_byte"]
    """
    if not sources:
        raise ValueError("`sources` must hold at least one. Received: {}")
    if lm.preprocessor is None:
        raise ValueError(
            "Perplexity of text needs a tokenizer: load the model with its "
            "preprocessor. Received: lm.preprocessor=None"
        )
    protocol = _Protocol(lm, protocol, context, stride)
    scorer = TokenScorer(lm, batch_size)
    rows = [
        _row(scorer, protocol, name, documents, progress)
        for name, documents in sources.items()
    ]
    return rows if len(rows) == 1 else [*rows, _total(rows)]


class _Protocol:
    """Documents cut by a protocol, its arguments checked."""

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
        # In a chunk of 2 nothing would count.
        _check_whole("context", context, 3 if self.chunked else 1, longest)
        if self.chunked and stride is not None:
            raise ValueError(
                '`stride` is for protocol="strided" alone; chunks of llama.cpp share '
                f"nothing. Leave it out. Received: stride={stride!r}"
            )
        if stride is None:
            stride = max(1, context // 2)
        _check_whole("stride", stride, 1, context)
        self.context, self.stride = context, stride

    def texts(self, name, documents):
        """Documents as this protocol takes them."""
        if not self.chunked:
            return documents
        if len(documents) != 1 or not isinstance(documents[0], str):
            raise ValueError(
                'protocol="llama.cpp" measures one text a source, and '
                f"{name!r} has {len(documents)} documents. Give it as a text file, or "
                'take protocol="strided".'
            )
        # As llama.cpp does when it reads a file.
        return [documents[0].removesuffix("\n")]

    def windows(self, name, count):
        """List of `Window`."""
        if not self.chunked:
            return strided_windows(count, self.context, self.stride)
        if count + 1 < 2 * self.context:
            raise ValueError(
                f"{name!r} has {count + 1} tokens, and llama.cpp's protocol asks for "
                f"{2 * self.context}, two chunks. Give a longer text, a smaller "
                f'`context` than {self.context}, or protocol="strided".'
            )
        return llama_cpp_windows(count, self.context)


def _row(scorer, protocol, name, documents, progress):
    documents = [documents] if isinstance(documents, str) else list(documents)
    tokenizer = scorer.lm.preprocessor.tokenizer
    token_ids = _tokenized(tokenizer, protocol.texts(name, documents))
    cuts = [
        (ids, window)
        for ids in token_ids
        for window in protocol.windows(name, len(ids))
    ]
    if not cuts:
        raise ValueError(f"The source {name!r} has no tokens. Leave it out.")
    begin = time.perf_counter()
    nats = _nats(scorer, cuts, tokenizer.start_token_id, protocol, name, progress)
    seconds = time.perf_counter() - begin
    counts = [window.last + 1 - window.first for _, window in cuts]
    row = {
        "name": name,
        "documents": len(documents),
        "bytes": sum(map(_size, documents)),
        "tokens": sum(counts),
        "nats": math.fsum(nats),
    }
    row |= _rates(row, seconds, None if protocol.chunked else _xz(documents))
    if not math.isfinite(row["nats"]):
        raise ValueError(
            f"The model gives some tokens of {name!r} no probability above 0 (their "
            f"sum is {-row['nats']} nats). Are its weights sound, and is its dtype one "
            "that holds them?"
        )
    if protocol.chunked:
        row["bits_per_byte"] = None
        row["cumulative"] = _cumulative(nats, counts)
    return row


def _nats(scorer, cuts, start_token_id, protocol, name, progress):
    """What the tokens of each window cost, in order."""
    nats = [0.0] * len(cuts)
    done = 0
    total = sum(window.last + 1 - window.first for _, window in cuts)
    at_once = max(1, _PLANNED // protocol.context)
    with tqdm(
        desc=name, total=total, unit=" tokens", disable=None if progress else True
    ) as bar:
        for begin in range(0, len(cuts), at_once):
            part = cuts[begin : begin + at_once]
            sequences = [_sequence(*cut, start_token_id, protocol) for cut in part]
            wanted_from = [window.first - window.start for _, window in part]
            for batch in scorer.plan(sequences):
                for i, (log_probs, _) in scorer.run(
                    batch, sequences, wanted_from
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


def _tokenized(tokenizer, documents):
    texts = [document for document in documents if isinstance(document, str)]
    if texts:
        texts = iter(tokenizer.tokenize(texts, add_bos=False, add_eos=False))
    return [
        next(texts) if isinstance(document, str) else list(map(int, document[0]))
        for document in documents
    ]


def _size(document):
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
    result, cost, count = [], 0.0, 0
    for more, tokens in zip(nats, counts, strict=True):
        cost, count = cost + more, count + tokens
        result.append(perplexity_from_loss(cost / count))
    return result


def _xz(documents):
    if not all(isinstance(document, str) for document in documents):
        return None
    data = "\n".join(documents).encode()
    return xz_bits_per_byte(data) if 0 < len(data) <= _XZ_BYTES else None


def xz_bits_per_byte(data):
    """What `xz -9e` needs for bytes, its headers included."""
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) * 8 / len(data)


def _check_whole(name, value, least, most):
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"`{name}` is a whole number. Received: {name}={value!r}")
    if not least <= value <= most:
        raise ValueError(
            f"`{name}` is from {least} to {most} here. Received: {name}={value}"
        )


# --- The table ---


def table(rows):
    """What `evaluate` measured, as lines to print.

    Args:
        rows: list of dicts, see `evaluate`.

    Returns:
        String. Below several sources stands the mean of their bits per byte, in which
        each counts the same; in the total it counts by its bytes.
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
        _number(row["bits_per_byte"]),
        _number(row["xz_bits_per_byte"]),
        f"{row['tokens_per_second']:.0f}",
    )


def _number(value):
    return "–" if value is None else f"{value:.3f}"


def mean_bits_per_byte(rows):
    """Mean over the sources, each counting the same; the total is left out."""
    sources = rows if len(rows) == 1 else rows[:-1]
    return sum(row["bits_per_byte"] for row in sources) / len(sources)
