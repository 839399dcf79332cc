"""The limits of generation: lengths and stop ids."""

import numpy as np
import pytest

from keras_openllama.generation.limits import new_token_limits, resolve_stop_ids

pytestmark = pytest.mark.backend_free


def limits(lengths, max_length=None, max_new_tokens=None, default=32, context=64):
    return new_token_limits(lengths, max_length, max_new_tokens, default, context)


def test_max_length_includes_the_prompt_and_max_new_tokens_does_not():
    assert limits([3, 10], max_length=12) == [9, 2]
    assert limits([3, 10], max_new_tokens=12) == [12, 12]


def test_the_stricter_of_both_limits_applies():
    assert limits([3, 10], max_length=12, max_new_tokens=4) == [4, 2]


def test_default_length_is_limited_by_the_context():
    assert limits([3]) == [29]
    assert limits([3], default=100) == [61]


def test_limits_of_a_prompt_of_max_length_and_of_a_full_context():
    assert limits([12, 3], max_length=12) == [0, 9]
    assert limits([60], max_new_tokens=4) == [4]


@pytest.mark.parametrize("name", ["max_length", "max_new_tokens"])
@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "8"])
def test_invalid_limits_are_rejected(name, bad):
    with pytest.raises(
        ValueError,
        match=f"`{name}` must be a positive integer. Received: {name}={bad!r}",
    ):
        limits([3], **{name: bad})
    assert limits([3], **{name: np.int64(8)}) == [5 if name == "max_length" else 8]


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([3, 65], {}, "prompt of 65 tokens, but the context of this model is 64"),
        ([3, 33], {}, "prompt of 33 tokens, more than max_length=32"),
        ([13], dict(max_length=12), "prompt of 13 tokens, more than max_length=12"),
        (
            [3],
            dict(max_length=65),
            "`max_length`=65 allows sequences of up to 65 tokens",
        ),
        (
            [3, 10],
            dict(max_new_tokens=55),
            "`max_new_tokens`=55 allows sequences of up to 65",
        ),
    ],
)
def test_prompts_and_limits_beyond_the_context_are_rejected(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        limits(lengths, **options)


def test_resolve_stop_ids_defaults_to_the_end_tokens_of_the_model():
    assert resolve_stop_ids("auto", [2, 77], 512) == [2, 77]
    assert resolve_stop_ids(None, [2, 77], 512) == []
    assert resolve_stop_ids([], [2, 77], 512) == []
    for ids in ([5, 7], (5, 7), np.array([5, 7])):
        assert resolve_stop_ids(ids, [], 512) == [5, 7]
    for one in (5, np.int64(5)):
        assert resolve_stop_ids(one, [], 512) == [5]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("auto", r'"auto".*end_token_ids=\[\]'),
        ("eos", "stop_token_ids='eos'"),
        ([512], "`stop_token_ids` must be from 0 to 511"),
        ([1.5], "`stop_token_ids` must be integers"),
    ],
)
def test_resolve_stop_ids_rejects_invalid_values(ids, message):
    with pytest.raises(ValueError, match=message):
        resolve_stop_ids(ids, [], 512)
