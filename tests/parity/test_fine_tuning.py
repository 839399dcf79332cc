"""`fit` with LoRA on responses has the losses of `peft` with `torch.optim.AdamW`."""

import numpy as np
import pytest
import torch
from tensorflow_marks import first_on_tensorflow
from tiny_models import SHAPES, as_ours, batch, in_transformers

from keras_openllama.config import PROJECTIONS
from keras_openllama.optimizers import AdamW

peft = pytest.importorskip("peft")

STEPS, BATCH_SIZE, LENGTH, RATE = 20, 4, 32, 1e-2


def batches(shape):
    """Returns ids of 32 different tokens, which can be learned, and prompt lengths."""
    random = np.random.default_rng(0)
    return [
        (
            3 + batch(shape, BATCH_SIZE, LENGTH, seed) % 32,
            random.integers(1, LENGTH, BATCH_SIZE),
        )
        for seed in range(STEPS)
    ]


def losses_of_theirs(model, batches):
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    losses = []
    for ids, prompts in batches:
        ids = torch.tensor(ids, dtype=torch.int64)
        is_prompt = torch.arange(LENGTH)[None] < torch.tensor(prompts)[:, None]
        loss = model(ids, labels=ids.masked_fill(is_prompt, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def losses_of_ours(lm, batches):
    lm.compile(optimizer=AdamW(RATE, weight_decay=0.1, global_clipnorm=1.0))
    losses = []
    for ids, prompts in batches:
        x = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, 1:])}
        weights = (np.arange(1, LENGTH)[None] >= prompts[:, None]).astype("float32")
        options = dict(batch_size=BATCH_SIZE, verbose=0)
        history = lm.fit(x, ids[:, 1:], sample_weight=weights, **options).history
        losses.append(history["loss"][0])
    return losses


@first_on_tensorflow("targets", [("query", "value"), PROJECTIONS])
@first_on_tensorflow("shape", SHAPES[1:3], ids=str)
def test_fit_with_adapters_has_the_losses_of_peft_for_20_steps(
    shape, targets, tmp_path
):
    base = in_transformers(shape)
    ours = as_ours(base, tmp_path / "base")
    ours.backbone.enable_lora(4, list(targets), alpha=8)
    ours.save_adapters(tmp_path / "adapters")  # Both start with the same adapters.
    theirs = peft.PeftModel.from_pretrained(
        base, tmp_path / "adapters", is_trainable=True
    )
    expected = losses_of_theirs(theirs, batches(shape))
    assert expected[-1] < 0.9 * expected[0], "the reference does not learn"
    found = losses_of_ours(ours, batches(shape))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow_on_tensorflow
def test_fit_of_all_weights_has_the_losses_of_transformers_for_20_steps(tmp_path):
    theirs = in_transformers(SHAPES[2])
    ours = as_ours(theirs, tmp_path)
    expected = losses_of_theirs(theirs, batches(SHAPES[2]))
    np.testing.assert_allclose(
        losses_of_ours(ours, batches(SHAPES[2])), expected, rtol=1e-4
    )
