"""The network on the device, compared with transformers' LLaMA on the CPU."""

import tempfile

import keras
import numpy as np
import results
import torch
from tiny_models import SHAPES, as_ours, batch, in_transformers  # tests/support

from keras_openllama.backend.arrays import to_numpy
from keras_openllama.checkpoints.weight_names import weight_specs

NEW_TOKENS = 200
# Relative to the norm of the reference. In float32 another order of summation differs
# by about 1e-6, and TF32 by 3e-4.
LOGITS_LIMIT, GRADIENTS_LIMIT = 1e-5, 1e-4
BFLOAT16_LIMIT = 1.5  # Error divided by that of transformers.


def run(shapes=("head_dim_100", "grouped_heads")):
    """Checks the shapes of these names."""
    for shape in SHAPES:
        if shape.name in shapes:
            theirs = in_transformers(shape)
            with tempfile.TemporaryDirectory() as directory:
                compare(shape, theirs, directory)


def compare(shape, theirs, directory):
    """Checks logits, gradients and greedy tokens of one shape."""
    ours = as_ours(theirs, directory, dtype="float32")
    ids = batch(shape, batch_size=8, length=100)
    expected = logits_of_theirs(theirs, ids)
    found = logits(ours, ids)
    results.check(f"{shape}: logits", error(found, expected), LOGITS_LIMIT)
    compare_gradients(shape, ours, theirs, ids)
    compare_tokens(shape, ours, theirs)
    ours_bfloat16 = as_ours(theirs, directory, dtype="bfloat16")
    of_ours = error(logits(ours_bfloat16, ids), expected)
    of_theirs = error(logits_of_theirs(theirs.to(torch.bfloat16), ids), expected)
    results.check(
        f"{shape}: bfloat16, error relative to transformers",
        of_ours / of_theirs,
        BFLOAT16_LIMIT,
        f"{of_ours:.1e} by {of_theirs:.1e}",
    )


def compare_tokens(shape, ours, theirs):
    """Checks greedy tokens."""
    prompts = batch(shape, batch_size=3, length=12, seed=1)
    outputs = ours.generate(
        {"token_ids": prompts, "padding_mask": np.ones_like(prompts)},
        max_new_tokens=NEW_TOKENS,
        stop_token_ids=None,
        strip_prompt=True,
    )
    ids = torch.tensor(prompts, dtype=torch.long)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )[:, ids.shape[1] :].numpy()
    different = outputs["token_ids"][:, :NEW_TOKENS] != expected
    results.check(
        f"{shape}: greedy tokens that differ",
        different.sum(),
        0,
        f"{expected.size} tokens, {len(np.unique(expected))} different ones",
    )


def compare_gradients(shape, ours, theirs, ids):
    """Checks the gradients of all weights."""
    x, y = ids[:, :-1], ids[:, 1:]
    found = gradients(ours, x, y)
    theirs.float().zero_grad()
    logits = theirs(torch.tensor(x, dtype=torch.long)).logits
    targets = torch.tensor(y, dtype=torch.long)
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten()
    ).backward()
    parameters = dict(theirs.named_parameters())
    errors = {
        row.transformers: error(
            found[row.path], parameters[row.transformers].grad.numpy()
        )
        for row in weight_specs(shape.num_layers)
    }
    worst = max(errors, key=errors.get)
    results.check(f"{shape}: gradients", errors[worst], GRADIENTS_LIMIT, worst)


def gradients(lm, x, y):
    """Gradients of the mean loss: dict of variable path -> NumPy array."""
    if keras.config.backend() == "jax":
        import jax

        from keras_openllama.training import train_step_jax as step

        options = step.options_for_devices(step.TrainStepOptions())

        # One program: otherwise every operation is compiled separately.
        @jax.jit
        def program(trainable, non_trainable, batch):
            return step.compute_gradients(lm, trainable, non_trainable, batch, options)[
                2
            ]

        variables = lm.trainable_variables
        values = program(
            [v.value for v in variables],
            [v.value for v in lm.non_trainable_variables],
            step.prepare_batch({"token_ids": x, "padding_mask": np.ones_like(x)}, y),
        )
        return {v.path: np.asarray(g) for v, g in zip(variables, values, strict=True)}
    found = lm({"token_ids": x, "padding_mask": np.ones_like(x)})
    targets = torch.tensor(y, dtype=torch.long, device=found.device)
    torch.nn.functional.cross_entropy(found.flatten(0, 1), targets.flatten()).backward()
    return {v.path: to_numpy(v.value.grad) for v in lm.trainable_variables}


def logits(lm, ids):
    """Logits of this package, float32."""
    found = lm.score(ids)
    return keras.ops.convert_to_numpy(keras.ops.cast(found, "float32"))


@torch.no_grad()
def logits_of_theirs(model, ids):
    """Logits of transformers, float32."""
    return model(torch.tensor(ids, dtype=torch.long)).logits.float().numpy()


def error(found, expected):
    """The norm of the difference, relative to the norm of `expected`."""
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)
