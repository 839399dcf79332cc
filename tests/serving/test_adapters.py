"""Requests choose adapters by the name of their model."""

import threading

import numpy as np
import openai
import pytest
from running_server import running_server

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.generation.continuous_batching.named_adapters import NamedAdapters

pytestmark = pytest.mark.backend_free
SETTINGS = {"law": (2, ["query"]), "poems": (6, ["up", "down"])}


def make_lm(directory=None):
    lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
    if directory:
        lm.load_adapters(directory)
    return lm


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    paths = {}
    for name, settings in SETTINGS.items():
        lm = make_lm()
        lm.backbone.enable_lora(*settings)
        random = np.random.default_rng(len(name))
        for weight in lm.trainable_variables:
            weight.assign(0.2 * random.standard_normal(weight.shape))
        paths[name] = tmp_path_factory.mktemp("adapters") / name
        lm.save_adapters(paths[name])
    return paths


@pytest.fixture(scope="module")
def client(directories):
    lm = make_lm()
    adapters = NamedAdapters(lm)
    for name, path in directories.items():
        adapters.load(name, path)
    with running_server(lm, adapters=adapters, num_slots=2) as server:
        with openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as made:
            yield made


def test_models_lists_the_model_alone_and_with_each_adapter(client):
    names = ["nano", "nano+law", "nano+poems"]
    assert [model.id for model in client.models.list().data] == names
    assert client.models.retrieve("nano+law").id == "nano+law"


def test_concurrent_requests_have_the_text_of_their_adapters(client, directories):
    found = {}

    def complete(name, number):
        completion = client.completions.create(
            model=name, prompt="The sea", temperature=0, max_tokens=8
        )
        assert completion.model == name
        found[name, number] = completion.choices[0].text

    names = ["nano", "nano+law", "nano+poems"]
    threads = [
        threading.Thread(target=complete, args=(name, number))
        for number in range(3)
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    paths = {"nano": None} | {f"nano+{name}": p for name, p in directories.items()}
    expected = {
        name: make_lm(path).generate("The sea", max_new_tokens=8, strip_prompt=True)
        for name, path in paths.items()
    }
    assert len(set(expected.values())) == 3
    assert found == {(name, n): expected[name] for name in names for n in range(3)}


def test_unknown_adapters_are_not_found_and_the_error_lists_the_names(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nano+prose", prompt="The sea")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    assert "Choose one of: nano, nano+law, nano+poems" in str(caught.value)
