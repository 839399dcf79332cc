"""`fit` on texts, pairs and chats, in any container, with and without packing."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops
from pairs import AS_DICT, PAIRS, PROMPTS, RESPONSES, SHAPE, Pairs, make_lm, tf_dataset
from tensorflow_marks import first_on_tensorflow
from tiny_models import random_lm
from tokenizer_models import trained_model

from keras_openllama.backend.keras_private import kernel_variable
from keras_openllama.optimizers import AdamW
from keras_openllama.text.inputs import normalize_examples

pytestmark = pytest.mark.usefixtures("compile_fast")

AS_LIST = [{"prompt": p, "response": r} for p, r in PAIRS]
TEMPLATE = {
    "system": "{content}\n",
    "user": "USER: {content}\n",
    "assistant": "BOT: {content}!",
}


def sum_of_losses(lm):
    """Sum of the losses of all tokens of the responses, and their number."""
    total = count = 0
    for prompt, response in PAIRS:
        prompt_ids = lm.preprocessor.prompt_ids([prompt])[0]
        sequence = lm.preprocessor.prompt_ids([prompt + response])[0]
        if sequence[: len(prompt_ids)] != prompt_ids:
            rest = lm.preprocessor.tokenizer.tokenize_continuation(response)
            sequence = prompt_ids + rest
        ids = np.array([[*sequence, lm.preprocessor.tokenizer.end_token_id]])
        logits = ops.convert_to_numpy(lm.score(ids[:, :-1])).astype("float64")[0]
        for position in range(len(prompt_ids) - 1, ids.shape[1] - 1):
            position_logits = logits[position]
            largest = position_logits.max()
            log_normalizer = largest + np.log(np.exp(position_logits - largest).sum())
            total += log_normalizer - position_logits[ids[0, position + 1]]
            count += 1
    return total, count


# ----- The loss of responses


@pytest.mark.parametrize("name", ["batch_size", "validation_batch_size"])
def test_fit_rejects_a_batch_size_of_zero(name):
    lm = make_lm(length=32)
    with pytest.raises(ValueError, match="`batch_size` must be a positive integer"):
        lm.fit(AS_DICT, validation_data=AS_DICT, verbose=0, **{name: 0})


@first_on_tensorflow("length", [32, 40])
def test_evaluate_counts_only_responses(length):
    lm = make_lm(length=length)
    total, count = sum_of_losses(lm)
    found = lm.evaluate(AS_DICT, batch_size=3, verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)
    size = sum(len(response.encode()) for response in RESPONSES)
    assert found["bits_per_byte"] == pytest.approx(total / np.log(2) / size, rel=1e-5)


@pytest.mark.slow_on_tensorflow
def test_pack_does_not_change_the_loss():
    lm = make_lm(length=40)
    plain = lm.evaluate(AS_DICT, verbose=0, return_dict=True)
    packed = lm.evaluate(AS_DICT, verbose=0, return_dict=True, pack=True)
    examples = lm.preprocessor.tokenize_examples(normalize_examples(AS_DICT))
    assert len(examples.packed()[1]) < len(PAIRS), "no examples are packed"
    for name, value in plain.items():
        assert packed[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow_on_tensorflow
def test_pack_does_not_change_the_gradients():
    def trained(pack):
        lm = make_lm(length=40)
        lm.compile(optimizer=keras.optimizers.SGD(0.1))
        lm.fit(AS_DICT, batch_size=4, pack=pack, verbose=0, epochs=2)
        return [ops.convert_to_numpy(v) for v in lm.trainable_variables]

    for packed, padded in zip(trained(True), trained(False), strict=True):
        np.testing.assert_allclose(packed, padded, atol=2e-5)


def test_fit_averages_the_loss_over_the_targets_of_an_epoch():
    lm = make_lm()
    lm.compile(optimizer=keras.optimizers.SGD(0.0))
    total, count = sum_of_losses(lm)
    # The batches have very different numbers of targets.
    history = lm.fit(AS_DICT, batch_size=1, verbose=0).history
    assert history["loss"][0] == pytest.approx(total / count, rel=1e-5)
    assert history["perplexity"][0] == pytest.approx(np.exp(total / count), rel=1e-4)


def test_tokens_with_zero_weight_are_ignored_in_loss_and_metrics():
    lm = make_lm()
    x, y, weights = lm.preprocessor(AS_DICT)
    results = lm.evaluate(x, y, sample_weight=weights, verbose=0)
    x["token_ids"], y = x["token_ids"].copy(), np.where(weights > 0, y, 7)
    again = lm.evaluate(x, y, sample_weight=weights, verbose=0)
    np.testing.assert_allclose(again, results, rtol=1e-6)
    alone = lm.evaluate(AS_DICT, sample_weight=np.array([0, 1, 0, 0]), verbose=0)
    one = {"prompt": PROMPTS[1:2], "response": RESPONSES[1:2]}
    np.testing.assert_allclose(alone, lm.evaluate(one, verbose=0), rtol=1e-5)


@pytest.mark.parametrize("keep_spaces", [True, False], ids=["v2", "v1"])
@pytest.mark.parametrize(
    "pair", [*PAIRS, ("A: ", "yes"), ("x=", "1\n\ny=2"), ("naïve", "té ☃")]
)
def test_prompts_are_tokenized_as_by_generate(keep_spaces, pair):
    lm = make_lm(keep_spaces)
    prompt, response = pair
    examples = lm.preprocessor.tokenize_examples(
        normalize_examples([prompt], [response])
    )
    (ids,), (learned,) = examples.token_ids, examples.loss_masks
    prompt_ids = lm.preprocessor.prompt_ids([prompt])[0]
    assert ids[: len(prompt_ids)] == prompt_ids
    assert learned == [i >= len(prompt_ids) for i in range(len(ids))]
    assert ids[-1] == lm.preprocessor.tokenizer.end_token_id
    text = lm.preprocessor.tokenizer.detokenize(ids)
    expected = prompt + response
    if not keep_spaces:
        expected, text = expected.replace(" ", ""), text.replace(" ", "")
    assert text == expected


# ----- Containers


def grain_dataset():
    grain = pytest.importorskip("grain")
    return grain.MapDataset.source(AS_LIST).batch(2)


CONTAINERS = {
    "dict": lambda: AS_DICT,
    "list": lambda: AS_LIST,
    "x and y": lambda: (PROMPTS, RESPONSES),
    "tf.data of dicts": lambda: tf_dataset(AS_DICT),
    "tf.data of tuples": lambda: tf_dataset((PROMPTS, RESPONSES)),
    "PyDataset": Pairs,
    "generator": lambda: (Pairs()[i] for i in range(2)),
    "generator of tuples": lambda: (
        (Pairs()[i]["prompt"], Pairs()[i]["response"]) for i in range(2)
    ),
    "Grain": grain_dataset,
}


@pytest.fixture(scope="module")
def steady_lm():
    """A model that training does not change, so that it is compiled once."""
    lm = make_lm()
    lm.compile(optimizer=keras.optimizers.SGD(0.0))
    return lm


@pytest.fixture(scope="module")
def expected_loss(steady_lm):
    return steady_lm.fit(AS_DICT, **_options()).history["loss"]


def _options():
    return dict(batch_size=2, shuffle=False, verbose=0)


@first_on_tensorflow("kind", CONTAINERS)
def test_fit_accepts_pairs_in_any_container(kind, steady_lm, expected_loss):
    x = CONTAINERS[kind]()
    data = x if isinstance(x, tuple) else (x,)
    options = _options()
    if not isinstance(x, (dict, list, tuple)):
        options.pop("batch_size")
    history = steady_lm.fit(*data, **options).history
    assert history["loss"] == pytest.approx(expected_loss, rel=1e-5)


@first_on_tensorflow("weights", [np.ones(4), None, np.ones((4, 32))])
@first_on_tensorflow("container", ["arrays", "generator"])
def test_padding_of_arrays_is_ignored(container, weights):
    lm = make_lm()
    x, y, _ = lm.preprocessor([p + r for p, r in PAIRS])
    expected = lm.evaluate(x, y, sample_weight=x["padding_mask"] * 1.0, verbose=0)[0]
    if container == "arrays":
        found = lm.evaluate(x, y, sample_weight=weights, verbose=0)[0]
    else:
        batch = (x, y) if weights is None else (x, y, weights)
        found = lm.evaluate((b for b in [batch]), verbose=0)[0]
    assert found == pytest.approx(expected, rel=1e-5)


def test_fit_checks_token_ids_of_a_generator():
    lm = make_lm()
    x, y, weights = lm.preprocessor(AS_DICT)
    with pytest.raises(ValueError, match="`y` must be from 0 to 511"):
        lm.fit((b for b in [(x, y + 600, weights)]), verbose=0)


@pytest.mark.skipif(keras.config.backend() != "jax", reason="needs JAX")
def test_fit_pads_batches_that_micro_batches_do_not_divide():
    plain, micro_batched = make_lm(), make_lm()
    micro_batched.compile(optimizer=keras.optimizers.Adam(1e-2), micro_batches=2)
    three = AS_LIST[:3]
    options = dict(_options(), epochs=2, validation_data=three)
    expected = plain.fit(three, **options).history
    for name, values in micro_batched.fit(three, **options).history.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, err_msg=name)
    with pytest.raises(ValueError, match="must be a multiple of 2"):
        micro_batched.fit(three, batch_size=3, verbose=0)


@pytest.mark.slow_on_tensorflow
def test_validation_split_holds_out_the_last_sequences():
    lm = make_lm()
    lm.compile(optimizer=keras.optimizers.SGD(0.0))
    history = lm.fit(AS_LIST, validation_split=0.5, **_options()).history
    for name, part in (("loss", AS_LIST[:2]), ("val_loss", AS_LIST[2:])):
        expected = lm.evaluate(part, verbose=0, return_dict=True)["loss"]
        assert history[name] == pytest.approx([expected], rel=1e-5), name


@pytest.mark.skipif(keras.config.backend() != "jax", reason="needs JAX")
@pytest.mark.slow_on_tensorflow
def test_validation_split_holds_out_no_padding():
    lm = make_lm()
    # 5 sequences are padded to 8. The last 3 would be held out, all of them padding.
    lm.compile(optimizer=keras.optimizers.SGD(0.0), micro_batches=4)
    five = [*AS_LIST, AS_LIST[1]]
    options = dict(_options(), batch_size=4, validation_split=0.3)
    history = lm.fit(five, **options).history
    for name, part in (("loss", five[:3]), ("val_loss", five[3:])):
        expected = lm.evaluate(part, verbose=0, return_dict=True)["loss"]
        assert history[name] == pytest.approx([expected], rel=1e-5), name


def test_validation_split_must_leave_sequences():
    lm = make_lm()
    for fraction in (-0.5, 0.9, 1.0):
        with pytest.raises(ValueError, match=f"validation_split={fraction}, 4 seq"):
            lm.fit(AS_LIST, validation_split=fraction, verbose=0)
    with pytest.raises(ValueError, match="validation_split"):  # By Keras.
        lm.fit(Pairs(), validation_split=0.5, verbose=0)


@pytest.mark.slow_on_tensorflow
def test_fit_accepts_a_generator_of_texts():
    texts = [p + r for p, r in PAIRS]
    batches = (texts[i : i + 2] for i in (0, 2))
    losses = make_lm().fit(batches, shuffle=False, verbose=0).history["loss"]
    assert losses == pytest.approx(make_lm().fit(texts, **_options()).history["loss"])


@pytest.mark.slow_on_tensorflow
def test_fit_reports_validation_perplexity_and_bits_per_byte():
    lm = make_lm()
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(logs["val_bits_per_byte"])
    )
    options = dict(verbose=0, callbacks=[watch])
    history = lm.fit(AS_DICT, validation_data=AS_LIST[:2], **options).history
    alone = lm.evaluate(AS_LIST[:2], verbose=0, return_dict=True)
    assert history["val_perplexity"][0] == pytest.approx(alone["perplexity"], rel=1e-5)
    assert history["val_bits_per_byte"] == seen
    assert seen[0] == pytest.approx(alone["bits_per_byte"], rel=1e-5)


def test_fit_on_pairs_learns_the_responses():
    lm = make_lm()
    lm.compile(optimizer=keras.optimizers.Adam(5e-3))
    lm.fit(AS_DICT, epochs=40, batch_size=4, verbose=0)
    answers = lm.generate(PROMPTS, max_new_tokens=12, strip_prompt=True)
    assert answers == RESPONSES


# ----- Chats


CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Farewell"},
]


@pytest.mark.slow_on_tensorflow
def test_only_assistant_replies_of_a_chat_are_learned():
    lm = make_lm(length=60)
    lm.preprocessor.chat_template = TEMPLATE
    examples = lm.preprocessor.tokenize_examples(
        normalize_examples([{"messages": CHAT}])
    )
    (ids,), (learned,) = examples.token_ids, examples.loss_masks
    tokenizer = lm.preprocessor.tokenizer
    text = "Be short.\nUSER: Hello\nBOT: Hi!</s>USER: Bye\nBOT: Farewell!</s>"
    assert ids == [1, *tokenizer.tokenize(text, parse_special=True)]
    targets = [token for token, counts in zip(ids, learned, strict=True) if counts]
    assert tokenizer.detokenize(targets) == "Hi!Farewell!"
    assert targets.count(tokenizer.end_token_id) == 2
    assert examples.num_bytes == len("Hi!Farewell!")
    lm.fit([{"messages": CHAT}, {"messages": CHAT[:3]}], verbose=0)


@pytest.mark.slow_on_tensorflow
def test_generate_on_chats_returns_the_learned_replies():
    lm = make_lm(length=60)
    lm.preprocessor.chat_template = TEMPLATE
    lm.compile(optimizer=keras.optimizers.Adam(5e-3))
    lm.fit([{"messages": CHAT}], epochs=40, verbose=0)
    for turn, reply in ((2, "Hi!"), (4, "Farewell!")):
        assert lm.generate({"messages": CHAT[:turn]}, max_new_tokens=12) == reply
    for two in ([{"messages": CHAT[:4]}] * 2, {"messages": [CHAT[:4]] * 2}):
        assert lm.generate(two, max_new_tokens=12) == ["Farewell!"] * 2


def test_chat_template_is_saved_with_the_preprocessor(tmp_path):
    lm = make_lm()
    lm.preprocessor.chat_template = TEMPLATE
    lm.save_to_preset(str(tmp_path))
    again = type(lm.preprocessor).from_preset(str(tmp_path))
    assert again.chat_template == TEMPLATE


# ----- Invalid input


@pytest.mark.slow_on_tensorflow
def test_fit_warns_once_about_truncated_examples():
    lm = make_lm(length=12)
    with pytest.warns(
        UserWarning, match=r"2 of 4 examples were truncated.*12"
    ) as caught:
        lm.fit(AS_DICT, verbose=0)
    assert sum("were truncated to" in str(w.message) for w in caught) == 1


@pytest.mark.slow_on_tensorflow
def test_fit_on_a_generator_warns_about_truncation_in_later_batches():
    lm = make_lm(length=12)
    long = PAIRS[1]
    batches = (([p], [r]) for p, r in (PAIRS[0], long, long))
    with pytest.warns(UserWarning, match="examples so far were trunc") as caught:
        lm.fit(batches, verbose=0)
    [found] = [w for w in caught if "were truncated to" in str(w.message)]
    assert str(found.message).startswith("1 of the 2 examples so far")


@pytest.mark.slow_on_tensorflow
def test_bits_per_byte_exclude_truncated_text():
    text = "The sea was calm, and the captain looked at it for a long time."
    lm = make_lm(length=64)
    ids = lm.preprocessor.prompt_ids([text])[0][:11]
    truncated = lm.preprocessor.tokenizer.detokenize(ids)
    losses = ops.convert_to_numpy(lm.score(truncated, scoring_mode="loss"))
    assert losses.shape == (1, 10), "the truncated text has other tokens"
    lm.preprocessor.sequence_length = 10
    with pytest.warns(UserWarning, match="truncated"):
        found = lm.evaluate([text], verbose=0, return_dict=True)
    expected = losses.sum() / np.log(2) / len(truncated.encode())
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_truncated_response_has_zero_weight_and_a_warning():
    lm = make_lm(length=4)
    with pytest.warns(UserWarning, match="of 4 examples have no target"):
        _, _, weights = lm.preprocessor(AS_DICT)
    assert not weights[1].any()


def test_empty_texts_have_zero_weight_and_a_warning():
    lm = make_lm()
    with pytest.warns(UserWarning, match="1 of 3 examples have no target"):
        _, _, weights = lm.preprocessor(["a", "", "b"])
    assert weights.any(axis=1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ({"prompt": ["a", "b"], "response": ["c"]}, "2 prompts and 1 responses"),
        ({"prompt": ["a"]}, r"keys \['prompt'\]"),
        (
            [{"prompt": "a", "response": "b"}, {"prompt": "a"}],
            r"x\[1\]` must have the keys",
        ),
        ({"prompt": ["", "a"], "response": ["b", "c"]}, "1 of 2 prompts .* empty"),
        ({"prompt": ["a"], "response": [""]}, "responses .* empty"),
        ({"prompt": ["a"], "response": [7]}, r"\['response'\]\[0\]` must be a string"),
        ([{"messages": CHAT[:2]}], r"`x\[0\]\['messages'\]` has no reply"),
        (
            [{"prompt": "a", "response": ""}] * 3,
            r"3 of 3 examples.*\n.*`x\[0\]` are emp",
        ),
        ([{"messages": CHAT[:2]}] * 2, "2 of 2 examples cannot be used"),
        ([{"messages": [{"role": "judge", "content": "x"}, CHAT[2]]}], "judge"),
        ([{"messages": [{"role": "user"}]}], '"role" and "content"'),
        ([{"messages": None}], "must be a non-empty list of messages"),
        ([], "all of one kind"),
        ([{"prompt": "a", "response": "b"}, "c"], "all of one kind"),
        ({"question": ["a"]}, "all of one kind"),
    ],
)
def test_fit_rejects_malformed_pairs_and_chats(x, message):
    lm = make_lm()
    lm.preprocessor.chat_template = TEMPLATE
    before = [ops.convert_to_numpy(v) for v in lm.weights]
    with pytest.raises(ValueError, match=message):
        lm.fit(x, verbose=0)
    for old, new in zip(before, lm.weights, strict=True):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(new))


def test_fit_on_chats_needs_a_chat_template():
    with pytest.raises(ValueError, match="chat_template"):
        make_lm().fit([{"messages": CHAT}], verbose=0)
    with pytest.raises(ValueError, match="content"):
        make_lm().preprocessor.chat_template = {"assistant": "BOT:"}


@pytest.mark.parametrize("bad", [-1, 512])
def test_fit_rejects_ids_outside_the_vocabulary(bad):
    lm = make_lm()
    x, y, weights = lm.preprocessor(AS_DICT)
    wrong = y.copy()
    wrong[0, 0] = bad
    with pytest.raises(ValueError, match=f"`y` must be from 0 to 511.*{bad}"):
        lm.fit(x, wrong, sample_weight=weights, verbose=0)
    x["token_ids"] = wrong
    with pytest.raises(ValueError, match="`token_ids` must be from 0 to 511"):
        lm.fit(x, y, sample_weight=weights, verbose=0)


@pytest.mark.slow_on_tensorflow
def test_pack_does_not_apply_to_validation_arrays():
    lm = make_lm()
    arrays = lm.preprocessor(AS_DICT)
    history = lm.fit(AS_DICT, validation_data=arrays, pack=True, verbose=0).history
    assert np.isfinite(history["val_loss"][0])


def test_fit_rejects_negative_sample_weights():
    x, y, weights = make_lm().preprocessor(AS_DICT)
    with pytest.raises(ValueError, match=r"must not be negative.*minimum of -1\.0"):
        make_lm().fit(x, y, sample_weight=-weights, verbose=0)


def test_pack_rejects_batches():
    with pytest.raises(ValueError, match="`pack` needs a list"):
        make_lm().fit(Pairs(), pack=True, verbose=0)


def test_fit_raises_if_all_steps_are_skipped_and_changes_nothing():
    lm = make_lm()
    lm.compile(optimizer=keras.optimizers.Adam(1e-2))
    lm.fit(AS_DICT, **_options())
    scale = lm.backbone.final_norm.scale
    value = ops.convert_to_numpy(scale)
    scale.assign(np.full_like(value, np.nan))
    others = [v for v in lm.weights if v is not scale]
    before = [ops.convert_to_numpy(v) for v in others]
    moments = [ops.convert_to_numpy(v) for v in lm.optimizer.variables]
    with pytest.raises(FloatingPointError, match=r"2 of the 2 steps .*\(now 0\.01\)"):
        lm.fit(AS_DICT, **_options())
    after = [ops.convert_to_numpy(v) for v in others]
    after += [ops.convert_to_numpy(v) for v in lm.optimizer.variables]
    for old, new in zip(before + moments, after, strict=True):
        np.testing.assert_array_equal(old, new)
    scale.assign(value)
    lm.fit(AS_DICT, **_options())  # It does not raise.


def test_fit_warns_about_skipped_steps():
    lm = make_lm()
    x, y, weights = lm.preprocessor(AS_DICT)
    weights[0, :] = np.inf
    with pytest.warns(UserWarning, match="1 of the 2 steps of this epoch"):
        lm.fit(x, y, sample_weight=weights, **_options())
    assert all(np.isfinite(ops.convert_to_numpy(v)).all() for v in lm.weights)


def test_weights_stay_finite_with_a_diverging_learning_rate():
    lm = make_lm()
    lm.compile(optimizer=keras.optimizers.SGD(1e30))
    with pytest.raises(FloatingPointError, match="learning rate"):
        lm.fit(AS_DICT, epochs=3, **_options())
    assert all(np.isfinite(ops.convert_to_numpy(v)).all() for v in lm.weights)


# ----- Defaults


@pytest.mark.slow_on_tensorflow
def test_default_optimizer_is_adamw_with_a_higher_rate_for_adapters():
    lm = random_lm(SHAPE, trained_model(True))
    assert type(lm.optimizer).__name__ == "AdamW"
    assert float(lm.optimizer.learning_rate) == pytest.approx(2e-5)
    lm.preprocessor.sequence_length = 32
    lm.backbone.enable_lora(2)
    lm.fit(AS_DICT, verbose=0)
    assert float(lm.optimizer.learning_rate) == pytest.approx(2e-4)
    lm.compile()
    assert float(lm.optimizer.learning_rate) == pytest.approx(2e-4)


@pytest.mark.slow_on_tensorflow
def test_fit_warns_about_bfloat16_variables():
    lm = make_lm(dtype="bfloat16")
    with pytest.warns(UserWarning, match="rounds small updates to zero"):
        lm.fit(AS_DICT, verbose=0)
    adapted = make_lm(dtype="bfloat16")
    adapted.backbone.enable_lora(2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The trainable variables have dtype")
        adapted.fit(AS_DICT, verbose=0)


def test_fit_accumulates_gradients_with_the_optimizers_of_keras_and_of_this_package():
    for optimizer in (keras.optimizers.AdamW, AdamW):
        lm = make_lm()
        lm.compile(optimizer(1e-2, gradient_accumulation_steps=2))
        before = keras.ops.convert_to_numpy(lm.weights[0])
        lm.fit(AS_DICT, batch_size=len(PAIRS), verbose=0)
        unchanged = keras.ops.convert_to_numpy(lm.weights[0])
        np.testing.assert_array_equal(unchanged, before)
        lm.fit(AS_DICT, batch_size=len(PAIRS), verbose=0)
        assert not np.array_equal(keras.ops.convert_to_numpy(lm.weights[0]), before)


def test_fit_adds_the_regularization_losses_of_layers():
    losses = []
    for factor in (0.0, 1.0):
        lm = make_lm()
        layer = lm.backbone.transformer_layers[0].feedforward.up
        kernel_variable(layer).regularizer = keras.regularizers.L2(factor)
        lm.compile(keras.optimizers.SGD(0.0))
        losses.append(lm.evaluate(AS_DICT, verbose=0)[0])
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    assert losses[1] - losses[0] == pytest.approx(np.sum(kernel**2), rel=1e-3)
