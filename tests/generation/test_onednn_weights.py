"""Packed matrices: the same tokens, never of old weights, and only where they fit."""

import keras
import numpy as np
import pytest

if keras.config.backend() != "torch":
    pytest.skip("Packing is about PyTorch.", allow_module_level=True)

import torch

from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM
from keras_openllama.generation import onednn_weights

if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    pytest.skip("This CPU has no bfloat16 for oneDNN.", allow_module_level=True)

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


@pytest.fixture
def no_memory(monkeypatch):
    onednn_weights._warn_of_memory.cache_clear()
    monkeypatch.setattr(onednn_weights, "free_memory", lambda: 0)


def packed(lm):
    return lm.make_generate_function()._packed


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_packed_matrices_give_the_same_logits(rows):
    lm = make_lm()
    first = generate(lm, rows)
    assert len(packed(lm)) == KERNELS
    # The likelihood of each token under the plain products is that of the best one.
    logits = keras.ops.convert_to_numpy(lm.score(first))[:, 8:-1]
    chosen = np.take_along_axis(logits, first[:, 9:, None], axis=-1)[..., 0]
    np.testing.assert_array_less(logits.max(axis=-1) - chosen, 0.05 * logits.std())


def test_new_values_are_packed_again():
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


def test_adapters_are_not_left_out():
    lm = make_lm()
    before = generate(lm)
    lm.backbone.enable_lora(4)
    for weight in lm.trainable_variables:
        weight.assign(0.5 * keras.random.normal(weight.shape, seed=1))
    assert (generate(lm) != before).any()
    # They are beside the kernels, which stay what they are.
    assert len(packed(lm)) == KERNELS


def test_short_of_memory_it_says_so_once_and_goes_on(no_memory):
    lm = make_lm()
    with pytest.warns(UserWarning, match="GB of free memory") as warned:
        plain = generate(lm)
        generate(make_lm(), rows=3)
    assert sum("free memory" in str(w.message) for w in warned) == 1
    assert packed(lm) == {}
    assert plain.shape == (2, 29)
