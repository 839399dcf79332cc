"""Streams of several prompts, and `generate` with a prompt cache."""

import numpy as np
import pytest

from keras_openllama import OpenLlamaCausalLM, SamplingConfig
from keras_openllama.generation.continuous_batching import token_loop
from keras_openllama.generation.continuous_batching.slot_decoder import (
    make_slot_decoder,
)
from keras_openllama.generation.prompt_cache import PromptCache

pytestmark = [
    pytest.mark.usefixtures("compile_fast"),
    pytest.mark.slow_on_tensorflow,
]
TEXTS = ["The sea was calm and the", "Once", "A small boat"]


@pytest.fixture(scope="module")
def lm():
    return OpenLlamaCausalLM.from_preset("open_llama_nano")


def joined(pieces, number):
    texts = [""] * number
    for index, piece in pieces:
        assert piece
        texts[index] += piece
    return texts


@pytest.mark.parametrize("stop", [None, " the"])
def test_stream_of_several_prompts_yields_the_texts_of_generate(lm, stop):
    options = {"max_new_tokens": 12, "stop": stop}
    found = joined(lm.stream(TEXTS, **options), len(TEXTS))
    assert found == lm.generate(TEXTS, strip_prompt=True, **options)


def test_stream_of_several_prompts_interleaves_them(lm):
    indices = [index for index, _ in lm.stream(TEXTS[1:], max_new_tokens=12)]
    first, second = ([i for i, x in enumerate(indices) if x == n] for n in (0, 1))
    assert first[0] < second[-1] and second[0] < first[-1]


def test_stream_of_several_prompts_ends_requests_at_stop_strings(lm, monkeypatch):
    engines, engine_class = [], token_loop.Engine

    def make_engine(*arguments, **options):
        engines.append(engine_class(*arguments, **options))
        return engines[-1]

    with monkeypatch.context() as patch:
        patch.setattr(token_loop, "Engine", make_engine)
        options = {"max_new_tokens": 200, "stop": [" the", ","]}
        found = joined(lm.stream(TEXTS[:1] * 2, **options), 2)
    assert found == lm.generate(TEXTS[:1] * 2, strip_prompt=True, **options)
    assert engines[0].stats.finished == {"cancelled": 2}
    assert engines[0].stats.generated_tokens < 50


def test_stream_of_several_prompts_samples_as_generate(lm):
    configs = [SamplingConfig(temperature=0.9, seed=seed) for seed in range(3)]
    options = {"max_new_tokens": 8, "sampling": configs}
    found = joined(lm.stream(TEXTS, **options), len(TEXTS))
    assert found == lm.generate(TEXTS, strip_prompt=True, **options)


def test_generate_with_cache_returns_the_same_texts(lm):
    cache = PromptCache(10**8)
    text = " ".join(TEXTS)
    first = lm.generate(text, max_new_tokens=8, cache=cache)
    assert first == lm.generate(text, max_new_tokens=8)
    assert (len(cache), cache.hits) == (1, 0)
    longer = first + " and"
    second = lm.generate(longer, max_new_tokens=8, cache=cache)
    assert second == lm.generate(longer, max_new_tokens=8)
    assert cache.hits == 1


def test_generate_with_cache_takes_all_options(lm):
    options = {
        "max_new_tokens": 5,
        "num_samples": 2,
        "logprobs": 2,
        "sampling": SamplingConfig(seed=1),
    }
    found = lm.generate(TEXTS[:1], cache=PromptCache(10**8), **options)
    expected = lm.generate(TEXTS[:1], **options)
    for new, old in zip(found[0], expected[0], strict=True):
        assert (new.text, new.token_ids) == (old.text, old.token_ids)
        np.testing.assert_allclose(new.logprobs, old.logprobs, atol=1e-4)
        assert [list(x) for x in new.top_logprobs] == [
            list(x) for x in old.top_logprobs
        ]


def test_generate_with_cache_reads_the_prompt_of_several_samples_once(lm, monkeypatch):
    fed = []
    decoder = make_slot_decoder(lm, 1, 64)
    prefill = type(decoder).prefill

    def record(self, slot, tokens, start):
        fed.append(len(tokens))
        return prefill(self, slot, tokens, start)

    monkeypatch.setattr(type(decoder), "prefill", record)
    text = " ".join(TEXTS * 2)
    options = {
        "max_new_tokens": 4,
        "num_samples": 3,
        "sampling": SamplingConfig(seed=1),
    }
    found = lm.generate(text, cache=PromptCache(10**8), **options)
    assert found == lm.generate(text, **options)
    assert sum(fed) == len(lm.preprocessor.prompt_ids([text])[0]) - 1


def test_generate_with_cache_takes_token_ids(lm):
    ids = np.array([[1, 357, 1239], [1, 357, 0]])
    inputs = {"token_ids": ids, "padding_mask": ids > 0}
    found = lm.generate(inputs, max_new_tokens=4, cache=PromptCache(10**8))
    expected = lm.generate(inputs, max_new_tokens=4)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_generate_with_cache_and_a_random_sampler_raises(lm):
    lm.compile(sampler="top_p")
    try:
        with pytest.raises(ValueError, match="greedy decoding"):
            lm.generate("The", max_new_tokens=2, cache=PromptCache(10**8))
    finally:
        lm.compile(sampler="greedy")
