import keras
import numpy as np
import pytest

from keras_openllama.models.tokenizer import OpenLlamaTokenizer
from tests.support.tokenizer_models import trained_model

V2 = OpenLlamaTokenizer(trained_model(keep_spaces=True))
backend_free = pytest.mark.backend_free


@backend_free
@pytest.mark.parametrize(
    "batch",
    [
        ["naïve", "b"],
        ("naïve", "b"),
        ["naïve".encode(), b"b"],
        np.array(["naïve", "b"]),
        np.array(["naïve", "b"], dtype=object),
        np.array(["naïve".encode(), b"b"]),
    ],
    ids=["list", "tuple", "bytes", "array of str", "objects", "array of bytes"],
)
def test_every_kind_of_batch_is_taken(batch):
    assert V2(batch) == [V2("naïve"), V2("b")]


@backend_free
def test_every_kind_of_single_text_is_taken():
    for text in ("naïve", "naïve".encode(), np.array("naïve"), np.str_("naïve")):
        assert V2(text) == V2.tokenize("naïve")
    ids = V2("naïve")
    assert isinstance(ids, list) and all(type(i) is int for i in ids)


@backend_free
def test_empty_text_and_empty_batch():
    assert V2("") == [] and V2([]) == [] and V2([""]) == [[]]
    assert V2.detokenize([]) == "" and V2.detokenize([[], [5]]) == ["", "\x02"]


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
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (3, "`inputs` must be a string.*3.*int"),
        (["a", 3], r"`inputs\[1\]` must be a string.*3"),
        (["a", None], r"`inputs\[1\]` must be a string.*None"),
        (b"\xff", "`inputs` is not valid Unicode"),
        (["a", "\ud800"], r"`inputs\[1\]` is not valid Unicode"),
        (np.array([["a"]]), r"shape \(1, 1\)"),
        (np.array([1, 2]), r"`inputs\[0\]` must be a string.*1"),
    ],
)
def test_inputs_that_are_no_text_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        V2.tokenize(bad)
