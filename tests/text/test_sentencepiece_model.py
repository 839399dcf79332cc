import pytest
import sentencepiece

from keras_openllama.models.tokenizer import OpenLlamaTokenizer
from tests.support.tokenizer_models import trained_model

pytestmark = pytest.mark.backend_free


def model_without_end(path):
    """A complete SentencePiece model without an end token."""
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some text to train on", "and some more"]),
            model_writer=file,
            vocab_size=30,
            hard_vocab_limit=False,
            eos_id=-1,
            minloglevel=2,
        )
    return path.read_bytes()


def truncated_before_normalizer_spec(data):
    """A model without its last field, which SentencePiece accepts."""
    position = data.rindex(b"\x1a")
    assert data[position + 1] == len(data) - position - 2
    cut = sentencepiece.SentencePieceProcessor(model_proto=data[:position])
    complete = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert cut.encode("a  b") != complete.encode("a  b")
    return data[:position]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "empty"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:-1], "truncated"),
        (truncated_before_normalizer_spec, "lack parts"),
        (lambda data: b"not a model" * 9, "not a SentencePiece model"),
        (lambda data: b'{"version": "1.0"}', "JSON"),
        (lambda data: b'\n  {"version": "1.0"}', "JSON"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (lambda data: bytes([18, 0, 26, 0]), "SentencePiece cannot load"),
    ],
)
def test_tokenizer_error_names_the_invalid_file_reason_and_remedy(
    tmp_path, damage, message
):
    path = tmp_path / "wrong.model"
    path.write_bytes(damage(trained_model(keep_spaces=True)))
    with pytest.raises(ValueError, match=message) as caught:
        OpenLlamaTokenizer(path)
    assert str(path) in str(caught.value)
    assert "tokenizer.model" in str(caught.value)


def test_tokenizer_rejects_a_model_without_end_token(tmp_path):
    path = tmp_path / "other.model"
    model_without_end(path)
    with pytest.raises(ValueError, match="no </s>"):
        OpenLlamaTokenizer(path)


def test_tokenizer_error_names_a_missing_file_or_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist.*absent"):
        OpenLlamaTokenizer(str(tmp_path / "absent.model"))
    with pytest.raises(IsADirectoryError, match="from_preset"):
        OpenLlamaTokenizer(tmp_path)


@pytest.mark.parametrize("bad", [3, ["tokenizer.model"], "A" * 3001])
def test_tokenizer_rejects_a_proto_of_another_type(bad):
    with pytest.raises(ValueError, match="`proto`"):
        OpenLlamaTokenizer(bad)
