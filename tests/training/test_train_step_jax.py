"""The training step on JAX: gradients, skipped steps, and `fit` on top."""

import dataclasses
import functools
import re

import keras
import numpy as np
import pytest
from tiny_models import SHAPES, batch, random_lm

if keras.config.backend() != "jax":
    pytest.skip("Needs JAX.", allow_module_level=True)

import jax
import jax.numpy as jnp

from keras_openllama.distribution import OpenLlamaParallel, make_mesh
from keras_openllama.optimizers import AdamW, WarmupCosine
from keras_openllama.training import train_step_jax
from keras_openllama.training.train_step_jax import (
    TrainStepOptions,
    compute_gradients,
    train_step,
)

pytestmark = pytest.mark.usefixtures("compile_fast")

SHAPE = dataclasses.replace(SHAPES[2], num_layers=1)
ROWS, LENGTH = 4, 16


@functools.cache
def shared_lm():
    """A model that no test changes."""
    return random_lm(SHAPE)


def data(seed=0, rows=ROWS, length=LENGTH):
    """A batch of sequences with different numbers and weights of targets."""
    ids = 3 + batch(SHAPE, rows, length + 1, seed) % 8
    random = np.random.default_rng(seed)
    weights = random.choice([0, 0.5, 1, 2], (rows, length)).astype("float32")
    weights[0] = 0  # A sequence without targets.
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((rows, length), "int32")}
    return x, ids[:, 1:], weights


def values_of(variables):
    return [jnp.array(v.value) for v in variables]


@functools.cache
def compiled(**options):
    """A compiled function for loss and gradients of a batch."""
    lm = shared_lm()
    non_trainable = values_of(lm.non_trainable_variables)

    def run(trainable, batch):
        sums, total, grads = compute_gradients(
            lm, trainable, non_trainable, batch, TrainStepOptions(**options)
        )
        return sums.loss / total, grads

    return jax.jit(run)


def loss_and_gradients(batch, **options):
    return compiled(**options)(values_of(shared_lm().trainable_variables), batch)


@functools.cache
def loss_from_logits():
    """The weighted mean of the cross-entropy, from all logits."""
    lm = shared_lm()

    def loss(trainable, batch, z_loss):
        x, targets, weights = batch
        with keras.StatelessScope(zip(lm.trainable_variables, trainable, strict=True)):
            logits = lm.logits(x["token_ids"], x["padding_mask"])
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        mean = jnp.sum((log_normalizer - chosen) * weights) / weights.sum()
        z = jnp.sum(log_normalizer**2 * weights) / weights.sum()
        return mean + z_loss * z, mean

    return jax.jit(jax.grad(loss, has_aux=True))


def plain_loss_and_gradients(batch, z_loss=0.0):
    trainable = values_of(shared_lm().trainable_variables)
    grads, loss = loss_from_logits()(trainable, batch, z_loss)
    return loss, grads


def assert_equal_gradients(actual, expected):
    """The difference is below 1e-5 of the norm, for each tensor."""
    for name, x, y in zip(paths(shared_lm()), actual, expected, strict=True):
        difference = np.linalg.norm(np.asarray(x) - y)
        assert difference <= 1e-5 * np.linalg.norm(y), name


def paths(lm):
    return [v.path for v in lm.trainable_variables]


# ----- Gradients


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(rematerialize="projections", loss_chunks=4),
        dict(micro_batches=2, rematerialize="full", z_loss=1e-2),
        dict(scan=True, micro_batches=4, rematerialize="projections"),
    ],
    ids=str,
)
def test_compute_gradients_of_the_mean_over_all_targets(options):
    loss, grads = loss_and_gradients(data(), **options)
    z_loss = options.get("z_loss", 0.0)
    expected_loss, expected = plain_loss_and_gradients(data(), z_loss)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_equal_gradients(grads, expected)


def test_packed_documents_have_the_gradients_of_separate_ones():
    lengths = [7, 4, 3]
    packed, alone = (
        {name: np.zeros((ROWS, LENGTH), "int32") for name in ("ids", "mask", "y", "w")}
        for _ in range(2)
    )
    start = 0
    for row, length in enumerate(lengths):
        ids = batch(SHAPE, 1, length, seed=row)[0]
        for arrays, place, number in (
            (packed, (0, slice(start, start + length)), row + 1),
            (alone, (row, slice(length)), 1),
        ):
            arrays["ids"][place], arrays["mask"][place] = ids, number
            # The last token has no target in its document.
            arrays["y"][place] = np.roll(ids, -1)
            arrays["w"][place] = np.arange(length) < length - 1
        start += length

    def result(arrays):
        x = {"token_ids": arrays["ids"], "padding_mask": arrays["mask"]}
        return loss_and_gradients((x, arrays["y"], arrays["w"].astype("float32")))

    (loss, grads), (expected_loss, expected) = result(packed), result(alone)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_equal_gradients(grads, expected)


def test_targets_with_zero_weight_do_not_change_the_gradients():
    x, targets, weights = data()
    other = np.where(weights == 0, (targets + 1) % SHAPE.vocabulary_size, targets)
    assert (other != targets).any()
    loss, grads = loss_and_gradients((x, other, weights))
    expected_loss, expected = loss_and_gradients((x, targets, weights))
    assert loss == expected_loss
    assert_equal_gradients(grads, expected)


def test_gradients_without_targets_are_zero():
    x, targets, weights = data()
    loss, grads = loss_and_gradients((x, targets, 0 * weights))
    assert loss == 0
    assert not any(np.any(g) for g in grads)


def test_micro_batches_must_divide_the_batch_size():
    with pytest.raises(ValueError, match="micro_batches=3, batch_size=4"):
        loss_and_gradients(data(), micro_batches=3)


# ----- One step


class Steps:
    """A model with its optimizer, their state as arrays, and the compiled step."""

    def __init__(self):
        self.lm = random_lm(SHAPE)
        schedule = WarmupCosine(1e-2, final=1e-3, warmup_steps=4, steps=10)
        self.lm.compile(optimizer=AdamW(schedule))
        self.lm.optimizer.build(self.lm.trainable_variables)
        self.start = tuple(
            values_of(variables)
            for variables in (
                self.lm.trainable_variables,
                self.lm.non_trainable_variables,
                self.lm.optimizer.variables,
            )
        )
        self._update = jax.jit(
            lambda state, batch, limit: train_step(
                self.lm, state, batch, max_loss=limit
            )
        )

    def step(self, state, batch, limit=np.inf):
        metrics, (trainable, optimizer) = self._update(state, batch, limit)
        return metrics, (trainable, state[1], optimizer)


@pytest.fixture(scope="module")
def steps():
    return Steps()


def assert_identical(state, other):
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True)
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def not_a_number(steps, state):
    x, targets, weights = data(1)
    weights[1, 1] = np.nan
    return state, (x, targets, weights), np.inf


def no_targets(steps, state):
    x, targets, weights = data(1)
    return state, (x, targets, np.zeros_like(weights)), np.inf


def infinite_gradient(steps, state):
    """A hidden dimension is always 0, so a huge head does not change the logits."""
    lm = steps.lm
    values = dict(zip(paths(lm), state[0], strict=True))
    scale, head = lm.backbone.final_norm.scale.path, lm.lm_head.kernel.path
    signs = np.where(np.arange(SHAPE.vocabulary_size) % 2, 1, -1)
    values[scale] = values[scale].at[0].set(0)
    values[head] = values[head].at[:, 0].set(signs * np.finfo("float32").max)
    return ([*values.values()], *state[1:]), data(1), np.inf


def spike(steps, state):
    return state, data(1), 1.0


@pytest.mark.parametrize("fault", [not_a_number, no_targets, infinite_gradient, spike])
def test_skipped_step_changes_nothing(steps, fault):
    metrics, state = steps.step(steps.start, data(0))
    assert metrics.applied
    state, bad, limit = fault(steps, state)
    metrics, after = steps.step(state, bad, limit)
    assert not metrics.applied
    assert_identical(after, state)
    loss_is_finite, gradient_is_finite = (
        bool(np.isfinite(x)) for x in (metrics.loss, metrics.grad_norm)
    )
    assert (loss_is_finite, gradient_is_finite) == {
        not_a_number: (False, False),
        no_targets: (False, True),
        infinite_gradient: (True, False),
        spike: (True, True),
    }[fault]


@pytest.mark.parametrize("fault", [not_a_number, spike])
def test_training_after_a_skipped_step_is_unaffected(steps, fault):
    first, state = steps.step(steps.start, data(0))
    _, after = steps.step(*fault(steps, state))
    with_fault, without = steps.step(after, data(2)), steps.step(state, data(2))
    assert_identical(with_fault, without)
    assert with_fault[0].learning_rate > first.learning_rate


def test_step_is_skipped_only_above_max_loss(steps):
    metrics, _ = steps.step(steps.start, data(0))
    assert steps.step(steps.start, data(0), metrics.loss)[0].applied
    below = np.nextafter(metrics.loss, np.float32(0))
    assert not steps.step(steps.start, data(0), below)[0].applied


def test_step_metrics_equal_a_plain_computation(steps):
    metrics, (after, _, _) = steps.step(steps.start, data())
    loss, grads = plain_loss_and_gradients(data())
    x, targets, weights = data()
    right = np.argmax(steps.lm.score(x["token_ids"]), axis=-1) == targets
    expected = dict(
        loss=loss,
        accuracy=(right * weights).sum() / weights.sum(),
        targets=weights.sum(),
        grad_norm=np.sqrt(sum(np.square(g).sum() for g in grads)),
        param_norm=np.sqrt(sum(np.square(v).sum() for v in steps.start[0])),
        learning_rate=1e-2 / 4,
    )
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(metrics, name), value, rtol=1e-5)
    for path, old, new in zip(paths(steps.lm), steps.start[0], after, strict=True):
        assert not np.array_equal(old, new), path


# ----- fit


def cross_entropy():
    """The loss of `loss="auto"`. Passed explicitly, the step of Keras is used."""
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )


class FitRun:
    """A model that restarts from its initial weights, without another compilation."""

    def __init__(self, loss, prepare=lambda lm: None, optimizer=None, **options):
        self.lm = random_lm(SHAPE, dtype=options.pop("dtype", "float32"))
        prepare(self.lm)
        self.lm.compile(optimizer=optimizer or AdamW(1e-2), loss=loss, **options)
        self.lm.optimizer.build(self.lm.trainable_variables)
        variables = [*self.lm.variables, *self.lm.optimizer.variables]
        self.start = [(v, np.array(v.value)) for v in variables]

    def run(self, seeds, weights=lambda weights: weights):
        """Loss and accuracy of steps of `fit`, each on another batch."""
        for variable, value in self.start:
            variable.assign(value)
        results = []
        for seed in seeds:
            x, y, sample_weight = data(seed)
            sample_weight = weights(sample_weight)
            options = dict(batch_size=ROWS, shuffle=False, verbose=0)
            history = self.lm.fit(x, y, sample_weight=sample_weight, **options).history
            results.append(
                [history[n][0] for n in sorted(history) if n != "perplexity"]
            )
        return np.array(results)

    def state(self):
        return values_of([*self.lm.trainable_variables, *self.lm.optimizer.variables])

    def changed(self):
        return {v.path: not np.array_equal(v.value, x) for v, x in self.start}


@pytest.fixture(scope="module")
def default_fit():
    return FitRun("auto")


@pytest.fixture(scope="module")
def keras_fit():
    return FitRun(cross_entropy())


@pytest.mark.parametrize("weights", [None, "positions", "rows"])
def test_fit_equals_the_train_step_of_keras(default_fit, keras_fit, weights):
    rows = np.array([0, 0.5, 1, 2], "float32")
    given, for_keras = {
        None: (lambda weights: None, lambda weights: None),
        "positions": (lambda weights: weights, lambda weights: weights),
        "rows": (lambda _: rows, lambda _: np.tile(rows[:, None], (1, LENGTH))),
    }[weights]
    results = default_fit.run(range(5), given)
    assert results.shape == (5, 2)
    np.testing.assert_allclose(results, keras_fit.run(range(5), for_keras), rtol=2e-5)


def test_fit_updates_every_variable(default_fit):
    default_fit.run([0])
    changed = default_fit.changed()
    assert [path for path in paths(default_fit.lm) if not changed[path]] == []


def test_fit_averages_an_epoch_over_its_targets(default_fit):
    default_fit.run([])
    rate, default_fit.lm.optimizer.learning_rate = 1e-2, 0.0
    x, y, weights = data(rows=2 * ROWS)
    options = dict(sample_weight=weights, batch_size=ROWS, verbose=0)
    history = default_fit.lm.fit(x, y, shuffle=False, **options).history
    default_fit.lm.optimizer.learning_rate = rate
    options["batch_size"] = 2 * ROWS
    loss, accuracy, _ = default_fit.lm.evaluate(x, y, **options)
    assert history["loss"] == pytest.approx([loss], rel=1e-5)
    assert history["sparse_categorical_accuracy"] == pytest.approx([accuracy], rel=1e-5)


def test_fit_skips_and_reports_a_step_that_is_not_finite(default_fit):
    def spoil(weights):
        weights[1, 1] = np.nan
        return weights

    default_fit.run([0])
    state = default_fit.state()
    x, y, weights = data(1)
    options = dict(batch_size=ROWS, shuffle=False, verbose=0)
    with pytest.raises(FloatingPointError, match="1 of the 1 steps"):
        default_fit.lm.fit(x, y, sample_weight=spoil(weights), **options)
    assert_identical(state, default_fit.state())


def test_fit_with_lora_updates_only_the_adapters():
    def prepare(lm):
        keras.utils.set_random_seed(1)
        lm.backbone.enable_lora(4)
        lm.lm_head.trainable = True
        lm.lm_head.enable_lora(4)

    default_fit, keras_fit = FitRun("auto", prepare), FitRun(cross_entropy(), prepare)
    np.testing.assert_allclose(
        default_fit.run(range(3)), keras_fit.run(range(3)), rtol=2e-5
    )
    changed = {path for path, is_changed in default_fit.changed().items() if is_changed}
    adapters = set(paths(default_fit.lm))
    assert {path for path in changed if not path.startswith("adamw/")} == adapters
    assert all("lora" in path for path in adapters)
    assert len(adapters) == 2 * 3  # Of query, value and head.


# ----- The train step of Keras


def test_fit_with_custom_metrics_uses_the_step_of_keras(keras_fit):
    # Top-1 accuracy equals accuracy.
    metric = keras.metrics.SparseTopKCategoricalAccuracy(k=1)
    default_fit = FitRun("auto", weighted_metrics=[metric])
    results = default_fit.run(range(5))
    np.testing.assert_allclose(results, keras_fit.run(range(5)), rtol=2e-5)
    assert results[:, 1].any()


def test_fit_with_float16_scales_the_loss(keras_fit):
    default_fit = FitRun("auto", dtype="mixed_float16")
    assert isinstance(default_fit.lm.optimizer, keras.optimizers.LossScaleOptimizer)
    losses, exact = (fit.run(range(3))[:, 0] for fit in (default_fit, keras_fit))
    np.testing.assert_allclose(losses, exact, rtol=5e-3)


def test_fit_with_a_quantized_head_needs_no_other_compile():
    lm = random_lm(SHAPE)
    lm.compile(optimizer=keras.optimizers.SGD(0.0), micro_batches=2)
    lm.lm_head.quantize("int8")
    x, y, weights = data()
    history = lm.fit(x, y, sample_weight=weights, batch_size=len(y), verbose=0).history
    losses = lm.score(**x, scoring_mode="loss", target_ids=y)
    expected = np.average(losses, weights=weights)
    assert history["loss"] == pytest.approx([expected], rel=1e-4)


def test_fit_after_quantize_to_float8_asks_to_compile_again():
    lm = random_lm(SHAPE)
    lm.compile()
    lm.lm_head.quantize("float8")
    x, y, _ = data()
    with pytest.raises(ValueError, match="Call `compile` after `quantize`"):
        lm.fit(x, y, verbose=0)


@pytest.mark.parametrize(
    "option", [dict(micro_batches=2), dict(rematerialize="full"), dict(z_loss=1e-4)]
)
@pytest.mark.parametrize(
    ("custom", "message"),
    [
        (dict(loss=cross_entropy()), "sparse_categorical_crossentropy"),
        (dict(metrics=["accuracy"]), "metrics"),
        (dict(weighted_metrics=["accuracy"]), "weighted_metrics=.'accuracy'"),
    ],
    ids=["loss", "metrics", "weighted_metrics"],
)
def test_compile_rejects_step_options_with_the_step_of_keras(custom, message, option):
    with pytest.raises(
        ValueError, match=f"(?s){next(iter(option))}=.*needs.*{message}"
    ):
        random_lm(SHAPE).compile(**custom, **option)


# ----- Mixed precision


def test_mixed_bfloat16_has_float32_variables_and_moments(default_fit):
    mixed = FitRun("auto", dtype="mixed_bfloat16")
    losses, exact = mixed.run([0, 1])[:, 0], default_fit.run([0, 1])[:, 0]
    np.testing.assert_allclose(losses, exact, rtol=1e-2)
    assert not np.array_equal(losses, exact)
    variables = [*mixed.lm.trainable_variables, *mixed.lm.optimizer.variables]
    assert {v.value.dtype.name for v in variables if v.ndim} == {"float32"}


def test_gradients_of_embeddings_and_norms_are_float32():
    lm = random_lm(SHAPE, dtype="mixed_bfloat16")
    program = jax.make_jaxpr(lambda *values: compute_gradients(lm, *values, data()))(
        *(values_of(lm.trainable_variables), values_of(lm.non_trainable_variables))
    )
    results = re.findall(r":(\w+)\[([\d,]*)\] = ([\w-]+)", str(program))
    assert ("f32", f"{SHAPE.vocabulary_size},{SHAPE.hidden_dim}", "scatter-add") in (
        results
    )
    assert not [r for r in results if r[0] == "bf16" and r[2] == "scatter-add"]
    assert not [r for r in results if r[:2] == ("bf16", f"{SHAPE.hidden_dim}")]


def test_attention_kernels_need_our_distribution(monkeypatch):
    meshes = []

    def select_attention(device, mesh=None):
        meshes.append(mesh)

    monkeypatch.setattr(train_step_jax, "select_attention", select_attention)
    ids = batch(SHAPES[0], 2, 9)
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((2, 8), "int32")}

    def fit(distribution):
        keras.distribution.set_distribution(distribution)
        try:
            lm = random_lm(SHAPES[0])
            lm.compile(AdamW(1e-3))
            lm.fit(x, ids[:, 1:], verbose=0)
        finally:
            keras.distribution.set_distribution(None)

    device = keras.distribution.list_devices()[:1]
    fit(keras.distribution.DataParallel(devices=device))
    assert meshes == []
    fit(None)
    assert meshes == [None]
    parallel = OpenLlamaParallel(make_mesh(devices=device))
    fit(parallel)
    assert meshes == [None, parallel.device_mesh.backend_mesh]
