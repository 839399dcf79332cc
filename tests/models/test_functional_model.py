"""What backbone and task share: quantization, cloning, export to other programs."""

import keras
import numpy as np
import pytest
from keras import ops
from tokenizer_models import trained_model

from keras_openllama import (
    OpenLlamaBackbone,
    OpenLlamaCausalLM,
    OpenLlamaCausalLMPreprocessor,
    OpenLlamaTokenizer,
)
from keras_openllama.backend.keras_private import flatten_layers

pytestmark = pytest.mark.usefixtures("compile_fast")

TEXTS = ["The class body", "If a name"]
ONES = {name: np.ones((2, 5), "int32") for name in ("token_ids", "padding_mask")}


def make_lm():
    tokenizer = OpenLlamaTokenizer(trained_model(keep_spaces=True))
    backbone = OpenLlamaBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=1,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=32,
    )
    preprocessor = OpenLlamaCausalLMPreprocessor(tokenizer, sequence_length=8)
    return OpenLlamaCausalLM(backbone, preprocessor)


# ----- Quantization and adapters


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.slow_on_tensorflow
def test_fit_trains_adapters_of_a_quantized_model_without_another_compile(mode):
    lm = make_lm()
    lm.quantize(mode)
    lm.backbone.enable_lora(4, lm.backbone.default_lora_layer_names())
    assert len(lm.trainable_variables) == 4
    loss = lm.evaluate(TEXTS, verbose=0)[0]
    x, y, _ = lm.preprocessor(TEXTS)
    expected = ops.convert_to_numpy(lm.score(**x, scoring_mode="loss", target_ids=y))[
        lm.preprocessor(TEXTS)[2] > 0
    ]
    assert loss == pytest.approx(expected.mean(), rel=1e-4)
    lm.compile(optimizer=keras.optimizers.Adam(0.1))
    losses = lm.fit(TEXTS, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_quantize_names_gptq_instead_of_awq():
    config = keras.quantizers.AWQConfig(dataset=["a"], tokenizer=str)
    lm = make_lm()
    for quantize in (
        lambda: lm.quantize("awq"),
        lambda: lm.quantize(config=config),
        lambda: lm.backbone.quantize("awq", config=config),
        lambda: lm.lm_head.quantize("awq", config=config),
    ):
        with pytest.raises(ValueError, match=r"does not support 'awq'.*GPTQConfig"):
            quantize()
    assert {layer.quantization_mode for layer in flatten_layers(lm)} == {None}


@pytest.mark.slow_on_tensorflow
@pytest.mark.filterwarnings("ignore::UserWarning")  # The embedding stays as it is.
def test_quantize_float8_trains_all_weights_but_no_adapters():
    lm = make_lm()
    lm.backbone.quantize("float8")
    lm.compile(optimizer=keras.optimizers.Adam(1e-2))
    losses = lm.fit(TEXTS, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="'int8' or 'int4'"):
        lm.backbone.enable_lora(4)
    lm = make_lm()
    lm.backbone.enable_lora(4)
    with pytest.raises(ValueError, match="'int8' or 'int4'"):
        lm.quantize("float8")


# ----- Cloning and exporting


def test_clone_model_names_from_config():
    lm = make_lm()
    for model in (lm, lm.backbone):
        with pytest.raises(ValueError, match=rf"{type(model).__name__}\.from_config"):
            keras.models.clone_model(model)
        copy = type(model).from_config(model.get_config())
        copy.set_weights(model.get_weights())
        np.testing.assert_array_equal(
            ops.convert_to_numpy(copy(ONES)), ops.convert_to_numpy(model(ONES))
        )


@pytest.mark.slow_on_tensorflow
def test_export_returns_a_program_for_each_batch_size_and_length(tmp_path):
    lm = make_lm()
    call = exported(lm, tmp_path)
    for batch, length in ((1, 4), (3, 9)):
        x = {name: np.ones((batch, length), "int32") for name in ONES}
        x["token_ids"][:, -1] = 7
        expected = ops.convert_to_numpy(lm.score(**x))
        np.testing.assert_allclose(call(x), expected, atol=1e-5)


def exported(model, tmp_path, **options):
    if keras.config.backend() == "torch":
        import torch

        model.export(tmp_path / "model.pt2", format="torch", verbose=False, **options)
        program = torch.export.load(tmp_path / "model.pt2").module()

        def call(x):
            outputs = program({name: torch.tensor(array) for name, array in x.items()})
            return outputs.detach().numpy()

        return call
    tf = pytest.importorskip("tensorflow")
    model.export(tmp_path / "model", verbose=False, **options)
    program = tf.saved_model.load(tmp_path / "model")
    return lambda x: program.serve(x).numpy()


@pytest.mark.skipif(keras.config.backend() == "torch", reason="Keras's code alone")
def test_export_takes_an_input_signature(tmp_path):
    backbone = make_lm().backbone
    signature = [{name: keras.InputSpec("int32", (None, 5)) for name in ONES}]
    call = exported(backbone, tmp_path, input_signature=signature)
    expected = ops.convert_to_numpy(backbone(ONES))
    np.testing.assert_allclose(call(ONES), expected, atol=1e-5)


@pytest.mark.skipif(keras.config.backend() != "torch", reason="a limit of PyTorch")
def test_export_to_a_saved_model_on_pytorch_names_the_way_out(tmp_path):
    with pytest.raises(ValueError, match='format="torch"'):
        make_lm().export(tmp_path / "model")
