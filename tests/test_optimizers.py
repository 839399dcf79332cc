"""AdamW, against PyTorch and optax; Muon; the learning-rate schedule."""

import keras
import numpy as np
import pytest
import torch
from keras import ops

from keras_openllama.optimizers import AdamW, WarmupCosine, muon

SHAPES = ((4, 5), (7,), (3, 2, 2), (6, 3))
# Scales of the gradients. At 1e-7 the position of epsilon matters, at 1e-9 epsilon
# dominates.
SCALES = (1.0, 0.1, 1e-7, 1e-9)
STEPS = 10


def problem():
    """Initial values and the gradients of each step, some of which are clipped."""
    random = np.random.default_rng(0)

    def arrays(scales):
        return [
            (scale * random.normal(size=shape)).astype("float32")
            for shape, scale in zip(SHAPES, scales, strict=True)
        ]

    steps = [arrays(np.array(SCALES) * (0.05, 3)[i % 2]) for i in range(STEPS)]
    norms = [np.sqrt(sum((g**2).sum() for g in grads)) for grads in steps]
    assert min(norms) < 1 < max(norms)
    # Small values, so that their rounding does not hide differences between steps.
    return arrays([0.1] * len(SHAPES)), steps


def optimized(optimizer, initial, steps):
    variables = [keras.Variable(x) for x in initial]
    optimizer.build(variables)
    for gradients in steps:
        optimizer.apply([ops.convert_to_tensor(g) for g in gradients], variables)
    return [ops.convert_to_numpy(v) for v in variables]


def in_torch(initial, steps, factor=lambda step: 1.0, **options):
    tensors = [torch.nn.Parameter(torch.tensor(x)) for x in initial]
    settings = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = torch.optim.AdamW(tensors, **{**settings, **options})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for gradients in steps:
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizer.step()
        schedule.step()
    return [t.detach().numpy() for t in tensors]


def assert_equal_steps(found, expected):
    """Ten steps of up to 0.01 each, to 1e-5 of one step."""
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-7)


# ----- AdamW


def test_adamw_equals_torch():
    assert_equal_steps(optimized(AdamW(0.01), *problem()), in_torch(*problem()))


def test_adamw_on_a_schedule_equals_torch():
    schedule = WarmupCosine(0.01, final=0.001, warmup_steps=3, steps=8)

    def factor(step):
        step += 1
        if step < 3:
            return step / 3
        progress = min(1, (step - 3) / 5)
        return 0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2

    expected = in_torch(*problem(), factor)
    assert_equal_steps(optimized(AdamW(schedule), *problem()), expected)


@pytest.mark.parametrize(
    ("options", "torch_options"),
    [
        (dict(weight_decay=0.0), dict(weight_decay=0.0)),
        (dict(epsilon=1e-5), dict(eps=1e-5)),
        (dict(beta_1=0.0, beta_2=0.99), dict(betas=(0.0, 0.99))),
        (dict(amsgrad=True), dict(amsgrad=True)),
    ],
    ids=str,
)
def test_adamw_with_other_settings_equals_torch(options, torch_options):
    expected = in_torch(*problem(), **torch_options)
    assert_equal_steps(optimized(AdamW(0.01, **options), *problem()), expected)


@pytest.mark.backend_free
def test_adamw_equals_optax():
    optax = pytest.importorskip("optax")
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(0.01, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1),
    )
    values, steps = problem()
    state = optimizer.init(values)
    for gradients in steps:
        updates, state = optimizer.update(gradients, state, values)
        values = optax.apply_updates(values, updates)
    expected = [np.asarray(v) for v in values]
    assert_equal_steps(optimized(AdamW(0.01), *problem()), expected)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="Needs TensorFlow.")
def test_adamw_sums_indexed_slices_of_a_gradient():
    import tensorflow as tf

    initial, steps = problem()
    rows = np.array([3, 0, 3, 5, 3])  # One token occurs three times.
    by_row, sums = [], []
    for gradients in steps:
        values = 0.3 * np.random.default_rng(1).normal(size=(5, 3)).astype("float32")
        dense = np.zeros(SHAPES[3], "float32")
        np.add.at(dense, rows, values)
        sums.append([*gradients[:3], dense])
        slices = tf.IndexedSlices(tf.constant(values), tf.constant(rows), SHAPES[3])
        by_row.append([*gradients[:3], slices])
    variables = [keras.Variable(x) for x in initial]
    optimizer = AdamW(0.01)
    optimizer.build(variables)
    for gradients in by_row:
        *tensors, slices = gradients
        optimizer.apply([*map(tf.constant, tensors), slices], variables)
    assert_equal_steps(map(ops.convert_to_numpy, variables), in_torch(initial, sums))


def test_adamw_decays_vectors_too():
    variable = keras.Variable(np.ones(3, "float32"), name="scale")
    optimizer = AdamW(0.5, weight_decay=0.1)
    optimizer.build([variable])
    optimizer.apply([ops.zeros(3)], [variable])
    np.testing.assert_allclose(ops.convert_to_numpy(variable), 0.95)


def test_adamw_state_is_the_moments_and_the_counter():
    variables = [keras.Variable(np.ones(s, "float32")) for s in SHAPES]
    optimizer = AdamW(WarmupCosine(1e-3, 0.0, 1, 10))
    optimizer.build(variables)
    shapes = sorted(tuple(v.shape) for v in optimizer.variables)
    assert shapes == sorted([(), *SHAPES, *SHAPES])


def test_adamw_is_restored_from_its_config():
    schedule = WarmupCosine(0.01, final=0.001, warmup_steps=3, steps=8)
    optimizer = AdamW(schedule, weight_decay=0.2, beta_1=0.8, epsilon=1e-6)
    restored = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(restored) is AdamW
    assert restored.get_config() == optimizer.get_config()
    for x, y in zip(
        optimized(restored, *problem()), optimized(optimizer, *problem()), strict=True
    ):
        np.testing.assert_array_equal(x, y)


# ----- Muon

# Paths of variables of a model, and their shapes.
MODEL = {"query/kernel": (6, 4), "token_embedding/embeddings": (8, 4)}
MODEL |= {"lm_head/kernel": (8, 4), "final_norm/scale": (4,)}


def change_of(optimizer, gradients):
    """How the first step changes variables of ones, by name."""
    variables = []
    for path, shape in MODEL.items():
        layer, _, name = path.rpartition("/")
        with keras.name_scope(layer):
            variables.append(keras.Variable(np.ones(shape, "float32"), name=name))
    optimizer.build(variables)
    optimizer.apply([ops.convert_to_tensor(g) for g in gradients], variables)
    values = map(ops.convert_to_numpy, variables)
    return {path: value - 1 for path, value in zip(MODEL, values, strict=True)}


def test_muon_orthogonalizes_matrices_and_updates_the_rest_by_adam():
    random = np.random.default_rng(0)
    gradients = [random.normal(size=s).astype("float32") for s in MODEL.values()]
    change = change_of(muon(0.01, weight_decay=0.0, global_clipnorm=1e9), gradients)
    kernel = change.pop("query/kernel")
    sizes = np.linalg.svd(kernel, compute_uv=False)
    # arXiv:2502.16982: orthogonal, times 0.2 sqrt(longer side). Five Newton-Schulz
    # steps bring the singular values close to 1.
    assert sizes.shape == (4,)
    assert np.all(np.abs(sizes / (0.01 * 0.2 * 6**0.5) - 1) < 0.35)
    assert (kernel * gradients[0]).sum() < 0
    for moved, gradient in zip(change.values(), gradients[1:], strict=True):
        np.testing.assert_allclose(moved, -0.01 * np.sign(gradient), rtol=1e-3)


def test_muon_decays_other_variables_by_a_tenth():
    zeros = [np.zeros(shape, "float32") for shape in MODEL.values()]
    change = change_of(muon(0.5, weight_decay=0.1), zeros)
    for path, moved in change.items():
        expected = -0.05 if path == "query/kernel" else -0.005
        np.testing.assert_allclose(moved, expected, rtol=1e-4)


# ----- WarmupCosine


def rates(at, /, **options):
    schedule = WarmupCosine(
        **{**dict(peak=0.4, final=0.1, warmup_steps=10, steps=30), **options}
    )
    return [float(schedule(step)) for step in at]


def test_warmup_cosine_at_its_corners():
    values = rates([0, 4, 9, 19, 29, 30, 10**6])
    expected = [0.04, 0.2, 0.4, 0.25, 0.1, 0.1, 0.1]
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_warmup_cosine_is_linear_then_half_a_cosine():
    values = rates(range(30))
    np.testing.assert_allclose(values[:10], 0.04 * np.arange(1, 11), rtol=1e-6)
    progress = np.arange(1, 21) / 20
    expected = 0.1 + 0.3 * (1 + np.cos(np.pi * progress)) / 2
    np.testing.assert_allclose(values[10:], expected, rtol=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_warmup_cosine_without_warmup_starts_near_the_peak(warmup_steps):
    (value,) = rates([0], warmup_steps=warmup_steps, steps=1000)
    assert value == pytest.approx(0.4, rel=1e-5)


def test_warmup_cosine_can_be_constant():
    assert rates([0, 5, 29, 99], final=0.4, warmup_steps=0) == pytest.approx([0.4] * 4)


def test_warmup_cosine_is_restored_from_its_config():
    schedule = WarmupCosine(0.4, final=0.1, warmup_steps=10, steps=30)
    schedules = keras.optimizers.schedules
    restored = schedules.deserialize(schedules.serialize(schedule))
    assert type(restored) is WarmupCosine
    assert restored.get_config() == schedule.get_config()
    assert [float(restored(i)) for i in (0, 9, 20)] == rates([0, 9, 20])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(final=0.5), r"in \[0, `peak`\]. Received: final=0.5, peak=0.4"),
        (dict(final=-0.1), "final=-0.1"),
        (dict(peak=-1), "peak=-1"),
        (dict(peak=float("nan")), "peak=nan"),
        (dict(warmup_steps=30), "warmup_steps=30, steps=30"),
        (dict(warmup_steps=-1), "warmup_steps=-1"),
        (dict(warmup_steps=0, steps=0), "steps=0"),
    ],
    ids=str,
)
def test_warmup_cosine_rejects_invalid_rates_and_steps(options, message):
    with pytest.raises(ValueError, match=message):
        rates([0], **options)


def test_over_epochs_ends_with_the_last_step():
    schedule = WarmupCosine.over_epochs(1.0, examples=101, batch_size=10, epochs=3)
    assert (schedule.steps, schedule.warmup_steps) == (33, 1)
    assert float(schedule(32)) == pytest.approx(0.1)
    short = WarmupCosine.over_epochs(1.0, examples=1, batch_size=10)
    assert (short.steps, short.warmup_steps) == (1, 0)
