"""`fit` has the losses of `transformers` with `torch.optim.AdamW`."""

import math

import numpy as np
import torch
from tensorflow_marks import first_on_tensorflow
from tiny_models import SHAPES, as_ours, batch, in_transformers

from keras_openllama.optimizers import AdamW, WarmupCosine

STEPS, BATCH_SIZE, LENGTH = 20, 4, 32
PEAK, FINAL, WARMUP_STEPS = 3e-3, 3e-4, 5


def factor(step):
    """Returns the learning rate of a step, relative to the peak."""
    if step + 1 < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    along = (step + 1 - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    final = FINAL / PEAK
    return final + (1 - final) * (1 + math.cos(math.pi * along)) / 2


def losses_of_theirs(model, batches):
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    losses = []
    for ids in batches:
        ids = torch.tensor(ids, dtype=torch.int64)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def losses_of_ours(lm, batches):
    schedule = WarmupCosine(PEAK, FINAL, WARMUP_STEPS, STEPS)
    lm.compile(optimizer=AdamW(schedule, weight_decay=0.1, global_clipnorm=1.0))
    losses = []
    for ids in batches:
        x = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, 1:])}
        history = lm.fit(x, ids[:, 1:], batch_size=BATCH_SIZE, verbose=0).history
        losses.append(history["loss"][0])
    return losses


@first_on_tensorflow("shape", SHAPES[1:3], ids=str)
def test_fit_has_the_losses_of_transformers_for_20_steps(shape, tmp_path):
    theirs = in_transformers(shape)
    ours = as_ours(theirs, tmp_path)
    # Only 32 different tokens, so that the loss can decrease.
    batches = [3 + batch(shape, BATCH_SIZE, LENGTH, seed) % 32 for seed in range(STEPS)]
    expected = losses_of_theirs(theirs, batches)
    assert expected[-1] < 0.8 * expected[0], "the reference does not learn"
    np.testing.assert_allclose(losses_of_ours(ours, batches), expected, rtol=1e-5)
