"""Bits per byte of held-out text under a language model, next to `xz -9e`.

    python train/fetch_corpus.py                  # once
    python train/bits_per_byte.py                 # open_llama_nano
    python train/bits_per_byte.py --preset runs/open_llama_nano

The tokens of a text stand behind a BOS. Windows of the model's whole context advance
by half a context, so that each token but the first ones has at least half a context
before it. Every token counts once, and the sum is divided by the text's UTF-8 bytes,
which makes models with different tokenizers comparable.
"""

import argparse
import json
import lzma
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np
from keras import ops

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from fetch_corpus import DEFAULT_CACHE  # noqa: E402

from keras_openllama import OpenLlamaCausalLM  # noqa: E402
from keras_openllama.commands.process import one_line  # noqa: E402


def cross_entropy(labels, logits):
    """Nats per token, in float32 whatever the logits are, and without a one-hot.

    Args:
        labels: int `(batch, length)`.
        logits: float `(batch, length, vocabulary)`.

    Returns:
        float32 `(batch, length)`.
    """
    logits = ops.cast(logits, "float32")
    labels = ops.cast(labels, "int32")[..., None]
    chosen = ops.take_along_axis(logits, labels, axis=-1)[..., 0]
    return ops.logsumexp(logits, axis=-1) - chosen


def windows(count, context):
    """How `count` tokens behind a BOS are cut into windows.

    Args:
        count: int, tokens to predict: positions 1 to `count`, with BOS at 0.
        context: int, tokens a window reads.

    Returns:
        List of `(start, first, last)`: the window reads the `context` tokens from
        `start` on, and counts the predictions of positions `first` to `last`.
    """
    spans, last = [], 0
    while last < count:
        first = last + 1
        last = min(count, last + (context // 2 if spans else context))
        spans.append((max(0, last - context), first, last))
    return spans


def total_bits(lm, ids, start_token_id, context, batch_size=8):
    """Bits that tokens cost.

    Args:
        lm: `OpenLlamaCausalLM`.
        ids: list of int, token ids without BOS.
        start_token_id: int, id of BOS.
        context: int, tokens a window reads.
        batch_size: int, windows computed at once.

    Returns:
        float.

    Example:
        bits = total_bits(lm, tokenizer("Some text."), 1, context=256)
    """
    stream = np.array([start_token_id, *ids], "int32")
    spans = windows(len(ids), context)
    nats = 0.0
    for begin in range(0, len(spans), batch_size):
        rows = spans[begin : begin + batch_size]
        # Zeros pad the end of a short text; causality hides them from what counts.
        tokens = np.zeros((len(rows), context + 1), "int32")
        for row, (start, _, last) in enumerate(rows):
            tokens[row, : last + 1 - start] = stream[start : last + 1]
        mask = np.ones((len(rows), context), "bool")
        logits = lm.predict_on_batch(
            {"token_ids": tokens[:, :-1], "padding_mask": mask}
        )
        losses = ops.convert_to_numpy(cross_entropy(tokens[:, 1:], logits))
        for row, (start, first, last) in enumerate(rows):
            counted = losses[row, first - start - 1 : last - start]
            nats += counted.sum(dtype="float64")
    return nats / math.log(2)


def xz_bits_per_byte(data):
    """What `xz -9e` needs for the same bytes, its headers included."""
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) * 8 / len(data)


def evaluate(lm, tokenizer, texts):
    """Scores texts.

    Args:
        lm: `OpenLlamaCausalLM`.
        tokenizer: its `OpenLlamaTokenizer`.
        texts: dict, name -> text.

    Returns:
        Dict by name of dicts with `"bytes"`, `"tokens"`, `"bits_per_byte"` and
        `"xz_bits_per_byte"`.
    """
    rows = {}
    for name, text in texts.items():
        data, ids = text.encode(), tokenizer(text)
        context = lm.backbone.max_sequence_length
        bits = total_bits(lm, ids, tokenizer.start_token_id, context)
        rows[name] = {
            "bytes": len(data),
            "tokens": len(ids),
            "bits_per_byte": round(bits / len(data), 4),
            "xz_bits_per_byte": round(xz_bits_per_byte(data), 4),
        }
    return rows


def mean(rows):
    """Mean of the bits per byte over the texts, each counting the same."""
    return round(sum(row["bits_per_byte"] for row in rows.values()) / len(rows), 4)


def table(rows):
    """The scores as lines to print."""
    header = ("held-out text", "bytes", "tokens", "bits/byte", "xz -9e")
    lines = ["{:<14}{:>8}{:>8}{:>11}{:>8}".format(*header)]
    lines += [
        f"{name:<14}{row['bytes']:>8}{row['tokens']:>8}{row['bits_per_byte']:>11.3f}"
        f"{row['xz_bits_per_byte']:>8.3f}"
        for name, row in rows.items()
    ]
    return "\n".join([*lines, f"{'mean':<30}{mean(rows):>11.3f}"])


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset",
        default="open_llama_nano",
        metavar="PRESET|DIR",
        help="what `from_preset` takes: a run, too (default: %(default)s)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        default=DEFAULT_CACHE / "heldout",
        metavar="DIR",
        help="directory of .txt files (default: the one of fetch_corpus.py)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    paths = sorted(options.text.glob("*.txt"))
    texts = {path.stem: path.read_bytes().decode() for path in paths}
    if not paths or not all(texts.values()):
        sys.exit(
            f"bits_per_byte: {options.text} has no .txt files, or an empty one. Run "
            "first: python train/fetch_corpus.py"
        )
    try:
        lm = OpenLlamaCausalLM.from_preset(options.preset, dtype="float32")
    except (OSError, ValueError) as error:
        sys.exit(f"bits_per_byte: {one_line(error)}")
    rows = evaluate(lm, lm.preprocessor.tokenizer, texts)
    if options.json:
        print(json.dumps({"mean_bits_per_byte": mean(rows), "results": rows}, indent=2))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
