"""Exact match and F1 of short answers, as defined by SQuAD.

The harness's task `record` imports them from transformers, which removed them in
version 5.

Source: SQuAD (arXiv:1606.05250), evaluation script of version 1.1.
"""

import contextlib
import importlib.util
import re
import string
import sys
import types
from collections import Counter
from collections.abc import Iterator

_MODULE = "transformers.data.metrics.squad_metrics"


def compute_exact(gold: str, predicted: str) -> int:
    """Returns 1 if both answers are equal after normalization, else 0.

    Normalization removes case, punctuation and articles.

    Example:
        >>> compute_exact("The U.S. Senate", "us senate")
        1
    """
    return int(_normalize(gold) == _normalize(predicted))


def compute_f1(gold: str, predicted: str) -> float:
    """Returns the harmonic mean of precision and recall over the answers' words.

    Example:
        >>> compute_f1("Barack Hussein Obama", "barack obama")
        0.8
    """
    gold, predicted = _normalize(gold).split(), _normalize(predicted).split()
    if not gold or not predicted:
        return int(gold == predicted)
    common = (Counter(gold) & Counter(predicted)).total()
    return 2 * common / (len(gold) + len(predicted))


@contextlib.contextmanager
def provide_squad_metrics() -> Iterator[None]:
    """Lets the harness import these functions if transformers does not have them."""
    parts = _MODULE.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    missing = [name for name in names if not _can_import(name)]
    for name in missing:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].compute_exact = compute_exact
        sys.modules[name].compute_f1 = compute_f1
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def _can_import(name):
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # The parent package does not exist.
        return False


def _normalize(answer):
    text = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
