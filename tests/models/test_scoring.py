"""`score` returns the logits and the losses of given sequences."""

import dataclasses
import types

import keras
import numpy as np
import pytest
import tiny_models
from keras import ops
from tokenizer_models import trained_model

SHAPE = dataclasses.replace(tiny_models.SHAPES[2], context=32)


def make_lm(dtype="float32"):
    return tiny_models.random_lm(SHAPE, trained_model(True), dtype=dtype)


def test_score_of_text_returns_the_loss_of_each_next_token():
    lm = make_lm()
    ids = lm.preprocessor.prompt_ids(["The body of"])[0]
    logits = ops.convert_to_numpy(lm.score("The body of"))[0]
    assert logits.shape == (len(ids) - 1, 512)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = [-log_probabilities[i, ids[i + 1]] for i in range(len(ids) - 1)]
    losses = ops.convert_to_numpy(lm.score("The body of", scoring_mode="loss"))[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.skipif(keras.config.backend() != "jax", reason="Kernels are JAX's.")
def test_score_uses_the_attention_kernel_of_the_device(monkeypatch):
    import jax

    from keras_openllama.layers import attention_kernels
    from keras_openllama.models import scoring

    # Both round the attention weights to bfloat16, as the C function does not.
    monkeypatch.setattr(attention_kernels, "is_compiled", lambda: False)
    ids = np.arange(3, 27).reshape(2, 12)
    mask = np.arange(12) >= np.array([[0], [4]])  # Padding on the left.
    expected = ops.convert_to_numpy(make_lm("bfloat16").score(ids, mask))
    original, used = jax.nn.dot_product_attention, []

    def in_xla(*heads, implementation, **options):  # The kernel needs a GPU.
        used.append(implementation)
        return original(*heads, implementation="xla", **options)

    client = types.SimpleNamespace(platform_version="PJRT C API cuda 13000")
    gpu = types.SimpleNamespace(platform="gpu", client=client, compute_capability="9.0")
    monkeypatch.setattr(jax.nn, "dot_product_attention", in_xla)
    monkeypatch.setattr(scoring, "model_device", lambda backbone: gpu)
    found = ops.convert_to_numpy(make_lm("bfloat16").score(ids, mask))
    assert set(used) == {"cudnn"}
    np.testing.assert_allclose(found[mask], expected[mask], atol=0.02)


def test_score_layer_intercept_fn_reads_and_changes_layers():
    lm = make_lm()
    seen = []

    def double(x, index):
        seen.append(index)
        return x * 2 if index == 1 else x

    ids = np.array([[1, 5, 9]])
    logits = ops.convert_to_numpy(lm.score(ids, layer_intercept_fn=double))
    assert seen == [-1, 0, 1]
    # The final norm cancels the factor, up to its epsilon.
    np.testing.assert_allclose(logits, ops.convert_to_numpy(lm.score(ids)), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(inputs=np.array([1, 2])), "shape"),
        (dict(inputs=np.array([[1, 512]])), "512"),
        (dict(inputs=np.array([[1, 2]]), padding_mask=np.ones((2, 2))), "padding_mask"),
        (dict(inputs=np.array([[1, 2]]), scoring_mode="nll"), "nll"),
        (dict(inputs=np.array([[1, 2]]), scoring_mode="loss"), "target_ids"),
        (
            dict(
                inputs=np.array([[1, 2]]),
                scoring_mode="loss",
                target_ids=np.ones((1, 3), int),
            ),
            "target_ids",
        ),
        (dict(inputs=""), "empty"),
        (dict(inputs=np.ones((1, 33), int)), "context of this model is 32"),
        (dict(inputs="a b", padding_mask=np.ones((1, 2))), "padding_mask"),
    ],
    ids=str,
)
def test_score_rejects_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make_lm().score(**options)
