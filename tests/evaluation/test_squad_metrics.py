"""Answers are compared as SQuAD does, and the harness finds that."""

import importlib
import sys

import pytest

from keras_openllama.evaluation import squad_metrics
from keras_openllama.evaluation.squad_metrics import compute_exact, compute_f1

pytestmark = pytest.mark.backend_free


def test_case_punctuation_and_articles_do_not_count():
    assert compute_exact("The U.S. Senate", "us senate") == 1
    assert compute_exact("Senate", "House") == 0


def test_f1_is_that_of_the_words():
    # Three words and two, of which two are the same: 2 * (1 * 2/3) / (1 + 2/3).
    assert compute_f1("Barack Hussein Obama", "barack obama") == pytest.approx(0.8)
    assert compute_f1("a cat", "dog") == 0
    assert compute_f1("the", "a") == 1  # Nothing is left of both.
    assert compute_f1("the", "cat") == 0


def test_a_word_counts_as_often_as_it_is_there():
    assert compute_f1("no no yes", "no") == pytest.approx(0.5)


def test_the_harness_finds_them_only_meanwhile():
    name = "transformers.data.metrics.squad_metrics"
    before = name in sys.modules
    with squad_metrics.provided():
        found = importlib.import_module(name)
        assert found.compute_f1("cat", "cat") == 1
    assert (name in sys.modules) == before
