"""Generation with a KV cache of 8 bits."""

import keras
import keras_hub
import numpy as np
import pytest
import tiny_models
from keras import ops
from tensorflow_marks import first_on_tensorflow

from keras_openllama.generation.continuous_batching.slot_decoder import (
    make_slot_decoder,
)
from keras_openllama.generation.kv_cache import init_cache
from keras_openllama.generation.prompt_cache import PromptCache
from keras_openllama.layers import quantized_cache
from keras_openllama.layers.quantized_cache import quantize_heads

NEW = 12


def round_trip(x):
    integers, scales = quantize_heads(x)
    return ops.cast(ops.cast(integers, "float32") / 128 * scales[..., None], x.dtype)


@pytest.fixture
def rounded_float_cache(monkeypatch):
    """Float caches are written with values that were rounded to 8 bits."""
    as_stored = quantized_cache.as_stored

    def as_stored_rounded(cache, key, value):
        if len(cache) == 2:
            return round_trip(key), round_trip(value)
        return as_stored(cache, key, value)

    modules = [quantized_cache]
    if keras.config.backend() == "torch":
        from keras_openllama.generation.pytorch import cpu_layer as torch_cpu_layer
        from keras_openllama.generation.pytorch import network as torch_network

        modules += [torch_cpu_layer, torch_network]
    for module in modules:
        monkeypatch.setattr(module, "as_stored", as_stored_rounded)


def generate(lm, lengths=(3, 12, 1, 7), sampler="greedy", dtype=None):
    lm.compile(sampler=sampler, kv_cache_dtype=dtype)
    ids = tiny_models.batch(tiny_models.SHAPES[0], len(lengths), max(lengths))
    mask = tiny_models.right_padding(lengths, max(lengths))
    outputs = lm.generate(
        {"token_ids": ids, "padding_mask": mask}, max_new_tokens=NEW, stop_token_ids=[5]
    )
    return outputs["token_ids"].tolist()


@first_on_tensorflow("shape", tiny_models.SHAPES[2:], ids=str)
def test_generate_with_int8_cache_equals_rounded_keys_and_values(
    shape, rounded_float_cache
):
    lm = tiny_models.random_lm(shape)
    assert generate(lm, dtype="int8") == generate(lm)


@pytest.mark.slow_on_tensorflow
def test_generate_with_int8_cache_after_a_prompt_of_several_chunks(
    rounded_float_cache,
):
    lm = tiny_models.random_lm(tiny_models.SHAPES[1])
    lengths = (300, 17)
    assert generate(lm, lengths, dtype="int8") == generate(lm, lengths)


@pytest.mark.parametrize(
    "make_sampler",
    [
        lambda: keras_hub.samplers.BeamSampler(num_beams=3),
        pytest.param(
            lambda: keras_hub.samplers.ContrastiveSampler(k=3), marks=pytest.mark.slow
        ),
    ],
    ids=["beam", "contrastive"],
)
@pytest.mark.slow_on_tensorflow
def test_search_with_int8_cache_equals_rounded_keys_and_values(
    make_sampler, rounded_float_cache
):
    lm = tiny_models.random_lm(tiny_models.SHAPES[2])
    found = generate(lm, (9,), make_sampler(), "int8")
    assert found == generate(lm, (9,), make_sampler())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_init_cache_of_int8_takes_a_byte_per_element_and_four_per_head(dtype):
    lm = tiny_models.random_lm(tiny_models.SHAPES[2], dtype=dtype)
    cache = init_cache(lm.backbone, 3, 16, "int8")
    assert len(cache) == 2
    for layer in cache:
        assert [tuple(x.shape) for x in layer] == [(6, 16, 16)] * 2 + [(6, 16)] * 2
        dtypes = [keras.backend.standardize_dtype(x.dtype) for x in layer]
        assert dtypes == ["int8", "int8", "float32", "float32"]


def test_token_loop_keeps_the_cache_in_int8():
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    lm.compile(kv_cache_dtype="int8")
    loop = lm.make_generate_function()
    state, prompt_layout = loop.start([[1, 5, 6], [1, 9]], [4, 4])
    stop_ids = loop._padded_stop_ids([])
    state = loop.advance(
        state=state, prompt_layout=prompt_layout, stop_ids=stop_ids, until=np.int32(4)
    )
    cache = state.cache
    if keras.config.backend() == "torch":
        cache = cache.decoder.cache
    for key, value, *scales in cache:
        for integers in map(ops.convert_to_numpy, (key, value)):
            assert integers.dtype == "int8" and np.abs(integers).max() == 127
        assert all(ops.convert_to_numpy(x).max() > 0 for x in scales)


@pytest.mark.parametrize("dtype", ["int4", "float32", 8, "bfloat16"])
def test_compile_names_an_unknown_kv_cache_dtype(dtype):
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    with pytest.raises(ValueError, match=f"kv_cache_dtype={dtype!r}"):
        lm.compile(kv_cache_dtype=dtype)


def test_engine_refuses_an_int8_cache():
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    lm.compile(kv_cache_dtype="int8")
    with pytest.raises(ValueError, match="Compile the model without `kv_cache_dtype`"):
        make_slot_decoder(lm, num_slots=1, context=16)


@pytest.mark.parametrize("name", ["draft", "cache"])
def test_generate_with_an_int8_cache_names_the_argument_that_it_excludes(name):
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    lm.compile(kv_cache_dtype="int8")
    value = {"draft": "prompt_lookup", "cache": PromptCache(1)}[name]
    inputs = {"token_ids": [[5]], "padding_mask": [[1]]}
    message = f"`{name}` needs .* kv_cache_dtype='int8'"
    with pytest.raises(ValueError, match=message):
        lm.generate(inputs, max_new_tokens=2, **{name: value})


def test_get_compile_config_contains_kv_cache_dtype():
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    lm.compile(kv_cache_dtype="int8")
    config = lm.get_compile_config()
    lm.compile()
    assert lm.kv_cache_dtype is None
    lm.compile_from_config(config)
    assert lm.kv_cache_dtype == "int8"
    del config["kv_cache_dtype"]  # Of earlier versions.
    lm.compile_from_config(config)
    assert lm.kv_cache_dtype is None
