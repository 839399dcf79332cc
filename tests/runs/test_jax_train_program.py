"""Compiled programs of a run on JAX: skipped steps, evaluation, and their state."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TinyShape, batch, random_lm

from keras_openllama.optimizers import AdamW
from keras_openllama.runs import jax_train_program as module
from keras_openllama.runs.checkpoint_manager import CheckpointManager
from keras_openllama.training.train_step_jax import TrainStepOptions

pytestmark = pytest.mark.backend_free  # It is JAX, whatever Keras runs on.

SHAPE = TinyShape("small", 4, 2, 8, hidden_dim=32, num_layers=1)
ROWS, LENGTH = 2, 12
MEMORY = 3
THRESHOLD = 4.0


@pytest.fixture(scope="module")
def lm():
    """A model with confident predictions; no test changes its variables."""
    lm = random_lm(SHAPE)
    lm.lm_head.kernel.assign(8 * lm.lm_head.kernel)
    optimizer = AdamW(1e-6)  # The loss of a batch stays nearly the same.
    lm.compile(optimizer=optimizer, weighted_metrics=[])
    optimizer.build(lm.trainable_variables)
    return lm


def fresh(lm):
    """The state before the first step, copied, because a step donates it."""
    return jax.tree.map(jnp.array, module.initial_state(lm))


def bits(tree):
    """Dtypes, shapes and bytes of arrays, for comparison."""
    return jax.tree.map(
        lambda a: (str(a.dtype), a.shape, np.asarray(a).tobytes()), tree
    )


def text_and_logits(lm):
    x = {
        "token_ids": batch(SHAPE, ROWS, LENGTH),
        "padding_mask": np.ones((ROWS, LENGTH), "int32"),
    }
    return x, np.asarray(lm.logits(x["token_ids"], x["padding_mask"]), "float64")


@pytest.fixture(scope="module")
def easy(lm):
    """A batch whose targets are the most likely tokens."""
    x, logits = text_and_logits(lm)
    return x, logits.argmax(-1).astype("int32"), np.ones((ROWS, LENGTH), "float32")


@pytest.fixture(scope="module")
def hard(lm):
    """A batch whose targets are the least likely tokens, a spike."""
    x, logits = text_and_logits(lm)
    return x, logits.argmin(-1).astype("int32"), np.ones((ROWS, LENGTH), "float32")


def loss_of(lm, batch):
    """The mean cross-entropy, from all logits in float64."""
    _, targets, weights = batch
    _, logits = text_and_logits(lm)
    normaliser = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return ((normaliser - chosen) * weights).sum() / weights.sum()


@pytest.fixture(scope="module")
def step(lm, easy):
    """A compiled step whose running mean is valid after a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOSS_AVERAGE_STEPS", MEMORY)
        return module.compile_step(lm, fresh(lm), easy, TrainStepOptions(), THRESHOLD)


def run_steps(step, state, *batches):
    """Runs a step per batch; returns the last metrics, and the state."""
    for item in batches:
        metrics, state = step(state, item)
    return metrics, state


def test_compiled_step_updates_matrices_in_place_instead_of_copying_them(step):
    program = step.as_text()
    assert re.search(r"%state_trainable\S+ = \S+ parameter", program)
    # As `%copy.7 = f32[64,32]{1,0} copy(%state_trainable_2_.1)`.
    assert not re.findall(r"\w+\[\d+,[\d,]+\]\S* copy\(%state_\S+", program)


# --- Skipped steps ---


def test_the_losses_of_the_two_batches_differ(lm, easy, hard):
    assert loss_of(lm, hard) > 10 * loss_of(lm, easy) > 0


def test_step_skips_a_spike_once_the_running_mean_is_valid(lm, step, easy, hard):
    _, state = run_steps(step, fresh(lm), *[easy] * MEMORY)
    assert state.guard["steps"] == MEMORY
    before = bits(state)
    metrics, state = step(state, hard)
    assert metrics.loss == pytest.approx(loss_of(lm, hard), rel=1e-3)
    assert not metrics.applied
    # Model, optimizer and running mean are unchanged.
    assert bits(state) == before
    metrics, state = step(state, easy)
    assert metrics.applied
    assert bits(state.trainable) != before.trainable
    assert bits(state.optimizer) != before.optimizer
    assert bits(state.guard) != before.guard


def test_step_applies_a_spike_before_the_running_mean_is_valid(lm, step, easy, hard):
    metrics, state = run_steps(step, fresh(lm), *[easy] * (MEMORY - 1), hard)
    assert metrics.applied
    mean = (loss_of(lm, hard) + (MEMORY - 1) * loss_of(lm, easy)) / MEMORY
    assert state.guard["mean_loss"] == pytest.approx(mean, rel=1e-3)
    # The mean is now high, so that the same batch is not a spike.
    metrics, _ = step(state, hard)
    assert metrics.applied


def test_running_mean_is_arithmetic_at_first_and_exponential_later(
    lm, step, easy, hard
):
    state, losses, mean = fresh(lm), [], 0.0
    for item in (hard, easy, hard, easy, easy, easy):
        metrics, state = step(state, item)
        assert metrics.applied
        losses.append(float(metrics.loss))
        if len(losses) <= MEMORY:
            mean = np.mean(losses)
        else:
            mean += (losses[-1] - mean) / MEMORY
        assert state.guard["mean_loss"] == pytest.approx(mean, rel=1e-5)
        assert state.guard["steps"] == len(losses)
    assert mean < np.mean(losses)


@pytest.mark.parametrize(("factor", "applied"), [(1.001, True), (0.999, False)])
def test_spike_threshold_is_a_multiple_of_the_running_mean(
    factor, applied, lm, step, easy
):
    mean = np.float32(factor * loss_of(lm, easy) / THRESHOLD)
    guard = {"mean_loss": jnp.array(mean), "steps": jnp.float32(MEMORY)}
    metrics, _ = step(fresh(lm)._replace(guard=guard), easy)
    assert bool(metrics.applied) is applied


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_step_leaves_the_state_unchanged_if_the_loss_is_not_finite(
    value, known, lm, step, easy
):
    x, targets, weights = easy
    weights = weights.copy()
    weights[0, 3] = value
    _, state = run_steps(step, fresh(lm), *[easy] * (MEMORY if known else 1))
    before = bits(state)
    metrics, state = step(state, (x, targets, weights))
    assert not np.isfinite(metrics.loss) and not metrics.applied
    assert bits(state) == before
    metrics, _ = step(state, easy)
    assert metrics.applied and np.isfinite(metrics.loss)


def test_step_without_a_spike_threshold_applies_spikes(lm, step, easy, hard):
    without = module.compile_step(lm, fresh(lm), easy, TrainStepOptions())
    many = jnp.float32(10 * module.LOSS_AVERAGE_STEPS)
    guard = {"mean_loss": jnp.float32(1e-3), "steps": many}
    metrics, _ = without(fresh(lm)._replace(guard=guard), hard)
    assert metrics.applied
    # With a threshold, applied steps are bit-exactly the same.
    first, second = step(fresh(lm), easy), without(fresh(lm), easy)
    for name in ("trainable", "non_trainable", "optimizer"):
        assert bits(getattr(first[1], name)) == bits(getattr(second[1], name))


def test_step_donates_the_state(lm, step, easy):
    state = fresh(lm)
    step(state, easy)
    leaves = jax.tree.leaves((state.trainable, state.optimizer))
    assert all(array.is_deleted() for array in leaves)


def test_running_mean_is_over_many_steps():
    assert module.LOSS_AVERAGE_STEPS >= 100


# --- Evaluation ---


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_compile_evaluation_sums_over_targets(lm, hard, micro_batches):
    x, targets, weights = hard
    weights = np.linspace(0, 2, weights.size, dtype="float32").reshape(weights.shape)
    state = fresh(lm)
    before = bits(state)
    batch = x, targets, weights
    options = TrainStepOptions(micro_batches=micro_batches)
    evaluate = module.compile_evaluation(lm, state, batch, options)
    sums, total = evaluate(state, batch)
    assert total == pytest.approx(weights.sum(), rel=1e-6)
    expected = loss_of(lm, (x, targets, weights)) * weights.sum()
    assert sums.loss == pytest.approx(expected, rel=1e-5)
    assert bits(state) == before


# --- Conversions of the state ---


def test_initial_state_shares_the_arrays_of_the_variables(lm):
    state = module.initial_state(lm)
    for variables, values in (
        (lm.trainable_variables, state.trainable),
        (lm.non_trainable_variables, state.non_trainable),
        (lm.optimizer.variables, state.optimizer),
    ):
        for variable, value in zip(variables, values, strict=True):
            assert value is variable.value
    assert bits(state.guard) == bits(
        {"mean_loss": np.float32(0), "steps": np.float32(0)}
    )


def numbered(lm):
    """A state whose arrays are all different."""
    leaves, tree = jax.tree.flatten(fresh(lm))
    return jax.tree.unflatten(tree, [jnp.full_like(a, i) for i, a in enumerate(leaves)])


def test_state_to_dict_names_arrays_by_variable_path(lm):
    state = numbered(lm)
    found = module.state_to_dict(lm, state)
    assert {*found} == {"model", "optimizer", "guard"}
    variables = [*lm.trainable_variables, *lm.non_trainable_variables]
    assert {*found["model"]} == {v.path for v in variables}
    assert {*found["optimizer"]} == {v.path for v in lm.optimizer.variables}
    place = [v.path for v in lm.trainable_variables].index("lm_head/kernel")
    assert found["model"]["lm_head/kernel"] is state.trainable[place]


def test_state_from_dict_inverts_state_to_dict_in_any_order(lm):
    state = numbered(lm)
    names = {
        part: dict(reversed(arrays.items()))
        for part, arrays in module.state_to_dict(lm, state).items()
    }
    again = module.state_from_dict(lm, names)
    assert isinstance(again, module.StepState)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, again, state))


def test_state_from_dict_raises_if_a_variable_is_missing(lm):
    names = module.state_to_dict(lm, fresh(lm))
    del names["model"]["lm_head/kernel"]
    with pytest.raises(KeyError, match="lm_head/kernel"):
        module.state_from_dict(lm, names)


def test_state_to_dict_rejects_duplicate_paths():
    twins = [types.SimpleNamespace(path="a/kernel")] * 2
    lm = types.SimpleNamespace(trainable_variables=twins, non_trainable_variables=[])
    with pytest.raises(ValueError, match="same path"):
        module.state_to_dict(lm, module.StepState([jnp.ones(1)] * 2, [], [], {}))


def test_assign_to_model_does_not_copy(lm):
    before = module.initial_state(lm)
    state = numbered(lm)
    try:
        module.assign_to_model(lm, state)
        after = module.initial_state(lm).trainable
        assert jax.tree.all(jax.tree.map(lambda x, y: x is y, after, state.trainable))
    finally:
        module.assign_to_model(lm, before)


def test_a_state_resumes_bit_exactly_from_a_checkpoint(lm, step, easy, hard, tmp_path):
    _, state = run_steps(step, fresh(lm), easy, hard)
    checkpoints = CheckpointManager(tmp_path)
    checkpoints.save(2, module.state_to_dict(lm, state), {})
    expected = bits(run_steps(step, state, easy, hard))  # Reuses its buffers.
    checkpoints.close()
    target = module.abstract_arrays(module.state_to_dict(lm, module.initial_state(lm)))
    _, arrays = checkpoints.restore_latest(target)
    assert (
        bits(run_steps(step, module.state_from_dict(lm, arrays), easy, hard))
        == expected
    )
