"""The embedded model is small, complete and predicts plain English."""

import json
import re

import keras
import pytest
from checkout import ROOT

from keras_openllama import OpenLlamaCausalLM, OpenLlamaTokenizer
from keras_openllama.evaluation import perplexity

PRESETS = ROOT / "presets"
DIRECTORY = PRESETS / "open_llama_nano"
MEGABYTE = 1_000_000

# Written for this test, so that no corpus contains it.
PLAIN_ENGLISH = """\
The old man rose early, as he had done every day for many years, and went down to the \
shore to see what the night had left there. The wind had turned in the dark, and the \
water lay so still that the boats seemed to stand upon the sky. He walked slowly, with \
his hands behind his back, and thought of his sons, who had gone to the city and who \
wrote to him at Easter and at Christmas, and sometimes in the summer, when the letters \
were short and the weather was the chief matter in them.
"You are late," said the woman who sold bread at the corner of the street. She said \
it every morning, whether he was late or not, and he gave her the same answer that he \
had always given, that bread was never better for being bought in a hurry. Then she \
laughed, and he took his loaf under his arm, and they talked a little of the price of \
fish and of the new teacher, whom nobody had seen yet, but of whom everybody had heard \
something.
At noon there was a great noise in front of the church. A carriage had come over the \
hill, with two horses before it and a young man upon the box, and it had stopped in \
the very middle of the place, where no carriage had ever stopped before. The children \
ran up to look at the horses. The young man asked them where the school was, and they \
pointed in four directions at once, for it was a small town, and the school had been \
moved three times since the last war.
In the evening the people of the town came together in the large room of the inn, and \
it was decided that the teacher should have the house by the river, which had been \
empty since the spring, and that every family should give what it could: one a table, \
another a bed, and the third a little money, if there was any to be had.
"""

COMMON_WORDS = set(
    """
    a about after again against all also always am among an and any are as at be
    because been before being between both but by came can come could day did do
    does down each even ever every eyes few first for from gave give go god good
    great had hand has have he heart her here him himself his house how i if in into
    is it its just king know land let life like little long lord made make man many
    may me men might more most much must my nation never new no nor not nothing now
    o of off old on one only or other our out over own people place put said same
    saw say see sea shall she ship should so some son such than that the their them
    then there these they thing things think this those thou though through time to
    too two under up upon us very was way we well went were what when where which
    while who whole whom whose will with without woman word work world would years
    yet you young your
    """.split()
)


@pytest.fixture(scope="module")
def lm():
    return OpenLlamaCausalLM.from_preset("open_llama_nano")


@pytest.fixture(scope="module")
def tokenizer():
    return OpenLlamaTokenizer.from_preset("open_llama_nano")


@pytest.fixture(scope="module")
def preset():
    return json.loads((PRESETS / "open_llama_nano.json").read_text())


def test_nano_parameters_match_the_preset(lm, preset):
    assert lm.count_params() == preset["parameters"]
    assert 4_000_000 <= lm.count_params() <= 7_000_000


@pytest.mark.backend_free  # `test_causal_lm.py` tests int8 on other backends.
def test_nano_in_int8_is_a_quarter_of_the_size_with_equal_perplexity():
    lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
    text = PLAIN_ENGLISH[:800]

    def measure():
        weights = [keras.ops.convert_to_numpy(weight) for weight in lm.weights]
        size = sum(weight.nbytes for weight in weights)
        return perplexity.evaluate_perplexity(lm, {"text": text})[0]["nats"], size

    nats, size = measure()
    lm.quantize("int8")
    quantized_nats, quantized_size = measure()
    assert quantized_nats <= 1.02 * nats
    assert quantized_size <= 0.30 * size
    words = re.findall("[a-z]+", lm.generate("The captain", max_new_tokens=40).lower())
    assert sum(word in COMMON_WORDS for word in words) > len(words) / 3


@pytest.mark.backend_free
def test_nano_files_are_small():
    assert (DIRECTORY / "model.safetensors").stat().st_size <= 16 * MEGABYTE
    assert sum(file.stat().st_size for file in DIRECTORY.iterdir()) <= 17 * MEGABYTE


@pytest.mark.backend_free
def test_nano_preset_matches_its_config(preset):
    config = json.loads((DIRECTORY / "config.json").read_text())
    architecture = preset["architecture"]
    assert config["vocab_size"] == architecture["vocabulary_size"]
    assert config["num_hidden_layers"] == architecture["num_layers"]
    assert config["num_attention_heads"] == architecture["num_query_heads"]
    assert config["num_key_value_heads"] == architecture["num_key_value_heads"]
    assert config["head_dim"] == architecture["head_dim"]
    assert config["hidden_size"] == architecture["hidden_dim"]
    assert config["intermediate_size"] == architecture["intermediate_dim"]
    assert config["rope_theta"] == architecture["rope_max_wavelength"]
    assert config["rms_norm_eps"] == architecture["layer_norm_epsilon"]
    assert config["max_position_embeddings"] == architecture["max_sequence_length"]


@pytest.mark.backend_free
def test_nano_preset_reports_each_source_below_xz(preset):
    results = preset["provenance"]["held_out"]["results"]
    sources = {source["name"] for source in preset["provenance"]["sources"]}
    assert set(results) == sources
    for row in results.values():
        assert row["bytes"] >= 20_000
        assert row["bits_per_byte"] < row["xz_bits_per_byte"]
    mean = sum(row["bits_per_byte"] for row in results.values()) / len(results)
    assert mean == pytest.approx(
        preset["provenance"]["held_out"]["mean_bits_per_byte"], abs=1e-3
    )


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "  two spaces  before, between and after  ",
        "lines\nand\n\nparagraphs\n",
        "tabs\tand\r\nreturns",
        "emoji 🙂🏳️‍🌈, 漢字, ünïcödé",
        "def f(x):\n    return x  # 100 % of 2026\n",
    ],
)
def test_nano_tokenizer_round_trips_text(tokenizer, text):
    assert tokenizer.detokenize(tokenizer(text)) == text


@pytest.mark.backend_free
def test_nano_tokenizer_has_the_control_tokens_of_llama(tokenizer):
    ids = [tokenizer.token_to_id(piece) for piece in ("<unk>", "<s>", "</s>")]
    assert ids == [0, 1, 2]
    assert tokenizer.keeps_spaces


def test_nano_compresses_unseen_english_better_than_xz(lm):
    [row] = perplexity.evaluate_perplexity(lm, {"text": PLAIN_ENGLISH})
    assert row["bytes"] >= 1500
    # xz compresses short texts poorly, so there is an absolute limit, too.
    assert row["bits_per_byte"] < row["xz_bits_per_byte"]
    assert row["bits_per_byte"] < 2.2


@pytest.mark.slow_on_tensorflow
def test_nano_generates_common_words(lm):
    text = lm.generate(
        "It was a fine morning, and the old man",
        max_new_tokens=48,
        stop_token_ids=None,
        strip_prompt=True,
    )
    words = re.findall(r"[a-z]+", text.lower())
    assert len(words) >= 20
    common = sum(word in COMMON_WORDS for word in words)
    assert common / len(words) >= 0.5
    # No endless repetition of a phrase.
    assert len(set(words)) >= 8
