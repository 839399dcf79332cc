"""Tokens beside SentencePiece's pieces: the same ids as in transformers, and back."""

import json

import pytest
import transformers
from tiny_models import TinyShape, in_transformers, random_lm
from tokenizer_models import trained_model

from keras_openllama import (
    OpenLlamaCausalLM,
    OpenLlamaCausalLMPreprocessor,
    OpenLlamaTokenizer,
)
from keras_openllama.convert import convert

pytestmark = pytest.mark.backend_free

PIECES = 512
SHAPE = TinyShape("added", 4, 2, 16, vocabulary_size=PIECES + 2, context=64)
START, END = "<|im_start|>", "<|im_end|>"
TEXTS = [
    f"{START}user\nthe sea{END}\n{START}assistant\n",
    f"the {END} sea",
    f"{START}{END}",
    f"the sea{END}",
    "no added token here</s>",
    "the <unk> sea<s>",
]


def entry(content, **flags):
    defaults = dict(special=True, normalized=False, lstrip=False, rstrip=False)
    return {"content": content, "single_word": False, **defaults, **flags}


def decoder(**flags):
    return {"512": entry(START, **flags), "513": entry(END, **flags)}


FORMS = {
    "added_tokens.json": {"added_tokens.json": {START: 512, END: 513}},
    "special_tokens_map.json": {
        "added_tokens.json": {START: 512, END: 513},
        "special_tokens_map.json": {
            "pad_token": START,
            "extra_special_tokens": [END],
        },
    },
    "added_tokens_decoder": {
        "tokenizer_config.json": {"added_tokens_decoder": decoder()}
    },
    "not special": {
        "tokenizer_config.json": {"added_tokens_decoder": decoder(special=False)}
    },
    "lstrip and rstrip": {
        "tokenizer_config.json": {
            "added_tokens_decoder": decoder(lstrip=True, rstrip=True)
        }
    },
    "extra_special_tokens": {
        "tokenizer_config.json": {"extra_special_tokens": [START, END]}
    },
    "named extra_special_tokens": {
        "tokenizer_config.json": {"extra_special_tokens": {"start": START, "end": END}}
    },
    "additional_special_tokens": {
        "tokenizer_config.json": {"additional_special_tokens": [START, END]}
    },
    "pad_token": {
        "tokenizer_config.json": {"pad_token": START, "extra_special_tokens": [END]}
    },
    "flags without ids": {
        "tokenizer_config.json": {
            "pad_token": {"__type": "AddedToken", **entry(START, rstrip=True)}
        },
        "special_tokens_map.json": {"mask_token": entry(END, lstrip=True)},
    },
    "legacy": {
        "tokenizer_config.json": {"legacy": True, "added_tokens_decoder": decoder()}
    },
}


def checkpoint(directory, files):
    """A checkpoint of a tiny LLaMA with 512 pieces and 514 rows."""
    in_transformers(SHAPE).save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(trained_model(True))
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    config |= files.get("tokenizer_config.json", {})
    for name, data in {**files, "tokenizer_config.json": config}.items():
        (directory / name).write_text(json.dumps(data))
    return directory


def ids_of_transformers(directory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


def ids(directory):
    tokenizer = OpenLlamaTokenizer.from_preset(str(directory))
    return tokenizer.tokenize(TEXTS, parse_special=True)


@pytest.mark.parametrize("form", FORMS)
def test_from_preset_reads_added_tokens_like_transformers(form, tmp_path):
    directory = checkpoint(tmp_path, FORMS[form])
    expected = ids_of_transformers(directory)
    assert {512, 513} <= {i for sequence in expected for i in sequence}
    found = ids(directory)
    for text, expected_ids, found_ids in zip(TEXTS, expected, found, strict=True):
        # Unlike SentencePiece, transformers puts no space before text that has one.
        if form != "legacy" or "> " not in text:
            assert found_ids == expected_ids


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("keeps_spaces", [True, False])
def test_export_to_transformers_writes_added_tokens(
    keeps_spaces, normalized, special, tmp_path
):
    proto = trained_model(keeps_spaces)
    tokens = [
        {"content": name, "id": i, "special": special, "normalized": normalized}
        for i, name in ((512, START), (513, END))
    ]
    lm = chat_model(proto, tokens)
    lm.export_to_transformers(tmp_path / "a")
    tokenizer = lm.preprocessor.tokenizer
    expected = tokenizer.tokenize(TEXTS, parse_special=True)
    assert ids_of_transformers(tmp_path / "a") == expected
    assert (tmp_path / "a" / "tokenizer.model").read_bytes() == proto
    again = OpenLlamaTokenizer.from_preset(str(tmp_path / "a"))
    assert again.added_tokens == tokenizer.added_tokens
    assert again.prepend_scheme == tokenizer.prepend_scheme


def chat_model(proto, tokens, **options):
    tokenizer = OpenLlamaTokenizer(proto, added_tokens=tokens, **options)
    lm = random_lm(SHAPE)
    preprocessor = OpenLlamaCausalLMPreprocessor(tokenizer, sequence_length=64)
    return OpenLlamaCausalLM(lm.backbone, preprocessor)


@pytest.mark.parametrize("with_model", [True, False])
def test_checkpoints_of_transformers_5_load(with_model, tmp_path):
    """It writes tokenizer.json and tokenizer_config.json only."""
    checkpoint(tmp_path / "a", FORMS["added_tokens_decoder"])
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    in_transformers(SHAPE).save_pretrained(tmp_path / "b")
    saved.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / "tokenizer.model").exists()
    if with_model:
        (tmp_path / "b" / "tokenizer.model").write_bytes(trained_model(True))
    expected = ids_of_transformers(tmp_path / "b")
    assert ids(tmp_path / "b") == expected
    lm = OpenLlamaCausalLM.from_preset(str(tmp_path / "b"))
    lm.export_to_transformers(tmp_path / "c")
    assert ids_of_transformers(tmp_path / "c") == ids(tmp_path / "c") == expected


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_added_tokens_survive_every_format(scheme, tmp_path):
    lm = chat_model(trained_model(True), [START, END], prepend_scheme=scheme)
    lm.preprocessor.tokenizer.add_eos = True
    expected = lm.preprocessor.tokenizer.tokenize(TEXTS, parse_special=True)
    lm.save_to_preset(tmp_path / "keras")
    convert(tmp_path / "keras", tmp_path / "hf", "transformers")
    convert(tmp_path / "hf", tmp_path / "keras_again", "keras")
    convert(tmp_path / "keras_again", tmp_path / "hf_again", "transformers")
    convert(tmp_path / "keras", tmp_path / "weights.msgpack", "easylm")
    convert(
        tmp_path / "weights.msgpack",
        tmp_path / "from_easylm",
        "transformers",
        preset=tmp_path / "hf",
    )
    lm.save(tmp_path / "model.keras")
    for name in ("keras", "hf", "keras_again", "hf_again", "from_easylm"):
        assert ids(tmp_path / name) == expected, name


def test_tokenizer_config_is_kept_by_conversions(tmp_path):
    files = {"tokenizer_config.json": {"add_bos_token": False, "add_eos_token": True}}
    checkpoint(tmp_path / "a", files)
    convert(tmp_path / "a", tmp_path / "b", "keras")
    convert(tmp_path / "b", tmp_path / "c", "transformers")
    for name in "abc":
        preprocessor = OpenLlamaCausalLMPreprocessor.from_preset(str(tmp_path / name))
        assert not preprocessor.add_start_token and preprocessor.tokenizer.add_eos
    config = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is False and config["add_eos_token"] is True
    text = "the sea"
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")(text)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "c")(text)
    assert found["input_ids"] == expected["input_ids"]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_from_preset_reads_the_template_that_transformers_5_writes(bos, eos, tmp_path):
    """It writes `add_bos_token` and `add_eos_token` into tokenizer.json only."""
    config = {"add_bos_token": bos, "add_eos_token": eos}
    checkpoint(tmp_path, {"tokenizer_config.json": config})
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.model").unlink()
    saved.save_pretrained(tmp_path)
    assert config.keys().isdisjoint(
        json.loads((tmp_path / "tokenizer_config.json").read_text())
    )
    preprocessor = OpenLlamaCausalLMPreprocessor.from_preset(str(tmp_path))
    assert preprocessor.add_start_token is bos
    ids = preprocessor.tokenizer("the sea", add_bos=bos)
    assert list(ids) == saved("the sea")["input_ids"]


def test_from_preset_warns_of_another_start_token(tmp_path):
    checkpoint(tmp_path, FORMS["added_tokens.json"])
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"bos_token": START}))
    with pytest.warns(UserWarning, match=r"bos_token='<\|im_start\|>'.*add_start_tok"):
        OpenLlamaCausalLMPreprocessor.from_preset(str(tmp_path))


@pytest.mark.parametrize("tokens", [(), (START, END)])
def test_detokenize_omits_the_unknown_token_like_transformers(tokens, tmp_path):
    lm = chat_model(trained_model(True), tokens)
    lm.export_to_transformers(tmp_path / "a")
    of_transformers = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    tokenizer = lm.preprocessor.tokenizer
    for text in ("the <unk> sea", "<unk>the sea<unk>", "<unk>"):
        ids = tokenizer.tokenize(text, parse_special=True)
        assert ids == of_transformers(text, add_special_tokens=False)["input_ids"]
        expected = of_transformers.decode(ids, skip_special_tokens=True)
        assert tokenizer.detokenize(ids) == expected
        decoder = tokenizer.stream_decoder()
        assert "".join(map(decoder.push, ids)) + decoder.flush() == expected
