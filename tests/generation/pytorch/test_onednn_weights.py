"""Weights packed for oneDNN: the same tokens, current values, limited memory."""

import keras
import numpy as np
import pytest

if keras.config.backend() != "torch":
    pytest.skip("Needs PyTorch.", allow_module_level=True)

import torch

from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM
from keras_openllama.generation.onnx_runtime import token_loop
from keras_openllama.generation.pytorch import onednn_weights
from keras_openllama.generation.pytorch.decoder import TorchDecoder

if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    pytest.skip(
        "oneDNN does not support bfloat16 on this CPU.", allow_module_level=True
    )

KERNELS = 2 * 7 + 1  # Of two layers, and the head.


def make_lm():
    keras.utils.set_random_seed(0)
    backbone = OpenLlamaBackbone(
        vocabulary_size=160,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=48,
        intermediate_dim=64,
        initializer_std=0.3,
        dtype="bfloat16",
    )
    return OpenLlamaCausalLM(backbone)


def generate(lm, rows=2):
    ids = np.random.default_rng(0).integers(3, 160, (rows, 9)).astype("int32")
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    return lm.generate(inputs, max_new_tokens=20, stop_token_ids=None)["token_ids"]


@pytest.fixture(autouse=True)
def on_pytorch(monkeypatch):
    """As on a system for which no product can be compiled."""
    monkeypatch.setattr(token_loop, "native_library", lambda: None)


@pytest.fixture
def no_memory(monkeypatch):
    onednn_weights._warn_of_memory.cache_clear()
    monkeypatch.setattr(onednn_weights, "free_memory", lambda: 0)


def packed(lm):
    return lm.make_generate_function()._packed


@pytest.mark.parametrize("rows", [2, 8])
def test_packed_weights_give_the_same_logits(rows):
    lm = make_lm()
    first = generate(lm, rows)
    assert len(packed(lm)) == KERNELS
    # With unpacked weights, each token has nearly the largest logit.
    logits = keras.ops.convert_to_numpy(lm.score(first))[:, 8:-1]
    chosen = np.take_along_axis(logits, first[:, 9:, None], axis=-1)[..., 0]
    np.testing.assert_array_less(logits.max(axis=-1) - chosen, 0.05 * logits.std())


def test_changed_weights_are_packed_again():
    lm = make_lm()
    before = generate(lm)
    other = make_lm()
    for weight in other.weights:
        weight.assign(-1.0 * weight)
    expected = generate(other)
    for weight in lm.weights:
        weight.assign(-1.0 * weight)
    np.testing.assert_array_equal(generate(lm), expected)
    assert (before != expected).any()


def test_packed_weights_do_not_bypass_lora_adapters():
    lm = make_lm()
    before = generate(lm)
    lm.backbone.enable_lora(4)
    for weight in lm.trainable_variables:
        weight.assign(0.5 * keras.random.normal(weight.shape, seed=1))
    assert (generate(lm) != before).any()
    # The kernels themselves do not change.
    assert len(packed(lm)) == KERNELS


def test_generation_without_free_memory_warns_once_and_does_not_pack(no_memory):
    lm = make_lm()
    with pytest.warns(UserWarning, match="GB of free memory") as warned:
        plain = generate(lm)
        generate(make_lm(), rows=3)
    assert sum("free memory" in str(w.message) for w in warned) == 1
    assert len(packed(lm)) == 0
    assert plain.shape == (2, 29)


def test_one_sequence_is_decoded_without_onednn(monkeypatch):
    lm, enabled = make_lm(), []
    first = generate(lm, rows=1)
    assert len(packed(lm)) == 0
    compute = TorchDecoder._compute

    def recorded(*inputs):
        enabled.append(torch.backends.mkldnn.enabled)
        return compute(*inputs)

    monkeypatch.setattr(TorchDecoder, "_compute", recorded)
    np.testing.assert_array_equal(generate(lm, rows=1), first)
    assert enabled == [False] * 20
    assert torch.backends.mkldnn.enabled
    logits = keras.ops.convert_to_numpy(lm.score(first))[:, 8:-1]
    chosen = np.take_along_axis(logits, first[:, 9:, None], axis=-1)[..., 0]
    assert (logits.max(-1) - chosen < 0.1).all()


def test_without_onednn_is_disabled_until_the_last_thread_has_finished():
    first, second = onednn_weights.without_onednn(), onednn_weights.without_onednn()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mkldnn.enabled
    second.__exit__(None, None, None)
    assert torch.backends.mkldnn.enabled
    with pytest.raises(KeyError), onednn_weights.without_onednn():
        raise KeyError
    assert torch.backends.mkldnn.enabled
