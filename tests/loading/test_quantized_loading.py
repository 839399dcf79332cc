"""Models are quantized tensor by tensor when they are loaded."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops
from tensorflow_marks import first_on_tensorflow
from tiny_models import SHAPES, batch, random_lm

from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM
from keras_openllama.convert import easylm
from keras_openllama.loading.weight_types import WeightTypes
from keras_openllama.quantization import WeightQuantizationConfig

pytestmark = pytest.mark.usefixtures("compile_fast")

SHAPE = SHAPES[2]
CONFIGS = {
    "int8": "int8",
    "int4": "int4",
    "zero points": WeightQuantizationConfig(4, 16, False, None, 4),
    "keras": keras.quantizers.Int4QuantizationConfig(block_size=16),
}


def logits_of(lm):
    return ops.convert_to_numpy(lm.score(batch(SHAPE)))


def quantized(config):
    lm = random_lm(SHAPE)
    if isinstance(config, str):
        lm.quantize(config)
    else:
        lm.quantize(config=config)
    return lm


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    lm = random_lm(SHAPE)
    lm.save_to_preset(directory / "keras_hub")
    lm.export_to_transformers(directory / "transformers")
    easylm.save(lm, directory / "easylm.msgpack", dtype=None)
    return directory


def load(directories, source, **options):
    if source == "easylm":
        path, preset = directories / "easylm.msgpack", directories / "transformers"
        return easylm.load(path, preset, preprocessor=None, **options)
    path = str(directories / source)
    return OpenLlamaCausalLM.from_preset(path, preprocessor=None, **options)


@first_on_tensorflow("kind", CONFIGS)
@first_on_tensorflow("source", ["transformers", "keras_hub", "easylm"])
def test_from_preset_with_quantization_equals_quantize(source, kind, directories):
    lm = load(directories, source, quantization=CONFIGS[kind])
    expected = quantized(CONFIGS[kind])
    found = {weight.path: weight.numpy() for weight in lm.weights}
    assert found.keys() == {weight.path for weight in expected.weights}
    for weight in expected.weights:
        np.testing.assert_array_equal(found[weight.path], weight.numpy())
    np.testing.assert_array_equal(logits_of(lm), logits_of(expected))


@first_on_tensorflow("source", ["transformers", "keras_hub"])
def test_backbone_from_preset_with_quantization(source, directories):
    path = str(directories / source)
    backbone = OpenLlamaBackbone.from_preset(path, quantization="int4", dtype="float16")
    up = backbone.transformer_layers[0].feedforward.up
    assert up.dtype_policy[up.path].name == "int4/32_from_float16"
    assert backbone.compute_dtype == "float16"


@pytest.mark.slow_on_tensorflow
def test_from_preset_without_weights_builds_a_quantized_model(directories):
    lm = load(directories, "transformers", quantization="int8", load_weights=False)
    assert lm.lm_head.quantized_matrix().bits == 8


@first_on_tensorflow("mode", ["int8", "int4"])
def test_save_to_preset_restores_a_model_that_was_loaded_quantized(
    mode, directories, tmp_path
):
    lm = load(directories, "transformers", quantization=mode)
    for name in ("first", "second"):
        lm.save_to_preset(tmp_path / name)
        expected = logits_of(lm)
        lm = OpenLlamaCausalLM.from_preset(str(tmp_path / name), preprocessor=None)
        np.testing.assert_array_equal(logits_of(lm), expected)
        assert lm.lm_head.quantization_mode == "int8"
    half = OpenLlamaCausalLM.from_preset(
        str(tmp_path / "first"), preprocessor=None, dtype="bfloat16"
    )
    assert half.backbone.compute_dtype == "bfloat16"
    assert half.lm_head.quantized_matrix().bits == 8
    for quantization in (None, "int4"):
        with pytest.raises(ValueError, match="Pass quantization='auto'"):
            OpenLlamaCausalLM.from_preset(
                str(tmp_path / "first"), preprocessor=None, quantization=quantization
            )


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.slow_on_tensorflow
def test_export_to_transformers_dequantizes(adapters, directories, tmp_path):
    lm = load(directories, "transformers", quantization="int4")
    if adapters:
        lm.backbone.enable_lora(2)
        for weight in lm.trainable_variables:
            weight.assign(0.02 * np.ones(weight.shape))
    lm.export_to_transformers(tmp_path / "out")
    easylm.save(lm, tmp_path / "easylm.msgpack", dtype=None)
    for source in ("out", "easylm"):
        preset = tmp_path / "out"
        if source == "out":
            again = OpenLlamaCausalLM.from_preset(str(preset), preprocessor=None)
        else:
            path = tmp_path / "easylm.msgpack"
            again = easylm.load(path, preset, preprocessor=None)
        assert again.lm_head.quantization_mode is None
        np.testing.assert_allclose(logits_of(again), logits_of(lm), atol=1e-4)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            "int3",
            "`quantization` must be 'auto', None, .* Received: quantization='int3'",
        ),
        ("awq", "does not support 'awq'"),
        ("gptq", "GPTQ quantizes a model that is loaded"),
        (8, "Received: quantization=8"),
        (keras.quantizers.Int8QuantizationConfig(), "activation_quantizer=None"),
    ],
)
def test_weight_types_rejects_other_quantizations(quantization, message):
    with pytest.raises(ValueError, match=message):
        WeightTypes(None, quantization)
    with pytest.raises(ValueError, match=message):
        OpenLlamaCausalLM.from_preset("open_llama_nano", quantization=quantization)


_MEASURE = """
import json, sys
import numpy as np
from keras_openllama import OpenLlamaCausalLM

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int([x for x in lines if x.startswith(name)][0].split()[1])

# What loading itself needs: modules, threads, the first programs of JAX.
OpenLlamaCausalLM.from_preset(sys.argv[1], quantization="int4", preprocessor=None)
open("/proc/self/clear_refs", "w").write("5")  # Resets the peak.
before = status("VmRSS")
lm = OpenLlamaCausalLM.from_preset(sys.argv[2], quantization="int4", preprocessor=None)
size = sum(w.numpy().nbytes for w in lm.weights)
print(json.dumps([status("VmHWM") - before, size]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_from_preset_with_quantization_never_holds_the_float_weights(tmp_path):
    backbone = OpenLlamaBackbone(8000, 8, 8, 1024, 4096, dtype="float32")
    lm = OpenLlamaCausalLM(backbone, preprocessor=None)
    lm.export_to_transformers(tmp_path / "large")
    random_lm(SHAPE).export_to_transformers(tmp_path / "small")
    arguments = [str(tmp_path / name) for name in ("small", "large")]
    process = subprocess.run(
        [sys.executable, "-c", _MEASURE, *arguments],
        env={**os.environ, "KERAS_BACKEND": keras.config.backend()},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, size = json.loads(process.stdout.splitlines()[-1])
    floats = 4 * lm.count_params()
    assert size < 0.17 * floats
    # One float32 tensor is 5 % of the weights. The rest is what is read ahead, and
    # libraries and threads, whose memory does not grow with the model.
    assert peak < size + 0.25 * floats
