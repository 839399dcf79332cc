"""Sequences for a calibration are spread evenly over its texts."""

import numpy as np
import pytest

from keras_openllama.text.calibration_sequences import calibration_sequences

pytestmark = pytest.mark.backend_free


class Letters:
    """A tokenizer: token 3 is "a". The start token is 1."""

    start_token_id = 1

    def tokenize(self, text):
        return [3 + ord(letter) - ord("a") for letter in text]


def sequences(dataset, tokenizer=None, **changes):
    options = {"length": 4, "count": 8, "vocabulary_size": 30, **changes}
    return calibration_sequences(dataset, tokenizer, **options).tolist()


def test_calibration_sequences_joins_texts_and_starts_each_with_the_start_token():
    assert sequences(["abc", "defgh"], Letters()) == [[1, 3, 4, 5], [1, 6, 7, 8]]
    assert sequences(["abcdefg"], Letters()) == [[1, 3, 4, 5], [1, 7, 8, 9]]
    # Not twice, if the ids have it.
    assert sequences([[1, 3, 4, 5, 6]], Letters()) == [[1, 3, 4, 5]]
    assert sequences(["ab"], Letters().tokenize, length=2) == [[3, 4]]


def test_calibration_sequences_takes_ids_and_generators():
    assert sequences([np.array([5, 6]), [7, 8, 9]]) == [[5, 6, 7, 8]]
    assert sequences(text for text in ("abc",)[:1] for text in [[5, 6]]) == [[5, 6]]
    assert sequences(np.arange(8).reshape(2, 4)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_calibration_sequences_is_spread_evenly():
    ids = np.arange(30)
    assert sequences([ids], length=2, count=3) == [[0, 1], [14, 15], [28, 29]]


@pytest.mark.parametrize(
    ("dataset", "tokenizer", "message"),
    [
        ("abc", Letters(), "`dataset` must be a list of strings.*dataset='abc'"),
        (None, Letters(), "`dataset` must be a list of strings"),
        ([], Letters(), "`dataset` must have at least two tokens. Received: 0"),
        (["abc"], None, "`tokenizer` must be a tokenizer, since `dataset` has strings"),
        ([[0.5, 1.5]], None, "`dataset` must be a list of strings"),
        ([[5, 30]], None, "`dataset` must be from 0 to 29.*Received: .30."),
    ],
)
def test_calibration_sequences_rejects_other_datasets(dataset, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        sequences(dataset, tokenizer)
