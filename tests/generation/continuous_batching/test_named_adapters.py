"""Requests with different adapters get what the model with these adapters generates."""

import keras
import numpy as np
import pytest
import tiny_models

from keras_openllama import SamplingConfig
from keras_openllama.generation.continuous_batching.engine import (
    Engine,
    EngineRequest,
)
from keras_openllama.generation.continuous_batching.named_adapters import NamedAdapters
from keras_openllama.layers.lora import adapted_layers
from keras_openllama.layers.projection import Projection

pytestmark = pytest.mark.usefixtures("compile_fast")
GREEDY = SamplingConfig(temperature=0)
WIDE = (5, ["query", "output", "gate", "up", "down"], 7)
# Ranks, scales and layers differ, or are the same.
SETTINGS = {"narrow": (2, ["query", "value"], 8), "wide": WIDE, "other": WIDE}


def make_lm(shape_name="grouped_heads"):
    (shape,) = [s for s in tiny_models.SHAPES if s.name == shape_name]
    return tiny_models.random_lm(shape)


def add_random_adapters(lm, name):
    lm.backbone.enable_lora(*SETTINGS[name])
    random = np.random.default_rng(len(name))
    for weight in lm.trainable_variables:
        weight.assign(0.3 * random.standard_normal(weight.shape))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Adapters with random weights, in PEFT's format."""
    paths = {}
    for name in SETTINGS:
        lm = make_lm()
        add_random_adapters(lm, name)
        paths[name] = tmp_path_factory.mktemp("adapters") / name
        lm.save_adapters(paths[name])
    return paths


@pytest.fixture(scope="module")
def prompts():
    """The last one needs a program of another shape."""
    random = np.random.default_rng(0)
    return [random.integers(3, 199, length).tolist() for length in (20, 20, 50)]


@pytest.fixture(scope="module")
def expected(directories, prompts):
    """What `generate` returns for each prompt, by the name of the adapters."""
    found = {}
    for name in (None, *SETTINGS):
        lm = make_lm()
        if name:
            lm.load_adapters(directories[name])
        found[name] = []
        for prompt in prompts:
            inputs = {"token_ids": [prompt], "padding_mask": np.ones((1, len(prompt)))}
            outputs = lm.generate(
                inputs, max_new_tokens=6, stop_token_ids=None, strip_prompt=True
            )
            found[name].append(outputs["token_ids"][0, :6].tolist())
    return found


@pytest.fixture
def adapters(directories):
    made = NamedAdapters(make_lm())
    for name, path in directories.items():
        made.load(name, path)
    return made


def engine_with(adapters, **options):
    return Engine(adapters.model, context=64, adapters=adapters, **options)


def tokens(engine, prompt, name):
    events = engine.stream(EngineRequest(prompt, 6, GREEDY, adapter=name))
    return [event.token_id for event in events]


@pytest.mark.slow_on_tensorflow
def test_engine_gives_concurrent_requests_the_tokens_of_their_adapters(
    adapters, prompts, expected
):
    names = ["wide", None, "narrow", "other", None, "wide", None, "wide", "narrow"]
    with engine_with(adapters, num_slots=2) as engine:
        requests = [
            EngineRequest(prompts[i // 3], 6, GREEDY, adapter=name)
            for i, name in enumerate(names)
        ]
        streams = [engine.stream(request) for request in requests]
        found = [[event.token_id for event in events] for events in streams]
    assert found == [expected[name][i // 3] for i, name in enumerate(names)]
    firsts = {tuple(texts[0]) for texts in expected.values()}
    assert len(firsts) == 4  # The adapters matter.
    assert adapters.active is None


@pytest.mark.slow_on_tensorflow
def test_engine_reuses_prompts_of_the_same_adapters_only(adapters, prompts, expected):
    prompt = prompts[0]
    with engine_with(adapters, num_slots=1) as engine:
        for name in (None, "wide", "narrow", "wide"):
            assert tokens(engine, prompt, name) == expected[name][0]
    assert engine.stats.cached_tokens == len(prompt) - 1  # Of the last request.


@pytest.mark.slow_on_tensorflow
def test_engine_exchanges_adapters_of_the_same_rank_and_layers(
    adapters, prompts, expected
):
    with engine_with(adapters, num_slots=1, prompt_cache_bytes=0) as engine:
        for name, index in [("wide", 0), ("other", 2), ("wide", 2), ("other", 0)]:
            assert tokens(engine, prompts[index], name) == expected[name][index]


def test_engine_refuses_unknown_adapters(adapters, prompts):
    request = EngineRequest(prompts[0], 6, GREEDY, adapter="new")
    message = r"narrow, wide, other\. Received: adapter='new'"
    with pytest.raises(ValueError, match=message):
        engine_with(adapters, num_slots=1).submit(request, print)
    engine = Engine(adapters.model, num_slots=1, context=64)
    with pytest.raises(ValueError, match="needs an engine with `adapters`"):
        engine.submit(request, print)


def test_engine_refuses_adapters_of_another_model(adapters):
    with pytest.raises(ValueError, match="must be those of `model`"):
        Engine(make_lm(), num_slots=1, context=64, adapters=adapters)


def test_engine_refuses_adapters_by_name_with_onnx_runtime(directories):
    lm = make_lm()
    lm.quantize("int8")
    adapters = NamedAdapters(lm)
    adapters.load("wide", directories["wide"])
    with pytest.raises(ValueError, match="ONNX Runtime"):
        engine_with(adapters, num_slots=1)


def test_named_adapters_refuse_a_model_that_has_adapters():
    lm = make_lm()
    lm.backbone.enable_lora(2)
    with pytest.raises(ValueError, match="has none yet"):
        NamedAdapters(lm)


def test_named_adapters_refuse_a_name_that_is_in_use(adapters, directories):
    with pytest.raises(ValueError, match="`name` must be unique"):
        adapters.load("wide", directories["narrow"])


def test_named_adapters_complete_a_change_after_one_that_failed(adapters, monkeypatch):
    layers = adapted_layers(adapters.model.backbone)
    adapters.use("wide")
    complete = len(adapted_layers(adapters.model.backbone))
    adapters.use("narrow")
    with monkeypatch.context() as patch:
        patch.setattr(Projection, "restore_adapters", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adapters.use("wide")
    for name in ("narrow", "wide"):
        adapters.use(name)
    assert len(adapted_layers(adapters.model.backbone)) == complete > len(layers) == 0


def test_named_adapters_leave_none_in_the_model_if_files_cannot_be_read(
    directories, monkeypatch
):
    made = NamedAdapters(make_lm())
    monkeypatch.setattr(keras.Variable, "assign", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.load("wide", directories["wide"])
    assert not adapted_layers(made.model.backbone)
