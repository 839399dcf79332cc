"""TokenValidation agrees with an evaluation document by document."""

import collections
import math

import jax
import numpy as np
import pytest
from tiny_models import TinyShape, random_lm
from token_data import prepare_sources

from keras_openllama.data import mixture as mixtures
from keras_openllama.runs import jax_train_program, recipe
from keras_openllama.runs.token_data import TokenValidation
from keras_openllama.training.step_metrics import LossSums
from keras_openllama.training.train_step_jax import TrainStepOptions

pytestmark = pytest.mark.backend_free

COUNTS = {"web": 60, "code": 60, "books": 4}
WEIGHTS = {"web": 0.5, "code": 0.3, "books": 0.2}
# Tokens per sequence: all documents of `web` fit, most of `code` do not.
LENGTH = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    return prepare_sources(directory, COUNTS, WEIGHTS, validation_fraction=0.5)


def validation(data, weights=WEIGHTS, **settings):
    settings = {
        "sequence_length": LENGTH,
        "batch_size": 1,
        "validation_batches": 1000,
        "packing": "best_fit",
        "mask_documents": True,
    } | settings
    chosen = recipe.resolve_recipe("nano", overrides=settings).recipe
    return TokenValidation(data, chosen, mixtures.mixture_from_weights(weights))


class RecordingEvaluation:
    """Records the batches; the loss of a target is its token id, in nats."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        _, targets, weights = batch
        self.batches.append(batch)
        loss = float((targets * weights).sum())
        return LossSums(loss, 0.0, 0.0), weights.sum()


def documents(data, source):
    found = data.documents(source, "validation")
    return [ids.astype("int64") for ids, _ in found.read_many(range(len(found)))]


def test_measure_returns_the_loss_of_the_held_out_documents(data):
    shape = TinyShape("small", 4, 2, 8, hidden_dim=32, num_layers=1)
    size = data.manifest["tokenizer"]["vocabulary_size"]
    lm = random_lm(TinyShape(**{**vars(shape), "vocabulary_size": size}))
    run = jax_train_program.StepState(
        [v.value for v in lm.trainable_variables],
        [v.value for v in lm.non_trainable_variables],
        *([], {}),
    )

    def evaluate(batch):
        return jax_train_program.compile_evaluation(lm, run, batch, TrainStepOptions())(
            run, batch
        )

    found = validation(data, {"web": 1.0}).measure(evaluate)
    # Evaluated document by document, from all logits.
    logits_of = jax.jit(lambda ids, mask: lm.logits(ids, mask))
    nats = targets = 0
    web = documents(data, "web")
    for ids in web:
        padded = np.zeros((1, LENGTH + 1), "int32")
        padded[0, : len(ids)] = ids
        logits = np.asarray(logits_of(padded, np.ones_like(padded))[0], "float64")
        losses = np.log(np.exp(logits).sum(-1, keepdims=True)) - logits
        count = len(ids) - 1
        nats, targets = nats + losses[range(count), ids[1:]].sum(), targets + count
    assert len(web) > 20 and max(map(len, web)) <= LENGTH + 1
    assert found["loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-4)


def plain_loss(found):
    """The mean token id of the targets."""
    targets = np.concatenate([ids[1:] for ids in found])
    return targets.mean()


@pytest.mark.parametrize("source", COUNTS)
def test_measure_reads_a_small_source_once(source, data):
    evaluation = RecordingEvaluation()
    found = validation(data, {source: 1.0}).measure(evaluation)
    seen = collections.Counter()
    for _, targets, weights in evaluation.batches:
        seen.update(targets[weights > 0].tolist())
    expected = collections.Counter()
    for ids in documents(data, source):
        expected.update(ids[1:].tolist())
    assert seen == expected
    assert found["loss"] == pytest.approx(plain_loss(documents(data, source)))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("batches", [1, 7])
def test_measure_reads_at_most_validation_batches(batches, batch_size, data):
    evaluation = RecordingEvaluation()
    settings = dict(validation_batches=batches, batch_size=batch_size)
    validation(data, {"code": 1.0}, **settings).measure(evaluation)
    assert len(evaluation.batches) == batches


@pytest.mark.parametrize(
    ("packing", "batch_size"),
    [
        ("best_fit", 1),
        ("best_fit", 4),
        ("concatenate", 1),
        ("concatenate", 4),
    ],
)
def test_measure_reads_at_most_one_epoch(packing, batch_size, data):
    for length in range(24, 80):
        evaluation = RecordingEvaluation()
        settings = dict(batch_size=batch_size, sequence_length=length, packing=packing)
        held_out = validation(data, {"code": 1.0}, **settings)
        held_out.measure(evaluation)
        count = held_out._streams["code"]._indexes[0].sequences_per_epoch
        assert len(evaluation.batches) == math.ceil(count / batch_size), count


def test_measure_reads_the_same_batches_each_time(data):
    held_out = validation(data, validation_batches=3)
    first, second = RecordingEvaluation(), RecordingEvaluation()
    assert held_out.measure(first) == held_out.measure(second)
    for one, other in zip(first.batches, second.batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    again = RecordingEvaluation()
    assert validation(data, validation_batches=3).measure(again) == held_out.measure(
        second
    )


def test_measure_reads_no_training_documents(data):
    evaluation = RecordingEvaluation()
    validation(data, {"web": 1.0}).measure(evaluation)
    train = data.documents("web", "train")
    known = {tuple(ids.tolist()) for ids, _ in train.read_many(range(len(train)))}
    start = data.manifest["tokenizer"]["start_token_id"]
    for x, _, _ in evaluation.batches:
        ids, segments = x["token_ids"][0], x["padding_mask"][0]
        for number in range(1, segments.max() + 1):
            document = ids[segments == number]
            assert document[0] == start
            assert tuple(document.tolist()) not in known
    assert known


# --- Results ---


def test_measure_weights_means_by_the_mixture(data):
    found = validation(data).measure(RecordingEvaluation())
    assert {*found["sources"]} == {*COUNTS}
    losses = {name: plain_loss(documents(data, name)) for name in COUNTS}
    for name, loss in losses.items():
        assert found["sources"][name]["loss"] == pytest.approx(loss)
    for key in ("loss", "bits_per_byte"):
        expected = sum(WEIGHTS[n] * s[key] for n, s in found["sources"].items())
        assert found[key] == pytest.approx(expected)
    assert len({round(loss, 3) for loss in losses.values()}) == 3


def test_measure_returns_the_perplexity_of_the_mean_loss(data):
    found = validation(data, {"web": 1.0}).measure(
        lambda batch: (LossSums(2.5 * batch[2].sum(), 0, 0), batch[2].sum())
    )
    assert found["loss"] == 2.5
    assert found["perplexity"] == math.exp(2.5)


@pytest.mark.parametrize("loss", [701.0, 1e5, math.inf, math.nan])
def test_measure_does_not_raise_for_a_diverged_model(loss, data):
    found = validation(data, {"web": 1.0}).measure(
        lambda batch: (LossSums(loss * batch[2].sum(), 0, 0), batch[2].sum())
    )
    expected = math.nan if math.isnan(loss) else math.inf
    assert found["perplexity"] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("source", COUNTS)
def test_measure_returns_bits_per_byte_of_all_tokens(source, data):
    # With concatenated documents every token is a target.
    held_out = validation(
        data, {source: 1.0}, packing="concatenate", mask_documents=False
    )
    found = held_out.measure(
        lambda batch: (LossSums(3.0 * batch[2].sum(), 0, 0), batch[2].sum())
    )
    split = data.documents(source, "validation")
    documents = split.read_many(range(len(split)))
    nats = 3.0 * sum(len(ids) for ids, _ in documents)
    size = sum(num_bytes for _, num_bytes in documents)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)


@pytest.mark.parametrize("source", COUNTS)
def test_measure_excludes_tokens_that_are_not_targets_from_bits_per_byte(source, data):
    found = validation(data, {source: 1.0}).measure(
        lambda batch: (LossSums(3.0 * batch[2].sum(), 0, 0), batch[2].sum())
    )
    split = data.documents(source, "validation")
    documents = split.read_many(range(len(split)))
    nats = 3.0 * sum(len(ids) - 1 for ids, _ in documents)
    size = sum(num_bytes for _, num_bytes in documents)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)


def test_measure_uses_the_last_weights_of_a_schedule(data):
    evaluation = RecordingEvaluation()
    chosen = recipe.resolve_recipe("nano", overrides={"sequence_length": LENGTH}).recipe
    mixture = mixtures.mixture_from_weights(WEIGHTS).with_weights(
        9, {"web": 1, "code": 3}
    )
    held_out = TokenValidation(data, chosen, mixture)
    found = held_out.measure(evaluation)
    assert held_out.sources == ["web", "code"] == [*found["sources"]]
    losses = [found["sources"][name]["loss"] for name in held_out.sources]
    assert found["loss"] == pytest.approx(0.25 * losses[0] + 0.75 * losses[1])


# --- Sources without targets or documents ---


def test_measure_excludes_sources_without_targets(data):
    class Evaluation(RecordingEvaluation):
        """Ignores the targets of one source, the first to be measured."""

        def __call__(self, batch):
            sums, count = super().__call__(batch)
            return (sums, count) if len(self.batches) > 1 else (LossSums(0, 0, 0), 0)

    found = validation(data, validation_batches=1).measure(Evaluation())
    assert [*found["sources"]] == ["code", "books"]
    code, books = (source["loss"] for source in found["sources"].values())
    assert found["loss"] == pytest.approx(0.6 * code + 0.4 * books)


def test_measure_without_any_targets_is_not_a_number(data):
    found = validation(data).measure(lambda batch: (LossSums(0, 0, 0), 0))
    assert math.isnan(found["loss"]) and math.isnan(found["perplexity"])


def test_sources_exclude_those_without_held_out_documents(tmp_path):
    data = prepare_sources(tmp_path, {"web": 60, "books": 1}, validation_fraction=0.3)
    assert data.split_info("books", "validation")["documents"] == 0
    weights = {"web": 0.2, "books": 0.3, "code": 0.5}  # `code` does not exist.
    held_out = validation(data, weights)
    assert held_out.sources == ["web"]
    found = held_out.measure(RecordingEvaluation())
    assert found["loss"] == pytest.approx(found["sources"]["web"]["loss"])


def test_sources_are_empty_without_held_out_documents(tmp_path):
    data = prepare_sources(tmp_path, {"web": 9}, validation_fraction=0)
    assert validation(data, {"web": 1.0}).sources == []
