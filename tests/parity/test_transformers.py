"""The model computes what `transformers.LlamaForCausalLM` computes."""

import keras
import numpy as np
import pytest
import torch
from tensorflow_marks import first_on_tensorflow
from tiny_models import SHAPES, as_ours, assert_close, batch, in_transformers
from tiny_models import right_padding as padded

# TensorFlow runs the shape with grouped heads and a head_dim of 100 only.
pytestmark = first_on_tensorflow("pair", SHAPES[::-1], ids=str, indirect=True)


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """A shape, the reference, and the Keras model with the same weights."""
    theirs = in_transformers(request.param)
    ours = as_ours(theirs, tmp_path_factory.mktemp(request.param.name))
    return request.param, theirs, ours


def test_logits_match_transformers(pair):
    shape, theirs, ours = pair
    ids = batch(shape, length=100)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits
    mask = np.ones_like(ids, "bool")
    assert_close(ours({"token_ids": ids, "padding_mask": mask}), expected)
    assert_close(ours.score(ids), expected)


def test_logits_of_padded_sequences_match_transformers(pair):
    shape, theirs, ours = pair
    ids = batch(shape, length=40)
    mask = padded([40, 23, 1], 40)
    with torch.no_grad():
        expected = theirs(
            torch.tensor(ids), attention_mask=torch.tensor(mask)
        ).logits.numpy()
    ours = keras.ops.convert_to_numpy(ours({"token_ids": ids, "padding_mask": mask}))
    assert_close(ours[mask], expected[mask])


def test_output_of_each_layer_matches_transformers(pair):
    shape, theirs, ours = pair
    ids = batch(shape, length=30)
    with torch.no_grad():
        reference = theirs.model(torch.tensor(ids), output_hidden_states=True)
    seen = []

    def record(x, index):
        seen.append(x)
        return x

    mask = np.ones_like(ids, "bool")
    ours.score(ids, mask, layer_intercept_fn=record)
    names = ["embedding", *(f"layer {i}" for i in range(shape.num_layers))]
    # transformers returns the output of the last layer only after the final norm.
    for name, x, expected in zip(
        names[:-1], seen[:-1], reference.hidden_states[:-1], strict=True
    ):
        assert_close(x, expected, where=name)
    normed = ours.backbone({"token_ids": ids, "padding_mask": mask})
    assert_close(normed, reference.last_hidden_state, where="final norm")


def test_sublayers_match_transformers(pair):
    shape, theirs, ours = pair
    ours, theirs = ours.backbone.transformer_layers[0], theirs.model.layers[0]
    x = np.random.default_rng(1).normal(size=(2, 9, shape.hidden_dim)).astype("float32")
    tensor, there = keras.ops.convert_to_tensor(x), torch.tensor(x)
    with torch.no_grad():
        assert_close(
            ours.self_attention_norm(tensor), theirs.input_layernorm(there), "norm"
        )
        assert_close(ours.feedforward(tensor), theirs.mlp(there), "feed-forward")
        for name in "query", "key", "value":
            projection = getattr(theirs.self_attn, f"{name[0]}_proj")
            assert_close(
                getattr(ours.self_attention, name)(tensor), projection(there), name
            )


def test_generate_matches_200_greedy_tokens_of_transformers(pair):
    shape, theirs, ours = pair
    ids = batch(shape, batch_size=2, length=10)
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(ids),
            attention_mask=torch.ones(ids.shape, dtype=torch.int64),
            max_new_tokens=200,
            min_new_tokens=200,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        ).numpy()
    assert expected.shape == (2, 210)
    outputs = ours.generate(
        {"token_ids": ids, "padding_mask": np.ones_like(ids)},
        max_new_tokens=200,
        stop_token_ids=None,
    )
    assert len(set(expected[0].tolist())) > 10, "the reference repeats itself"
    np.testing.assert_array_equal(outputs["token_ids"], expected)


def test_generate_of_a_padded_batch_matches_200_greedy_tokens_of_transformers(pair):
    shape, theirs, ours = pair
    ids, mask = batch(shape, 2, length=12), padded([12, 7], 12)
    outputs = ours.generate(
        {"token_ids": ids * mask, "padding_mask": mask},
        max_new_tokens=200,
        stop_token_ids=None,
    )
    for row, n in enumerate(mask.sum(axis=1)):
        with torch.no_grad():
            prompt = torch.tensor(ids[row : row + 1, :n])
            expected = theirs.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=200,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        np.testing.assert_array_equal(
            outputs["token_ids"][row, : n + 200], expected[0].numpy()
        )
