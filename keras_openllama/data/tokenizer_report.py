"""Compression of held-out text by a tokenizer, compared with other tokenizers."""

import hashlib
import importlib.util
import io
from pathlib import Path
from typing import Any

from keras_openllama import presets
from keras_openllama.data.tokenizer_training import DocumentSample, count_texts
from keras_openllama.text.sentencepiece_model import keeps_spaces, load_processor

_ALL = "all sources"  # Not a valid name of a source.


def installed_tokenizers() -> dict[str, bytes]:
    """Returns SentencePiece models for comparison that need no download, by name.

    Example:
        >>> "open_llama_nano" in installed_tokenizers()
        True
    """
    paths = {
        "open_llama_nano": Path(presets.folder(), "open_llama_nano", "tokenizer.model")
    }
    package = importlib.util.find_spec("mistral_common")
    if package is not None:
        folder = Path(package.origin).parent
        paths["mistral v1"] = folder / "data" / "tokenizer.model.v1"
    return {name: path.read_bytes() for name, path in paths.items() if path.exists()}


def measure_tokenizers(
    samples: dict[str, DocumentSample], tokenizers: dict[str, bytes]
) -> dict[str, Any]:
    """Measures how many bytes of held-out text a token stands for.

    `<s>` and `</s>` are not counted.

    Args:
        samples: samples by source. Sources without held-out text are ignored.
        tokenizers: bytes of SentencePiece models by name.

    Returns:
        Dict of `"held_out"`, the documents and bytes by source, and `"tokenizers"`, by
        name a dict of `"pieces"`, `"keeps_spaces"`, `"sha256"`, `"bytes_per_token"` by
        source, and `"overall"`, all bytes divided by all tokens (`None` without
        tokens).
    """
    held_out = {
        name: sample.held_out for name, sample in samples.items() if sample.held_out
    }
    sizes = {name: count_texts(texts) for name, texts in held_out.items()}
    total = sum(size["bytes"] for size in sizes.values())
    measured = {}
    for tokenizer, proto in tokenizers.items():
        processor = load_processor(proto, tokenizer)
        tokens = {
            name: _count_tokens(processor, texts) for name, texts in held_out.items()
        }
        measured[tokenizer] = {
            "pieces": processor.vocab_size(),
            "keeps_spaces": keeps_spaces(processor),
            "sha256": hashlib.sha256(proto).hexdigest(),
            "bytes_per_token": {
                name: sizes[name]["bytes"] / count for name, count in tokens.items()
            },
            "overall": total / sum(tokens.values()) if tokens else None,
        }
    return {"held_out": sizes, "tokenizers": measured}


def _count_tokens(processor, texts):
    token_ids = processor.encode([data.decode() for data in texts], num_threads=-1)
    return sum(map(len, token_ids))


def format_table(report: dict[str, Any]) -> str:
    """Formats a report as a table.

    Args:
        report: output of `measure_tokenizers`.

    Returns:
        Lines of text in aligned columns.
    """
    tokenizers, held_out = report["tokenizers"], report["held_out"]
    columns = [_values(measured) for measured in tokenizers.values()]
    rows = [
        ["bytes per token", "held out", *(_marked(name, report) for name in tokenizers)]
    ]
    for group in _groups(report):
        size = f"{held_out[group]['bytes'] / 1e6:.2f} MB" if group in held_out else ""
        rows.append([group, size, *(f"{values[group]:.2f}" for values in columns)])
    rows.append(["pieces", "", *(f"{t['pieces']:,}" for t in tokenizers.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ""
    for first, *others in rows:
        cells = [cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True)]
        text += "  ".join([first.ljust(widths[0]), *cells]) + "\n"
    if not all(t["keeps_spaces"] for t in tokenizers.values()):
        text += "* merges runs of spaces, so detokenization loses them.\n"
    return text


def _label(tokenizer, measured):
    merges = "" if measured["keeps_spaces"] else ", merges spaces"
    return f"{tokenizer} ({measured['pieces']:,} pieces{merges})"


def _marked(tokenizer, report):
    is_lossless = report["tokenizers"][tokenizer]["keeps_spaces"]
    return tokenizer if is_lossless else f"{tokenizer} *"


def _groups(report):
    """The sources with held-out text, and all of them together."""
    return [*report["held_out"], _ALL] if report["held_out"] else []


def _values(measured):
    """A tokenizer's bytes per token, by the groups of `_groups`."""
    return {**measured["bytes_per_token"], _ALL: measured["overall"]}


def draw_chart(report: dict[str, Any]) -> bytes:
    """Plots a report as a bar chart.

    Args:
        report: output of `measure_tokenizers`.

    Returns:
        The bytes of a PNG file.
    """
    from matplotlib.figure import Figure

    from keras_openllama.utils import plots

    groups = _groups(report)
    width = 0.8 / len(report["tokenizers"])
    png = io.BytesIO()
    with plots.style():
        figure = Figure(figsize=(max(7, 1.6 * len(groups) + 1), 4.2))
        axes = figure.subplots()
        for number, (name, measured) in enumerate(report["tokenizers"].items()):
            values = [_values(measured)[group] for group in groups]
            left = (number + 0.5) * width - 0.4
            places = [group + left for group in range(len(groups))]
            bars = axes.bar(places, values, 0.92 * width, label=_label(name, measured))
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
        axes.set_title("Compression of held-out text (more is better)")
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel("bytes per token")
        axes.grid(visible=False, axis="x")
        figure.legend(loc="outside lower center", ncols=2)
        figure.savefig(png, format="png")
    return png.getvalue()
