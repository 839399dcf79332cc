"""Saving and loading of the preprocessor and its tokenizer."""

import copy
import json
import pickle

import keras
import numpy as np
import pytest

from keras_openllama.backend.keras_hub import CausalLMPreprocessor, Tokenizer
from keras_openllama.models.backbone import OpenLlamaBackbone
from keras_openllama.models.causal_lm_preprocessor import OpenLlamaCausalLMPreprocessor
from keras_openllama.models.tokenizer import OpenLlamaTokenizer
from tests.support.tokenizer_models import trained_model

TOKENIZER = OpenLlamaTokenizer(trained_model(keep_spaces=True))
TEXT = "some text"
IDS = TOKENIZER(TEXT)
backend_free = pytest.mark.backend_free


def make(tokenizer=TOKENIZER, sequence_length=12, **options):
    return OpenLlamaCausalLMPreprocessor(tokenizer, sequence_length, **options)


@backend_free
def test_preprocessor_config_round_trips_through_json():
    preprocessor = make(add_start_token=False, add_end_token=False, name="mine")
    config = json.loads(json.dumps(keras.layers.serialize(preprocessor)))
    copy = keras.layers.deserialize(config)
    assert copy.get_config() == preprocessor.get_config()
    assert copy.sequence_length == 12 and copy.name == "mine"
    keras.tree.map_structure(
        np.testing.assert_array_equal, copy([TEXT]), preprocessor([TEXT])
    )


@keras.saving.register_keras_serializable(package="keras_openllama_tests")
class ModelWithPreprocessor(keras.Model):
    """A model that has a preprocessor, like the task."""

    def __init__(self, preprocessor, **kwargs):
        super().__init__(**kwargs)
        self.preprocessor = preprocessor
        self.dense = keras.layers.Dense(1)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs):
        return self.dense(inputs)

    def get_config(self):
        preprocessor = keras.layers.serialize(self.preprocessor)
        return {**super().get_config(), "preprocessor": preprocessor}

    @classmethod
    def from_config(cls, config):
        config["preprocessor"] = keras.layers.deserialize(config["preprocessor"])
        return cls(**config)


def test_keras_file_contains_the_tokenizer(tmp_path):
    tokenizer = OpenLlamaTokenizer(TOKENIZER.proto, add_bos=True)
    model = ModelWithPreprocessor(make(tokenizer, add_end_token=False))
    model(np.ones((1, 2), "float32"))
    model.save(tmp_path / "model.keras")
    copy = keras.models.load_model(tmp_path / "model.keras").preprocessor
    assert copy.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert copy.tokenizer.add_bos and not copy.add_end_token
    assert copy(TEXT)[1].tolist() == model.preprocessor(TEXT)[1].tolist()


@pytest.fixture(scope="module")
def kerashub_directory(tmp_path_factory):
    """The files that `save_to_preset` of a task writes, without its weights."""
    directory = tmp_path_factory.mktemp("kerashub")
    OpenLlamaBackbone(
        vocabulary_size=TOKENIZER.vocabulary_size(),
        num_layers=1,
        num_query_heads=1,
        hidden_dim=8,
        intermediate_dim=8,
        num_key_value_heads=1,
    ).save_to_preset(directory)
    tokenizer = OpenLlamaTokenizer(TOKENIZER.proto, add_bos=True)
    make(tokenizer, add_start_token=False).save_to_preset(str(directory))
    return str(directory)


@backend_free
@pytest.mark.parametrize("cls", [OpenLlamaTokenizer, Tokenizer])
def test_tokenizer_from_preset_loads_a_keras_hub_directory(kerashub_directory, cls):
    copy = cls.from_preset(kerashub_directory)
    assert type(copy) is OpenLlamaTokenizer
    assert copy.add_bos and copy(TEXT) == [1, *IDS]
    assert copy.fingerprint == TOKENIZER.fingerprint
    assert cls.from_preset(kerashub_directory, add_bos=False)(TEXT) == IDS


@backend_free
@pytest.mark.parametrize("cls", [OpenLlamaCausalLMPreprocessor, CausalLMPreprocessor])
def test_preprocessor_from_preset_loads_a_keras_hub_directory(kerashub_directory, cls):
    copy = cls.from_preset(kerashub_directory)
    assert type(copy) is OpenLlamaCausalLMPreprocessor
    assert copy.sequence_length == 12 and not copy.add_start_token
    assert copy.tokenizer.add_bos
    assert copy(TEXT)[0]["token_ids"].tolist() == [*IDS, 2, *[0] * (11 - len(IDS))]
    assert cls.from_preset(kerashub_directory, sequence_length=5).sequence_length == 5


@backend_free
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_preprocessor_can_be_deepcopied_and_pickled(copied):
    preprocessor = make(OpenLlamaTokenizer(TOKENIZER.proto, add_bos=True))
    assert copied(preprocessor).tokenizer(TEXT) == [1, *IDS]
    assert copied(preprocessor).sequence_length == 12


@backend_free
def test_from_preset_loads_tokenizer_and_preprocessor_by_name():
    tokenizer = OpenLlamaTokenizer.from_preset("open_llama_nano", add_eos=True)
    assert tokenizer.keeps_spaces and tokenizer(TEXT)[-1] == 2
    preprocessor = OpenLlamaCausalLMPreprocessor.from_preset(
        "open_llama_nano", sequence_length=5
    )
    assert preprocessor.prompt_ids([TEXT]) == [[1, *tokenizer(TEXT)[:-1]]]
    assert preprocessor.sequence_length == 5
