"""Settings of tokenizers in files of transformers are read, or refused by name."""

import json

import pytest
import transformers
from tokenizer_models import trained_model

from keras_openllama.checkpoints.repository import LocalRepository
from keras_openllama.checkpoints.tokenizer_json import build_tokenizer_json
from keras_openllama.checkpoints.tokenizer_settings import TokenizerFiles

pytestmark = pytest.mark.backend_free
CONFIG, FAST, ADDED = "tokenizer_config.json", "tokenizer.json", "added_tokens.json"


def settings(directory, files, num_rows=514, keeps_spaces=True):
    (directory / "tokenizer.model").write_bytes(trained_model(keeps_spaces))
    for name, data in files.items():
        text = data if isinstance(data, str) else json.dumps(data)
        (directory / name).write_text(text)
    return TokenizerFiles(LocalRepository(directory)).settings(num_rows)


def names(directory, files, **options):
    tokens = settings(directory, files, **options)["added_tokens"]
    return {token["content"]: token["id"] for token in tokens}


def test_files_without_added_tokens_have_the_default_settings(tmp_path):
    default = {"added_tokens": [], "prepend_scheme": "always", "add_eos": False}
    assert settings(tmp_path, {}) == default


def test_tokens_of_several_files_are_merged(tmp_path):
    files = {
        ADDED: {"<a>": 512, "<b>": 513},
        CONFIG: {"added_tokens_decoder": {"513": {"content": "<b>", "special": True}}},
        "special_tokens_map.json": {"pad_token": {"content": "[PAD]"}},
    }
    assert names(tmp_path, files, num_rows=520) == {
        "<a>": 512,
        "<b>": 513,
        "[PAD]": 514,
    }


def test_control_tokens_of_the_model_are_not_added(tmp_path):
    decoder = {"1": {"content": "<s>", "special": True}, "0": {"content": "<unk>"}}
    files = {CONFIG: {"added_tokens_decoder": decoder, "pad_token": "<unk>"}}
    assert names(tmp_path, files) == {}


def test_tokens_without_a_row_are_ignored_with_a_warning(tmp_path):
    files = {ADDED: {"<a>": 512, "[PAD]": 514}}
    with pytest.warns(UserWarning, match=r"\[PAD\]\. Its embedding has 514 rows"):
        assert names(tmp_path, files) == {"<a>": 512}


@pytest.mark.parametrize(
    "files, message",
    [
        ({ADDED: {"x": "512"}}, "added_tokens.json .*integer id.*'x': '512'"),
        ({ADDED: {"x": None}}, "added_tokens.json .*integer id"),
        ({ADDED: {"x": -1}}, "added_tokens.json.*-1"),
        ({ADDED: "null"}, "added_tokens.json must contain a JSON object"),
        ({ADDED: "[]"}, "added_tokens.json must contain a JSON object"),
        ({ADDED: "{"}, "added_tokens.json is not valid JSON"),
        ({CONFIG: "null"}, "tokenizer_config.json must contain a JSON object"),
        ({FAST: "[1]"}, "tokenizer.json must contain a JSON object"),
        ({FAST: {"added_tokens": {}, "x": 1}}, "tokenizer.json"),
        ({FAST: {"added_tokens": {"x": 1}}}, "tokenizer.json"),
        ({FAST: {"added_tokens": [3]}}, "tokenizer.json"),
        ({CONFIG: {"added_tokens_decoder": ["<a>"]}}, "added_tokens_decoder with"),
        ({CONFIG: {"added_tokens_decoder": {"a": "b"}}}, "added_tokens_decoder with"),
        ({CONFIG: {"added_tokens_decoder": {"512": 3}}}, "tokenizer_config.json"),
        ({CONFIG: {"pad_token": 3}}, "pad_token=3"),
        ({CONFIG: {"extra_special_tokens": [3]}}, "extra_special_tokens=3"),
        ({CONFIG: {"add_bos_token": "no", "add_eos_token": "no"}}, "must be a boolean"),
        ({CONFIG: {"legacy": 1}}, "legacy=1"),
        ({CONFIG: {"tokenizer_class": "GPT2Tokenizer"}}, "GPT2Tokenizer.*LlamaTok"),
        ({CONFIG: {"add_prefix_space": False}}, "add_prefix_space=False"),
        ({CONFIG: {"sp_model_kwargs": {"enable_sampling": True}}}, "sp_model_kwargs"),
        (
            {
                ADDED: {"<a>": 512},
                CONFIG: {"added_tokens_decoder": {"512": {"content": "<b>"}}},
            },
            "added_tokens.json .* gives the id 512 to '<a>', but tokenizer_config.json",
        ),
        ({ADDED: {"<a>": 512, "</s>": 513}}, "'</s>', which tokenizer.model has as 2"),
    ],
)
def test_malformed_files_are_named(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, files)


def test_tokenizer_json_with_other_spaces_is_reported(tmp_path):
    fast = build_tokenizer_json(trained_model(True))
    pieces = build_tokenizer_json(trained_model(False))
    merged = json.loads(pieces)
    merged["normalizer"] = json.loads(fast)["normalizer"]  # As transformers converts.
    with pytest.warns(UserWarning, match="tokenizer.json and tokenizer.model .*spaces"):
        settings(tmp_path, {FAST: merged}, keeps_spaces=False)


def test_tokenizer_json_of_another_tokenizer_is_reported(tmp_path):
    with pytest.warns(UserWarning, match="It belongs to another tokenizer"):
        settings(tmp_path, {FAST: build_tokenizer_json(trained_model(False))})


def test_an_equal_tokenizer_json_is_silent(tmp_path, recwarn):
    settings(tmp_path, {FAST: build_tokenizer_json(trained_model(True))})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)  # As transformers 5 writes it.
    recwarn.clear()
    settings(tmp_path, {})
    assert not recwarn.list


@pytest.mark.parametrize("with_model", [True, False])
def test_tokenizer_json_may_begin_with_a_byte_order_mark(with_model, tmp_path):
    text = build_tokenizer_json(trained_model(keep_spaces=True))
    (tmp_path / FAST).write_text("\ufeff" + text, "utf-8")
    if with_model:
        (tmp_path / "tokenizer.model").write_bytes(trained_model(keep_spaces=True))
    files = TokenizerFiles(LocalRepository(tmp_path))
    assert files.settings(512)["added_tokens"] == []
    assert files.proto()
