"""LoRA: the adapters, their training, files and merging."""

import json

import keras
import numpy as np
import pytest
from keras import ops
from tensorflow_marks import first_on_tensorflow
from tiny_models import SHAPES, batch, random_lm

from keras_openllama.backend.keras_private import flatten_layers, kernel_variable
from keras_openllama.config import PROJECTIONS

pytestmark = pytest.mark.usefixtures("compile_fast")

SHAPE = SHAPES[2]  # Grouped heads: projections of different kinds differ in shape.


def make_lm(rank=3, targets=PROJECTIONS, alpha=6, seed=0, shape=SHAPE, **options):
    """A model with random adapters."""
    lm = random_lm(shape, seed=seed, **options)
    if rank:
        lm.backbone.enable_lora(rank, list(targets), alpha)
        random = np.random.default_rng(seed + 1)
        for weight in lm.trainable_variables:
            weight.assign(0.1 * random.standard_normal(weight.shape))
    return lm


def logits_of(lm):
    return ops.convert_to_numpy(lm.score(batch(SHAPE)))


def values_of(lm):
    return {w.path: ops.convert_to_numpy(ops.cast(w, "float32")) for w in lm.weights}


def fit(lm, steps=2, optimizer=None):
    lm.compile(optimizer=optimizer or keras.optimizers.Adam(1e-2))
    ids = 3 + batch(SHAPE, 4 * steps, 17) % 8
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, 1:])}
    options = dict(batch_size=4, verbose=0, shuffle=False)
    return [
        lm.fit(
            {k: v[4 * i : 4 * i + 4] for k, v in x.items()},
            ids[4 * i : 4 * i + 4, 1:],
            **options,
        ).history["loss"][0]
        for i in range(steps)
    ]


# ----- Adapters and training


def test_enable_lora_adds_the_scaled_product_to_the_kernels():
    lm = make_lm()
    plain = random_lm(SHAPE)
    kernels = {w.path: w for w in plain.weights}
    for layer in flatten_layers(lm):
        if getattr(layer, "lora_enabled", False):
            a, b = (ops.convert_to_numpy(v) for v in layer.adapters().values())
            kernel = kernels[kernel_variable(layer).path]
            kernel.assign(ops.convert_to_numpy(kernel) + 6 / 3 * a @ b)
    np.testing.assert_allclose(logits_of(lm), logits_of(plain), atol=2e-4)
    assert np.abs(logits_of(lm) - logits_of(random_lm(SHAPE))).max() > 1


def test_enable_lora_does_not_change_the_logits():
    lm = random_lm(SHAPE)
    before = logits_of(lm)
    lm.backbone.enable_lora(2, list(PROJECTIONS))
    np.testing.assert_array_equal(logits_of(lm), before)


@first_on_tensorflow("targets", [("query", "value"), ("gate", "down"), PROJECTIONS])
def test_fit_with_lora_updates_every_adapter_and_nothing_else(targets):
    lm = make_lm(targets=targets)
    before = values_of(lm)
    fit(lm, steps=1)
    moved = {
        path for path, value in values_of(lm).items() if (value != before[path]).any()
    }
    assert moved == {
        f"transformer_layer_{i}/{part}/{name}/lora_kernel_{ab}"
        for i in range(SHAPE.num_layers)
        for name in targets
        for part in [
            "feedforward" if name in ("gate", "up", "down") else "self_attention"
        ]
        for ab in "ab"
    }
    assert {v.path for v in lm.trainable_variables} == moved


@pytest.mark.slow_on_tensorflow
def test_fit_without_lora_updates_every_variable():
    lm = make_lm(rank=None)
    before = values_of(lm)
    fit(lm, steps=1)
    for path, value in values_of(lm).items():
        assert (value != before[path]).any(), path


def test_lora_adapters_and_moments_are_float32_on_a_bfloat16_base():
    lm = make_lm(dtype="bfloat16")
    fit(lm, steps=1)
    assert {v.dtype for v in lm.trainable_variables} == {"float32"}
    moments = [v for v in lm.optimizer.variables if "lora" in v.path]
    assert len(moments) == 2 * len(lm.trainable_variables)
    assert {v.dtype for v in moments} == {"float32"}


@pytest.mark.slow_on_tensorflow
def test_lora_on_a_bfloat16_base_learns_as_on_float32():
    start = random_lm(SHAPE)

    def losses(dtype):
        lm = random_lm(SHAPE, dtype=dtype)
        for weight, same in zip(lm.weights, start.weights, strict=True):
            weight.assign(ops.convert_to_numpy(same))
        keras.utils.set_random_seed(3)
        lm.backbone.enable_lora(4, list(PROJECTIONS))
        return fit(lm, steps=60)

    full, half = losses("float32"), losses("bfloat16")
    assert full[-1] < 0.7 * full[0]
    np.testing.assert_allclose(half, full, rtol=0.01)


@pytest.mark.parametrize("first", ["quantize", "enable_lora"])
@pytest.mark.slow_on_tensorflow
def test_lora_on_an_int8_base_learns(first):
    lm = random_lm(SHAPE)
    order = ["quantize", "enable_lora"]
    for step in order if first == "quantize" else order[::-1]:
        if step == "quantize":
            lm.quantize("int8")
        else:
            lm.backbone.enable_lora(4, list(PROJECTIONS))
    base = {p: v for p, v in values_of(lm).items() if "lora" not in p}
    losses = fit(lm, steps=60)
    assert losses[-1] < 0.75 * losses[0]
    after = values_of(lm)
    for path, value in base.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)
    query = lm.backbone.transformer_layers[0].self_attention.query
    assert kernel_variable(query).dtype == "int8"


# ----- Merging


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unmerge_lora_restores_the_model_exactly(dtype):
    lm = make_lm(dtype=dtype)
    before, logits = values_of(lm), logits_of(lm)
    lm.merge_lora()
    assert not any("lora" in weight.path for weight in lm.weights)
    assert len(lm.trainable_variables) == len(lm.weights)
    tolerance = 1e-4 if dtype == "float32" else 0.2
    np.testing.assert_allclose(logits_of(lm), logits, atol=tolerance)
    lm.unmerge_lora()
    after = values_of(lm)
    assert set(after) == set(before)
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)
    np.testing.assert_array_equal(logits_of(lm), logits)
    assert all("lora" in v.path for v in lm.trainable_variables)


@pytest.mark.slow_on_tensorflow
def test_fit_after_unmerge_lora_equals_fit_without_merging():
    def losses(merge):
        lm = make_lm()
        first = fit(lm)
        if merge:
            lm.merge_lora()
            lm.generate(
                {"token_ids": [[1, 5]], "padding_mask": [[1, 1]]},
                max_length=4,
                stop_token_ids=None,
            )
            lm.unmerge_lora()
        return first + fit(lm, optimizer=lm.optimizer)

    assert losses(True) == losses(False)


@pytest.mark.slow_on_tensorflow
def test_irreversible_merge_lora_gives_a_plain_model(tmp_path):
    lm = make_lm()
    logits = logits_of(lm)
    lm.backbone.merge_lora(reversible=False)
    with pytest.raises(ValueError, match="no merged adapters to restore"):
        lm.unmerge_lora()
    lm.save_to_preset(str(tmp_path))
    restored = type(lm).from_preset(str(tmp_path), preprocessor=None)
    np.testing.assert_allclose(logits_of(restored), logits, atol=1e-4)
    lm.backbone.enable_lora(2)
    assert len(fit(lm)) == 2


@first_on_tensorflow("method", ["predict", "evaluate", "predict_on_batch"])
def test_enable_and_merge_lora_take_effect_in_compiled_functions(method):
    lm = random_lm(SHAPE)
    lm.compile()
    x = {"token_ids": batch(SHAPE), "padding_mask": np.ones_like(batch(SHAPE))}

    def found():
        if method == "evaluate":
            return lm.evaluate(x, batch(SHAPE), verbose=0)[0]
        options = {"verbose": 0} if method == "predict" else {}
        return ops.convert_to_numpy(getattr(lm, method)(x, **options))

    plain = found()
    lm.backbone.enable_lora(3)
    for weight in lm.trainable_variables:
        weight.assign(0.3 * np.random.default_rng(0).standard_normal(weight.shape))
    adapted = found()
    assert np.abs(adapted - plain).max() > 1e-2
    lm.merge_lora()
    np.testing.assert_allclose(found(), adapted, atol=1e-3)
    lm.unmerge_lora()
    np.testing.assert_allclose(found(), adapted, atol=1e-5)


@pytest.mark.slow_on_tensorflow
def test_enable_lora_between_two_fits_trains_only_the_adapters():
    lm = random_lm(SHAPE)
    x = {"token_ids": batch(SHAPE), "padding_mask": np.ones_like(batch(SHAPE))}
    lm.fit(x, batch(SHAPE), verbose=0)
    lm.backbone.enable_lora(2)
    before = values_of(lm)
    lm.fit(x, batch(SHAPE), verbose=0)  # With the default optimizer.
    after = values_of(lm)
    assert all("lora" in path for path in after if (after[path] != before[path]).any())
    lm.compile(optimizer=keras.optimizers.Adam())
    lm.fit(x, batch(SHAPE), verbose=0)
    lm.merge_lora()
    before = values_of(lm)
    with pytest.raises(ValueError, match="Call `compile` again"):
        lm.fit(x, batch(SHAPE), verbose=0)
    for path, value in values_of(lm).items():
        np.testing.assert_array_equal(value, before[path])


@pytest.mark.parametrize("change", ["train", "quantize"])
@pytest.mark.slow_on_tensorflow
def test_unmerge_lora_rejects_kernels_that_changed(change):
    lm = make_lm()
    lm.merge_lora()
    if change == "quantize":
        lm.backbone.quantize("int8")
    else:
        fit(lm, steps=1)
    before = logits_of(lm)
    with pytest.raises(ValueError, match="trained or quantized since"):
        lm.unmerge_lora()
    np.testing.assert_array_equal(logits_of(lm), before)


# ----- Files


@pytest.mark.parametrize("targets", [("query", "value"), PROJECTIONS])
@pytest.mark.slow_on_tensorflow
def test_save_adapters_and_load_adapters_round_trip(targets, tmp_path):
    lm = make_lm(targets=targets)
    lm.save_adapters(tmp_path / "adapters")
    size = 4 * sum(int(np.prod(v.shape)) for v in lm.trainable_variables)
    written = (tmp_path / "adapters" / "adapter_model.safetensors").stat().st_size
    assert size < written < size + 10_000
    restored = random_lm(SHAPE)
    restored.load_adapters(tmp_path / "adapters")
    np.testing.assert_array_equal(logits_of(restored), logits_of(lm))
    assert {v.path for v in restored.trainable_variables} == {
        v.path for v in lm.trainable_variables
    }
    other = make_lm(targets=targets, seed=0)
    for v in other.trainable_variables:
        v.assign(np.zeros(v.shape))
    other.load_adapters(tmp_path / "adapters")
    np.testing.assert_array_equal(logits_of(other), logits_of(lm))


@first_on_tensorflow("targets", [("query", "value"), PROJECTIONS])
def test_peft_loads_saved_adapters_with_equal_logits(targets, tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    import transformers

    lm = make_lm(targets=targets)
    base = random_lm(SHAPE)
    base.export_to_transformers(str(tmp_path / "base"), tokenizer=False)
    lm.save_adapters(tmp_path / "adapters")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapters")
    with torch.no_grad():
        expected = theirs(torch.from_numpy(batch(SHAPE)).long()).logits.numpy()
    found = logits_of(lm)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.slow_on_tensorflow
def test_load_adapters_reads_adapters_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    import transformers

    base = random_lm(SHAPE)
    base.export_to_transformers(str(tmp_path / "base"), tokenizer=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["k_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
        expected = theirs(torch.from_numpy(batch(SHAPE)).long()).logits.numpy()
    theirs.save_pretrained(tmp_path / "adapters")
    base.load_adapters(tmp_path / "adapters")
    assert np.abs(logits_of(base) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(logits_of(random_lm(SHAPE)) - expected).max() > 1


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("origin", "base"),
    [
        ("hf://user/repo", "user/repo"),
        ("open_llama_3b_v3", "openlm-research/open_llama_3b_v2"),
        ("open_llama_nano", None),
        ("the directory tf_", None),
        (None, None),
    ],
)
def test_save_adapters_names_a_base_model_that_peft_can_load(origin, base, tmp_path):
    lm = make_lm()
    lm.loaded_from = origin
    lm.save_adapters(tmp_path / "adapters")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base


@pytest.mark.slow_on_tensorflow
def test_export_to_transformers_merges_adapters(tmp_path):
    lm = make_lm()
    lm.export_to_transformers(str(tmp_path), tokenizer=False)
    merged = type(lm).from_preset(str(tmp_path), preprocessor=None)
    np.testing.assert_allclose(logits_of(merged), logits_of(lm), atol=1e-4)


# ----- Invalid input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rank=0), "`rank` must be a positive integer. Received: rank=0"),
        (dict(rank=2.5), "`rank` must be a positive integer"),
        (dict(rank=True), "`rank` must be a positive integer"),
        (dict(rank=2, alpha=0), "`alpha` must be a positive number"),
        (dict(rank=2, alpha="16"), "`alpha` must be a positive number.*alpha='16'"),
        (dict(rank=2, alpha=float("inf")), "`alpha` must be a positive number"),
        (dict(rank=2, target_layer_names=["querry"]), "querry"),
        (dict(rank=2, target_layer_names=[]), "must be a list of names"),
        (dict(rank=2, target_layer_names="query"), "must be a list of names"),
    ],
)
def test_enable_lora_rejects_invalid_arguments_without_side_effects(arguments, message):
    lm = random_lm(SHAPE)
    with pytest.raises(ValueError, match=message):
        lm.backbone.enable_lora(**arguments)
    assert len(lm.trainable_variables) == len(lm.weights)


def test_enable_lora_twice_is_rejected():
    lm = make_lm()
    before = values_of(lm)
    with pytest.raises(ValueError, match=r"has adapters \(rank 3\)"):
        lm.backbone.enable_lora(4)
    for path, value in values_of(lm).items():
        np.testing.assert_array_equal(value, before[path])


@pytest.mark.slow_on_tensorflow
def test_errors_after_a_reversible_merge_name_steps_that_work():
    lm = make_lm()
    logits = logits_of(lm)
    lm.merge_lora()
    with pytest.raises(ValueError, match=r"merged already. Call `unmerge_lora\(\)`"):
        lm.merge_lora(reversible=False)
    steps = r"`unmerge_lora\(\)` and then `merge_lora\(reversible=False\)`.*rank=4"
    with pytest.raises(ValueError, match=steps):
        lm.backbone.enable_lora(4)
    lm.unmerge_lora()
    lm.merge_lora(reversible=False)
    lm.backbone.enable_lora(4)
    np.testing.assert_allclose(logits_of(lm), logits, atol=1e-4)


def test_save_adapters_and_merge_lora_need_adapters(tmp_path):
    lm = random_lm(SHAPE)
    with pytest.raises(ValueError, match="no adapters to save"):
        lm.save_adapters(tmp_path / "adapters")
    with pytest.raises(ValueError, match="no adapters to merge"):
        lm.merge_lora()
    assert not (tmp_path / "adapters").exists()


def test_merge_lora_rejects_quantized_weights():
    lm = random_lm(SHAPE)
    lm.quantize("int8")
    lm.backbone.enable_lora(2)
    with pytest.raises(ValueError, match="cannot be merged into weights that are quan"):
        lm.merge_lora()


def changed(directory, **settings):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(use_dora=True), r"use_dora=True \(DoRA\)"),
        (dict(bias="all"), "biases"),
        (dict(peft_type="IA3"), "Only LoRA is supported. Received: peft_type='IA3'"),
        (dict(r=None), r"adapter_config.json: `r` must be .* Received: r=None"),
        (dict(r=5), "for r=5: .* another model, or `r` in adapter_config.json is wr"),
        (dict(lora_alpha=None), "`lora_alpha` must be a positive number"),
        (dict(lora_alpha=0), "Received: lora_alpha=0"),
        (dict(init_lora_weights="pissa_niter_16"), "may change the base model's weig"),
        (dict(init_lora_weights="olora"), "init_lora_weights='olora'"),
        (dict(alora_invocation_tokens=[5, 6]), "act after certain tokens only"),
        (dict(kasa_config={"beta": 1e-4}), "kasa_config={'beta': 0.0001}. Merge"),
        (dict(use_new_variant=True), "use_new_variant=True. Merge"),
    ],
)
def test_load_adapters_rejects_unsupported_settings(settings, message, tmp_path):
    make_lm().save_adapters(tmp_path / "adapters")
    changed(tmp_path / "adapters", **settings)
    lm = random_lm(SHAPE)
    before = values_of(lm)
    with pytest.raises(ValueError, match=message):
        lm.load_adapters(tmp_path / "adapters")
    assert values_of(lm).keys() == before.keys()
    assert len(lm.trainable_variables) == len(lm.weights)


@pytest.mark.slow_on_tensorflow
def test_load_adapters_ignores_settings_without_effect(tmp_path):
    lm = make_lm()
    lm.save_adapters(tmp_path / "adapters")
    changed(
        tmp_path / "adapters",
        init_lora_weights="gaussian",
        lora_dropout=0.1,
        layers_to_transform=[0, 1],
        peft_version="0.21.2",
        use_new_variant=None,
    )
    other = random_lm(SHAPE)
    other.load_adapters(tmp_path / "adapters")
    np.testing.assert_array_equal(logits_of(other), logits_of(lm))


def test_load_adapters_rejects_a_file_without_tensors(tmp_path):
    make_lm().save_adapters(tmp_path / "adapters")
    path = tmp_path / "adapters" / "adapter_model.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=r"contains no tensors\. Save"):
        random_lm(SHAPE).load_adapters(tmp_path / "adapters")


def test_load_adapters_rejects_adapters_of_another_model(tmp_path):
    make_lm(shape=SHAPES[0]).save_adapters(tmp_path / "adapters")
    lm = random_lm(SHAPE)
    with pytest.raises(
        ValueError, match=r"shape \(\d+, \d+\), but this model requires"
    ):
        lm.load_adapters(tmp_path / "adapters")
    assert not any("lora" in weight.path for weight in lm.weights)


def test_load_adapters_rejects_adapters_that_differ_from_the_models(tmp_path):
    make_lm().save_adapters(tmp_path / "adapters")
    lm = make_lm(rank=2)
    before = values_of(lm)
    with pytest.raises(ValueError, match="already has different adapters"):
        lm.load_adapters(tmp_path / "adapters")
    for path, value in values_of(lm).items():
        np.testing.assert_array_equal(value, before[path])


def test_load_adapters_rejects_a_truncated_file(tmp_path):
    make_lm().save_adapters(tmp_path / "adapters")
    path = tmp_path / "adapters" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        random_lm(SHAPE).load_adapters(tmp_path / "adapters")


def test_save_adapters_replaces_files_only_with_force(tmp_path):
    lm = make_lm()
    lm.save_adapters(tmp_path / "adapters")
    with pytest.raises(FileExistsError, match="force=True"):
        lm.save_adapters(tmp_path / "adapters")
    lm.save_adapters(tmp_path / "adapters", force=True)
