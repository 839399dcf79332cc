"""Validation of token ids and masks, and padding of sequences."""

import keras
import numpy as np
import pytest
from tokenizer_models import trained_model

from keras_openllama.models.tokenizer import OpenLlamaTokenizer
from keras_openllama.text.token_arrays import (
    as_padding_mask,
    pad_sequences,
    unpadded_ids,
)

V2 = OpenLlamaTokenizer(trained_model(keep_spaces=True))
backend_free = pytest.mark.backend_free


def test_detokenize_accepts_backend_tensors():
    ids = V2("some text")
    tensor = keras.ops.convert_to_tensor(ids, "int32")
    assert V2.detokenize(tensor) == "some text"
    assert V2.detokenize(tensor[None]) == ["some text"]
    assert V2.detokenize(list(tensor)) == "some text"
    assert V2.id_to_token(tensor[0]) == V2.id_to_token(ids[0])


@backend_free
def test_detokenize_accepts_lists_and_arrays_of_any_integer_dtype():
    ids = V2("some text")
    for dtype in ("int32", "int64", "uint16"):
        assert V2.detokenize(np.array(ids, dtype)) == "some text"
    assert V2.detokenize(np.array([ids, ids])) == ["some text"] * 2
    assert V2.detokenize([np.array(ids), ids[:0]]) == ["some text", ""]
    assert V2.detokenize([np.array(ids), np.array(ids)]) == ["some text"] * 2
    assert V2.detokenize((tuple(ids), tuple(ids))) == ["some text"] * 2
    assert V2.detokenize(tuple(ids)) == "some text"
    assert V2.detokenize(V2.token_to_id("a")) == "a"


@backend_free
@pytest.mark.parametrize("bad", [512, -1, 10**9, 2**62])
def test_detokenize_rejects_ids_outside_the_vocabulary(bad):
    for ids in ([5, bad], [[5], [bad]]):
        with pytest.raises(ValueError, match=rf"`ids` .* 0 to 511. Received: {bad}$"):
            V2.detokenize(ids)
    with pytest.raises(ValueError, match=rf"0 to 511.*{bad}"):
        V2.id_to_token(bad)


@backend_free
@pytest.mark.parametrize(
    "bad", [[1.5], "text", ["a"], [[[1]]], np.zeros((1, 1, 1), int), [None], [[1], 2]]
)
def test_detokenize_rejects_ids_that_are_not_integers(bad):
    with pytest.raises(ValueError, match="`ids`"):
        V2.detokenize(bad)


@backend_free
def test_unpadded_ids_is_the_inverse_of_pad_sequences():
    sequences = [[5, 6, 7], [8]]
    arrays = pad_sequences(sequences, 4)
    assert arrays["token_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert arrays["padding_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert unpadded_ids(arrays, 512) == (sequences, 4)


@backend_free
def test_as_padding_mask_of_none_is_no_padding():
    assert as_padding_mask(None, (2, 3)).tolist() == [[True] * 3] * 2
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(1, 3\)"):
        as_padding_mask(np.ones((1, 3)), (2, 3))
