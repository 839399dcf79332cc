"""`fit` and `evaluate` on a `TokenStream`, on every backend."""

import dataclasses

import numpy as np
import pytest
from keras import ops
from tiny_models import SHAPES, random_lm
from token_data import prepare_sources

from keras_openllama.data.token_stream import TokenStream


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_sources(tmp_path_factory.mktemp("fit"), {"web": 60, "code": 30})


HEAD_DIM_100, MULTI_HEAD = (
    dataclasses.replace(shape, vocabulary_size=512) for shape in (SHAPES[3], SHAPES[0])
)


@pytest.mark.slow_on_tensorflow
def test_evaluate_on_packed_documents_equals_the_loss_of_separate_documents(data):
    lm = random_lm(HEAD_DIM_100)
    lm.compile()
    stream = TokenStream(
        data, sequence_length=60, batch_size=4, packing="best_fit", mask_documents=True
    )
    loss, *_ = lm.evaluate(stream.dataset(steps=3), verbose=0)
    losses = [
        losses_of_separate_documents(lm, data, stream.sequences_read(step))
        for step in range(3)
    ]
    assert loss == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)


def losses_of_separate_documents(lm, data, sequences):
    """Nats of each target, with each document in a sequence of its own."""
    spans = [(source, *span) for source, spans in sequences for span in spans]
    tokens, mask = np.zeros((2, len(spans), 61), "int32")
    for place, (source, document, first, size) in enumerate(spans):
        part = data.documents(source)[document][0][first : first + size]
        tokens[place, :size], mask[place, : size - 1] = part, 1
    logits = lm.score(tokens[:, :-1], mask[:, :-1])
    logits = ops.convert_to_numpy(ops.cast(logits, "float32")).astype("float64")
    chosen = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    losses = np.log(np.exp(logits).sum(-1)) - chosen
    return losses[mask[:, :-1] > 0]


def test_fit_on_a_token_stream_reduces_the_loss(data):
    lm = random_lm(MULTI_HEAD)
    lm.compile(optimizer="adam")
    stream = TokenStream(data, sequence_length=32, batch_size=4)
    history = lm.fit(stream.dataset(), steps_per_epoch=6, epochs=2, verbose=0)
    first, second = history.history["loss"]
    assert second < first
