"""Training in mixed float16: the loss is scaled, and overflows are reported."""

import keras
import numpy as np
import pytest
from pairs import AS_DICT, make_lm

pytestmark = pytest.mark.usefixtures("compile_fast")


def variable(lm, name):
    return next(v for v in lm.weights if v.path.endswith(name))


def overflowing_lm():
    lm = make_lm(dtype="mixed_float16")
    kernel = variable(lm, "down/kernel")
    kernel.assign(1e7 * keras.ops.convert_to_numpy(kernel))
    return lm


@pytest.mark.slow_on_tensorflow
def test_fit_with_the_default_optimizer_scales_the_loss():
    lm = make_lm(dtype="mixed_float16")
    lm.compile()
    before = keras.ops.convert_to_numpy(variable(lm, "query/kernel"))
    history = lm.fit(AS_DICT, verbose=0).history
    assert isinstance(lm.optimizer, keras.optimizers.LossScaleOptimizer)
    assert np.isfinite(history["perplexity"]).all()
    lm.backbone.enable_lora(2)  # `fit` then makes another optimizer.
    lm.fit(AS_DICT, verbose=0)
    assert isinstance(lm.optimizer, keras.optimizers.LossScaleOptimizer)
    assert float(lm.optimizer.learning_rate) == pytest.approx(2e-4)
    assert (keras.ops.convert_to_numpy(variable(lm, "query/kernel")) != before).any()


def test_fit_in_float16_has_the_losses_of_float32():
    losses = [
        make_lm(dtype=dtype).fit(AS_DICT, epochs=4, verbose=0).history["loss"]
        for dtype in ("float32", "mixed_float16")
    ]
    np.testing.assert_allclose(*losses, rtol=5e-3)


@pytest.mark.slow_on_tensorflow
def test_fit_with_a_constant_loss_scale_has_the_losses_without():
    losses = []
    for scale in (None, 64.0):
        lm = make_lm()
        lm.compile(keras.optimizers.SGD(0.1, loss_scale_factor=scale))
        losses.append(lm.fit(AS_DICT, epochs=3, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_fit_raises_if_the_loss_overflows_float16():
    lm = overflowing_lm()
    with pytest.raises(FloatingPointError, match=r"float16.*65504.*mixed_bfloat16"):
        lm.fit(AS_DICT, epochs=2, verbose=0)
    assert all(np.isfinite(keras.ops.convert_to_numpy(v)).all() for v in lm.weights)


def test_evaluate_warns_if_the_loss_overflows_float16():
    with pytest.warns(UserWarning, match="The loss is .*float16.*mixed_bfloat16"):
        loss, *_ = overflowing_lm().evaluate(AS_DICT, verbose=0)
    assert not np.isfinite(loss)


@pytest.mark.slow_on_tensorflow
def test_fit_with_a_loss_of_keras_warns_if_it_overflows_float16():
    lm = overflowing_lm()
    lm.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.warns(UserWarning, match="The loss is nan.*float16.*mixed_bfloat16"):
        lm.fit(AS_DICT, verbose=0)
    with pytest.warns(UserWarning, match="The loss is nan.*float16.*mixed_bfloat16"):
        lm.evaluate(AS_DICT, verbose=0)


def test_fit_reduces_a_loss_scale_that_overflows_and_goes_on():
    lm = make_lm(dtype="mixed_float16")
    # The gradient of a single batch overflows with this scale, but not the loss.
    lm.optimizer.initial_scale = 2.0**26
    with pytest.warns(UserWarning, match="1 of the 1 steps .* reduced to 3.3554"):
        lm.fit(AS_DICT, verbose=0)
    before = keras.ops.convert_to_numpy(variable(lm, "query/kernel"))
    lm.fit(AS_DICT, epochs=20, verbose=0)
    assert float(lm.optimizer.dynamic_scale) < 2.0**25
    assert (keras.ops.convert_to_numpy(variable(lm, "query/kernel")) != before).any()
