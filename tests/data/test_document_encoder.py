"""`DocumentEncoder` gives SentencePiece's ids, whatever the model and the text."""

import io
from pydoc_data.topics import topics

import numpy as np
import pytest
import sentencepiece
from difficult_texts import difficult_texts
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizer_models import MODELS, trained_model

from keras_openllama.data import document_encoder
from keras_openllama.data.document_encoder import DocumentEncoder

pytestmark = pytest.mark.backend_free

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6
BPE = 2


def wrong_texts(encoder, texts):
    """Returns the texts that have other ids than with SentencePiece."""
    expected = encoder.processor.encode(texts)
    found = [np.frombuffer(encoder.encode(text), "<u2").tolist() for text in texts]
    return [t for t, a, b in zip(texts, found, expected, strict=True) if a != b]


@pytest.fixture(scope="module")
def all_texts():
    return difficult_texts()


@pytest.mark.parametrize("name", MODELS)
def test_document_encoder_gives_the_ids_of_sentencepiece(name, all_texts):
    encoder = DocumentEncoder(MODELS[name]())
    assert encoder.remembers_words
    assert wrong_texts(encoder, all_texts) == []
    # All words are known now.
    assert wrong_texts(encoder, all_texts[::10]) == []


# --- Any vocabulary ---

letters = st.sampled_from("abc(.1é")
spaces = st.sampled_from(["", "", "▁", "▁▁"])
pieces = st.builds(
    str.__add__, spaces, st.text(letters, min_size=1, max_size=4)
) | st.text("▁", min_size=1, max_size=4)
any_pieces = st.text(st.sampled_from("▁abc(.1é"), min_size=1, max_size=4)
texts = st.text(st.sampled_from("  abc(.1é\n▁日\0"), max_size=30)


def model_of(scores, **normalizer):
    """Returns a BPE model with bytes and these pieces, a dict of scores."""
    model = ModelProto()
    model.pieces.add(piece="<unk>", type=UNKNOWN)
    model.pieces.add(piece="<s>", type=CONTROL)
    model.pieces.add(piece="</s>", type=CONTROL)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", type=BYTE)
    for piece, score in scores.items():
        model.pieces.add(piece=piece, score=score)
    model.trainer_spec.model_type = BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(model.pieces)
    model.normalizer_spec.name = "identity"
    for name, value in normalizer.items():
        setattr(model.normalizer_spec, name, value)
    return model.SerializeToString()


def vocabularies(pieces):
    # Few scores, so that many are equal.
    return st.dictionaries(pieces, st.integers(-3, 0), min_size=1, max_size=25)


@given(vocabularies(pieces), st.lists(texts, max_size=8), st.booleans(), st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_document_encoder_is_exact_for_any_vocabulary_of_words(
    scores, texts, merges_spaces, has_prefix
):
    encoder = DocumentEncoder(
        model_of(
            scores,
            remove_extra_whitespaces=merges_spaces,
            add_dummy_prefix=has_prefix,
        )
    )
    assert encoder.remembers_words
    assert wrong_texts(encoder, texts) == []


@given(vocabularies(any_pieces), st.lists(texts, max_size=8))
@example({"a▁": -1, "a▁b": 0, "▁b": -2}, ["a b"])
@settings(max_examples=200, deadline=None, derandomize=True)
def test_document_encoder_leaves_pieces_across_spaces_to_sentencepiece(scores, texts):
    encoder = DocumentEncoder(model_of(scores))
    crosses = any("▁" in piece.lstrip("▁") for piece in scores)
    assert encoder.remembers_words != crosses
    assert wrong_texts(encoder, texts) == []


# --- Other models ---


def trained(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(topics.values()).splitlines()[:500]),
        model_writer=model,
        vocab_size=700,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **options,
    )
    return model.getvalue()


def with_kind(kind):
    model = ModelProto.FromString(trained_model(keep_spaces=True))
    for piece in model.pieces[300:310]:
        piece.type = kind
    return model.SerializeToString()


@pytest.mark.parametrize(
    "make",
    [
        lambda: trained(model_type="unigram", byte_fallback=True),
        lambda: trained(model_type="char"),
        lambda: trained(model_type="bpe", byte_fallback=True),  # NFKC.
        lambda: trained(model_type="bpe", normalization_rule_name="identity"),
        lambda: trained(
            model_type="bpe",
            normalization_rule_name="identity",
            byte_fallback=True,
            treat_whitespace_as_suffix=True,
        ),
        lambda: with_kind(USER_DEFINED),
        lambda: with_kind(UNUSED),
    ],
    ids=["unigram", "char", "nfkc", "unknown", "suffix", "user-defined", "unused"],
)
def test_document_encoder_leaves_other_models_to_sentencepiece(make, all_texts):
    encoder = DocumentEncoder(make())
    assert not encoder.remembers_words
    assert wrong_texts(encoder, all_texts[::20]) == []


# --- Memory ---


def test_document_encoder_remembers_a_limited_number_of_words(monkeypatch):
    monkeypatch.setattr(document_encoder, "_MAX_WORDS", 100)
    monkeypatch.setattr(document_encoder, "_MAX_WORD_LENGTH", 8)
    encoder = DocumentEncoder(trained_model(keep_spaces=True))
    assert wrong_texts(encoder, list(topics.values())) == []
    assert 0 < len(encoder._ids) <= 100
    assert max(map(len, encoder._ids)) <= 8
