"""The backbone: its variables, its configuration, adapters."""

import keras
import numpy as np
import pytest
import torch
from keras import ops
from tiny_models import SHAPES, as_ours, assert_close, batch, in_transformers

from keras_openllama import OpenLlamaBackbone

TINY = dict(
    vocabulary_size=50,
    num_layers=2,
    num_query_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    hidden_dim=16,
    intermediate_dim=24,
)


def tiny(**options):
    return OpenLlamaBackbone(**{**TINY, **options})


def test_backbone_variable_paths_and_shapes():
    # Layouts, checkpoints and conversions depend on them.
    per_layer = [
        ("self_attention_norm/scale", (16,)),
        ("self_attention/query/kernel", (32, 16)),
        ("self_attention/key/kernel", (16, 16)),
        ("self_attention/value/kernel", (16, 16)),
        ("self_attention/output/kernel", (16, 32)),
        ("feedforward_norm/scale", (16,)),
        ("feedforward/gate/kernel", (24, 16)),
        ("feedforward/up/kernel", (24, 16)),
        ("feedforward/down/kernel", (16, 24)),
    ]
    expected = [
        ("token_embedding/embeddings", (50, 16)),
        *(
            (f"transformer_layer_{i}/{path}", s)
            for i in (0, 1)
            for path, s in per_layer
        ),
        ("final_norm/scale", (16,)),
    ]
    assert [(v.path, tuple(v.shape)) for v in tiny().variables] == expected


def test_initial_weights_differ_and_have_the_published_standard_deviation():
    backbone = tiny(hidden_dim=64, num_query_heads=4, head_dim=64)
    weights = {
        v.path: ops.convert_to_numpy(v) for v in backbone.variables if v.ndim == 2
    }
    assert len(weights) == 15
    values = list(weights.values())
    for i, (path, value) in enumerate(weights.items()):
        assert value.std() == pytest.approx(0.02, rel=0.1), path
        for other in values[:i]:
            assert other.shape != value.shape or not np.allclose(other, value), path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "head_dim": 10},
        {"dtype": "bfloat16", "layer_norm_epsilon": 1e-3, "rope_max_wavelength": 7.0},
        {"dtype": "mixed_bfloat16", "initializer_std": 0.1, "max_sequence_length": 9},
    ],
    ids=str,
)
def test_backbone_from_config_restores_get_config(options):
    backbone = tiny(**options)
    config = backbone.get_config()
    assert {k: config[k] for k in options if k != "dtype"} == {
        k: v for k, v in options.items() if k != "dtype"
    }
    again = OpenLlamaBackbone.from_config(config)
    assert again.get_config() == config
    assert again.dtype_policy == backbone.dtype_policy


def test_load_model_restores_a_saved_backbone(tmp_path):
    backbone = tiny(rope_scaling={"rope_type": "linear", "factor": 2.0})
    backbone.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(again, OpenLlamaBackbone)
    assert again.get_config() == backbone.get_config()
    x = {"token_ids": [[1, 5, 7]], "padding_mask": [[1, 1, 1]]}
    x = {name: np.array(value) for name, value in x.items()}
    np.testing.assert_array_equal(
        ops.convert_to_numpy(again(x)), ops.convert_to_numpy(backbone(x))
    )


@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
def test_rope_scaling_agrees_with_transformers(rope_type, tmp_path):
    shape = SHAPES[0]
    theirs = in_transformers(
        shape,
        rope_parameters={"rope_type": rope_type, "factor": 2.0, "rope_theta": 1e4},
    )
    theirs.config.max_position_embeddings = 32
    ours = as_ours(theirs, tmp_path)
    assert ours.backbone.rope_scaling == {"rope_type": rope_type, "factor": 2.0}
    assert ours.backbone.context_length == 64
    rope = type(theirs.model.rotary_emb)(theirs.config)
    theirs.model.rotary_emb = rope
    for length in (20, 60):
        ids = batch(shape, length=length)
        with torch.no_grad():
            assert_close(ours.score(ids), theirs(torch.tensor(ids)).logits, length)


def test_right_padding_does_not_change_hidden_states():
    backbone = tiny(dtype="float32")
    ids = np.array([[1, 5, 7, 9, 0, 0]])
    mask = np.array([[1, 1, 1, 1, 0, 0]])
    alone = backbone({"token_ids": ids[:, :4], "padding_mask": mask[:, :4]})
    padded = backbone({"token_ids": ids, "padding_mask": mask})
    np.testing.assert_allclose(
        ops.convert_to_numpy(padded)[:, :4], ops.convert_to_numpy(alone), atol=1e-6
    )


def test_packed_documents_have_the_hidden_states_of_separate_ones():
    backbone = tiny(dtype="float32")
    ids = np.array([[1, 5, 7, 9, 2, 1, 8, 3, 0, 0], [1, 6, 2, 1, 4, 4, 4, 9, 2, 1]])
    numbers = np.array([[1] * 5 + [2] * 3 + [0] * 2, [1] * 3 + [2] * 6 + [3]])
    together = ops.convert_to_numpy(
        backbone({"token_ids": ids, "padding_mask": numbers})
    )
    for row, first, last in ((0, 0, 5), (0, 5, 8), (1, 0, 3), (1, 3, 9), (1, 9, 10)):
        length = last - first
        part, mask = np.zeros((2, 1, 10), "int32")  # One shape compiles once.
        part[0, :length], mask[0, :length] = ids[row, first:last], 1
        alone = backbone({"token_ids": part, "padding_mask": mask})
        np.testing.assert_allclose(
            together[row, first:last],
            ops.convert_to_numpy(alone)[0, :length],
            atol=1e-6,
        )


def test_head_dim_default_must_be_an_integer():
    with pytest.raises(ValueError, match="num_query_heads=3"):
        tiny(num_query_heads=3, num_key_value_heads=3, head_dim=None)
    assert tiny(head_dim=None).head_dim == 4


def test_enable_lora_makes_only_adapters_trainable():
    backbone = tiny()
    backbone.enable_lora(2)
    names = {v.path for v in backbone.trainable_variables}
    assert names == {
        f"transformer_layer_{i}/self_attention/{part}/lora_kernel_{ab}"
        for i in (0, 1)
        for part in ("query", "value")
        for ab in "ab"
    }


def test_enable_lora_accepts_projections_and_rejects_other_names():
    backbone = tiny()
    backbone.enable_lora(2, ["gate", "output"])
    assert len(backbone.trainable_variables) == 8
    with pytest.raises(ValueError, match="querry"):
        tiny().enable_lora(2, ["querry"])
