"""Weights saved by Keras under LoRA: kernels and adapters come back apart."""

import h5py
import keras
import numpy as np
import pytest
from keras import ops
from tensorflow_marks import first_on_tensorflow
from tiny_models import SHAPES, batch, random_lm

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.backend.keras_hub import Backbone
from keras_openllama.backend.keras_private import kernel_variable
from keras_openllama.layers.adapter_merging import saving_merged
from keras_openllama.layers.lora import adapted_layers

pytestmark = pytest.mark.usefixtures("compile_fast")

SHAPE = SHAPES[2]  # Grouped heads: projections of different kinds differ in shape.
QUANTIZATIONS = (None, "int8", "int4")
FILES = ("lm.weights.h5", "lm.weights.json", "lm.keras")


def make_lm(rank=2, targets=("query", "value"), alpha=6, seed=0, mode=None, **options):
    """A model with random adapters; without adapters if the rank is 0."""
    lm = random_lm(SHAPE, seed=seed, **options)
    if mode:
        lm.backbone.quantize(mode)
    if rank:
        lm.backbone.enable_lora(rank, list(targets), alpha)
        random = np.random.default_rng(seed + 1)
        for weight in lm.trainable_variables:
            weight.assign(0.1 * random.standard_normal(weight.shape))
    return lm


def values_of(model):
    return {weight.path: ops.convert_to_numpy(weight.value) for weight in model.weights}


def assert_same_weights(found, expected):
    found, expected = values_of(found), values_of(expected)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == value.dtype
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def logits_of(lm):
    return ops.convert_to_numpy(lm.score(batch(SHAPE)))


def save(lm, path):
    if path.suffix == ".keras":
        lm.save(path)
    else:
        sharded = {"max_shard_size": 1e-4} if path.suffix == ".json" else {}
        lm.save_weights(path, **sharded)
    return path


# ----- Kernels and adapters apart


@first_on_tensorflow("name", FILES)
@first_on_tensorflow("mode", QUANTIZATIONS)
def test_load_weights_restores_kernels_and_adapters_bit_exactly(
    mode, name, tmp_path, recwarn
):
    lm = make_lm(mode=mode)
    path = save(lm, tmp_path / name)
    other = make_lm(mode=mode, seed=5)
    other.load_weights(path)
    assert_same_weights(other, lm)
    assert not [w for w in recwarn if "adapters" in str(w.message)]


@pytest.mark.slow_on_tensorflow
def test_load_weights_of_the_backbone_restores_kernels_and_adapters(tmp_path):
    lm, other = make_lm(), make_lm(seed=5)
    lm.backbone.save_weights(tmp_path / "backbone.weights.h5")
    other.backbone.load_weights(tmp_path / "backbone.weights.h5")
    assert_same_weights(other.backbone, lm.backbone)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
@pytest.mark.slow_on_tensorflow
def test_load_weights_keeps_float32_adapters_of_a_bfloat16_model(dtype, tmp_path):
    lm, other = make_lm(dtype=dtype), make_lm(dtype=dtype, seed=5)
    lm.save_weights(tmp_path / "lm.weights.h5")
    other.load_weights(tmp_path / "lm.weights.h5")
    assert_same_weights(other, lm)


@first_on_tensorflow("mode", QUANTIZATIONS)
def test_load_model_restores_the_adapters_of_a_keras_file(mode, tmp_path):
    lm = make_lm(mode=mode)
    lm.save(tmp_path / "lm.keras")
    restored = keras.saving.load_model(tmp_path / "lm.keras")
    assert_same_weights(restored, lm)
    assert [v.path for v in restored.trainable_variables] == [
        v.path for v in lm.trainable_variables
    ]
    np.testing.assert_array_equal(logits_of(restored), logits_of(lm))
    assert {layer.lora_alpha for layer in adapted_layers(restored)} == {6}


class _Interruption(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize("mode", [None, "int8"])
def test_backup_and_restore_resumes_training_of_adapters(mode, tmp_path):
    ids = batch(SHAPE, 4, 9)
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, 1:])}

    def fit(*callbacks):
        lm = make_lm(mode=mode)
        lm.compile(optimizer=keras.optimizers.Adam(1e-2))
        options = dict(epochs=4, shuffle=False, verbose=0, callbacks=[*callbacks])
        return lm, lm.fit(x, ids[:, 1:], **options).history["loss"]

    straight, losses = fit()
    backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    with pytest.raises(KeyboardInterrupt):
        fit(backup, _Interruption())
    resumed, later = fit(backup)
    assert later == losses[2:]
    assert_same_weights(resumed, straight)


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize("name", ["best.weights.h5", "best.keras"])
def test_model_checkpoint_saves_adapters_that_save_adapters_writes(name, tmp_path):
    lm = make_lm()
    ids = batch(SHAPE)
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    only = {"save_weights_only": name.endswith(".h5")}
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / name, **only)
    lm.fit(x, ids, callbacks=[checkpoint], verbose=0)
    other = make_lm(seed=5)
    other.load_weights(tmp_path / name)
    for model, directory in ((lm, "first"), (other, "second")):
        model.save_adapters(tmp_path / directory)
    first, second = (
        (tmp_path / directory / "adapter_model.safetensors").read_bytes()
        for directory in ("first", "second")
    )
    assert first == second


# ----- Files and models of which only one has adapters


@pytest.mark.slow_on_tensorflow
def test_load_weights_of_a_file_without_adapters_resets_the_adapters(tmp_path):
    lm = make_lm()
    with saving_merged():  # As before version 0.2.
        lm.save_weights(tmp_path / "old.weights.h5")
    other = make_lm(seed=5)
    with pytest.warns(UserWarning, match=r"old.weights.h5 has no LoRA adapters"):
        other.load_weights(tmp_path / "old.weights.h5")
    np.testing.assert_allclose(logits_of(other), logits_of(lm), atol=1e-4)
    for layer in adapted_layers(other):
        outputs, inputs = map(ops.convert_to_numpy, layer.adapters().values())
        assert not outputs.any()
        assert inputs.all()  # Otherwise no gradient could change either factor.


@pytest.mark.slow_on_tensorflow
def test_load_weights_merges_adapters_into_a_model_without_adapters(tmp_path):
    lm, plain = make_lm(), make_lm(rank=0, seed=5)
    lm.save_weights(tmp_path / "lm.weights.h5")
    message = r"merged into its kernels. .* `enable_lora\(2, \['query', 'value'\], alph"
    with pytest.warns(UserWarning, match=message):
        plain.load_weights(tmp_path / "lm.weights.h5")
    assert not adapted_layers(plain)
    np.testing.assert_allclose(logits_of(plain), logits_of(lm), atol=1e-4)


@pytest.mark.slow_on_tensorflow
def test_load_weights_does_not_merge_adapters_into_quantized_kernels(tmp_path):
    make_lm(mode="int8").save_weights(tmp_path / "lm.weights.h5")
    plain = make_lm(rank=0, seed=5, mode="int8")
    before = values_of(plain)
    with pytest.raises(ValueError, match=r"call `enable_lora\(2, .* alpha=6\)` before"):
        plain.load_weights(tmp_path / "lm.weights.h5")
    for path, value in values_of(plain).items():
        np.testing.assert_array_equal(value, before[path])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "other",
    [dict(alpha=3), dict(rank=3), dict(targets=["query"]), dict(targets=["up"])],
)
@pytest.mark.slow_on_tensorflow
def test_load_weights_rejects_other_adapters_by_the_call_that_fits(
    other, name, tmp_path
):
    file = save(make_lm(), tmp_path / name)
    lm = make_lm(**other)
    before = values_of(lm)
    message = r"enable_lora\(2, \['query', 'value'\], alpha=6\)`, but this model those"
    with pytest.raises(ValueError, match=message):
        lm.load_weights(file)
    for path, value in values_of(lm).items():
        np.testing.assert_array_equal(value, before[path])


@pytest.mark.parametrize(("saved", "loaded"), [(None, "int8"), ("int8", None)])
@pytest.mark.slow_on_tensorflow
def test_load_weights_rejects_weights_of_another_quantization(saved, loaded, tmp_path):
    make_lm(mode=saved).save_weights(tmp_path / "lm.weights.h5")
    lm = make_lm(mode=loaded)
    with pytest.raises(ValueError, match="another quantization"):
        lm.load_weights(tmp_path / "lm.weights.h5")


# ----- Presets


@first_on_tensorflow("dtype", ["float32", "mixed_bfloat16"])
def test_save_to_preset_merges_adapters_without_rounding(dtype, tmp_path):
    lm = make_lm(dtype=dtype)
    lm.save_to_preset(tmp_path)
    restored = OpenLlamaCausalLM.from_preset(tmp_path, preprocessor=None)
    assert not adapted_layers(restored)
    kernels = {weight.path: weight for weight in restored.weights}
    for layer in adapted_layers(lm):
        kernel = ops.convert_to_numpy(kernels[kernel_variable(layer).path].value)
        np.testing.assert_array_equal(kernel, layer.merged_kernel())


@pytest.mark.slow_on_tensorflow
def test_save_to_preset_warns_that_adapters_are_rounded_into_int8(tmp_path):
    lm = make_lm(mode="int8")
    with pytest.warns(UserWarning, match="into the int8 kernels.*`save_adapters`"):
        lm.save_to_preset(tmp_path)


# ----- Adapters alone


@first_on_tensorflow("mode", QUANTIZATIONS)
def test_load_adapters_adds_the_saved_adapters_to_a_quantized_model(mode, tmp_path):
    lm, other = make_lm(mode=mode), make_lm(rank=0, mode=mode)
    lm.save_adapters(tmp_path / "adapters")
    other.load_adapters(tmp_path / "adapters")
    assert_same_weights(other, lm)


@first_on_tensorflow("mode", QUANTIZATIONS)
def test_load_lora_weights_adds_the_saved_adapters(mode, tmp_path):
    lm = make_lm(targets=["key", "down"], mode=mode)
    lm.backbone.save_lora_weights(tmp_path / "a.lora.h5")
    for rank in (0, 2):  # Without adapters, and with the same.
        other = make_lm(rank, ["key", "down"], mode=mode)
        other.backbone.load_lora_weights(tmp_path / "a.lora.h5")
        assert_same_weights(other, lm)
        assert {layer.lora_alpha for layer in adapted_layers(other)} == {6}


@pytest.mark.parametrize(
    "other",
    [dict(alpha=3), dict(rank=3), dict(targets=["query"]), dict(targets=["up"])],
)
@pytest.mark.slow_on_tensorflow
def test_load_lora_weights_rejects_other_adapters_by_the_call_that_fits(
    other, tmp_path
):
    make_lm().backbone.save_lora_weights(tmp_path / "a.lora.h5")
    lm = make_lm(**other)
    before = values_of(lm)
    message = r"enable_lora\(2, \['query', 'value'\], alpha=6\)`, but this model those"
    with pytest.raises(ValueError, match=message):
        lm.backbone.load_lora_weights(tmp_path / "a.lora.h5")
    for path, value in values_of(lm).items():
        np.testing.assert_array_equal(value, before[path])


def as_kerashub(lm, path):
    """Saves adapters by KerasHub's own method, which does not store alpha."""
    Backbone.save_lora_weights(lm.backbone, path)
    return path


def test_load_lora_weights_reads_files_of_kerashub(tmp_path):
    lm = make_lm(alpha=2)
    path = as_kerashub(lm, tmp_path / "a.lora.h5")
    plain = make_lm(rank=0)
    plain.backbone.load_lora_weights(path)
    assert_same_weights(plain, lm)
    other = make_lm(alpha=4)
    with pytest.warns(UserWarning, match="does not store alpha.*is used: 4.*rank, 2"):
        other.backbone.load_lora_weights(path)
    assert_same_weights(other, lm)


@pytest.mark.slow_on_tensorflow
def test_kerashub_reads_files_of_save_lora_weights(tmp_path):
    lm, other = make_lm(), make_lm(seed=0)
    for weight in other.trainable_variables:
        weight.assign(np.zeros(weight.shape))
    lm.backbone.save_lora_weights(tmp_path / "a.lora.h5")
    Backbone.load_lora_weights(other.backbone, tmp_path / "a.lora.h5")
    assert_same_weights(other, lm)


@pytest.mark.backend_free
def test_load_lora_weights_rejects_files_that_do_not_belong_to_the_model(tmp_path):
    lm = make_lm(rank=0)
    with pytest.raises(FileNotFoundError, match="not a file"):
        lm.backbone.load_lora_weights(tmp_path / "a.lora.h5")
    lm.save_weights(tmp_path / "lm.weights.h5")
    with pytest.raises(ValueError, match="cannot be read as adapters"):
        lm.backbone.load_lora_weights(tmp_path / "lm.weights.h5")
    (tmp_path / "text.lora.h5").write_text("text")
    with pytest.raises(ValueError, match="cannot be read as adapters"):
        lm.backbone.load_lora_weights(tmp_path / "text.lora.h5")
    other = random_lm(SHAPES[0])
    other.backbone.enable_lora(2)
    other.backbone.save_lora_weights(tmp_path / "other.lora.h5")
    with pytest.raises(ValueError, match=r"requires \(\(96, 2\), .* another model"):
        lm.backbone.load_lora_weights(tmp_path / "other.lora.h5")
    make_lm().backbone.save_lora_weights(tmp_path / "some.lora.h5")
    with h5py.File(tmp_path / "some.lora.h5", "a") as file:
        del file["lora"][min(name for name in file["lora"] if name != "vars")]
    with pytest.raises(ValueError, match="Adapters of only some decoder layers"):
        lm.backbone.load_lora_weights(tmp_path / "some.lora.h5")
    assert not adapted_layers(lm)


@pytest.mark.backend_free
def test_save_lora_weights_needs_adapters_and_the_extension(tmp_path):
    lm = make_lm()
    with pytest.raises(ValueError, match=r"must end in .lora.h5. Received: .*a.h5"):
        lm.backbone.save_lora_weights(tmp_path / "a.h5")
    lm.merge_lora()
    with pytest.raises(ValueError, match="no adapters to save"):
        lm.backbone.save_lora_weights(tmp_path / "a.lora.h5")
