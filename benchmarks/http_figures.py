"""The figures of `benchmarks/serve_http.py`."""

import statistics

import numpy as np


def figures(requests, begin, end, options):
    """Figures of the tokens between two times.

    Args:
        requests: for each, when it was sent, and when its tokens came.
        begin: the first of the times, in seconds.
        end: the last one.
        options: the arguments of the command line.
    """
    # A server may send several tokens in one event.
    per_event = max(1.0, options.new / max(len(times) - 1 for times in requests))
    started = [times for times in requests if len(times) > 1]
    number = sum(begin <= t < end for times in started for t in times[1:])
    gaps = np.concatenate([np.diff(times[1:]) for times in started])
    return {
        "tokens_per_second": per_event * number / (end - begin),
        "first": statistics.median(times[1] - times[0] for times in started),
        "gap_p99": float(np.quantile(gaps, 0.99)),
    }


def add_results(results, contender, found):
    """Adds the figures of a round to those of the other rounds."""
    rounds = results.setdefault(contender, {})
    for name, value in found.items():
        rounds.setdefault(name, []).append(value)


def print_table(results):
    """Prints the medians of all rounds as tables in Markdown."""

    def median(contender, name, figure):
        rounds = results[contender].get(name, [])
        values = [r[figure] for r in rounds if figure in r]
        return statistics.median(values) if values else None

    def cell(value, digits=1, scale=1):
        return "" if value is None else f"{scale * value:.{digits}f}"

    numbers = sorted(
        {int(name) for rounds in results.values() for name in rounds if name.isdigit()}
    )
    columns = [f"{n} clients: tokens/s | first, s | gap, ms" for n in numbers]
    print("| contender |", " | ".join(columns), "|")
    print("|---" * (1 + 3 * len(numbers)) + "|")
    for contender in results:
        cells = []
        for number in map(str, numbers):
            cells += [
                cell(median(contender, number, "tokens_per_second")),
                cell(median(contender, number, "first"), 2),
                cell(median(contender, number, "gap_p99"), 0, 1000),
            ]
        print(f"| {contender} |", " | ".join(cells), "|")
    print("\n| contender | 512 tokens alone, s | beside, s | ratio | largest gap, s |")
    print("|---|---|---|---|---|")
    for contender in results:
        alone = median(contender, "first_token", "alone")
        if alone is None:
            continue
        beside = median(contender, "first_token", "beside")
        gap = median(contender, "first_token", "largest_gap")
        ratio = f"{beside / alone:.2f}"
        print(f"| {contender} | {alone:.2f} | {beside:.2f} | {ratio} | {gap:.2f} |")
    texts = {}
    for contender, rounds in results.items():
        texts.setdefault(rounds["text"][0], []).append(contender)
    print("\nThe same text:", "; ".join(", ".join(group) for group in texts.values()))
