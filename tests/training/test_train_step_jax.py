"""The training step on JAX: gradients, skipped steps, and `fit` on top."""

import dataclasses
import functools
import re

import keras
import numpy as np
import pytest
from tiny_models import SHAPES, batch, random_lm

if keras.config.backend() != "jax":
    pytest.skip("The step is for JAX.", allow_module_level=True)

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
def unchanged():
    """A model that no test changes."""
    return random_lm(SHAPE)


def data(seed=0, rows=ROWS, length=LENGTH):
    """A batch of few tokens, whose rows have targets of different number and weight."""
    ids = 3 + batch(SHAPE, rows, length + 1, seed) % 8
    random = np.random.default_rng(seed)
    weights = random.choice([0, 0.5, 1, 2], (rows, length)).astype("float32")
    weights[0] = 0  # A row, and so a part of the batch, without any.
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((rows, length), "int32")}
    return x, ids[:, 1:], weights


def values_of(variables):
    return [jnp.array(v.value) for v in variables]


@functools.cache
def compiled(**options):
    """Loss and gradients of a batch, by the model that no test changes."""
    lm = unchanged()
    non_trainable = values_of(lm.non_trainable_variables)

    def run(trainable, batch):
        sums, total, grads = compute_gradients(
            lm, trainable, non_trainable, batch, TrainStepOptions(**options)
        )
        return sums.loss / total, grads

    return jax.jit(run)


def loss_and_gradients(batch, **options):
    return compiled(**options)(values_of(unchanged().trainable_variables), batch)


@functools.cache
def loss_from_logits():
    """Plainly: all logits, and the mean of the cross-entropy by weight."""
    lm = unchanged()

    def loss(trainable, batch, z_loss):
        x, targets, weights = batch
        with keras.StatelessScope(zip(lm.trainable_variables, trainable, strict=True)):
            logits = lm.logits(x["token_ids"], x["padding_mask"])
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        mean = jnp.sum((normaliser - chosen) * weights) / weights.sum()
        z = jnp.sum(normaliser**2 * weights) / weights.sum()
        return mean + z_loss * z, mean

    return jax.jit(jax.grad(loss, has_aux=True))


def plain_loss_and_gradients(batch, z_loss=0.0):
    trainable = values_of(unchanged().trainable_variables)
    grads, loss = loss_from_logits()(trainable, batch, z_loss)
    return loss, grads


def assert_equal_gradients(ours, theirs):
    """Each tensor's within 1e-5 of its norm."""
    for name, x, y in zip(paths(unchanged()), ours, theirs, strict=True):
        difference = np.linalg.norm(np.asarray(x) - y)
        assert difference <= 1e-5 * np.linalg.norm(y), name


def paths(lm):
    return [v.path for v in lm.trainable_variables]


# ----- Gradients


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(micro_batches=2),
        dict(micro_batches=4),
        dict(rematerialize="projections", loss_chunks=4),
        dict(micro_batches=2, rematerialize="full", z_loss=1e-2),
        dict(scan=True),
        dict(scan=True, micro_batches=2, rematerialize="projections"),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_mean_over_all_targets(options):
    loss, grads = loss_and_gradients(data(), **options)
    z_loss = options.get("z_loss", 0.0)
    expected_loss, expected = plain_loss_and_gradients(data(), z_loss)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_equal_gradients(grads, expected)


def test_documents_that_share_a_row_give_what_they_give_alone():
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
            # What follows the last token is another document's.
            arrays["y"][place] = np.roll(ids, -1)
            arrays["w"][place] = np.arange(length) < length - 1
        start += length

    def result(arrays):
        x = {"token_ids": arrays["ids"], "padding_mask": arrays["mask"]}
        return loss_and_gradients((x, arrays["y"], arrays["w"].astype("float32")))

    (loss, grads), (expected_loss, expected) = result(packed), result(alone)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_equal_gradients(grads, expected)


def test_targets_without_weight_do_not_matter():
    x, targets, weights = data()
    other = np.where(weights == 0, (targets + 1) % SHAPE.vocabulary_size, targets)
    assert (other != targets).any()
    loss, grads = loss_and_gradients((x, other, weights))
    expected_loss, expected = loss_and_gradients((x, targets, weights))
    assert loss == expected_loss
    assert_equal_gradients(grads, expected)


def test_a_batch_without_targets_has_no_gradient():
    x, targets, weights = data()
    loss, grads = loss_and_gradients((x, targets, 0 * weights))
    assert loss == 0
    assert not any(np.any(g) for g in grads)


def test_parts_that_do_not_divide_a_batch_are_refused():
    with pytest.raises(ValueError, match="micro_batches=3, rows=4"):
        loss_and_gradients(data(), micro_batches=3)


# ----- One step


class Steps:
    """A model with its optimizer, its state as arrays, and the compiled step."""

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
            lambda state, batch, limit: train_step(self.lm, state, batch, limit=limit)
        )

    def step(self, state, batch, limit=np.inf):
        measures, (trainable, optimizer) = self._update(state, batch, limit)
        return measures, (trainable, state[1], optimizer)


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


def infinite_gradient(steps, state):
    """Where a state is always 0, the head may be huge: no logit shows it."""
    lm = steps.lm
    values = dict(zip(paths(lm), state[0], strict=True))
    scale, head = lm.backbone.final_norm.scale.path, lm.lm_head.kernel.path
    signs = np.where(np.arange(SHAPE.vocabulary_size) % 2, 1, -1)
    values[scale] = values[scale].at[0].set(0)
    values[head] = values[head].at[:, 0].set(signs * np.finfo("float32").max)
    return ([*values.values()], *state[1:]), data(1), np.inf


def spike(steps, state):
    return state, data(1), 1.0


@pytest.mark.parametrize("fault", [not_a_number, infinite_gradient, spike])
def test_a_bad_step_changes_not_one_bit(steps, fault):
    measures, state = steps.step(steps.start, data(0))
    assert measures.applied
    state, bad, limit = fault(steps, state)
    measures, after = steps.step(state, bad, limit)
    assert not measures.applied
    assert_identical(after, state)
    loss_is_finite, gradient_is_finite = (
        bool(np.isfinite(x)) for x in (measures.loss, measures.grad_norm)
    )
    assert (loss_is_finite, gradient_is_finite) == {
        not_a_number: (False, False),
        infinite_gradient: (True, False),
        spike: (True, True),
    }[fault]


@pytest.mark.parametrize("fault", [not_a_number, spike])
def test_after_a_bad_step_all_goes_on_as_if_it_had_not_been(steps, fault):
    first, state = steps.step(steps.start, data(0))
    _, after = steps.step(*fault(steps, state))
    with_fault, without = steps.step(after, data(2)), steps.step(state, data(2))
    assert_identical(with_fault, without)
    assert with_fault[0].learning_rate > first.learning_rate


def test_a_loss_at_the_limit_is_kept(steps):
    measures, _ = steps.step(steps.start, data(0))
    assert steps.step(steps.start, data(0), measures.loss)[0].applied
    below = np.nextafter(measures.loss, np.float32(0))
    assert not steps.step(steps.start, data(0), below)[0].applied


def test_measures_are_what_they_say(steps):
    measures, (after, _, _) = steps.step(steps.start, data())
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
        np.testing.assert_allclose(getattr(measures, name), value, rtol=1e-5)
    for path, old, new in zip(paths(steps.lm), steps.start[0], after, strict=True):
        assert not np.array_equal(old, new), path


# ----- fit


def cross_entropy():
    """What `loss="auto"` stands for; given by name, the step is Keras's."""
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )


class FitRun:
    """A model that begins again from its first weights, without compiling again."""

    def __init__(self, loss, prepare=lambda lm: None, optimizer=None, **options):
        self.lm = random_lm(SHAPE, dtype=options.pop("dtype", "float32"))
        prepare(self.lm)
        self.lm.compile(optimizer=optimizer or AdamW(1e-2), loss=loss, **options)
        self.lm.optimizer.build(self.lm.trainable_variables)
        variables = [*self.lm.variables, *self.lm.optimizer.variables]
        self.start = [(v, np.array(v.value)) for v in variables]

    def run(self, seeds, weights=lambda weights: weights):
        """Loss and accuracy of each step of `fit`, each on a batch of its own."""
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

    def moved(self):
        return {v.path: not np.array_equal(v.value, x) for v, x in self.start}


@pytest.fixture(scope="module")
def ours():
    return FitRun("auto")


@pytest.fixture(scope="module")
def theirs():
    return FitRun(cross_entropy())


@pytest.mark.parametrize("weights", [None, "positions", "rows"])
def test_fit_takes_the_steps_that_keras_would(ours, theirs, weights):
    rows = np.array([0, 0.5, 1, 2], "float32")
    given, for_keras = {
        None: (lambda weights: None, lambda weights: None),
        "positions": (lambda weights: weights, lambda weights: weights),
        "rows": (lambda _: rows, lambda _: np.tile(rows[:, None], (1, LENGTH))),
    }[weights]
    results = ours.run(range(5), given)
    assert results.shape == (5, 2)
    np.testing.assert_allclose(results, theirs.run(range(5), for_keras), rtol=2e-5)


def test_fit_moves_every_variable(ours):
    ours.run([0])
    moved = ours.moved()
    assert [path for path in paths(ours.lm) if not moved[path]] == []


def test_fit_averages_an_epoch_over_its_targets(ours):
    ours.run([])
    rate, ours.lm.optimizer.learning_rate = 1e-2, 0.0
    x, y, weights = data(rows=2 * ROWS)
    options = dict(sample_weight=weights, batch_size=ROWS, verbose=0)
    history = ours.lm.fit(x, y, shuffle=False, **options).history
    ours.lm.optimizer.learning_rate = rate
    options["batch_size"] = 2 * ROWS
    loss, accuracy, _ = ours.lm.evaluate(x, y, **options)
    assert history["loss"] == pytest.approx([loss], rel=1e-5)
    assert history["sparse_categorical_accuracy"] == pytest.approx([accuracy], rel=1e-5)


def test_fit_tells_of_a_bad_step_and_leaves_it_out(ours):
    def spoil(weights):
        weights[1, 1] = np.nan
        return weights

    ours.run([0])
    state = ours.state()
    x, y, weights = data(1)
    options = dict(batch_size=ROWS, shuffle=False, verbose=0)
    with pytest.raises(FloatingPointError, match="1 of the 1 steps"):
        ours.lm.fit(x, y, sample_weight=spoil(weights), **options)
    assert_identical(state, ours.state())


def test_with_lora_only_the_adapters_move():
    def prepare(lm):
        keras.utils.set_random_seed(1)
        lm.backbone.enable_lora(4)
        lm.lm_head.trainable = True
        lm.lm_head.enable_lora(4)

    ours, theirs = FitRun("auto", prepare), FitRun(cross_entropy(), prepare)
    np.testing.assert_allclose(ours.run(range(3)), theirs.run(range(3)), rtol=2e-5)
    moved = {path for path, moved in ours.moved().items() if moved}
    adapters = set(paths(ours.lm))
    assert {path for path in moved if not path.startswith("adamw/")} == adapters
    assert all("lora" in path for path in adapters)
    assert len(adapters) == 2 * 3  # Of query, value and head.


# ----- Where fit's step is Keras's


def test_metrics_of_ones_own_are_computed(theirs):
    # The best of one is what accuracy counts.
    metric = keras.metrics.SparseTopKCategoricalAccuracy(k=1)
    ours = FitRun("auto", weighted_metrics=[metric])
    results = ours.run(range(5))
    np.testing.assert_allclose(results, theirs.run(range(5)), rtol=2e-5)
    assert results[:, 1].any()


def test_float16_trains_with_its_loss_scaled(theirs):
    ours = FitRun("auto", dtype="mixed_float16")
    assert isinstance(ours.lm.optimizer, keras.optimizers.LossScaleOptimizer)
    losses, exact = (fitting.run(range(3))[:, 0] for fitting in (ours, theirs))
    np.testing.assert_allclose(losses, exact, rtol=5e-3)


def test_a_quantized_head_gives_its_own_loss():
    lm = random_lm(SHAPE)
    lm.lm_head.quantize("int8")
    lm.compile(optimizer=keras.optimizers.SGD(0.0))
    x, y, weights = data()
    history = lm.fit(x, y, sample_weight=weights, verbose=0).history
    loss, accuracy = lm.evaluate(x, y, sample_weight=weights, verbose=0)
    assert history["loss"] == pytest.approx([loss], rel=1e-5)
    assert history["sparse_categorical_accuracy"] == pytest.approx([accuracy], rel=1e-5)


def test_quantizing_a_compiled_model_asks_to_compile_again():
    lm = random_lm(SHAPE)
    lm.compile()
    lm.lm_head.quantize("int8")
    x, y, _ = data()
    with pytest.raises(ValueError, match="Call `compile` after `quantize`"):
        lm.fit(x, y, verbose=0)


@pytest.mark.parametrize(
    "option", [dict(micro_batches=2), dict(rematerialize="full"), dict(z_loss=1e-4)]
)
@pytest.mark.parametrize(
    ("own", "named"),
    [
        (dict(loss=cross_entropy()), "sparse_categorical_crossentropy"),
        (dict(metrics=["accuracy"]), "metrics"),
        (dict(weighted_metrics=["accuracy"]), "weighted_metrics=.'accuracy'"),
        (dict(optimizer=keras.optimizers.SGD(loss_scale_factor=2.0)), "SGD"),
    ],
    ids=["loss", "metrics", "weighted_metrics", "optimizer"],
)
def test_options_are_refused_where_the_step_is_keras(own, named, option):
    with pytest.raises(ValueError, match=f"(?s)`micro_batches`.*need.*{named}"):
        random_lm(SHAPE).compile(**own, **option)


# ----- Mixed precision


def test_mixed_bfloat16_keeps_variables_and_moments_in_float32(ours):
    mixed = FitRun("auto", dtype="mixed_bfloat16")
    losses, exact = mixed.run([0, 1])[:, 0], ours.run([0, 1])[:, 0]
    np.testing.assert_allclose(losses, exact, rtol=1e-2)
    assert not np.array_equal(losses, exact)
    kept = [*mixed.lm.trainable_variables, *mixed.lm.optimizer.variables]
    assert {v.value.dtype.name for v in kept if v.ndim} == {"float32"}


def test_gradients_of_embeddings_and_norms_are_not_rounded():
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


def test_kernels_are_for_distributions_that_say_how_to_divide_them(monkeypatch):
    asked = []

    def select_attention(device, mesh=None):
        asked.append(mesh)

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
    assert asked == []
    fit(None)
    assert asked == [None]
    parallel = OpenLlamaParallel(make_mesh(devices=device))
    fit(parallel)
    assert asked == [None, parallel.device_mesh.backend_mesh]
