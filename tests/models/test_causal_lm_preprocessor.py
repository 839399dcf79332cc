"""The preprocessor: training arrays, prompts, invalid input, `tf.data`."""

import warnings

import keras
import numpy as np
import pytest

from keras_openllama.backend.keras_hub import CausalLMPreprocessor
from keras_openllama.models.causal_lm_preprocessor import OpenLlamaCausalLMPreprocessor
from keras_openllama.models.tokenizer import OpenLlamaTokenizer
from tests.support.tokenizer_models import trained_model

TOKENIZER = OpenLlamaTokenizer(trained_model(keep_spaces=True))
TEXT = "some text"
IDS = TOKENIZER(TEXT)
LONG = "a long text " * 20
DTYPES = ["int32", "bool", "int32", "float32"]
backend_free = pytest.mark.backend_free


def make(tokenizer=TOKENIZER, sequence_length=12, **options):
    return OpenLlamaCausalLMPreprocessor(tokenizer, sequence_length, **options)


def padded(ids, length=12):
    return [*ids, *[0] * (length - len(ids))]


# --- Training ---


@backend_free
def test_call_returns_inputs_and_targets_shifted_by_one():
    x, y, sample_weight = make()([TEXT])
    ids = [1, *IDS, 2]
    assert x["token_ids"].tolist() == [padded(ids)]
    assert x["padding_mask"].tolist() == [padded([True] * len(ids))]
    assert y.tolist() == [padded(ids[1:])]
    assert sample_weight.tolist() == [padded([1.0] * (len(ids) - 1))]


@backend_free
def test_call_returns_numpy_arrays_of_fixed_shape_and_dtype():
    for inputs, shape in ((TEXT, (12,)), ([TEXT, LONG, ""], (3, 12)), ([], (0, 12))):
        x, y, sample_weight = make()(inputs)
        arrays = [x["token_ids"], x["padding_mask"], y, sample_weight]
        assert all(type(array) is np.ndarray for array in arrays)
        assert [array.shape for array in arrays] == [shape] * 4
        assert [array.dtype for array in arrays] == [
            "int32",
            "bool",
            "int32",
            "float32",
        ]


@backend_free
def test_call_on_a_single_text_equals_its_row_of_a_batch():
    single, batch = make()(TEXT), make()([TEXT])
    keras.tree.map_structure(
        lambda alone, row: np.testing.assert_array_equal(alone, row[0]), single, batch
    )


@backend_free
def test_call_truncates_long_texts_at_the_end():
    ids = [1, *TOKENIZER(LONG)]
    x, y, sample_weight = make()([LONG])
    assert x["token_ids"].tolist() == [ids[:12]]
    assert y.tolist() == [ids[1:13]]
    assert x["padding_mask"].all() and sample_weight.all()
    assert 2 not in y  # The text does not end here.


@backend_free
def test_end_token_is_the_last_target_of_a_text_that_just_fits():
    x, y, sample_weight = make(sequence_length=len(IDS) + 1)([TEXT])
    assert x["token_ids"].tolist() == [[1, *IDS]]
    assert y.tolist() == [[*IDS, 2]]
    assert sample_weight.all()


@backend_free
@pytest.mark.parametrize("add_start_token", [False, True])
@pytest.mark.parametrize("add_end_token", [False, True])
@pytest.mark.parametrize("of_tokenizer", [False, True])
def test_start_and_end_tokens_follow_the_options_and_are_never_doubled(
    add_start_token, add_end_token, of_tokenizer
):
    tokenizer = OpenLlamaTokenizer(
        TOKENIZER.proto, add_bos=of_tokenizer, add_eos=of_tokenizer
    )
    preprocessor = make(
        tokenizer, add_start_token=add_start_token, add_end_token=add_end_token
    )
    start, end = [1] * add_start_token, [2] * add_end_token
    x, _, _ = preprocessor([TEXT])
    assert x["token_ids"].tolist() == [padded([*start, *IDS, *end])]
    assert preprocessor.prompt_ids([TEXT]) == [[*start, *IDS]]
    prompt = preprocessor.generate_preprocess([TEXT])
    assert prompt["token_ids"].tolist() == [padded([*start, *IDS])]


@backend_free
def test_control_strings_in_texts_stay_text():
    preprocessor = make(sequence_length=40)
    text = "a</s> <s>b"
    x, _, _ = preprocessor([text])
    assert x["token_ids"].tolist() == [padded([1, *TOKENIZER(text), 2], 40)]
    assert preprocessor.prompt_ids([text]) == [[1, *TOKENIZER(text)]]


@backend_free
def test_sequence_length_can_be_set_and_overridden():
    preprocessor = make()
    preprocessor.sequence_length = 5
    assert preprocessor.sequence_length == 5
    assert preprocessor([TEXT])[1].shape == (1, 5)
    assert preprocessor([TEXT], sequence_length=7)[1].shape == (1, 7)
    assert preprocessor.generate_preprocess(["a"])["token_ids"].shape == (1, 5)
    prompt = preprocessor.generate_preprocess(["a"], sequence_length=9)
    assert prompt["padding_mask"].shape == (1, 9)


@backend_free
def test_default_sequence_length_is_the_models_context():
    assert OpenLlamaCausalLMPreprocessor(TOKENIZER).sequence_length == 2048


@backend_free
def test_sample_weights_multiply_the_mask():
    texts = [TEXT, LONG]
    mask = make()(texts)[2]
    per_text = np.array([0.5, 2.0])
    weights = make()(texts, sample_weight=per_text)[2]
    np.testing.assert_array_equal(weights, mask * [[0.5], [2.0]])
    per_target = np.arange(24.0).reshape(2, 12)
    weights = make()(texts, sample_weight=per_target)[2]
    np.testing.assert_array_equal(weights, mask * per_target)
    assert weights.dtype == "float32"


@backend_free
def test_sample_weight_per_text_if_batch_size_equals_sequence_length():
    texts, per_text = [TEXT] * 12, np.arange(12.0)
    mask = make()(texts)[2]
    weights = make()(texts, sample_weight=per_text)[2]
    np.testing.assert_array_equal(weights, mask * per_text[:, None])


@backend_free
def test_sample_weight_of_a_single_text():
    mask = make()(TEXT)[2]
    weights = make()(TEXT, sample_weight=0.5)[2]
    np.testing.assert_array_equal(weights, mask * 0.5)
    weights = make()(TEXT, sample_weight=np.arange(12.0))[2]
    np.testing.assert_array_equal(weights, mask * np.arange(12))


@backend_free
@pytest.mark.parametrize(
    "texts",
    [
        (TEXT.encode(), LONG.encode()),
        np.array([TEXT, LONG]),
        np.array([TEXT.encode(), LONG], dtype=object),
    ],
    ids=["bytes", "array", "objects"],
)
def test_all_types_of_batches_give_the_same_arrays(texts):
    # A keyword, since Keras takes a tuple as (x, y).
    got, expected = make()(x=texts), make()([TEXT, LONG])
    keras.tree.map_structure(np.testing.assert_array_equal, got, expected)
    got, expected = (make().generate_preprocess(t, 200) for t in (texts, [TEXT, LONG]))
    keras.tree.map_structure(np.testing.assert_array_equal, got, expected)


# --- Generation ---


@backend_free
def test_prompt_ids_have_a_start_token_and_no_end_token():
    assert make().prompt_ids([TEXT, "a"]) == [[1, *IDS], [1, *TOKENIZER("a")]]


@backend_free
def test_prompt_ids_does_not_double_a_parsed_start_token():
    prompts = make().prompt_ids(["<s>" + TEXT, TEXT, "<s>"], parse_special=True)
    assert prompts == [[1, *IDS], [1, *IDS], [1]]


@backend_free
def test_generate_preprocess_and_postprocess_are_inverses():
    for prompts in (TEXT, [TEXT, "  a\n", "🦙"]):
        arrays = make().generate_preprocess(prompts)
        assert arrays["token_ids"].dtype == "int32"
        assert arrays["padding_mask"].dtype == "bool"
        assert make().generate_postprocess(arrays) == prompts


def test_generate_postprocess_accepts_tensors_and_decodes_unmasked_tokens():
    ids = [[1, *IDS, 2, 300], [1, 2, *IDS, 301]]
    mask = [[1] * (len(IDS) + 2) + [0], [1] * (len(IDS) + 2) + [0]]
    rows = {
        "token_ids": keras.ops.convert_to_tensor(ids, "int32"),
        "padding_mask": keras.ops.convert_to_tensor(mask, "bool"),
    }
    assert make().generate_postprocess(rows) == [TEXT, TEXT]
    row = {name: tensor[0] for name, tensor in rows.items()}
    assert make().generate_postprocess(row) == TEXT


# --- Invalid input ---


@backend_free
def test_prompt_ids_rejects_an_empty_prompt():
    v1 = OpenLlamaTokenizer(trained_model(keep_spaces=False))
    v1._warned_of_lost_spaces = True
    for add_start_token in (True, False):
        for prompts, tokenizer in (("", TOKENIZER), ("   ", v1)):
            preprocessor = make(tokenizer, add_start_token=add_start_token)
            with pytest.raises(ValueError, match=r"`texts\[0\]` is an empty prompt"):
                preprocessor.prompt_ids([prompts])
    with pytest.raises(ValueError, match=r"`x\[1\]` is an empty prompt"):
        make().generate_preprocess(["a", ""])


@backend_free
def test_generate_preprocess_rejects_a_prompt_beyond_sequence_length():
    count = len(TOKENIZER(LONG)) + 1
    with pytest.raises(ValueError, match=rf"`x\[1\]` is a prompt of {count} .* 12"):
        make().generate_preprocess(["a", LONG])


@backend_free
@pytest.mark.parametrize("bad", [0, -1, 1.5, "12", None, True])
def test_invalid_sequence_length_is_rejected(bad):
    with pytest.raises(ValueError, match="`sequence_length`"):
        make(sequence_length=bad)
    preprocessor = make()
    with pytest.raises(ValueError, match="`sequence_length`"):
        preprocessor.sequence_length = bad
    if bad is not None:
        with pytest.raises(ValueError, match="`sequence_length`"):
            preprocessor([TEXT], sequence_length=bad)


@backend_free
def test_call_rejects_token_ids_as_y():
    with pytest.raises(ValueError, match=r"x\['response'\]\[0\]` must be a string"):
        make()([TEXT], y=[[1, 2]])


@backend_free
@pytest.mark.parametrize("shape", [(3,), (1, 12), (2, 11), (2, 1, 1), ()])
def test_sample_weights_of_the_wrong_shape_are_rejected(shape):
    with pytest.raises(ValueError, match="`sample_weight` must hold"):
        make()([TEXT, TEXT], sample_weight=np.ones(shape))


@backend_free
def test_error_names_inputs_that_are_not_text():
    with pytest.raises(ValueError, match=r"`x\[1\]` must be a string.*7"):
        make()([TEXT, 7])
    with pytest.raises(ValueError, match=r"`x\[1\]` must be a string.*7"):
        make().generate_preprocess([TEXT, 7])


@backend_free
def test_generate_postprocess_rejects_arrays_of_different_shapes():
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(1, 2\)"):
        make().generate_postprocess(
            {"token_ids": np.ones((1, 3), int), "padding_mask": np.ones((1, 2), bool)}
        )


# --- In TensorFlow graphs ---


def equal(tensors, arrays):
    keras.tree.map_structure(
        lambda tensor, array: np.testing.assert_array_equal(tensor.numpy(), array),
        tensors,
        arrays,
    )


@pytest.fixture
def tensorflow():
    return pytest.importorskip("tensorflow")


def test_call_in_a_tf_dataset_has_static_shapes_and_the_same_values(tensorflow):
    texts = [TEXT, LONG, "🦙"]
    dataset = tensorflow.data.Dataset.from_tensor_slices(texts)
    batches = dataset.batch(3, drop_remainder=True).map(make())
    x, y, sample_weight = batches.element_spec
    specs = [x["token_ids"], x["padding_mask"], y, sample_weight]
    assert [spec.shape.as_list() for spec in specs] == [[3, 12]] * 4
    assert [spec.dtype.name for spec in specs] == DTYPES
    [batch] = batches
    equal(batch, make()(texts))

    rows = dataset.map(make())
    assert rows.element_spec[1].shape.as_list() == [12]
    for row, text in zip(rows, texts, strict=True):
        equal(row, make()(text))

    some = dataset.batch(2).map(lambda texts: make()(texts, sequence_length=5))
    assert some.element_spec[1].shape.as_list() == [None, 5]


@backend_free
def test_call_in_a_tf_dataset_warns_at_1_10_and_100_truncated_examples(tensorflow):
    texts = [TEXT, *[LONG] * 100]  # The first batch has no truncated example.
    dataset = tensorflow.data.Dataset.from_tensor_slices(texts).batch(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len([*dataset.map(make())]) == len(texts)
    found = [str(warning.message) for warning in caught]
    counts = [text.split(" were")[0] for text in found if "were truncated to" in text]
    assert counts == [
        "1 of the 2 examples so far",
        "10 of the 11 examples so far",
        "100 of the 101 examples so far",
    ]


@backend_free
def test_sample_weights_multiply_the_mask_in_a_tf_dataset(tensorflow):
    texts, weights = [TEXT, LONG], np.array([0.5, 2.0], "float32")
    dataset = tensorflow.data.Dataset.from_tensor_slices((texts, weights)).batch(2)
    [batch] = dataset.map(lambda text, weight: make()(text, sample_weight=weight))
    equal(batch, make()(texts, sample_weight=weights))


@backend_free
def test_generate_preprocess_pads_prompts_in_a_tf_dataset(tensorflow):
    dataset = tensorflow.data.Dataset.from_tensor_slices([TEXT, "a"]).batch(2)
    prompts = dataset.map(make().generate_preprocess)
    assert prompts.element_spec["token_ids"].shape.as_list() == [None, 12]
    [rows] = prompts
    equal(rows, make().generate_preprocess([TEXT, "a"]))


@backend_free
def test_call_accepts_eager_string_tensors(tensorflow):
    got = make()(tensorflow.constant([TEXT, LONG]))
    keras.tree.map_structure(np.testing.assert_array_equal, got, make()([TEXT, LONG]))
    assert make()(tensorflow.constant(TEXT))[1].shape == (12,)


@backend_free
def test_call_rejects_a_matrix_of_strings_in_a_tf_dataset(tensorflow):
    dataset = tensorflow.data.Dataset.from_tensor_slices([[[TEXT]]])
    for function in (make(), make().generate_preprocess):
        with pytest.raises(ValueError, match=r"`x` must be .* one dimension"):
            dataset.map(function)
    prompts = tensorflow.data.Dataset.from_tensor_slices([TEXT])
    pairs = tensorflow.data.Dataset.zip(prompts, dataset)
    with pytest.raises(ValueError, match=r"`x\['response'\]` must be a string tensor"):
        pairs.map(make())


@backend_free
def test_call_rejects_token_ids_in_a_tf_dataset(tensorflow):
    dataset = tensorflow.data.Dataset.from_tensor_slices([[1, 5, 6]])
    with pytest.raises(ValueError, match="`x` must be a string tensor"):
        dataset.map(make())


@backend_free
def test_preprocessor_is_a_keras_hub_preprocessor():
    assert issubclass(OpenLlamaCausalLMPreprocessor, CausalLMPreprocessor)
    assert OpenLlamaCausalLMPreprocessor.tokenizer_cls is OpenLlamaTokenizer
    assert OpenLlamaCausalLMPreprocessor.backbone_cls is OpenLlamaTokenizer.backbone_cls
