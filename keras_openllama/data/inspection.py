"""Inspection of a prepared dataset, as text and as a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from keras_openllama.data.prepared_data import Documents, PreparedData
from keras_openllama.data.token_stream import TokenStream
from keras_openllama.utils import plots
from keras_openllama.utils.types import PathLike

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# Range of the length axis, in tokens. The last bin includes longer documents.
_LENGTH_RANGE = (1, 1 << 20)
_BINS = 60


def format_manifest(data: PreparedData) -> str:
    """Formats the manifest of a prepared dataset as a table.

    Args:
        data: the prepared dataset.

    Returns:
        Lines of text: the tokenizer, the mixture, and for each source and split its
        documents, tokens, tokens per document, bytes per token, shards and weight, and
        the skipped documents.
    """
    tokenizer, mixture = data.manifest["tokenizer"], data.mixture
    lines = [
        f"{data.directory}: prepared by keras_openllama "
        f"{data.manifest['keras_openllama']}",
        f"tokenizer: {tokenizer['vocabulary_size']} pieces, SHA-256 "
        f"{tokenizer['sha256'][:12]}…, "
        + ("keeps spaces" if tokenizer["keeps_spaces"] else "merges spaces"),
        f"mixture: {mixture.name}",
        "",
        f"{'source':<16}{'split':<12}{'documents':>14}{'tokens':>18}{'mean':>9}"
        f"{'bytes/token':>13}{'shards':>8}{'weight':>9}",
    ]
    weights = mixture.weights_at(0)
    total = sum(weights.get(name, 0) for name in data.sources) or 1
    for name in data.sources:
        for split in ("train", "validation"):
            sums = data.split_info(name, split)
            tokens, documents = sums["tokens"], sums["documents"]
            weight = f"{weights.get(name, 0) / total:.2%}" if split == "train" else ""
            lines.append(
                f"{name:<16}{split:<12}{documents:>14,}{tokens:>18,}"
                f"{tokens / max(documents, 1):>9,.0f}"
                f"{sums['bytes'] / max(tokens, 1):>13.3f}{len(sums['shards']):>8}"
                f"{weight:>9}"
            )
    lines.append("")
    for name in data.sources:
        skipped = data.manifest["sources"][name]["skipped"]
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        lines.append(f"{name}: skipped {reasons or 'nothing'}")
    missing = [name for name in mixture.names if name not in data.sources]
    if missing:
        lines.append(f"in the mixture but not prepared: {', '.join(missing)}")
    for step, entry in mixture.schedule[1:]:
        changed = ", ".join(f"{name} {weight:.2%}" for name, weight in entry.items())
        lines.append(f"from step {step} on: {changed}")
    return "\n".join(lines)


def describe_batch(
    stream: TokenStream,
    step: int,
    processor: SentencePieceProcessor,
    characters: int = 300,
) -> str:
    """Decodes a batch, with the source and the document boundaries of each sequence.

    Args:
        stream: the batches.
        step: index of the batch.
        processor: SentencePiece processor of the data.
        characters: maximum number of characters per document.

    Returns:
        Lines of text.
    """
    x, targets, weights = stream.batch(step)
    lines = [f"step {step}: {targets.shape[0]} sequences of {targets.shape[1]} tokens"]
    for number, (source, spans) in enumerate(stream.sequences_read(step)):
        num_targets = int(weights[number].sum())
        lines.append(f"sequence {number}: {source}, {num_targets} targets")
        column = 0
        # The last token of a sequence is a target only.
        tokens = np.append(x["token_ids"][number], targets[number, -1])
        for document, first, size in spans:
            part = tokens[column : column + size].tolist()
            column += size
            begins = "<s> " if part[0] == processor.bos_id() else "… "
            ends = " </s>" if part[-1] == processor.eos_id() else " …"
            text = repr(processor.decode(part))[1:-1]
            if len(text) > characters:
                half = characters // 2
                text = f"{text[:half]} [{len(text) - 2 * half} more] {text[-half:]}"
            lines.append(
                f"    document {document}, tokens {first} to {first + size - 1}: "
                f"{begins}{text}{ends}"
            )
        if padding := targets.shape[1] + 1 - column:
            lines.append(f"    {padding} tokens of padding")
    return "\n".join(lines)


def measure_mixture(stream: TokenStream, first: int, steps: int) -> dict[str, float]:
    """Measures the share of tokens of each source, without padding.

    Args:
        stream: the batches.
        first: first step.
        steps: number of steps.

    Returns:
        Share by source, from 0 to 1.
    """
    totals = dict.fromkeys(stream.sources, 0.0)
    for step in range(first, first + steps):
        for source, spans in stream.sequences_read(step):
            totals[source] += sum(size for *_, size in spans) - 1
    all_tokens = sum(totals.values())
    return {name: total / all_tokens for name, total in totals.items()}


def draw_overview(
    stream: TokenStream, measured: dict[str, float], step: int, path: PathLike
) -> None:
    """Plots the weights and shares of the mixture, and the lengths of documents.

    Args:
        stream: the batches.
        measured: share by source, see `measure_mixture`.
        step: the step whose weights are plotted.
        path: PNG or SVG file to write.
    """
    weights = stream.mixture.weights_at(step)
    names = sorted(stream.sources, key=lambda name: weights.get(name, 0))
    with plots.style():
        figure = Figure(figsize=(12.5, 1.8 + 0.45 * max(5, len(names))))
        bars, lengths = figure.subplots(1, 2)
        _draw_mixture(bars, names, weights, measured)
        _draw_lengths(lengths, names, stream)
        plots.save(figure, path)


def _draw_mixture(axes, names, weights, measured):
    places = np.arange(len(names))
    for offset, shares, label, color in (
        (0.2, weights, "weights", "#9aa5b1"),
        (-0.2, measured, "measured", "C0"),
    ):
        values = [100 * shares.get(name, 0.0) for name in names]
        drawn = axes.barh(places + offset, values, 0.38, label=label, color=color)
        axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=9)
    axes.set_yticks(places, names)
    axes.set_xlabel("share of the tokens (%)")
    axes.set_title("Weights of the mixture and measured shares")
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    axes.legend(loc="lower right")


def _draw_lengths(axes, names, stream):
    edges = np.geomspace(*_LENGTH_RANGE, _BINS + 1)
    for name in reversed(names):
        counts = length_histogram(stream.data.documents(name, stream.split), edges)
        axes.stairs(100 * counts / counts.sum(), edges, label=name, linewidth=1.5)
    axes.axvline(
        stream.sequence_length,
        color="black",
        linewidth=1,
        linestyle="--",
        label="sequence length",
    )
    axes.set_xscale("log")
    axes.set_xlabel("tokens in a document")
    axes.set_ylabel("share of the documents (%)")
    axes.set_title("Document lengths")
    axes.set_xlim(_used_range(axes, edges, stream))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def length_histogram(documents: Documents, edges: np.ndarray) -> np.ndarray:
    """Counts documents by length. The last bin includes all longer documents.

    Args:
        documents: documents of a source.
        edges: bin edges in tokens, `(bins + 1,)`.

    Returns:
        int64 array `(bins,)`.
    """
    counts = np.zeros(len(edges) - 1, "int64")
    for start in range(0, len(documents), 1 << 24):
        part = np.clip(documents.lengths[start : start + (1 << 24)], None, edges[-1])
        counts += np.histogram(part, edges)[0]
    return counts


def _used_range(axes, edges, stream):
    used = np.zeros(len(edges) - 1, "bool")
    for artist in axes.patches:
        used |= artist.get_data().values > 0
    (places,) = np.nonzero(used)
    low = min(edges[places[0]], stream.sequence_length)
    high = max(edges[places[-1] + 1], stream.sequence_length)
    return low / 1.25, high * 1.25
