"""Answers are compared as SQuAD defines, and the harness can import that."""

import importlib
import sys

import pytest

from keras_openllama.evaluation import squad_metrics
from keras_openllama.evaluation.squad_metrics import compute_exact, compute_f1

pytestmark = pytest.mark.backend_free


def test_compute_exact_ignores_case_punctuation_and_articles():
    assert compute_exact("The U.S. Senate", "us senate") == 1
    assert compute_exact("Senate", "House") == 0


def test_compute_f1_is_over_words():
    # Three and two words, two in common: 2 * (1 * 2/3) / (1 + 2/3).
    assert compute_f1("Barack Hussein Obama", "barack obama") == pytest.approx(0.8)
    assert compute_f1("a cat", "dog") == 0
    assert compute_f1("the", "a") == 1  # Both are empty after normalization.
    assert compute_f1("the", "cat") == 0


def test_compute_f1_counts_repeated_words():
    assert compute_f1("no no yes", "no") == pytest.approx(0.5)


def test_provide_squad_metrics_is_temporary():
    name = "transformers.data.metrics.squad_metrics"
    before = name in sys.modules
    with squad_metrics.provide_squad_metrics():
        found = importlib.import_module(name)
        assert found.compute_f1("cat", "cat") == 1
    assert (name in sys.modules) == before
