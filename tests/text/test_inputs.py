"""Normalization of user inputs of every kind."""

import importlib

import keras
import numpy as np
import pytest
from tokenizer_models import trained_model

from keras_openllama.models.tokenizer import OpenLlamaTokenizer
from keras_openllama.text.input_kinds import (
    Batches,
    ChatExample,
    ChatPrompts,
    Examples,
    GraphTexts,
    Pair,
    RawInputs,
    Texts,
    TokenArrays,
)
from keras_openllama.text.inputs import (
    normalize_examples,
    normalize_prompts,
    normalize_sequences,
    normalize_training_data,
)

V2 = OpenLlamaTokenizer(trained_model(keep_spaces=True))
backend_free = pytest.mark.backend_free
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
ASKED = TALK[:1]


@pytest.fixture
def tf():
    return pytest.importorskip("tensorflow")


# ----- Texts


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
def test_tokenizer_accepts_every_kind_of_batch(batch):
    assert V2(batch) == [V2("naïve"), V2("b")]


@backend_free
def test_tokenizer_accepts_every_kind_of_single_text():
    for text in ("naïve", "naïve".encode(), np.array("naïve"), np.str_("naïve")):
        assert V2(text) == V2.tokenize("naïve")
    ids = V2("naïve")
    assert isinstance(ids, list) and all(type(i) is int for i in ids)


@backend_free
def test_tokenizer_accepts_empty_text_and_empty_batch():
    assert V2("") == [] and V2([]) == [] and V2([""]) == [[]]
    assert V2.detokenize([]) == "" and V2.detokenize([[], [5]]) == ["", "\x02"]


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
def test_tokenize_rejects_inputs_that_are_not_text(bad, message):
    with pytest.raises(ValueError, match=message):
        V2.tokenize(bad)


TEXTS = {
    "a string": ("naïve", False),
    "bytes": ("naïve".encode(), False),
    "a scalar array": (np.array("naïve"), False),
    "a list": (["naïve"], True),
    "a tuple of bytes": (("naïve".encode(),), True),
    "an array": (np.array(["naïve"]), True),
    "an array of objects": (np.array(["naïve"], dtype=object), True),
}


@backend_free
@pytest.mark.parametrize("kind", TEXTS)
def test_each_normalize_function_accepts_each_kind_of_text(kind):
    inputs, batched = TEXTS[kind]
    expected = Texts(["naïve"], batched)
    assert normalize_prompts(inputs, 512) == expected
    assert normalize_sequences(inputs) == expected
    assert normalize_examples(inputs) == expected
    assert normalize_training_data(inputs) == expected


def test_each_normalize_function_accepts_string_tensors(tf):
    for inputs, batched in ((tf.constant("a"), False), (tf.constant(["a"]), True)):
        expected = Texts(["a"], batched)
        assert normalize_prompts(inputs, 512) == expected
        assert normalize_sequences(inputs) == expected
        assert normalize_training_data(inputs) == expected
    assert normalize_prompts([tf.constant("a")], 512) == Texts(["a"], True)


# ----- Prompts


@backend_free
def test_normalize_prompts_accepts_chats():
    for inputs in ([{"messages": ASKED}], {"messages": [ASKED]}):
        assert normalize_prompts(inputs, 512) == ChatPrompts([ASKED], True)
    assert normalize_prompts({"messages": ASKED}, 512) == ChatPrompts([ASKED], False)


@backend_free
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"messages": []}, r"`inputs\['messages'\]` must be a non-empty list"),
        ({"messages": None}, r"`inputs\['messages'\]` must be a non-empty list"),
        ({"messages": [ASKED, []]}, r"must be a non-empty list.*Received: \[\]"),
        ([{"messages": ASKED}, {"prompt": "Hi"}], r"`inputs\[1\]`.*keys \['prompt'\]"),
        ([{"messages": [ASKED, ASKED]}], r"`inputs\[0\]` must be one.*Received: 2"),
        ({"prompt": "Hi"}, r"a chat with the key \"messages\".*keys \['prompt'\]"),
    ],
)
def test_normalize_prompts_rejects_malformed_chats(inputs, message):
    with pytest.raises(ValueError, match=message):
        normalize_prompts(inputs, 512)


@backend_free
def test_normalize_prompts_accepts_token_ids():
    inputs = {
        "token_ids": [[1, 5, 6], [1, 7, 0]],
        "padding_mask": [[1, 1, 1], [1, 1, 0]],
    }
    expected = TokenArrays([[1, 5, 6], [1, 7]], 3)
    for has_preprocessor in (True, False):
        assert normalize_prompts(inputs, 512, has_preprocessor) == expected
    inputs.pop("padding_mask")
    assert normalize_prompts(inputs, 512).sequences == [[1, 5, 6], [1, 7, 0]]


def test_normalize_prompts_accepts_a_dataset(tf):
    dataset = tf.data.Dataset.from_tensor_slices(["a", "b", "c"])
    found = normalize_prompts(dataset, 512)
    assert isinstance(found, Batches)
    assert list(found.batches) == [Texts([text], True) for text in "abc"]
    found = normalize_prompts(dataset.batch(2), 512)
    assert list(found.batches) == [Texts(["a", "b"], True), Texts(["c"], True)]


def test_normalize_prompts_rejects_empty_batches(tf):
    message = "`inputs` must hold at least one prompt"
    for inputs in ([], np.array([], dtype=str), tf.constant([], "string")):
        with pytest.raises(ValueError, match=message):
            normalize_prompts(inputs, 512)
    with pytest.raises(ValueError, match=message):
        list(normalize_prompts(tf.data.Dataset.from_tensors([""][:0]), 512).batches)


@backend_free
def test_normalize_prompts_without_preprocessor_accepts_token_ids_only():
    for inputs in ("a", ["a"], {"messages": ASKED}):
        with pytest.raises(ValueError, match=r"has no `preprocessor`, so.*token_ids"):
            normalize_prompts(inputs, 512, has_preprocessor=False)


def test_normalize_prompts_without_preprocessor_rejects_a_dataset_of_texts(tf):
    dataset = tf.data.Dataset.from_tensor_slices(["a"])
    with pytest.raises(ValueError, match=r"has no `preprocessor`, so.*Dataset"):
        normalize_prompts(dataset, 512, has_preprocessor=False)


# ----- Sequences to score


@backend_free
def test_normalize_sequences_returns_texts_or_arrays():
    for ids in ([[1, 2]], np.array([[1, 2]])):
        assert normalize_sequences(ids).inputs is ids
    assert normalize_sequences("a", has_preprocessor=False) == RawInputs("a")


# ----- Examples

PAIRS = [Pair("2 + 2 =", " 4"), Pair("up", " down")]
AS_LIST = [{"prompt": pair.prompt, "response": pair.response} for pair in PAIRS]
AS_DICT = {"prompt": ["2 + 2 =", "up"], "response": [" 4", " down"]}


@backend_free
@pytest.mark.parametrize(
    "inputs",
    [
        (AS_LIST,),
        (tuple(AS_LIST),),
        (AS_DICT,),
        ({name: np.array(texts) for name, texts in AS_DICT.items()},),
        ({name: [t.encode() for t in texts] for name, texts in AS_DICT.items()},),
        tuple(AS_DICT.values()),
        tuple(map(np.array, AS_DICT.values())),
    ],
    ids=["list", "tuple", "dict", "arrays", "bytes", "x and y", "arrays x and y"],
)
def test_normalize_examples_accepts_every_kind_of_pairs(inputs):
    assert normalize_training_data(*inputs) == Examples(PAIRS, True)
    assert normalize_examples(*inputs) == Examples(PAIRS, True)


@backend_free
def test_normalize_examples_marks_a_single_example_as_unbatched():
    assert normalize_examples(AS_LIST[0]) == Examples(PAIRS[:1], False)
    assert normalize_examples("2 + 2 =", " 4") == Examples(PAIRS[:1], False)
    found = normalize_examples({"messages": TALK})
    assert found == Examples([ChatExample(TALK, "x['messages']")], False)


@backend_free
def test_normalize_training_data_accepts_pairs_mixed_with_chats():
    found = normalize_training_data([AS_LIST[0], {"messages": TALK}])
    assert found == Examples([PAIRS[0], ChatExample(TALK, "x[1]['messages']")], True)
    found = normalize_training_data({"messages": [TALK, ASKED]})
    assert [chat.messages for chat in found.examples] == [TALK, ASKED]


@backend_free
@pytest.mark.parametrize(
    ("x", "message"),
    [
        ({"prompt": ["a", "b"], "response": ["c"]}, "2 prompts and 1 responses"),
        ({"prompt": "a"}, r"`x` must have the keys.*keys \['prompt'\]"),
        ([*AS_LIST, {"prompt": "a", "answer": "b"}], r"`x\[2\]` must have the keys"),
        ([AS_DICT], r"`x\[0\]` must be one pair or one chat.* 2 of them"),
        ({"prompt": ["a", ""], "response": ["b", "c"]}, "1 of 2 prompts .* at 1"),
        ({"prompt": "a", "response": 7}, r"`x\['response'\]` must be a string"),
        ({"messages": "Hi"}, r"`x\['messages'\]` must be a non-empty list of messages"),
    ],
)
def test_normalize_examples_names_malformed_examples(x, message):
    for normalize in (normalize_examples, normalize_training_data):
        with pytest.raises(ValueError, match=message):
            normalize(x)


# ----- Training data


class OneBatch(keras.utils.PyDataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return AS_DICT


@pytest.mark.parametrize("kind", ["tf.data", "PyDataset", "generator", "grain"])
def test_normalize_training_data_returns_datasets_unconsumed(kind):
    if kind == "tf.data":
        tf = pytest.importorskip("tensorflow")
        data = tf.data.Dataset.from_tensors(AS_DICT)
    elif kind == "grain":
        grain = importlib.import_module("grain")
        data = grain.MapDataset.source(AS_LIST).batch(2)
    else:
        data = OneBatch() if kind == "PyDataset" else (batch for batch in [AS_DICT])
    for has_preprocessor in (True, False):
        found = normalize_training_data(data, has_preprocessor=has_preprocessor)
        assert isinstance(found, Batches) and found.batches is data
    if kind == "generator":
        assert next(data) is AS_DICT


def test_normalize_training_data_returns_token_ids_as_arrays():
    ids = keras.ops.ones((1, 3), "int32")
    x = {"token_ids": ids, "padding_mask": ids}
    found = normalize_training_data(x, ids)
    assert isinstance(found, RawInputs) and found.inputs is x


@backend_free
@pytest.mark.parametrize("x", ["text", ["text"], AS_DICT, AS_LIST, {"messages": TALK}])
def test_normalize_training_data_without_preprocessor_rejects_text(x):
    with pytest.raises(ValueError, match="need a preprocessor"):
        normalize_training_data(x, has_preprocessor=False)


@backend_free
@pytest.mark.parametrize("x", [[], ["a", 7], [*AS_LIST, "a"], {"question": ["a"]}])
def test_normalize_training_data_rejects_other_inputs(x):
    with pytest.raises(ValueError, match=r"all of one kind.*Received"):
        normalize_training_data(x)


def test_normalize_training_data_distinguishes_texts_and_ids_in_a_graph(tf):
    found = []

    def normalize(*batch):
        found.append(normalize_training_data(*batch))
        return 0

    ids = {"token_ids": [[1]], "padding_mask": [[1]]}
    for elements in (["a"], AS_DICT, tuple(AS_DICT.values()), ids):
        tf.data.Dataset.from_tensors(elements).map(normalize)
    assert [type(one) for one in found] == [GraphTexts] * 3 + [RawInputs]
    assert set(found[1].tensors) == set(found[2].tensors) == {"prompt", "response"}
