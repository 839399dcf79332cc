"""The tokenizer of a GGUF file tokenizes like the SentencePiece model it came from."""

import dataclasses
import io
import random
from pydoc_data.topics import topics

import gguf
import pytest
import sentencepiece
from gguf_files import changed_copy, read_file
from sentencepiece import sentencepiece_model_pb2
from tiny_models import TinyShape, random_lm
from tokenizer_models import large_model, trained_model

from keras_openllama import OpenLlamaCausalLMPreprocessor, OpenLlamaTokenizer
from keras_openllama.checkpoints.contents import contents_of_model
from keras_openllama.checkpoints.gguf_model import output_files

pytestmark = pytest.mark.backend_free

SHAPE = TinyShape("tiny", 2, 2, 4, hidden_dim=8, intermediate_dim=8, num_layers=1)
TEXTS = [
    "",
    " ",
    "The  import\n\n    statement",
    " a ",
    "\t\0\r\n",
    "日本 é\u0301 🙂\u200d ﬁ Ａ",
    "<s>a</s> <unk> <0x0A> ▁b",
    "  x" * 9,
]


def random_texts(pieces):
    rng = random.Random(0)
    for _ in range(300):
        yield "".join(rng.choices(pieces, k=8)).replace("▁", " ")


def export(proto, path, rows=None, settings=None, preprocessing=None, ends=(2,)):
    """Writes a GGUF file of a random model with a tokenizer; returns its path."""
    tokenizer = OpenLlamaTokenizer(proto, **(settings or {}))
    shape = dataclasses.replace(
        SHAPE, vocabulary_size=rows or tokenizer.vocabulary_size()
    )
    contents = contents_of_model(random_lm(shape))
    contents = dataclasses.replace(
        contents,
        tokenizer=proto,
        tokenizer_settings=tokenizer.settings(),
        preprocessing=preprocessing or {},
        end_token_ids=ends,
    )
    (output,) = output_files(contents, "f16", "x")
    with open(path, "wb") as file:
        output.write(file, (contents.tensors[p].array() for p in output.tensors))
    return path


@pytest.mark.parametrize("keep_spaces", [True, False], ids=["v2", "v1"])
@pytest.mark.filterwarnings("ignore:This tokenizer merges runs of spaces")
def test_from_preset_tokenizes_like_the_original_model(keep_spaces, tmp_path):
    proto = trained_model(keep_spaces)
    path = export(proto, tmp_path / "x.gguf")
    assert_same_tokenizer(proto, OpenLlamaTokenizer.from_preset(path))


def test_from_preset_tokenizes_like_a_model_of_32000_pieces(tmp_path):
    path = export(large_model(), tmp_path / "x.gguf")
    assert_same_tokenizer(large_model(), OpenLlamaTokenizer.from_preset(path))


def assert_same_tokenizer(proto, found):
    expected = OpenLlamaTokenizer(proto)
    models = [
        sentencepiece_model_pb2.ModelProto.FromString(t.proto)
        for t in (expected, found)
    ]
    assert models[0].pieces == models[1].pieces
    pieces = [piece.piece for piece in models[0].pieces]
    texts = [*TEXTS, *random_texts(pieces)]
    ids = expected(texts)
    assert found(texts) == ids
    assert found.detokenize(ids) == expected.detokenize(ids)
    assert (found.start_token_id, found.end_token_id) == (1, 2)


def test_export_warns_if_the_tokenizer_merges_spaces(tmp_path):
    with pytest.warns(
        UserWarning, match="merges runs of spaces, and llama.cpp does not"
    ):
        export(trained_model(False), tmp_path / "x.gguf")


def test_export_lists_tokens_as_llama_cpp_does(tmp_path):
    settings = {
        "added_tokens": ["<|im_start|>", {"content": "ß", "id": 514, "special": False}]
    }
    path = export(
        trained_model(True),
        tmp_path / "x.gguf",
        rows=520,
        settings=settings,
        ends=(515, 2),
        preprocessing={"add_start_token": False},
    )
    metadata, _ = read_file(path)
    found = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.")
    }
    tokens, scores = found.pop("tokens"), found.pop("scores")
    types = found.pop("token_type")
    assert found == {
        "model": "llama",
        "pre": "default",
        "bos_token_id": 1,
        "eos_token_id": 515,
        "eot_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 0,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_space_prefix": True,
        "remove_extra_whitespaces": False,
    }
    kinds = gguf.TokenType
    assert types[:4] == [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.BYTE]
    assert types[511:] == [
        kinds.NORMAL,
        *[kinds.UNUSED] * 2,
        kinds.USER_DEFINED,
        kinds.CONTROL,
        *[kinds.UNUSED] * 4,
    ]
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert tokens[512:] == [
        *("[PAD512]", "[PAD513]", "ß", "<|im_start|>"),
        *(f"[PAD{i}]" for i in range(516, 520)),
    ]
    assert scores[512:516] == [-10000.0, -10000.0, -1000.0, -1000.0]


def test_from_preset_restores_added_tokens_and_settings(tmp_path):
    settings = {
        "added_tokens": ["<|im_start|>", {"content": "ß", "id": 600, "special": False}],
        "add_eos": True,
    }
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    preprocessing = {"add_start_token": False, "chat_template": template}
    path = export(
        trained_model(True), tmp_path / "x.gguf", 640, settings, preprocessing
    )
    metadata, _ = read_file(path)
    assert "keras_openllama.tokenizer" not in metadata
    expected = OpenLlamaTokenizer(trained_model(True), **settings)
    preprocessor = OpenLlamaCausalLMPreprocessor.from_preset(path)
    tokenizer = preprocessor.tokenizer
    assert tokenizer.settings() == expected.settings()
    assert not preprocessor.add_start_token
    assert preprocessor.chat_template == template
    text = "a<|im_start|>ß b"
    assert tokenizer(text, parse_special=True) == expected(text, parse_special=True)


def test_from_preset_restores_what_gguf_cannot_express(tmp_path):
    settings = {
        "added_tokens": [{"content": "<a>", "id": 512, "lstrip": True}],
        "prepend_scheme": "first",
    }
    path = export(trained_model(True), tmp_path / "x.gguf", settings=settings)
    expected = OpenLlamaTokenizer(trained_model(True), **settings)
    assert OpenLlamaTokenizer.from_preset(path).settings() == expected.settings()
    changed = changed_copy(
        path, tmp_path / "y.gguf", metadata={"keras_openllama.tokenizer": "{"}
    )
    with pytest.raises(ValueError, match=r"y\.gguf sets .*to invalid JSON"):
        OpenLlamaTokenizer.from_preset(changed)


def test_from_preset_reads_files_that_mark_the_unknown_token_as_control(tmp_path):
    # As llama.cpp's converter does if tokenizer_config.json lists the token.
    path = export(trained_model(True), tmp_path / "x.gguf")
    types = read_file(path)[0]["tokenizer.ggml.token_type"]
    scores = read_file(path)[0]["tokenizer.ggml.scores"]
    changed = changed_copy(
        path,
        tmp_path / "y.gguf",
        metadata={
            "tokenizer.ggml.token_type": [3, 3, 3, *types[3:]],
            "tokenizer.ggml.scores": [-1000.0] * 3 + scores[3:],
            "tokenizer.ggml.unknown_token_id": None,
        },
    )
    assert_same_tokenizer(trained_model(True), OpenLlamaTokenizer.from_preset(changed))


@pytest.mark.parametrize(
    "key, value, error, message",
    [
        ("model", "gpt2", ValueError, "kind 'gpt2'.*preprocessor=None"),
        ("model", None, FileNotFoundError, "contains no tokenizer.*preprocessor=None"),
        ("scores", [0.0], ValueError, "512 tokens, 1 scores and 512 types"),
        ("token_type", [9] * 512, ValueError, r"unknown types \[9\]"),
        ("tokens", ["a"] * 512, ValueError, "cannot be used as a tokenizer|no <"),
        ("add_bos_token", "yes", ValueError, "must be a boolean"),
        ("bos_token_id", -1, ValueError, "must be an id"),
    ],
)
def test_from_preset_names_invalid_metadata(key, value, error, message, tmp_path):
    path = export(trained_model(True), tmp_path / "x.gguf")
    metadata = {f"tokenizer.ggml.{key}": value}
    if key == "bos_token_id":  # Used only if no token is "<s>".
        tokens = read_file(path)[0]["tokenizer.ggml.tokens"]
        metadata["tokenizer.ggml.tokens"] = ["<unk>", "<a>", *tokens[2:]]
    changed = changed_copy(path, tmp_path / "y.gguf", metadata=metadata)
    with pytest.raises(error, match=message):
        OpenLlamaCausalLMPreprocessor.from_preset(changed)


def test_export_rejects_a_tokenizer_that_llama_cpp_cannot_apply(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(topics.values()).splitlines()[:500]),
        model_writer=model,
        model_type="unigram",
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"not a BPE model.*--no-tokenizer"):
        export(model.getvalue(), tmp_path / "x.gguf")
