"""The arguments of `quantize` are resolved to one configuration."""

import keras
import pytest

from keras_openllama.quantization import WeightQuantizationConfig
from keras_openllama.quantization.policies import MatrixFormat
from keras_openllama.quantization.settings import resolve_config

pytestmark = pytest.mark.backend_free
ROLES = ("projection", "embedding", "head")


def formats(config):
    return [config.format_for(role) for role in ROLES]


def test_weight_quantization_config_gives_embedding_and_head_8_bits_by_default():
    int8 = MatrixFormat(8, None)
    assert formats(WeightQuantizationConfig(8)) == [int8] * 3
    assert formats(WeightQuantizationConfig(4)) == [MatrixFormat(4, 32), int8, int8]


def test_weight_quantization_config_chooses_groups_and_bits():
    config = WeightQuantizationConfig(
        4, group_size=64, symmetric=False, embedding_bits=None, head_bits=4
    )
    zeros = MatrixFormat(4, 64, symmetric=False)
    assert formats(config) == [zeros, None, zeros]
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(config)
    )
    assert copy.get_config() == config.get_config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "`bits` must be one of .* Received: bits=5"),
        ({"group_size": "all"}, "`group_size` must be a positive integer, 'auto' or N"),
        ({"group_size": -1}, "`group_size` must be a positive integer"),
        ({"head_bits": 16}, "`head_bits` must be one of .* Received: head_bits=16"),
        ({"bits": 8, "symmetric": False}, "8 bits have no zero points"),
    ],
)
def test_weight_quantization_config_rejects_other_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightQuantizationConfig(**arguments)


def test_resolve_config_accepts_modes_and_configurations_of_keras():
    assert resolve_config("int8").bits == resolve_config(None, "int8").bits == 8
    by_block = keras.quantizers.Int4QuantizationConfig(block_size=64)
    assert resolve_config(None, by_block).group_size == 64
    by_channel = keras.quantizers.Int4QuantizationConfig(block_size=-1)
    assert resolve_config("int4", by_channel).group_size is None
    weights = keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
    assert resolve_config("int8", weights).bits == 8
    config = WeightQuantizationConfig()
    assert resolve_config(None, config) is config


def test_resolve_config_for_one_layer_gives_it_the_bits_of_the_mode():
    config = resolve_config("int4", whole_model=False)
    assert formats(config) == [MatrixFormat(4, 32)] * 3


def test_resolve_config_leaves_other_modes_and_contradictions_to_keras():
    assert resolve_config("float8") is None
    config = keras.quantizers.Int4QuantizationConfig()
    assert resolve_config("int8", config) is config
    assert resolve_config(None, None) is None


def test_resolve_config_rejects_quantizers_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"Int8QuantizationConfig\(activation_quantizer"
    ):
        resolve_config(None, keras.quantizers.Int8QuantizationConfig())
    config = keras.quantizers.Int8QuantizationConfig(
        keras.quantizers.AbsMaxQuantizer(0), activation_quantizer=None
    )
    with pytest.raises(ValueError, match="WeightQuantizationConfig` to choose groups"):
        resolve_config(None, config)
