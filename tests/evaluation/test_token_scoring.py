"""The scores of a sequence do not depend on how it is packed."""

import numpy as np
import pytest
import torch
from keras import ops
from tiny_models import SHAPES, as_ours, in_transformers

from keras_openllama.evaluation.token_scoring import TokenScorer

pytestmark = pytest.mark.usefixtures("compile_fast")

CHOSEN = [shape for shape in SHAPES if "100" in shape.name or "grouped" in shape.name]


def questions(shape, count=5, seed=0):
    """Contexts with four continuations each, and where the continuations begin."""
    generator = np.random.default_rng(seed)

    def tokens(least, most):
        length = generator.integers(least, most)
        return generator.integers(3, shape.vocabulary_size, length).tolist()

    sequences, score_from = [], []
    for _ in range(count):
        context = [1, *tokens(1, 30)]
        sequences += [context + tokens(1, 12) for _ in range(4)]
        score_from += [len(context)] * 4
    return sequences, score_from


def scores(scorer, sequences, score_from):
    found = {}
    for batch in scorer.make_batches(sequences):
        found |= scorer.score_batch(batch, sequences, score_from)
    return [found[index] for index in range(len(sequences))]


def expected(model, sequence, first):
    """The same from logits of transformers for this sequence only."""
    with torch.no_grad():
        logits = model(torch.tensor([sequence[:-1]])).logits[0, first - 1 :]
    targets = torch.tensor(sequence[first:])
    chosen = logits.log_softmax(-1)[range(len(targets)), targets]
    return chosen.numpy(), (logits.argmax(-1) == targets).numpy()


@pytest.mark.parametrize("shape", CHOSEN, ids=str)
def test_score_batch_matches_transformers_on_single_sequences(shape, tmp_path):
    model = in_transformers(shape)
    scorer = TokenScorer(as_ours(model, tmp_path), batch_size=2)
    sequences, score_from = questions(shape)
    # A sequence of maximum length that shares no prefix, and a greedy generation.
    sequences.append(np.arange(3, 3 + shape.vocabulary_size - 3).tolist())
    score_from.append(1)
    prompt = torch.tensor([[1, 5, 9]])
    greedy = model.generate(
        prompt, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    sequences.append(greedy[0].tolist())
    score_from.append(3)
    found = scores(scorer, sequences, score_from)
    for (log_probs, flags), *arguments in zip(
        found, sequences, score_from, strict=True
    ):
        expected_log_probs, expected_flags = expected(model, *arguments)
        np.testing.assert_allclose(log_probs, expected_log_probs, atol=1e-4)
        assert flags.tolist() == expected_flags.tolist()
    assert found[-1][1].all()  # Otherwise the flags would be tested with `False` only.


def test_score_batch_accepts_one_token_more_than_the_context(tmp_path):
    shape = SHAPES[0]
    model = in_transformers(shape)
    sequence = np.random.default_rng(0).integers(3, 199, shape.context + 1).tolist()
    ((log_probs, _),) = scores(TokenScorer(as_ours(model, tmp_path)), [sequence], [1])
    np.testing.assert_allclose(log_probs, expected(model, sequence, 1)[0], atol=2e-4)


@pytest.mark.slow_on_tensorflow
def test_score_batch_with_dynamic_rope_scaling_uses_each_sequence_length(tmp_path):
    shape = SHAPES[0]
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model = in_transformers(shape)
    lm = as_ours(model, tmp_path, rope_scaling=scaling, max_sequence_length=16)
    sequences, score_from = questions(shape, count=2)
    together = scores(TokenScorer(lm), sequences, score_from)
    for sequence, first, (log_probs, _) in zip(
        sequences, score_from, together, strict=True
    ):
        ids = np.array([sequence[:-1]], "int32")
        losses = lm.score(
            ids, scoring_mode="loss", target_ids=np.array([sequence[1:]], "int32")
        )
        losses = ops.convert_to_numpy(losses)
        np.testing.assert_allclose(log_probs, -losses[0, first - 1 :], atol=1e-4)


@pytest.mark.slow_on_tensorflow
def test_score_batch_accepts_more_targets_than_the_packed_length(tmp_path):
    shape = SHAPES[0]
    model = in_transformers(shape)
    sequences = [[1, 5, token] for token in range(3, 199)]
    sequences += [[1, 5, 9, token] for token in range(3, 199)]
    score_from = [len(sequence) - 1 for sequence in sequences]
    found = scores(TokenScorer(as_ours(model, tmp_path)), sequences, score_from)
    for (log_probs, _), *arguments in zip(found, sequences, score_from, strict=True):
        expected_log_probs, _ = expected(model, *arguments)
        np.testing.assert_allclose(log_probs, expected_log_probs, atol=1e-4)


def test_score_batch_rejects_a_first_token(tmp_path):
    scorer = TokenScorer(as_ours(in_transformers(SHAPES[0]), tmp_path))
    with pytest.raises(ValueError, match="`score_from` must be at least 1"):
        scores(scorer, [[1, 5]], [0])


@pytest.mark.parametrize("batch_size", [0, 2.5, "8"])
def test_token_scorer_rejects_an_invalid_batch_size(batch_size, tmp_path):
    lm = as_ours(in_transformers(SHAPES[0]), tmp_path)
    with pytest.raises(ValueError, match=f"batch_size={batch_size!r}"):
        TokenScorer(lm, batch_size)
