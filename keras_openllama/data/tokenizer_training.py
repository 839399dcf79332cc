"""Training a tokenizer: a sample of the text, and SentencePiece.

Example:

```python
samples = sample({"wikipedia": texts, "code": sources}, {"wikipedia": 1, "code": 3})
proto = train_sentencepiece(lines(samples), 32_000, "v2")
```
"""

import collections
import dataclasses
import hashlib
import heapq
import io
import re

import sentencepiece

from keras_openllama.config import TOKENIZER_STYLES
from keras_openllama.data import document_reader
from keras_openllama.data.text_sources import SourceError
from keras_openllama.data.tokenizing import check_skipped
from keras_openllama.text.sentencepiece_model import load_processor

UNK, BOS, EOS = 0, 1, 2
# <unk>, <s>, </s> and the bytes: what there is before any text has been seen.
FIXED_PIECES = 3 + 256
# Ours: one document in so many is held out, to report on.
HELD_OUT_EVERY = 50
# Ours. SentencePiece counts the characters of a word, or run of spaces, in 16 bits, and
# ends the process where there are more, as in data that is written into code.
_LONGEST_WORD = 30_000
# It writes a space as ▁, so that to it the two are the same.
_TOO_LONG = re.compile(rf"[^ ▁]{{{_LONGEST_WORD}}}|[ ▁]{{{_LONGEST_WORD}}}")
# Documents between two checks of how many of them are damaged.
_CHECK_EVERY = 1000


# --- A sample of the text ---


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was kept of a source.

    Attributes:
        training: list of bytes, documents to train on.
        held_out: list of bytes, documents to report on; none of them is in `training`.
        documents: int, how many the source has.
        num_bytes: int, UTF-8 bytes of these.
        share: int, bytes that the source was to give.
        skipped: dict of numbers of skipped documents by reason.
    """

    training: list
    held_out: list
    documents: int
    num_bytes: int
    share: int
    skipped: dict

    def to_json(self):
        """A dict of numbers, without the texts."""
        return {
            "documents": self.documents,
            "bytes": self.num_bytes,
            "skipped": self.skipped,
            "share": self.share,
            "training": size_of(self.training),
            "held_out": size_of(self.held_out),
        }


def sample(
    documents_by_source, weights=None, max_bytes=10**9, seed=0, max_skipped=0.01
):
    """Draws documents at random, of each source as many bytes as its weight says.

    Each document has a priority, the hash of its text and the seed, and the smallest
    stay. So the sample depends neither on the order of the documents nor on chance; a
    text that comes twice is taken once; and there is never more in memory than
    `max_bytes` and a document of each source. A source that has less than its share
    gives all.

    Args:
        documents_by_source: dict by source of iterables of str, or of
            `document_reader.Skipped`, which is counted.
        weights: dict of numbers by source, whatever their sum. Equal by default.
        max_bytes: int, UTF-8 bytes of all sources.
        seed: int.
        max_skipped: float, share of damaged documents above which a source is refused.

    Returns:
        Dict of `Sample` by source, in the order of their names.

    Raises:
        SourceError: if a source has no text, or too many damaged documents.
        ValueError: if an argument is wrong.
    """
    names = sorted(documents_by_source)
    weights = dict.fromkeys(names, 1) if weights is None else weights
    if sorted(weights) != names or not all(weight > 0 for weight in weights.values()):
        raise ValueError(
            f"`weights` must have a number above 0 for each of {', '.join(names)}. "
            f"Received: {weights}"
        )
    if max_bytes < 1:
        raise ValueError(f"`max_bytes` must be above 0. Received: {max_bytes}")
    if not 0 <= max_skipped <= 1:
        raise ValueError(
            f"`max_skipped` is a share from 0 to 1. Received: {max_skipped}"
        )
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
    kept = _SmallestPriorities(share, seed)
    skipped = collections.Counter()
    seen = num_bytes = 0
    for seen, document in enumerate(documents, 1):
        if isinstance(document, document_reader.Skipped):
            skipped[str(document)] += 1
        else:
            data = document.encode()
            num_bytes += len(data)
            kept.add(data)
        if seen % _CHECK_EVERY == 0:
            check_skipped(f"Source {name!r}", seen, skipped, max_skipped)
    check_skipped(f"Source {name!r}", seen, skipped, max_skipped)
    texts = kept.in_order()
    if not texts:
        raise SourceError(
            f"Source {name!r} has no text: {seen} documents, and none of them holds "
            "any. Give other files, or leave the source out."
        )
    # A single document is trained on; of two or more, one at least is held out.
    count = min(len(texts) - 1, -(-len(texts) // HELD_OUT_EVERY))
    return Sample(
        training=texts[count:],
        held_out=texts[:count],
        documents=seen - sum(skipped.values()),
        num_bytes=num_bytes,
        share=share,
        skipped=dict(sorted(skipped.items())),
    )


def size_of(texts):
    """Number of documents (list of bytes) and their bytes, as a dict."""
    return {"documents": len(texts), "bytes": sum(map(len, texts))}


class _SmallestPriorities:
    """The documents of smallest priority that fill a number of bytes.

    A document goes once those of smaller priority alone fill it. What comes later can
    only push it further out, and what has gone never mattered to what stays: this is
    why the order of documents is no matter.
    """

    def __init__(self, max_bytes, seed):
        self._max_bytes, self._key = max_bytes, str(seed).encode()
        self._texts, self._num_bytes = {}, 0
        self._largest_first = []  # Negative priorities: heapq finds the smallest.

    def add(self, data):
        digest = hashlib.blake2b(data, digest_size=16, key=self._key).digest()
        priority = int.from_bytes(digest, "big")
        if priority in self._texts:  # The same text again.
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
        """List of the documents, by priority."""
        return [data for _, data in sorted(self._texts.items())]


def lines(samples):
    """Yields the lines (bytes) of the documents to train on, in the order of `sample`.

    A line's end is no part of it: the newline stays the byte piece 13.
    """
    for kept in samples.values():
        for data in kept.training:
            yield from data.split(b"\n")


# --- SentencePiece ---


def train_sentencepiece(lines, vocabulary_size, style, **overrides):
    """Trains a tokenizer laid out as OpenLLaMA's.

    BPE with byte fallback: `<unk>` 0, `<s>` 1, `</s>` 2, the bytes 3 to 258, then what
    was learnt; digits stand alone, and text is not normalised. The same lines give the
    same bytes, on any number of cores.

    Args:
        lines: iterable of str or UTF-8 bytes, without line ends.
        vocabulary_size: int, number of pieces.
        style: `"v1"` merges runs of spaces into one; `"v2"` keeps them, as code needs.
        **overrides: options of `sentencepiece.SentencePieceTrainer`; `None` leaves one
            at SentencePiece's own default. `num_threads` is written into the model.

    Returns:
        The bytes of the model file.

    Raises:
        ValueError: if the text has too few pieces, or the vocabulary no room for its
            characters; the message says how many there may be.

    Example:

    ```python
    proto = train_sentencepiece(["def f(x):", "    return x"], 275, "v2")
    OpenLlamaTokenizer(proto)
    ```

    Source: Kudo and Richardson, SentencePiece (arXiv:1808.06226).
    """
    if style not in TOKENIZER_STYLES:
        raise ValueError(
            f"`style` is one of {', '.join(TOKENIZER_STYLES)}. "
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
        "character_coverage": 0.99995,  # Ours; the rest becomes bytes.
        "max_sentence_length": 1 << 30,  # Ours: a longer line would be left out.
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
        raise ValueError(_explained(str(error), vocabulary_size)) from error
    return model.getvalue()


def _with_short_words(lines):
    """The lines, with those that have a word too long cut within it."""
    for line in lines:
        if len(line) < _LONGEST_WORD:
            yield line
        else:
            text = line.decode() if isinstance(line, bytes) else line
            yield from _TOO_LONG.sub(r"\g<0>\n", text).split("\n")


def check_vocabulary_size(vocabulary_size):
    """Raises a `ValueError` for a size that is too small whatever the text."""
    if vocabulary_size <= FIXED_PIECES:
        raise ValueError(
            f"`vocabulary_size` must be above {FIXED_PIECES}: <unk>, <s>, </s> and 256 "
            f"bytes come first. Received: vocabulary_size={vocabulary_size}"
        )


def _explained(message, vocabulary_size):
    """SentencePiece's complaint in terms of our arguments."""
    received = f"Received: vocabulary_size={vocabulary_size}"
    if largest := re.search(r"size too high .* <= (\d+)", message):
        return (
            f"The text has too few pieces: {largest[1]} is the largest vocabulary that "
            f"it gives. Ask for no more, or give more text. {received}"
        )
    if smallest := re.search(r"smaller than required_chars.* vs (\d+)", message):
        return (
            f"The text's characters and the {FIXED_PIECES} fixed pieces need a "
            f"vocabulary of {smallest[1]} at least, and merges need more. {received}"
        )
    if "sentences_.empty()" in message:
        return "There is no text to train on: all lines are empty."
    return f"SentencePiece cannot train: {message.strip()} {received}"


def vocabulary_list(proto):
    """The pieces of a model and their scores, a line each, as SentencePiece lists them.

    Args:
        proto: bytes of the model file.
    """
    processor = load_processor(proto, "the tokenizer")
    return "".join(
        f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n"
        for i in range(processor.vocab_size())
    )
