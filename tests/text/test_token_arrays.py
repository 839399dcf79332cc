"""Token ids and masks: what is taken, what is refused, and rows as arrays."""

import keras
import numpy as np
import pytest
from tokenizer_models import trained_model

from keras_openllama.models.tokenizer import OpenLlamaTokenizer
from keras_openllama.text.token_arrays import as_arrays, as_padding_mask, unpadded_ids

V2 = OpenLlamaTokenizer(trained_model(keep_spaces=True))
backend_free = pytest.mark.backend_free


def test_ids_are_taken_as_tensors_of_the_backend():
    ids = V2("some text")
    tensor = keras.ops.convert_to_tensor(ids, "int32")
    assert V2.detokenize(tensor) == "some text"
    assert V2.detokenize(tensor[None]) == ["some text"]
    assert V2.detokenize(list(tensor)) == "some text"
    assert V2.id_to_token(tensor[0]) == V2.id_to_token(ids[0])


@backend_free
def test_ids_are_taken_as_lists_and_arrays_of_any_integer_type():
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
def test_ids_out_of_range_are_named(bad):
    for ids in ([5, bad], [[5], [bad]]):
        with pytest.raises(ValueError, match=rf"`ids` holds {bad}.* size is 512"):
            V2.detokenize(ids)
    with pytest.raises(ValueError, match=rf"{bad}.*0 to 511"):
        V2.id_to_token(bad)


@backend_free
@pytest.mark.parametrize(
    "bad", [[1.5], "text", ["a"], [[[1]]], np.zeros((1, 1, 1), int), [None], [[1], 2]]
)
def test_ids_that_are_no_integers_are_refused(bad):
    with pytest.raises(ValueError, match="`ids`"):
        V2.detokenize(bad)


@backend_free
def test_rows_and_arrays_are_inverses():
    rows = [[5, 6, 7], [8]]
    arrays = as_arrays(rows, 4)
    assert arrays["token_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert arrays["padding_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert unpadded_ids(arrays, 512) == (rows, 4)


@backend_free
def test_no_mask_is_no_padding():
    assert as_padding_mask(None, (2, 3)).tolist() == [[True] * 3] * 2
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(1, 3\)"):
        as_padding_mask(np.ones((1, 3)), (2, 3))
