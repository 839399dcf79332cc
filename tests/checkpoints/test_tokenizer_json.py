"""`build_tokenizer_json` reproduces SentencePiece, or raises an error."""

import io
import json
from pydoc_data.topics import topics

import pytest
import sentencepiece
import tokenizers
import transformers
from difficult_texts import difficult_texts
from sentencepiece import sentencepiece_model_pb2
from tokenizer_models import MODELS, trained_model

from keras_openllama.checkpoints import tokenizer_json

pytestmark = pytest.mark.backend_free


@pytest.fixture(scope="module")
def all_texts():
    return difficult_texts()


@pytest.mark.parametrize("name", MODELS)
def test_build_tokenizer_json_encodes_and_decodes_like_sentencepiece(name, all_texts):
    proto = MODELS[name]()
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    fast = tokenizers.Tokenizer.from_str(tokenizer_json.build_tokenizer_json(proto))
    fast.encode_special_tokens = True  # "<s>" in a text is text for SentencePiece.
    expected = processor.encode(all_texts)
    encoded = fast.encode_batch_fast(all_texts, add_special_tokens=False)
    wrong = [
        text
        for text, found, ids in zip(all_texts, encoded, expected, strict=True)
        if found.ids != ids
    ]
    assert not wrong, f"{len(wrong)} texts, {wrong[:3]}"
    back = fast.decode_batch(expected)
    wrong = [
        (text, ours, theirs)
        for text, ours, theirs in zip(
            all_texts, back, processor.decode(expected), strict=True
        )
        if ours != theirs
    ]
    assert not wrong, f"{len(wrong)} texts, {wrong[:3]}"


def test_build_tokenizer_json_prepends_the_start_token():
    fast = tokenizers.Tokenizer.from_str(
        tokenizer_json.build_tokenizer_json(MODELS["v2"]())
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=MODELS["v2"]())
    assert fast.encode("the sea").ids == [1, *processor.encode("the sea")]
    assert fast.decode(fast.encode("  the sea").ids) == "  the sea"


def altered(change, keep_spaces=True):
    model = sentencepiece_model_pb2.ModelProto.FromString(trained_model(keep_spaces))
    change(model)
    return model.SerializeToString()


def trained(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(topics.values()).splitlines()[:500]),
        model_writer=model,
        vocab_size=400,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return model.getvalue()


@pytest.mark.parametrize(
    "make, reason",
    [
        (
            lambda: trained(model_type="unigram", hard_vocab_limit=False),
            "not a BPE model",
        ),
        (lambda: trained(model_type="bpe"), "'nmt_nfkc', rewrites characters"),
        (
            lambda: trained(model_type="bpe", normalization_rule_name="identity"),
            "does not fall back to bytes",
        ),
        (
            lambda: trained(
                model_type="bpe",
                normalization_rule_name="identity",
                byte_fallback=True,
                user_defined_symbols=["<sep>"],
            ),
            "user-defined",
        ),
        (
            lambda: altered(
                lambda m: setattr(m.trainer_spec, "treat_whitespace_as_suffix", True)
            ),
            "spaces after words",
        ),
        (
            lambda: altered(
                lambda m: setattr(m.normalizer_spec, "escape_whitespaces", False)
            ),
            "does not escape spaces",
        ),
    ],
)
def test_build_tokenizer_json_rejects_unsupported_models(make, reason):
    with pytest.raises(ValueError, match=f"{reason}.*--no-tokenizer"):
        tokenizer_json.build_tokenizer_json(make())


def test_build_tokenizer_json_rejects_scores_without_an_equivalent_merge_order():
    # With equal scores, SentencePiece merges from the left, regardless of the pieces.
    def flatten(model):
        for piece in model.pieces:
            piece.score = 0.0

    with pytest.raises(ValueError, match=r"would be encoded as \[.*instead of \["):
        tokenizer_json.build_tokenizer_json(altered(flatten))


def test_build_tokenizer_json_supports_models_without_dummy_prefix(all_texts):
    proto = trained(
        model_type="bpe",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        byte_fallback=True,
        remove_extra_whitespaces=False,
    )
    fast = tokenizers.Tokenizer.from_str(tokenizer_json.build_tokenizer_json(proto))
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    fast.encode_special_tokens = True
    for text in all_texts[::20]:
        ids = processor.encode(text)
        assert fast.encode(text, add_special_tokens=False).ids == ids
        assert fast.decode(ids) == processor.decode(ids)


@pytest.mark.parametrize("name", MODELS)
def test_build_sentencepiece_model_inverts_build_tokenizer_json(name, all_texts):
    proto = MODELS[name]()
    again = tokenizer_json.build_sentencepiece_model(
        tokenizer_json.build_tokenizer_json(proto)
    )
    found, expected = (
        sentencepiece.SentencePieceProcessor(model_proto=model)
        for model in (again, proto)
    )
    assert found.encode(all_texts) == expected.encode(all_texts)
    assert found.id_to_piece([0, 1, 2]) == expected.id_to_piece([0, 1, 2])
    assert found.bos_id() == 1 and found.eos_id() == 2 and found.pad_id() == -1


@pytest.mark.parametrize("name", ["v2", "nano", "tied_scores"])
def test_build_sentencepiece_model_reads_files_of_transformers(
    name, all_texts, tmp_path
):
    proto = MODELS[name]()
    (tmp_path / "tokenizer.model").write_bytes(proto)
    tokenizer = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    again = sentencepiece.SentencePieceProcessor(
        model_proto=tokenizer_json.build_sentencepiece_model(text)
    )
    # transformers puts no space before a text that begins with one.
    texts = [text for text in all_texts if text[:1] not in (" ", "▁")]
    fast = tokenizers.Tokenizer.from_str(text)
    fast.encode_special_tokens = True
    expected = fast.encode_batch(texts, add_special_tokens=False)
    assert again.encode(texts) == [encoded.ids for encoded in expected]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "null",
        tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).to_str(),
        tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).to_str(),
    ],
)
def test_build_sentencepiece_model_rejects_other_tokenizers(text):
    with pytest.raises(ValueError, match="not of a LLaMA tokenizer"):
        tokenizer_json.build_sentencepiece_model(text)


def test_build_sentencepiece_model_rejects_what_it_cannot_reproduce():
    data = json.loads(tokenizer_json.build_tokenizer_json(trained_model(True)))
    del data["model"]["merges"][::2]  # SentencePiece would merge these pairs.
    with pytest.raises(ValueError, match="would be encoded"):
        tokenizer_json.build_sentencepiece_model(json.dumps(data))
