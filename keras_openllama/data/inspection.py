"""What a prepared data set holds, as text and as a picture."""

import numpy as np
from matplotlib.figure import Figure

# Ours: the longest documents shown, in tokens; longer ones are counted with them.
_LENGTH_RANGE = (1, 1 << 20)
_BINS = 60


def table(data):
    """The manifest as lines of text.

    Args:
        data: `prepared_data.PreparedData`.

    Returns:
        String: tokenizer, mixture, and per source its documents, tokens, tokens per
        document, bytes per token, weight, epochs that a trillion tokens would take,
        and what was skipped.
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
    here = sum(weights.get(name, 0) for name in data.sources) or 1
    for name in data.sources:
        for split in ("train", "validation"):
            sums = data.split(name, split)
            tokens, documents = sums["tokens"], sums["documents"]
            weight = f"{weights.get(name, 0) / here:.2%}" if split == "train" else ""
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
        lines.append(f"not prepared, though in the mixture: {', '.join(missing)}")
    for step, entry in mixture.schedule[1:]:
        changed = ", ".join(f"{name} {weight:.2%}" for name, weight in entry.items())
        lines.append(f"from step {step} on: {changed}")
    return "\n".join(lines)


def describe_batch(stream, step, processor, characters=300):
    """The rows of a batch in words: source, documents, and where they meet.

    Args:
        stream: `token_stream.TokenStream`.
        step: int.
        processor: SentencePiece processor of the data.
        characters: int, text shown of each stretch of a document.

    Returns:
        String.
    """
    x, targets, weights = stream.batch(step)
    lines = [f"step {step}: {targets.shape[0]} rows of {targets.shape[1]} tokens"]
    for row, (source, spans) in enumerate(stream.sequences_read(step)):
        real = int(weights[row].sum())
        lines.append(f"row {row}: {source}, {real} targets")
        column = 0
        # The last token of a row is a target only.
        tokens = np.append(x["token_ids"][row], targets[row, -1])
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


def realised_mixture(stream, first, steps):
    """Shares of the tokens of some steps, padding left out: dict of floats."""
    totals = dict.fromkeys(stream.sources, 0.0)
    for step in range(first, first + steps):
        for source, spans in stream.sequences_read(step):
            totals[source] += sum(size for *_, size in spans) - 1
    everything = sum(totals.values())
    return {name: total / everything for name, total in totals.items()}


def draw(stream, realised, step, path):
    """Draws the mixture, wanted and realised, and the lengths of documents.

    Args:
        stream: `token_stream.TokenStream`.
        realised: dict of shares by source, see `realised_mixture`.
        step: int, whose weights are wanted.
        path: where the PNG goes.
    """
    wanted = stream.mixture.weights_at(step)
    names = sorted(stream.sources, key=lambda name: wanted.get(name, 0))
    figure = Figure(figsize=(11, 1.8 + 0.45 * max(5, len(names))), layout="constrained")
    bars, lengths = figure.subplots(1, 2)
    places = np.arange(len(names))
    for offset, shares, label, colour in (
        (0.2, wanted, "wanted", "#9aa5b1"),
        (-0.2, realised, "realised", "#2563eb"),
    ):
        values = [100 * shares.get(name, 0.0) for name in names]
        drawn = bars.barh(places + offset, values, 0.38, label=label, color=colour)
        bars.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
    bars.set_yticks(places, names)
    bars.set_xlabel("share of the tokens (%)")
    bars.set_title("Mixture")
    bars.margins(x=0.12)
    bars.legend(loc="lower right")
    edges = np.geomspace(*_LENGTH_RANGE, _BINS + 1)
    for name in reversed(names):
        counts = length_histogram(stream.data.documents(name, stream.split), edges)
        lengths.stairs(100 * counts / counts.sum(), edges, label=name, linewidth=1.5)
    lengths.axvline(
        stream.sequence_length, color="black", linewidth=0.8, linestyle="--"
    )
    lengths.set_xscale("log")
    lengths.set_xlabel("tokens in a document (dashed: the sequence length)")
    lengths.set_ylabel("share of the documents (%)")
    lengths.set_title("Document lengths")
    lengths.set_xlim(_used_range(lengths, edges, stream))
    lengths.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def length_histogram(documents, edges):
    """Documents by length; those beyond the last edge count in the last bin."""
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
