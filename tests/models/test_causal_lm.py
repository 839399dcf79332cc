"""The task: training, adapters, quantization, saving."""

import json

import keras
import numpy as np
import pytest
import tiny_models
from keras import ops
from tensorflow_marks import first_on_tensorflow
from tokenizer_models import trained_model

from keras_openllama import (
    OpenLlamaBackbone,
    OpenLlamaCausalLM,
    OpenLlamaCausalLMPreprocessor,
    OpenLlamaTokenizer,
)
from keras_openllama.convert import convert

TEXTS = ["The class body is executed.", "If a name is bound, it is local."] * 4


def make_lm(dtype="float32", **options):
    keras.utils.set_random_seed(0)
    tokenizer = OpenLlamaTokenizer(trained_model(keep_spaces=True))
    backbone = OpenLlamaBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=48,
        intermediate_dim=64,
        max_sequence_length=32,
        dtype=dtype,
        **options,
    )
    preprocessor = OpenLlamaCausalLMPreprocessor(tokenizer, sequence_length=16)
    return OpenLlamaCausalLM(backbone, preprocessor)


def logits_of(lm, text="The body of"):
    return ops.convert_to_numpy(lm.score(text))


# ----- Training


def train(lm, *args, **kwargs):
    lm.compile(optimizer=keras.optimizers.Adam(1e-2))
    return lm.fit(*args, epochs=4, batch_size=4, verbose=0, **kwargs).history["loss"]


@pytest.mark.slow_on_tensorflow
def test_fit_learns_from_strings():
    losses = train(make_lm(), TEXTS)
    assert losses[0] == pytest.approx(np.log(512), rel=0.2)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow_on_tensorflow
def test_fit_accepts_preprocessed_arrays():
    lm = make_lm()
    x, y, sample_weight = lm.preprocessor(TEXTS)
    losses = train(make_lm(), TEXTS, shuffle=False)
    assert train(lm, x, y, sample_weight=sample_weight, shuffle=False) == losses
    lm = make_lm()
    lm.preprocessor = None
    assert train(lm, x, y, sample_weight=sample_weight, shuffle=False) == losses


def test_fit_accepts_a_tf_dataset_of_strings():
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_tensor_slices(TEXTS).batch(4)
    lm = make_lm()
    lm.compile(optimizer=keras.optimizers.Adam(1e-2))
    losses = lm.fit(dataset, epochs=4, verbose=0).history["loss"]
    np.testing.assert_allclose(
        losses, train(make_lm(), TEXTS, shuffle=False), rtol=1e-5
    )


@pytest.mark.slow_on_tensorflow
def test_fit_validates_on_strings():
    lm = make_lm()
    lm.compile()
    history = lm.fit(TEXTS, validation_data=TEXTS[:2], verbose=0).history
    assert history["val_loss"][0] == pytest.approx(
        lm.evaluate(TEXTS[:2], verbose=0)[0], rel=1e-5
    )


def test_evaluate_ignores_tokens_with_zero_weight():
    lm = make_lm()
    lm.compile()
    x, y, sample_weight = lm.preprocessor(TEXTS[:2])
    mean = lm.evaluate(x, y, sample_weight=sample_weight, verbose=0)[0]
    losses = ops.convert_to_numpy(
        lm.score(x["token_ids"], x["padding_mask"], scoring_mode="loss", target_ids=y)
    )
    expected = (losses * sample_weight).sum() / sample_weight.sum()
    assert mean == pytest.approx(expected, rel=1e-4)
    sample_weight[1] = 0
    alone = lm.evaluate(x, y, sample_weight=sample_weight, verbose=0)[0]
    assert alone == pytest.approx(lm.evaluate(TEXTS[:1], verbose=0)[0], rel=1e-4)


def test_predict_returns_logits_of_strings():
    lm = make_lm()
    assert lm.predict(TEXTS[:2], verbose=0).shape == (2, 16, 512)


# ----- Adapters and quantization


@pytest.mark.slow_on_tensorflow
def test_fit_with_lora_trains_only_adapters_and_changes_generation():
    lm = make_lm(initializer_std=0.2)
    before = lm.generate("The", max_new_tokens=10)
    frozen = {v.path: ops.convert_to_numpy(v) for v in lm.variables}
    lm.backbone.enable_lora(4)
    assert {v.path.split("/")[-1] for v in lm.trainable_variables} == {
        "lora_kernel_a",
        "lora_kernel_b",
    }
    assert len(lm.trainable_variables) == 2 * 2 * 2
    assert lm.generate("The", max_new_tokens=10) == before
    losses = train(lm, TEXTS)
    assert losses[-1] < losses[0]
    for v in lm.variables:
        if v.path in frozen and "seed" not in v.path:
            np.testing.assert_array_equal(ops.convert_to_numpy(v), frozen[v.path])
    assert lm.generate("The", max_new_tokens=10) != before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow_on_tensorflow
def test_quantize_int8_changes_logits_little(tmp_path, dtype):
    lm = make_lm(dtype, initializer_std=0.2)
    before = logits_of(lm)
    lm.generate("The", max_new_tokens=4)
    lm.quantize("int8")
    kinds = {(v.path.endswith("_scale"), v.dtype) for v in lm.weights if v.ndim == 2}
    assert kinds == {(False, "int8"), (True, "float16")}
    after = logits_of(lm)
    assert 0 < np.abs(after - before).max() < 0.1 * np.abs(before).max()
    text = lm.generate("The", max_new_tokens=8)
    lm.save_to_preset(tmp_path)
    again = OpenLlamaCausalLM.from_preset(tmp_path)
    np.testing.assert_array_equal(logits_of(again), after)
    assert again.generate("The", max_new_tokens=8) == text


# ----- Saving


@first_on_tensorflow("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_from_preset_restores_save_to_preset(tmp_path, dtype):
    lm = make_lm(dtype, rope_scaling={"rope_type": "linear", "factor": 2.0})
    lm.save_to_preset(tmp_path)
    again = OpenLlamaCausalLM.from_preset(tmp_path, dtype=dtype)
    assert again.backbone.get_config() == lm.backbone.get_config()
    assert again.preprocessor.sequence_length == 16
    assert again.dtype_policy == lm.dtype_policy
    np.testing.assert_array_equal(logits_of(again), logits_of(lm))


@pytest.mark.backend_free
@pytest.mark.parametrize("of", ["task", "backbone", "conversion"])
def test_save_to_preset_names_the_task_of_keras_hub(tmp_path, of):
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    if of == "conversion":
        lm.export_to_transformers(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "saved", "keras", tokenizer=False)
    else:
        (lm if of == "task" else lm.backbone).save_to_preset(tmp_path / "saved")
    metadata = json.loads((tmp_path / "saved" / "metadata.json").read_text())
    assert metadata["tasks"] == ["CausalLM"]


@pytest.mark.slow_on_tensorflow
def test_save_to_preset_saves_the_head_of_each_task(tmp_path):
    first = make_lm()
    second = OpenLlamaCausalLM(first.backbone, first.preprocessor)
    assert not np.allclose(logits_of(first), logits_of(second))
    second.save_to_preset(tmp_path)
    again = OpenLlamaCausalLM.from_preset(tmp_path)
    np.testing.assert_array_equal(logits_of(again), logits_of(second))
    backbone = OpenLlamaBackbone.from_preset(tmp_path)
    assert backbone.count_params() == first.count_params() - 512 * 48


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_keras_hub_from_preset_returns_our_class(tmp_path, dtype):
    import keras_hub

    lm = make_lm(dtype)
    lm.save_to_preset(tmp_path)
    again = keras_hub.models.CausalLM.from_preset(str(tmp_path))
    assert again.dtype_policy == keras.config.dtype_policy()
    again = keras_hub.models.CausalLM.from_preset(str(tmp_path), dtype=dtype)
    assert isinstance(again, OpenLlamaCausalLM)
    np.testing.assert_array_equal(logits_of(again), logits_of(lm))


def test_load_model_restores_a_saved_task(tmp_path):
    lm = make_lm()
    lm.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(again, OpenLlamaCausalLM)
    np.testing.assert_array_equal(logits_of(again), logits_of(lm))
    assert again.generate("The", max_new_tokens=5) == lm.generate(
        "The", max_new_tokens=5
    )


@pytest.mark.slow_on_tensorflow
def test_from_preset_without_tokenizer_generates_from_ids(tmp_path):
    lm = make_lm()
    ids = np.array([[1, 40, 60]])
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    lm.preprocessor = None
    expected = lm.generate(x, max_new_tokens=4, stop_token_ids=None)
    lm.save_to_preset(tmp_path)
    again = OpenLlamaCausalLM.from_preset(tmp_path, preprocessor=None)
    assert again.preprocessor is None
    outputs = again.generate(x, max_new_tokens=4, stop_token_ids=None)
    np.testing.assert_array_equal(outputs["token_ids"], expected["token_ids"])
