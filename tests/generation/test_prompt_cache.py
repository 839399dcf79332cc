"""Saved prefixes of prompts: budget, order of removal, and equal tokens."""

import numpy as np
import pytest
import tiny_models

from keras_openllama import SamplingConfig
from keras_openllama.generation.continuous_batching.engine import Engine, EngineRequest
from keras_openllama.generation.prompt_cache import PromptCache

pytestmark = pytest.mark.usefixtures("compile_fast")
GREEDY = SamplingConfig(temperature=0)
FLOAT32 = pytest.param("float32", marks=pytest.mark.slow_on_tensorflow)


def arrays(length):
    """400 bytes for each token."""
    return [
        (np.zeros((2, length, 25), "float32"), np.zeros((2, length, 25), "float32"))
    ]


def test_prompt_cache_finds_the_longest_common_beginning():
    cache = PromptCache(10**6)
    first, second = arrays(3), arrays(4)
    cache.add([1, 2, 3], first)
    cache.add([1, 2, 4, 5], second)
    assert cache.find([1, 2, 4, 9]) == (second, 3)
    assert cache.find([1, 2, 3, 9, 9]) == (first, 3)
    assert cache.find([7, 2]) == (None, 0)
    assert (cache.hits, cache.misses) == (2, 1)


def test_prompt_cache_stays_within_its_budget():
    cache = PromptCache(max_bytes=400 * 10)
    for start in range(5):
        cache.add([start, 1, 1, 1], arrays(4))
        assert cache.nbytes == 1600 * len(cache) <= cache.max_bytes
    assert len(cache) == 2
    cache.add([9] * 11, arrays(11))  # Too large.
    assert len(cache) == 2


def test_prompt_cache_removes_the_least_recently_used_sequence():
    cache = PromptCache(max_bytes=400 * 8)
    cache.add([1, 1, 1, 1], arrays(4))
    cache.add([2, 2, 2, 2], arrays(4))
    cache.find([1, 1])
    cache.add([3, 3, 3, 3], arrays(4))
    assert cache.find([1, 1])[1] == 2
    assert cache.find([2, 2])[1] == 0


def test_prompt_cache_replaces_the_beginning_of_a_sequence():
    cache = PromptCache(max_bytes=10**6)
    cache.add([1, 2], arrays(2))
    cache.add([1, 2, 3], arrays(3))
    assert (len(cache), cache.nbytes) == (1, 1200)
    assert cache.contains([1, 2])
    assert not cache.contains([1, 3])


@pytest.mark.slow_on_tensorflow
def test_prompt_cache_separates_lengths_of_dynamic_rope_scaling():
    cache = PromptCache(max_bytes=10**6)
    cache.add([1, 2], arrays(2), variant=512)
    assert cache.find([1, 2], variant=600) == (None, 0)
    assert cache.find([1, 2], variant=512)[1] == 2


@pytest.fixture(scope="module", params=[FLOAT32, "int4"])
def lm(request):
    (shape,) = [s for s in tiny_models.SHAPES if s.name == "grouped_head_dim_100"]
    lm = tiny_models.random_lm(shape)
    if request.param != "float32":
        lm.quantize(request.param)
    return lm


def complete(engine, prompt, new=5):
    """Returns the new tokens and the handle of a request."""
    ids = []
    handle = engine.submit(
        EngineRequest(prompt, new, GREEDY), lambda event: ids.append(event.token_id)
    )
    assert handle.finished.wait(100)
    return ids, handle


def test_engine_with_prompt_cache_gives_the_same_tokens(lm):
    """A chat's second turn, and a prompt that departs in the middle of the first."""
    random = np.random.default_rng(0)
    chat, turn, other = (random.integers(3, 190, n).tolist() for n in (290, 9, 40))
    with Engine(lm, num_slots=2, context=400, prompt_cache_bytes=0) as engine:
        reply, _ = complete(engine, chat)
        prompts = [chat + reply + turn, chat[:270] + other, chat[:20] + other, chat]
        expected = [complete(engine, prompt)[0] for prompt in prompts]
        assert engine.stats.cached_tokens == 0
    with Engine(lm, num_slots=2, context=400) as engine:
        assert complete(engine, chat)[0] == reply
        found = [complete(engine, prompt) for prompt in prompts]
        total = engine.stats.cached_tokens
    assert [ids for ids, _ in found] == expected
    # The last token of a reply was never fed; the last one of a prompt always is.
    cached = [handle.cached_tokens for _, handle in found]
    assert cached == [294, 270, 20, 289]
    assert total == sum(cached)


@pytest.mark.slow_on_tensorflow
def test_engine_copies_the_prefix_of_a_running_request(lm):
    prompt = np.random.default_rng(1).integers(3, 190, 40).tolist()
    with Engine(lm, num_slots=2, context=400) as engine:
        expected, _ = complete(engine, prompt)
    with Engine(lm, num_slots=2, context=400) as engine:
        running = engine.stream(EngineRequest(prompt, 300, GREEDY))
        next(running)
        ids, handle = complete(engine, prompt)
        running.close()
    assert (ids, handle.cached_tokens) == (expected, 39)


def test_prompt_cache_of_another_model_raises(lm):
    cache = PromptCache(10**6)
    cache.use_with(lm)
    with pytest.raises(ValueError, match="another model"):
        cache.use_with(tiny_models.random_lm(tiny_models.SHAPES[0]))


@pytest.mark.slow_on_tensorflow
def test_prompt_cache_is_emptied_when_weights_change():
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    cache = PromptCache(10**6)
    cache.use_with(lm)
    cache.add([1, 2], arrays(2))
    cache.use_with(lm)
    assert len(cache) == 1
    lm.weights[-1].assign(lm.weights[-1] + 1)
    cache.use_with(lm)
    assert len(cache) == cache.nbytes == 0


def test_prompt_cache_keeps_what_the_first_call_of_a_quantized_model_read():
    lm = tiny_models.random_lm(tiny_models.SHAPES[1])
    lm.quantize("int8")
    cache, ids = PromptCache(10**6), np.arange(3, 53)[None]
    prompt = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    for _ in range(2):
        lm.generate(prompt, max_new_tokens=2, stop_token_ids=None, cache=cache)
    assert cache.hits == 1
