"""`quantize` with `keras.quantizers.GPTQConfig` calibrates the weights on texts."""

import dataclasses

import numpy as np
import pytest
from keras import ops
from keras.quantizers import GPTQConfig
from tiny_models import SHAPES, random_lm
from tokenizer_models import trained_model

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.backend.keras_private import kernel_variable
from keras_openllama.layers.quantizable import is_quantized
from keras_openllama.models.calibration import projections_of
from keras_openllama.quantization import WeightQuantizationConfig

pytestmark = pytest.mark.usefixtures("compile_fast")

SHAPE = {shape.name: shape for shape in SHAPES}


def token_ids(count, seed):
    """Ids that occur with very different frequencies, as in texts."""
    ids = np.random.default_rng(seed).zipf(1.5, size=(count, 32)) + 2
    return np.minimum(ids, 198).astype("int32")


def gptq(dataset, tokenizer=None, **changes):
    options = {"group_size": 32, "sequence_length": 32, "symmetric": True, **changes}
    return GPTQConfig(dataset, tokenizer, **options)


def logits_of(lm, ids):
    return ops.convert_to_numpy(lm.score(ids))


def test_quantize_by_gptq_has_a_smaller_error_than_rounding():
    ids, calibration = token_ids(64, seed=0), token_ids(64, seed=1)
    errors = {}
    for config in (WeightQuantizationConfig(4, 32), gptq(calibration)):
        # Heads of 100 elements, which share keys and values.
        lm = random_lm(dataclasses.replace(SHAPE["grouped_head_dim_100"], num_layers=2))
        exact = logits_of(lm, ids)
        # Head and embedding stay exact.
        lm.quantize(config=config, filters="query|key|value|output|gate|up|down")
        assert all(is_quantized(p) for p in projections_of(lm.backbone))
        assert not is_quantized(lm.lm_head)
        errors[config.mode] = np.square(logits_of(lm, ids) - exact).mean()
    assert errors["gptq"] < 0.7 * errors["int4"]


@pytest.mark.slow_on_tensorflow
def test_quantize_by_gptq_gives_an_int4_model_that_saves_and_loads(tmp_path):
    lm = random_lm(SHAPE["multi_head"])
    ids = token_ids(4, seed=0)
    expected = logits_of(lm, ids)  # Compiles the float model.
    lm.quantize("gptq", config=gptq([ids], group_size=64))
    assert np.abs(logits_of(lm, ids) - expected).max() > 0
    assert lm.backbone.token_embedding.dtype_policy.name == "int8_from_float32"
    down = lm.backbone.transformer_layers[0].feedforward.down
    assert down.dtype_policy.name == "int4/64_from_float32"
    lm.save_to_preset(str(tmp_path / "preset"))
    again = OpenLlamaCausalLM.from_preset(str(tmp_path / "preset"), preprocessor=None)
    np.testing.assert_array_equal(logits_of(again, ids), logits_of(lm, ids))


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"weight_bits": 8, "group_size": -1}, "float32"),
        ({"symmetric": False, "activation_order": True, "num_samples": 1}, "bfloat16"),
    ],
)
def test_quantize_by_gptq_takes_texts_and_all_formats(changes, dtype):
    proto = trained_model(keep_spaces=True)
    lm = random_lm(SHAPE["multi_head"], proto, dtype=dtype)
    texts = ["The class body of a name", "If a name is bound in a block"]
    config = gptq(texts, lm.preprocessor.tokenizer, sequence_length=8, **changes)
    ids = token_ids(4, seed=0)
    expected = logits_of(lm, ids)
    lm.quantize(config=config)
    assert np.abs(logits_of(lm, ids) - expected).mean() < 0.5 * expected.std()
    query = lm.backbone.transformer_layers[1].self_attention.query
    matrix = query.quantized_matrix()
    assert (matrix.bits, matrix.zeros is None) == (config.weight_bits, config.symmetric)
    assert matrix.groups == (1 if config.group_size == -1 else 2)


def test_quantize_by_gptq_keeps_adapters_and_what_filters_exclude():
    lm = random_lm(SHAPE["multi_head"])
    lm.backbone.enable_lora(4)
    ids = token_ids(4, seed=0)
    down = lm.backbone.transformer_layers[1].feedforward.down
    kept = ops.convert_to_numpy(kernel_variable(down)).copy()
    lm.backbone.quantize(config=gptq([ids]), filters="query|gate|token_embedding")
    found = {p.name for p in projections_of(lm.backbone) if is_quantized(p)}
    assert found == {"query", "gate"} and is_quantized(lm.backbone.token_embedding)
    np.testing.assert_array_equal(ops.convert_to_numpy(kernel_variable(down)), kept)
    query = lm.backbone.transformer_layers[0].self_attention.query
    assert set(query.adapters()) == {"lora_kernel_a", "lora_kernel_b"}
    assert np.isfinite(logits_of(lm, ids)).all()


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_bits": 3}, "`weight_bits` must be 8 or 4. Received: weight_bits=3"),
        ({"weight_bits": 8, "symmetric": False}, "`symmetric` must be True for 8 bits"),
        ({"per_channel": False}, "`per_channel` must be True"),
        ({"sequence_length": 513}, "`sequence_length` must be at most 512.*=513"),
        (
            {"quantization_layer_structure": {}},
            "`quantization_layer_structure` must be",
        ),
        ({"dataset": ["a text"]}, "`tokenizer` must be a tokenizer"),
    ],
)
def test_quantize_by_gptq_rejects_options_and_changes_nothing(changes, message):
    lm = random_lm(SHAPE["multi_head"])
    with pytest.raises(ValueError, match=message):
        lm.quantize(config=gptq(**{"dataset": [[3, 4, 5]], **changes}))
    assert not is_quantized(lm.backbone.token_embedding)


@pytest.mark.backend_free
def test_quantize_by_gptq_needs_float_weights_and_the_same_mode():
    lm = random_lm(SHAPE["multi_head"])
    with pytest.raises(ValueError, match=r"mode='int4' but config\.mode='gptq'"):
        lm.quantize("int4", config=gptq([[3, 4, 5]]))
    lm.quantize("int4", filters="down")
    with pytest.raises(ValueError, match="down is quantized already"):
        lm.quantize(config=gptq([[3, 4, 5]]))
    assert not is_quantized(lm.lm_head)
    for quantize in (
        lambda: lm.quantize("gptq"),
        lambda: lm.lm_head.quantize(config=gptq([[3, 4, 5]])),
    ):
        with pytest.raises(ValueError, match="GPTQ quantizes a model that is loaded"):
            quantize()


@pytest.mark.backend_free
def test_quantize_by_gptq_resets_what_was_compiled():
    lm = random_lm(SHAPE["multi_head"])
    ids = token_ids(2, seed=0)
    lm.make_generate_function()
    lm.quantize(config=gptq([ids]), filters="down")
    assert lm.generate_function is None
