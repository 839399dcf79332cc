"""Tokenizer training with SentencePiece on a random sample of the text."""

import collections
import dataclasses
import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece

from keras_openllama.config import TOKENIZER_STYLES
from keras_openllama.data import document_reader
from keras_openllama.data.text_sources import SourceError
from keras_openllama.data.tokenizing import check_skipped
from keras_openllama.text.sentencepiece_model import load_processor

UNK, BOS, EOS = 0, 1, 2
# <unk>, <s>, </s> and the bytes, which do not depend on the text.
FIXED_PIECES = 3 + 256
# Heuristic: one document of this many is held out for the report.
HELD_OUT_EVERY = 50
# Heuristic. SentencePiece counts the characters of a word, or run of spaces, in 16
# bits. It aborts the process if there are more, as in data embedded in code.
_MAX_WORD_LENGTH = 30_000
# SentencePiece writes a space as ▁ and does not distinguish the two.
_TOO_LONG = re.compile(rf"[^ ▁]{{{_MAX_WORD_LENGTH}}}|[ ▁]{{{_MAX_WORD_LENGTH}}}")
# Number of documents between checks of the fraction of damaged ones.
_CHECK_EVERY = 1000


# --- A sample of the text ---


@dataclasses.dataclass(frozen=True)
class DocumentSample:
    """A random sample of the documents of a source.

    Attributes:
        training: UTF-8 documents to train on.
        held_out: UTF-8 documents for evaluation; none of them is in `training`.
        documents: number of documents of the source.
        num_bytes: UTF-8 bytes of these documents.
        share: requested bytes of the sample.
        skipped: numbers of skipped documents by reason.
    """

    training: list[bytes]
    held_out: list[bytes]
    documents: int
    num_bytes: int
    share: int
    skipped: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Returns the counts as a dict for JSON, without the texts."""
        return {
            "documents": self.documents,
            "bytes": self.num_bytes,
            "skipped": self.skipped,
            "share": self.share,
            "training": count_texts(self.training),
            "held_out": count_texts(self.held_out),
        }


def sample_documents(
    documents_by_source: dict[str, Iterable[str | document_reader.Skipped]],
    weights: dict[str, float] | None = None,
    max_bytes: int = 10**9,
    seed: int = 0,
    max_skipped: float = 0.01,
) -> dict[str, DocumentSample]:
    """Samples documents at random, with bytes per source in proportion to its weight.

    The priority of a document is a hash of its text and the seed, and the documents
    with the smallest priorities are sampled. So the sample does not depend on the order
    of the documents, and duplicates are sampled once. The memory use is at most
    `max_bytes` and one document per source. All documents of a source that is smaller
    than its share are sampled.

    Args:
        documents_by_source: documents of each source. `Skipped` documents are counted.
        weights: numbers by source, of any sum. Equal by default.
        max_bytes: UTF-8 bytes of the sample, over all sources.
        seed: seed of the sample.
        max_skipped: maximum fraction of damaged documents per source, from 0 to 1.

    Returns:
        Samples by source, sorted by name.

    Raises:
        SourceError: if a source has no text, or too many damaged documents.
        ValueError: if an argument is invalid.

    Example:
        >>> samples = sample_documents({"web": ["A llama hums.", "An alpaca spits."]})
        >>> len(samples["web"].training), len(samples["web"].held_out)
        (1, 1)
    """
    names = sorted(documents_by_source)
    weights = dict.fromkeys(names, 1) if weights is None else weights
    if sorted(weights) != names or not all(weight > 0 for weight in weights.values()):
        raise ValueError(
            f"`weights` must have a positive number for each of {', '.join(names)}. "
            f"Received: {weights}"
        )
    if max_bytes < 1:
        raise ValueError(f"`max_bytes` must be positive. Received: {max_bytes}")
    if not 0 <= max_skipped <= 1:
        raise ValueError(f"`max_skipped` must be from 0 to 1. Received: {max_skipped}")
    total = sum(weights.values())
    return {
        name: _sample_source(
            name,
            documents_by_source[name],
            max(1, int(max_bytes * weights[name] / total)),
            seed,
            max_skipped,
        )
        for name in names
    }


def _sample_source(name, documents, share, seed, max_skipped):
    sample = _SmallestPriorities(share, seed)
    skipped = collections.Counter()
    seen = num_bytes = 0
    for seen, document in enumerate(documents, 1):
        if isinstance(document, document_reader.Skipped):
            skipped[str(document)] += 1
        else:
            data = document.encode()
            num_bytes += len(data)
            sample.add(data)
        if seen % _CHECK_EVERY == 0:
            check_skipped(f"Source {name!r}", seen, skipped, max_skipped)
    check_skipped(f"Source {name!r}", seen, skipped, max_skipped)
    texts = sample.in_order()
    if not texts:
        raise SourceError(
            f"Source {name!r} has no text in its {seen} documents. Use other files, or "
            "remove the source."
        )
    # A single document is for training. Of two or more, at least one is held out.
    count = min(len(texts) - 1, -(-len(texts) // HELD_OUT_EVERY))
    return DocumentSample(
        training=texts[count:],
        held_out=texts[:count],
        documents=seen - sum(skipped.values()),
        num_bytes=num_bytes,
        share=share,
        skipped=dict(sorted(skipped.items())),
    )


def count_texts(texts: Sequence[bytes]) -> dict[str, int]:
    """Counts documents and their bytes.

    Example:
        >>> count_texts([b"one", b"two"])
        {'documents': 2, 'bytes': 6}
    """
    return {"documents": len(texts), "bytes": sum(map(len, texts))}


class _SmallestPriorities:
    """The documents of smallest priority that fill a number of bytes.

    A document is dropped once the documents of smaller priority fill all bytes. Later
    documents cannot bring it back, and it never affected which others stay. So the
    result does not depend on the order of the documents.
    """

    def __init__(self, max_bytes, seed):
        self._max_bytes, self._key = max_bytes, str(seed).encode()
        self._texts, self._num_bytes = {}, 0
        self._largest_first = []  # Negative priorities: heapq finds the smallest.

    def add(self, data):
        digest = hashlib.blake2b(data, digest_size=16, key=self._key).digest()
        priority = int.from_bytes(digest, "big")
        if priority in self._texts:  # A duplicate.
            return
        self._texts[priority] = data
        self._num_bytes += len(data)
        heapq.heappush(self._largest_first, -priority)
        while True:
            last = -self._largest_first[0]
            rest = self._num_bytes - len(self._texts[last])
            if rest < self._max_bytes:
                return
            heapq.heappop(self._largest_first)
            del self._texts[last]
            self._num_bytes = rest

    def in_order(self):
        """The documents, sorted by priority."""
        return [data for _, data in sorted(self._texts.items())]


def training_lines(samples: dict[str, DocumentSample]) -> Iterator[bytes]:
    r"""Yields the lines of the training documents, in the order of the samples.

    Lines do not include their line ends, so the newline stays the byte piece 13.

    Example:
        >>> samples = sample_documents({"web": ["A llama\nhums."]})
        >>> list(training_lines(samples))
        [b'A llama', b'hums.']
    """
    for sample in samples.values():
        for data in sample.training:
            yield from data.split(b"\n")


# --- SentencePiece ---


def train_sentencepiece(
    lines: Iterable[str | bytes], vocabulary_size: int, style: str, **overrides: Any
) -> bytes:
    """Trains a tokenizer with the layout of OpenLLaMA's.

    The model is BPE with byte fallback. Ids 0 to 2 are `<unk>`, `<s>` and `</s>`, ids 3
    to 258 are the bytes, and then come the trained pieces. Digits are single pieces,
    and text is not normalized. The result is deterministic, on any number of cores.

    Args:
        lines: text without line ends; bytes are UTF-8.
        vocabulary_size: number of pieces.
        style: `"v1"` merges runs of spaces, `"v2"` preserves them, as code needs.
        **overrides: options of `sentencepiece.SentencePieceTrainer`. `None` selects
            SentencePiece's default. `num_threads` is written into the model.

    Returns:
        The bytes of the model file.

    Raises:
        ValueError: if the vocabulary is too large for the text, or too small for its
            characters. The message says what size is possible.

    Source: Kudo and Richardson, SentencePiece (arXiv:1808.06226).

    Example:
        >>> proto = train_sentencepiece(["def f(x):", "    return x"], 275, "v2")
        >>> len(format_vocabulary(proto).splitlines())
        275
    """
    if style not in TOKENIZER_STYLES:
        raise ValueError(
            f"`style` must be one of {', '.join(TOKENIZER_STYLES)}. "
            f"Received: style={style!r}"
        )
    check_vocabulary_size(vocabulary_size)
    model = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": vocabulary_size,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        **TOKENIZER_STYLES[style],
        "split_digits": True,
        "character_coverage": 0.99995,  # Heuristic; other characters become bytes.
        "max_sentence_length": 1 << 30,  # Longer lines would be skipped.
        "unk_id": UNK,
        "bos_id": BOS,
        "eos_id": EOS,
        "pad_id": -1,
        "minloglevel": 2,
        **overrides,
    }
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_with_short_words(lines),
            model_writer=model,
            **{name: value for name, value in options.items() if value is not None},
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocabulary_size)) from error
    return model.getvalue()


def _with_short_words(lines):
    """Splits lines with words that are too long for SentencePiece."""
    for line in lines:
        if len(line) < _MAX_WORD_LENGTH:
            yield line
        else:
            text = line.decode() if isinstance(line, bytes) else line
            yield from _TOO_LONG.sub(r"\g<0>\n", text).split("\n")


def check_vocabulary_size(vocabulary_size: int) -> None:
    """Checks that a vocabulary has room for the fixed pieces.

    Args:
        vocabulary_size: number of pieces.

    Raises:
        ValueError: if it is at most `FIXED_PIECES`.

    Example:
        >>> check_vocabulary_size(32_000)
    """
    if vocabulary_size <= FIXED_PIECES:
        raise ValueError(
            f"`vocabulary_size` must be above {FIXED_PIECES}, the number of fixed "
            "pieces: <unk>, <s>, </s> and 256 bytes. Received: "
            f"vocabulary_size={vocabulary_size}"
        )


def _explain(message, vocabulary_size):
    """Rephrases an error of SentencePiece in terms of the arguments."""
    received = f"Received: vocabulary_size={vocabulary_size}"
    if largest := re.search(r"size too high .* <= (\d+)", message):
        return (
            f"The vocabulary is too large for the text: {largest[1]} is the maximum. "
            f"Use a smaller vocabulary or more text. {received}"
        )
    if smallest := re.search(r"smaller than required_chars.* vs (\d+)", message):
        return (
            f"The vocabulary is too small for the text: its characters and the "
            f"{FIXED_PIECES} fixed pieces need at least {smallest[1]}. {received}"
        )
    if "sentences_.empty()" in message:
        return "There is no text to train on: all lines are empty."
    return f"SentencePiece training failed: {message.strip()} {received}"


def format_vocabulary(proto: bytes) -> str:
    r"""Lists the pieces of a model, in the format of SentencePiece's `.vocab` files.

    Args:
        proto: bytes of the model file.

    Returns:
        One line per piece: the piece, a tab, and its score.

    Example:
        >>> proto = train_sentencepiece(["hum hum"], 265, "v2")
        >>> format_vocabulary(proto).splitlines()[:2]
        ['<unk>\t0', '<s>\t0']
    """
    processor = load_processor(proto, "the tokenizer")
    return "".join(
        f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n"
        for i in range(processor.vocab_size())
    )
