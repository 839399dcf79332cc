"""`without_weights` builds models whose values are assigned later, once."""

import gc
import resource

import keras
import numpy as np
import pytest

from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM, presets
from keras_openllama.backend.keras_private import (
    stored_value,
    uninitialized_variables,
)
from keras_openllama.loading.uninitialized import (
    assign_value,
    finish_loading,
    without_weights,
)

SIZES = {
    "vocabulary_size": 50,
    "num_layers": 2,
    "num_query_heads": 4,
    "hidden_dim": 16,
    "intermediate_dim": 24,
    "num_key_value_heads": 2,
}
FULL_SIZES = {  # facts about the published models
    "open_llama_3b": 3_426_473_600,
    "open_llama_7b": 6_738_415_616,
    "open_llama_13b": 13_015_864_320,
    "open_llama_3b_v2": 3_426_473_600,
    "open_llama_7b_v2": 6_738_415_616,
    "open_llama_3b_v3": 3_426_473_600,
}


def numbers_for(variable):
    values = np.arange(np.prod(variable.shape)).reshape(variable.shape) / 1000
    return keras.ops.convert_to_tensor(values, variable.dtype)


@pytest.mark.backend_free
@pytest.mark.parametrize("name", FULL_SIZES)
def test_without_weights_builds_full_size_presets_in_little_memory(name):
    preset = presets.registry()[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with without_weights():
        backbone = OpenLlamaBackbone(**preset.config)
        model = OpenLlamaCausalLM(backbone, compile=False)
    assert model.count_params() == FULL_SIZES[name] == preset.parameters
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 500e6  # The smallest of the models takes 13.7 GB.


def test_assign_value_gives_a_model_that_computes_with_the_values():
    with without_weights() as variables:
        model = OpenLlamaBackbone(**SIZES)
    assert all(stored_value(variable) is None for variable in model.weights)
    for variable in model.weights:
        assign_value(variable, numbers_for(variable))
    finish_loading(model, variables)

    usual = OpenLlamaBackbone(**SIZES)
    for variable in usual.weights:
        variable.assign(numbers_for(variable))
    inputs = {"token_ids": [[1, 2, 3]], "padding_mask": [[True, True, True]]}
    inputs = {name: np.array(value) for name, value in inputs.items()}
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(model(inputs)),
        keras.ops.convert_to_numpy(usual(inputs)),
    )


def test_finish_loading_gives_a_model_that_trains():
    with without_weights() as variables:
        model = OpenLlamaCausalLM(OpenLlamaBackbone(**SIZES), compile=False)
    for variable in model.weights:
        assign_value(variable, numbers_for(variable))
    finish_loading(model, variables)
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    x = {"token_ids": np.ones((2, 5), "int32"), "padding_mask": np.ones((2, 5), bool)}
    before = [keras.ops.convert_to_numpy(w) for w in model.trainable_weights]
    keras.Model.fit(model, x, np.ones((2, 5), "int32"), verbose=0)
    after = [keras.ops.convert_to_numpy(w) for w in model.trainable_weights]
    assert any((a != b).any() for a, b in zip(after, before, strict=True))


def test_finish_loading_registers_torch_parameters():
    if keras.config.backend() != "torch":
        pytest.skip("Only PyTorch has parameters in addition to variables.")
    with without_weights() as variables:
        model = OpenLlamaBackbone(**SIZES)
    for variable in model.weights:
        assign_value(variable, numbers_for(variable))
    finish_loading(model, variables)
    own = {id(variable.value) for variable in model.weights}
    assert {id(parameter) for parameter in model.parameters()} == own
    usual = OpenLlamaBackbone(**SIZES)
    for filled, built in zip(model.layers, usual.layers, strict=True):
        names = [name for name, _ in filled.named_parameters()]
        assert names == [name for name, _ in built.named_parameters()]


def test_without_weights_leaves_nothing_for_keras_to_initialize():
    before = uninitialized_variables()
    with without_weights():
        OpenLlamaBackbone(**SIZES)
    with pytest.raises(RuntimeError, match="on purpose"), without_weights():
        OpenLlamaBackbone(**SIZES)
        raise RuntimeError("on purpose")
    after = uninitialized_variables()
    assert after == before
    gc.collect()
    usual = OpenLlamaBackbone(**SIZES)  # Models are built as usual again.
    assert all(stored_value(variable) is not None for variable in usual.weights)


def test_finish_loading_requires_exactly_one_value_per_weight():
    with without_weights() as variables:
        model = OpenLlamaBackbone(**SIZES)
    first, *others = model.weights
    with pytest.raises(ValueError, match=r"Received: a value of shape \(3,\)"):
        assign_value(first, keras.ops.zeros((3,)))
    assign_value(first, numbers_for(first))
    with pytest.raises(ValueError, match="already"):
        assign_value(first, numbers_for(first))
    with pytest.raises(RuntimeError, match=others[0].path):
        finish_loading(model, variables)


def test_finish_loading_initializes_states_that_are_not_weights():
    with without_weights() as variables:
        inputs = keras.Input((4,))
        outputs = keras.layers.Dense(2, use_bias=False)(
            keras.layers.Dropout(0.5, seed=1)(inputs)
        )
        model = keras.Model(inputs, outputs)
    for variable in model.weights:
        assign_value(variable, numbers_for(variable))
    finish_loading(model, variables)
    assert all(stored_value(variable) is not None for variable in model.variables)
    model(np.ones((1, 4)), training=True)


def test_without_weights_raises_in_a_stateless_scope():
    with keras.StatelessScope(), pytest.raises(RuntimeError, match="StatelessScope"):
        with without_weights():
            pass
