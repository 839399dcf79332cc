"""Declared end tokens: generation stops at each of them, and every format has them."""

import json
import shutil

import keras
import numpy as np
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from tiny_models import TinyShape, random_lm
from tokenizer_models import trained_model

from keras_openllama import (
    OpenLlamaBackbone,
    OpenLlamaCausalLM,
    OpenLlamaCausalLMPreprocessor,
    OpenLlamaTokenizer,
)
from keras_openllama.convert import convert, easylm
from keras_openllama.evaluation.lm_eval_model import OpenLlamaLM
from keras_openllama.text.sentencepiece_model import load_processor

pytestmark = pytest.mark.usefixtures("compile_fast")

SHAPE = TinyShape("grouped", 4, 2, 16, context=64)
PROMPT = "The value of"
MAX_NEW_TOKENS = 12
PROMPT_IDS = [1, *load_processor(trained_model(True), "a test").encode(PROMPT)]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Path of an exported model without `generation_config.json`."""
    path = tmp_path_factory.mktemp("end_tokens") / "model"
    random_lm(SHAPE, trained_model(True)).export_to_transformers(path)
    (path / "generation_config.json").unlink()
    return path


@pytest.fixture(scope="module")
def expected(export):
    """The tokens after the prompt, up to the second one that differs."""
    ids = new_tokens(OpenLlamaCausalLM.from_preset(export), stop_token_ids=None)
    first = [i for i, token_id in enumerate(ids) if token_id not in ids[:i]]
    second = first[:2][-1]
    return ids[: second + 1]


def update_json(path, **settings):
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **settings}))


@pytest.fixture
def declare(export, tmp_path):
    """Function that loads the model with other settings in its files."""

    def load(files, **options):
        directory = tmp_path / "declared"
        directory.mkdir()
        for path in export.iterdir():
            (directory / path.name).write_bytes(path.read_bytes())
        for name, settings in files.items():
            update_json(directory / name, **settings)
        return OpenLlamaCausalLM.from_preset(directory, **options)

    return load


def new_tokens(lm, **options):
    arrays = {"token_ids": [PROMPT_IDS], "padding_mask": [[1] * len(PROMPT_IDS)]}
    outputs = lm.generate(
        arrays, max_new_tokens=MAX_NEW_TOKENS, strip_prompt=True, **options
    )
    return outputs["token_ids"][0][outputs["padding_mask"][0]].tolist()


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ("one", None),
        ("list", None),
        ("own", "one"),
        ("own", "list"),
        ("list", "one"),
    ],
)
def test_generate_stops_where_transformers_does(
    declare, expected, tmp_path, config, generation
):
    values = {"one": expected[-1], "list": [2, expected[-1]], "own": 2}
    files = {"config.json": {"eos_token_id": values[config]}}
    if generation:
        files["generation_config.json"] = {"eos_token_id": values[generation]}
    lm = declare(files)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "declared")
    prompt = torch.tensor([PROMPT_IDS])
    found = theirs.generate(prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    assert found[0, len(PROMPT_IDS) :].tolist() == new_tokens(lm) == expected


@pytest.mark.backend_free
def test_from_preset_reads_the_end_tokens_of_both_files(declare):
    files = {
        "config.json": {"eos_token_id": [77, 3]},
        "generation_config.json": {"eos_token_id": [2, 3]},
    }
    assert declare(files, load_weights=False).end_token_ids == [2, 3, 77]


@pytest.mark.backend_free
def test_from_preset_without_preprocessor_reads_end_tokens(declare, expected):
    end = [2, expected[-1]]
    lm = declare({"config.json": {"eos_token_id": end}}, preprocessor=None)
    assert lm.end_token_ids == end
    assert new_tokens(lm) == expected


@pytest.mark.slow_on_tensorflow
def test_stream_beam_search_and_the_harness_stop_at_declared_end_tokens(
    declare, expected
):
    lm = declare({"config.json": {"eos_token_id": expected[-1]}})
    text = lm.generate(PROMPT, max_new_tokens=MAX_NEW_TOKENS, strip_prompt=True)
    limit = len(expected)
    assert text == lm.generate(PROMPT, max_new_tokens=limit, strip_prompt=True)
    assert "".join(lm.stream(PROMPT, max_new_tokens=MAX_NEW_TOKENS)) == text
    request = Instance(
        "generate_until", {}, (PROMPT, {"max_gen_toks": 12, "until": []}), 0
    )
    detokenized = lm.preprocessor.tokenizer.detokenize(expected)
    assert OpenLlamaLM(lm=lm).generate_until([request]) == [detokenized]

    lm.compile(sampler="beam")
    free = new_tokens(lm, stop_token_ids=None)
    lm.end_token_ids = [2, free[1]]
    found = new_tokens(lm)
    assert found == new_tokens(lm, stop_token_ids=[2, free[1]]) != free


def saved_as(kind, lm, path):
    """Saves and loads a model in a format."""
    if kind == "export_to_transformers":
        lm.export_to_transformers(path)
    elif kind == "save_to_preset":
        lm.save_to_preset(path)
    elif kind == ".keras":
        lm.save(f"{path}.keras")
        return keras.saving.load_model(f"{path}.keras")
    return OpenLlamaCausalLM.from_preset(path)


@pytest.mark.parametrize("kind", ["export_to_transformers", "save_to_preset", ".keras"])
@pytest.mark.parametrize("with_preprocessor", [True, False])
@pytest.mark.slow_on_tensorflow
def test_end_token_ids_are_saved(declare, tmp_path, kind, with_preprocessor):
    options = {} if with_preprocessor else {"preprocessor": None}
    lm = declare({"config.json": {"eos_token_id": [2, 77]}}, **options)
    path = tmp_path / "saved"
    if with_preprocessor or kind == ".keras":
        loaded = saved_as(kind, lm, path)
    else:
        (lm.export_to_transformers if kind.startswith("e") else lm.save_to_preset)(path)
        loaded = OpenLlamaCausalLM.from_preset(path, preprocessor=None)
    assert loaded.end_token_ids == [2, 77]
    if kind == "export_to_transformers":
        for name in ("config.json", "generation_config.json"):
            assert json.loads((path / name).read_text())["eos_token_id"] == [2, 77]


@pytest.mark.backend_free
def test_convert_preserves_end_tokens(declare, tmp_path):
    declare({"config.json": {"eos_token_id": [77, 2]}}, load_weights=False)
    source, weights = tmp_path / "declared", tmp_path / "weights.easylm"
    convert(source, tmp_path / "keras", "keras")
    convert(tmp_path / "keras", tmp_path / "again", "transformers")
    convert(source, weights, "easylm")
    convert(weights, tmp_path / "from_easylm", "transformers", preset=source)
    for name in ("keras", "again", "from_easylm"):
        lm = OpenLlamaCausalLM.from_preset(tmp_path / name, load_weights=False)
        assert lm.end_token_ids == [77, 2]
    assert easylm.load(weights, source).end_token_ids == [77, 2]


@pytest.mark.backend_free
def test_end_token_of_tokenizer_config_ends_texts_too(declare):
    lm = declare(
        {
            "config.json": {"eos_token_id": 2},
            "tokenizer_config.json": {"eos_token": {"content": "▁of"}},
        },
        load_weights=False,
    )
    piece = lm.preprocessor.tokenizer.token_to_id("▁of")
    assert lm.end_token_ids == [piece, 2]


@pytest.mark.backend_free
@pytest.mark.parametrize("value", ["77", [2, "77"], 2.5, True, {"id": 2}])
def test_from_preset_rejects_end_tokens_that_are_no_ids(declare, value):
    with pytest.raises(ValueError, match=r"config\.json sets eos_token_id=.*list of"):
        declare({"config.json": {"eos_token_id": value}}, load_weights=False)


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("value", "expected"), [([2, 512], [2]), (-1, [2]), ([-1, 77.0], [77])]
)
def test_from_preset_warns_of_end_tokens_outside_the_vocabulary(
    declare, value, expected
):
    with pytest.warns(UserWarning, match=r"cannot end at (512|-1)\. Correct the file"):
        lm = declare({"config.json": {"eos_token_id": value}}, load_weights=False)
    assert lm.end_token_ids == expected


@pytest.mark.backend_free
@pytest.mark.parametrize("value", [None, []])
def test_without_declared_end_tokens_that_of_the_tokenizer_applies(declare, value):
    lm = declare({"config.json": {"eos_token_id": value}}, load_weights=False)
    assert lm.end_token_ids == [2]


@pytest.mark.backend_free
def test_from_preset_warns_of_a_start_token_that_is_not_the_tokenizers(declare):
    with pytest.warns(UserWarning, match=r"bos_token_id=0.*'<s>' \(1\).*end_token_ids"):
        declare({"config.json": {"bos_token_id": 0}}, load_weights=False)


@pytest.mark.backend_free
def test_from_preset_takes_end_token_ids(export):
    lm = OpenLlamaCausalLM.from_preset(
        export, load_weights=False, end_token_ids=[5, np.int64(2), 5]
    )
    assert lm.end_token_ids == [5, 2]
    lm.end_token_ids = None
    assert lm.end_token_ids == [2]
    with pytest.raises(ValueError, match="`end_token_ids` must be from 0 to 511"):
        lm.end_token_ids = 512


@pytest.mark.backend_free
def test_fit_adds_the_end_token_of_its_texts(declare):
    lm = declare({"config.json": {"eos_token_id": 77}})
    lm.preprocessor.sequence_length = 16
    lm.fit(["some text"], verbose=0)
    assert lm.end_token_ids == [77, 2]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """Path of an exported model with two added tokens."""
    tokens = ["<|im_start|>", "<|im_end|>"]
    tokenizer = OpenLlamaTokenizer(trained_model(True), added_tokens=tokens)
    backbone = OpenLlamaBackbone(514, 1, 2, 16, 24, max_sequence_length=32)
    lm = OpenLlamaCausalLM(backbone, OpenLlamaCausalLMPreprocessor(tokenizer))
    path = tmp_path_factory.mktemp("chat") / "model"
    lm.export_to_transformers(path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        update_json(path / name, eos_token=None)
    return path


@pytest.mark.backend_free
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_exports_keep_an_added_token_as_the_end_token_of_the_tokenizer(
    chat_model, tmp_path, file
):
    source = shutil.copytree(chat_model, tmp_path / "source")
    update_json(source / file, eos_token="<|im_end|>")
    lm = OpenLlamaCausalLM.from_preset(source, load_weights=False)
    assert lm.end_token_ids == [513, 2]
    without = OpenLlamaCausalLM.from_preset(
        source, load_weights=False, preprocessor=None
    )
    assert without.end_token_ids == [513, 2]

    convert(source, tmp_path / "keras", "keras")
    convert(tmp_path / "keras", tmp_path / "again", "transformers")
    lm.export_to_transformers(tmp_path / "exported")
    for path in (tmp_path / "again", tmp_path / "exported"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 513)
        generation = transformers.GenerationConfig.from_pretrained(path)
        assert generation.eos_token_id == [513, 2]
