"""The programs of a run on JAX: its arrays by name, and what its guard keeps out."""

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
    """A model that is sure of what comes next; no test changes its variables."""
    lm = random_lm(SHAPE)
    lm.lm_head.kernel.assign(8 * lm.lm_head.kernel)
    optimizer = AdamW(1e-6)  # The loss of a batch stays nearly the same.
    lm.compile(optimizer=optimizer, weighted_metrics=[])
    optimizer.build(lm.trainable_variables)
    return lm


def fresh(lm):
    """The state before the first step; a step takes it over."""
    return jax.tree.map(jnp.array, module.initial_state(lm))


def bits(tree):
    """All that arrays are, for a comparison."""
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
    """A batch whose targets are what the model expects."""
    x, logits = text_and_logits(lm)
    return x, logits.argmax(-1).astype("int32"), np.ones((ROWS, LENGTH), "float32")


@pytest.fixture(scope="module")
def hard(lm):
    """One whose targets are what it expects least, a spike."""
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
    """A compiled step that knows the loss after few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOSS_AVERAGE_STEPS", MEMORY)
        return module.compile_step(lm, fresh(lm), easy, TrainStepOptions(), THRESHOLD)


def after(step, state, *batches):
    """The metrics of the last one, and the state."""
    for some in batches:
        metrics, state = step(state, some)
    return metrics, state


# --- The guard ---


def test_the_batches_are_what_they_are_meant_to_be(lm, easy, hard):
    assert loss_of(lm, hard) > 10 * loss_of(lm, easy) > 0


def test_a_spike_is_left_out_once_the_loss_is_known(lm, step, easy, hard):
    _, state = after(step, fresh(lm), *[easy] * MEMORY)
    assert state.guard["steps"] == MEMORY
    before = bits(state)
    metrics, state = step(state, hard)
    assert metrics.loss == pytest.approx(loss_of(lm, hard), rel=1e-3)
    assert not metrics.applied
    # Nothing has moved: neither the model and the optimizer nor the mean.
    assert bits(state) == before
    metrics, state = step(state, easy)
    assert metrics.applied
    assert bits(state.trainable) != before.trainable
    assert bits(state.optimizer) != before.optimizer
    assert bits(state.guard) != before.guard


def test_before_that_it_is_taken_for_what_is_usual(lm, step, easy, hard):
    metrics, state = after(step, fresh(lm), *[easy] * (MEMORY - 1), hard)
    assert metrics.applied
    mean = (loss_of(lm, hard) + (MEMORY - 1) * loss_of(lm, easy)) / MEMORY
    assert state.guard["mean_loss"] == pytest.approx(mean, rel=1e-3)
    # Now it is, and the same batch is none.
    metrics, _ = step(state, hard)
    assert metrics.applied


def test_the_mean_is_over_all_steps_at_first_and_forgets_later(lm, step, easy, hard):
    state, losses, mean = fresh(lm), [], 0.0
    for some in (hard, easy, hard, easy, easy, easy):
        metrics, state = step(state, some)
        assert metrics.applied
        losses.append(float(metrics.loss))
        if len(losses) <= MEMORY:
            mean = np.mean(losses)
        else:
            mean += (losses[-1] - mean) / MEMORY
        assert state.guard["mean_loss"] == pytest.approx(mean, rel=1e-5)
        assert state.guard["steps"] == len(losses)
    assert mean < np.mean(losses)


@pytest.mark.parametrize(("factor", "kept"), [(1.001, True), (0.999, False)])
def test_the_threshold_is_by_how_much_a_loss_may_exceed_its_mean(
    factor, kept, lm, step, easy
):
    mean = np.float32(factor * loss_of(lm, easy) / THRESHOLD)
    guard = {"mean_loss": jnp.array(mean), "steps": jnp.float32(MEMORY)}
    metrics, _ = step(fresh(lm)._replace(guard=guard), easy)
    assert bool(metrics.applied) is kept


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(
    value, known, lm, step, easy
):
    x, targets, weights = easy
    weights = weights.copy()
    weights[0, 3] = value
    _, state = after(step, fresh(lm), *[easy] * (MEMORY if known else 1))
    before = bits(state)
    metrics, state = step(state, (x, targets, weights))
    assert not np.isfinite(metrics.loss) and not metrics.applied
    assert bits(state) == before
    metrics, _ = step(state, easy)
    assert metrics.applied and np.isfinite(metrics.loss)


def test_without_a_threshold_no_spike_is_left_out(lm, step, easy, hard):
    without = module.compile_step(lm, fresh(lm), easy, TrainStepOptions())
    many = jnp.float32(10 * module.LOSS_AVERAGE_STEPS)
    guard = {"mean_loss": jnp.float32(1e-3), "steps": many}
    metrics, _ = without(fresh(lm)._replace(guard=guard), hard)
    assert metrics.applied
    # And with one, steps that are kept are the same to the bit.
    ours, theirs = step(fresh(lm), easy), without(fresh(lm), easy)
    for name in ("trainable", "non_trainable", "optimizer"):
        assert bits(getattr(ours[1], name)) == bits(getattr(theirs[1], name))


def test_a_step_takes_over_the_memory_of_the_state(lm, step, easy):
    state = fresh(lm)
    step(state, easy)
    leaves = jax.tree.leaves((state.trainable, state.optimizer))
    assert all(array.is_deleted() for array in leaves)


def test_the_memory_of_the_loss_is_that_of_many_steps():
    assert module.LOSS_AVERAGE_STEPS >= 100


# --- Evaluation ---


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_an_evaluation_is_the_sum_over_the_targets(lm, hard, micro_batches):
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


# --- By name ---


def test_a_state_is_that_of_the_variables(lm):
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


def test_the_names_of_a_state_are_the_paths_of_its_variables(lm):
    state = numbered(lm)
    found = module.state_to_dict(lm, state)
    assert {*found} == {"model", "optimizer", "guard"}
    variables = [*lm.trainable_variables, *lm.non_trainable_variables]
    assert {*found["model"]} == {v.path for v in variables}
    assert {*found["optimizer"]} == {v.path for v in lm.optimizer.variables}
    place = [v.path for v in lm.trainable_variables].index("lm_head/kernel")
    assert found["model"]["lm_head/kernel"] is state.trainable[place]


def test_a_state_comes_back_from_its_names_in_whatever_order(lm):
    state = numbered(lm)
    names = {
        part: dict(reversed(arrays.items()))
        for part, arrays in module.state_to_dict(lm, state).items()
    }
    again = module.state_from_dict(lm, names)
    assert isinstance(again, module.StepState)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, again, state))


def test_a_state_that_lacks_a_variable_is_refused(lm):
    names = module.state_to_dict(lm, fresh(lm))
    del names["model"]["lm_head/kernel"]
    with pytest.raises(KeyError, match="lm_head/kernel"):
        module.state_from_dict(lm, names)


def test_two_variables_of_one_path_are_refused():
    twins = [types.SimpleNamespace(path="a/kernel")] * 2
    lm = types.SimpleNamespace(trainable_variables=twins, non_trainable_variables=[])
    with pytest.raises(ValueError, match="same path"):
        module.state_to_dict(lm, module.StepState([jnp.ones(1)] * 2, [], [], {}))


def test_the_model_gets_the_very_arrays_back(lm):
    before = module.initial_state(lm)
    state = numbered(lm)
    try:
        module.assign_to_model(lm, state)
        after = module.initial_state(lm).trainable
        assert jax.tree.all(jax.tree.map(lambda x, y: x is y, after, state.trainable))
    finally:
        module.assign_to_model(lm, before)


def test_a_state_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(
    lm, step, easy, hard, tmp_path
):
    _, state = after(step, fresh(lm), easy, hard)
    checkpoints = CheckpointManager(tmp_path)
    checkpoints.save(2, module.state_to_dict(lm, state), {})
    expected = bits(after(step, state, easy, hard))  # Into the same memory.
    checkpoints.close()
    like = module.abstract_arrays(module.state_to_dict(lm, module.initial_state(lm)))
    _, arrays = checkpoints.restore_latest(lambda marker: like)
    assert bits(after(step, module.state_from_dict(lm, arrays), easy, hard)) == expected
