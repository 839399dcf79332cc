"""`fit` and `evaluate` on data without target tokens: an error or NaN, never loss 0."""

import keras
import numpy as np
import pytest
from pairs import AS_DICT, Pairs, make_lm, tf_dataset
from tensorflow_marks import first_on_tensorflow

pytestmark = [
    pytest.mark.usefixtures("compile_fast"),
    pytest.mark.filterwarnings("ignore:.* examples"),  # Truncated, or without targets.
]

# With `sequence_length=8`, these prompts leave no room for their responses.
FULL = {
    "prompt": ["A prompt that fills the whole sequence, and more than that."] * 3,
    "response": [" x"] * 3,
}
FITTING = {"prompt": ["a"] * 3, "response": [" x"] * 3}
ALL_ZERO = {"token_ids": np.ones((2, 4), "int32"), "padding_mask": np.ones((2, 4))}


def generator(*batches):
    for batch in batches:
        yield batch["prompt"], batch["response"]


class NoTargets(Pairs):
    """A `PyDataset` whose sequences are long prompts."""

    def __getitem__(self, index):
        return FULL["prompt"], FULL["response"]


@first_on_tensorflow("options", [{}, {"pack": True}, {"validation_split": 0.5}])
@first_on_tensorflow("method", ["fit", "evaluate"])
def test_fit_and_evaluate_reject_texts_without_targets(method, options):
    lm = make_lm(length=8)
    if method == "evaluate":
        options = {name: value for name, value in options.items() if name == "pack"}
    with pytest.raises(ValueError, match=r"`x` has no target tokens.*sequence_length"):
        getattr(lm, method)(FULL, verbose=0, **options)


@first_on_tensorflow("dtype", ["float32", "mixed_float16"])
@first_on_tensorflow("method", ["fit", "evaluate"])
def test_fit_and_evaluate_reject_weights_that_are_all_zero(method, dtype):
    lm = make_lm(dtype=dtype)
    targets, weights = np.ones((2, 4), "int32"), np.zeros((2, 4))
    with pytest.raises(ValueError, match="all sample weights are zero"):
        getattr(lm, method)(ALL_ZERO, targets, sample_weight=weights, verbose=0)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.slow_on_tensorflow
def test_fit_rejects_validation_data_without_targets_before_training(pack):
    lm = make_lm(length=8)
    before = keras.ops.convert_to_numpy(lm.weights[0])
    with pytest.raises(ValueError, match="`validation_data` has no target tokens"):
        lm.fit(FITTING, validation_data=FULL, pack=pack, verbose=0)
    np.testing.assert_array_equal(before, keras.ops.convert_to_numpy(lm.weights[0]))


@pytest.mark.slow_on_tensorflow
def test_fit_rejects_a_validation_split_without_targets():
    lm = make_lm(length=8)
    data = {name: FITTING[name] + FULL[name] for name in FULL}
    with pytest.raises(ValueError, match="`validation_data` has no target tokens"):
        lm.fit(data, validation_split=0.5, verbose=0)


def _containers():
    return {
        "generator": lambda: generator(FULL),
        "PyDataset": NoTargets,
        "tf.data": lambda: tf_dataset((FULL["prompt"], FULL["response"])),
    }


@first_on_tensorflow("container", _containers())
def test_fit_rejects_batches_without_targets_after_the_epoch(container):
    data = _containers()[container]
    lm = make_lm(length=8)
    with pytest.raises(ValueError, match="no target tokens"):
        lm.fit(data(), verbose=0)
    with pytest.raises(ValueError, match="no target tokens"):
        lm.evaluate(data(), verbose=0)
    # Not even the first value is the best one for early stopping.
    stopping = keras.callbacks.EarlyStopping("val_loss")
    with pytest.raises(ValueError, match="no target tokens"):
        lm.fit(FITTING, validation_data=data(), callbacks=[stopping], verbose=0)
    assert stopping.best is None


def test_fit_ignores_batches_without_targets_beside_others():
    lm = make_lm(length=8)
    lm.compile(optimizer=keras.optimizers.SGD(0.0))
    expected = lm.evaluate(FITTING, verbose=0, return_dict=True)
    with pytest.warns(UserWarning, match="1 of the 2 steps .* no target tokens"):
        history = lm.fit(generator(FULL, FITTING), verbose=0).history
    found = lm.evaluate(generator(FITTING, FULL), verbose=0, return_dict=True)
    for name in ("loss", "perplexity", "sparse_categorical_accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
        assert history[name] == pytest.approx([expected[name]], rel=1e-5)


@first_on_tensorflow("method", ["train_on_batch", "test_on_batch"])
def test_a_batch_without_targets_has_no_loss_and_changes_nothing(method):
    lm = make_lm(length=8)
    lm.fit(AS_DICT, verbose=0)  # Momentum would move the weights.
    x, y, weights = lm.preprocess_samples(FULL["prompt"], FULL["response"])
    before = [keras.ops.convert_to_numpy(v) for v in lm.weights]
    lm.reset_metrics()
    results = getattr(lm, method)(x, y, sample_weight=weights, return_dict=True)
    assert len(results) == 3 and np.isnan(list(results.values())).all()
    for value, variable in zip(before, lm.weights, strict=True):
        np.testing.assert_array_equal(value, keras.ops.convert_to_numpy(variable))


def test_micro_batches_may_lack_targets():
    if keras.config.backend() != "jax":
        pytest.skip("micro-batches need JAX")
    data = {name: FULL[name][:1] + FITTING[name][:1] for name in FULL}
    lm = make_lm(length=8)
    expected = lm.evaluate(data, verbose=0)
    lm.compile(optimizer=keras.optimizers.SGD(0.0), micro_batches=2)
    history = lm.fit(data, verbose=0).history
    assert history["loss"] == pytest.approx([expected[0]], rel=1e-5)
