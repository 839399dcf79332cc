"""How many tokens are added to each prompt, and which ids end it."""

import numpy as np
import pytest
from tokenizer_models import trained_model

from keras_openllama.generation.limits import new_token_limits, resolve_stop_ids
from keras_openllama.models.tokenizer import OpenLlamaTokenizer

pytestmark = pytest.mark.backend_free


def limits(lengths, max_length=None, max_new_tokens=None, default=32, context=64):
    return new_token_limits(lengths, max_length, max_new_tokens, default, context)


def test_max_length_counts_the_prompt_and_max_new_tokens_does_not():
    assert limits([3, 10], max_length=12) == [9, 2]
    assert limits([3, 10], max_new_tokens=12) == [12, 12]


def test_of_both_limits_the_nearer_counts():
    assert limits([3, 10], max_length=12, max_new_tokens=4) == [4, 2]


def test_the_default_length_ends_at_the_context():
    assert limits([3]) == [29]
    assert limits([3], default=100) == [61]


def test_a_full_row_gets_nothing_and_a_full_context_is_allowed():
    assert limits([12, 3], max_length=12) == [0, 9]
    assert limits([60], max_new_tokens=4) == [4]


@pytest.mark.parametrize("name", ["max_length", "max_new_tokens"])
@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "8"])
def test_what_is_no_number_of_tokens_is_refused(name, bad):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer .*{bad!r}"):
        limits([3], **{name: bad})
    assert limits([3], **{name: np.int64(8)}) == [5 if name == "max_length" else 8]


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([3, 65], {}, "prompt of 65 tokens, and the context of this model is 64"),
        ([3, 33], {}, "prompt of 33 tokens, more than max_length=32"),
        ([13], dict(max_length=12), "prompt of 13 tokens, more than max_length=12"),
        ([3], dict(max_length=65), "`max_length`=65 asks for .* up to 65 tokens"),
        ([3, 10], dict(max_new_tokens=55), "`max_new_tokens`=55 .* up to 65 tokens"),
    ],
)
def test_what_does_not_fit_is_named(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        limits(lengths, **options)


def test_stop_ids_are_the_end_token_unless_given():
    tokenizer = OpenLlamaTokenizer(trained_model(keep_spaces=True))
    assert resolve_stop_ids("auto", tokenizer, 512) == [tokenizer.end_token_id]
    assert resolve_stop_ids(None, tokenizer, 512) == []
    for ids in ([5, 7], (5, 7), np.array([5, 7])):
        assert resolve_stop_ids(ids, None, 512) == [5, 7]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("auto", '"auto".*tokenizer=None'),
        ("eos", "stop_token_ids='eos'"),
        ([512], "`stop_token_ids` must be from 0 to 511"),
        ([1.5], "`stop_token_ids` must be integers"),
    ],
)
def test_what_are_no_stop_ids_is_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        resolve_stop_ids(ids, None, 512)
